"""Tests mirror the three packages: ``tests/gsm/test_clipping.py`` tests ``gsm/clipping.py``."""
