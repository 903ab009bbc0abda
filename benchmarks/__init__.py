"""Private training steps beside the non-private step: time, memory, growth. Run ``python -m benchmarks --help``."""
