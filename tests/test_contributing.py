"""The code in CONTRIBUTING.md runs as it stands."""

import re
from pathlib import Path

import grad_samplers

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_ten_minute_layer():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    scope: dict = {}
    exec("\n".join(blocks), scope)
    try:
        scope["test_scale"]()
        sampler = grad_samplers.lookup(scope["Scale"](3))
        assert sampler is not None and sampler.grad is scope["scale_grad_sample"]
        layer = scope["Scale"](3)
        layer.weight = scope["nn"].Parameter(scope["torch"].ones(2, 3))
        assert "2 dimensions" in grad_samplers.reason_unsupported(layer)
    finally:
        grad_samplers.unregister(scope["Scale"])
