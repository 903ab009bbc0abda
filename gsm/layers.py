"""Running a layer whose class has a sampler of its own: a user's, or one that no known function stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from grad_samplers import Sampler
from gsm.capture import Capture, CapturedForward, Runner
from gsm.contributions import Record
from gsm.functions import Tap, TapMany
from gsm.layout import Layout, Rows, Unresolvable
from gsm.sampler_check import check_sampler, is_users, shown_instead
from gsm.structures import tensors_in
from gsm.tape import Pass
from gsm.tracked import Tracked


class SampledUse:
    """One call of a layer with a registered sampler."""

    def __init__(self, active: Pass, module: nn.Module, sampler: Sampler, layouts: list[Layout | Rows | None]):
        self.tape, self.group, self.batch_size = active.tape, active.group, active.batch_size
        self.module, self.sampler, self.layouts = module, sampler, layouts

    def receive(self, saved: tuple[Tensor, ...], grad: Any) -> None:
        activations = [self._front(a.detach(), lay) for a, lay in zip(saved, self.layouts, strict=True)]
        out = next(lay for lay in self.layouts if lay is not None)
        if isinstance(grad, list):
            backprops: Any = [self._front(g.detach(), out) for g in grad]
            backprops = backprops[0] if len(backprops) == 1 else backprops
        else:
            backprops = self._front(grad.detach(), out)
        record = Record(self.module, self.sampler, activations, backprops, self.batch_size)
        own = [p for p in self.module._parameters.values() if p is not None and p.requires_grad]
        self.tape.receive_layer(self.group, record, own)

    def _front(self, x: Tensor, layout: Layout | Rows | None) -> Tensor:
        return x if layout is None or x.dim() <= layout.dim else layout.to_front(x, self.batch_size)


def run_sampler(sampler: Sampler, path: str, strict: bool = False) -> Runner:
    """A runner that calls the layer with detached parameters and taps its output for ``sampler``.

    ``strict``: if the sampler is a user's, what it gives is compared with autograd before the first batch.
    """
    checked = strict and is_users(sampler)

    def run(capture: Capture, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active, module = capture.tape.active, forward.module
        assert active is not None
        inputs = tensors_in(args, kwargs)
        names = tuple(f"{path}.{n}" if path else n for n in module._parameters)
        if any(isinstance(x, Tracked) for x in inputs):
            raise Unresolvable(f"{path or 'the model'}: its input is a parameter that has not met a sample", names)
        layouts = [active.layout(f"{path}:input{i}", x) for i, x in enumerate(inputs)]
        if not any(layouts):
            raise Unresolvable(f"{path or 'the model'}: none of its inputs depends on the samples", names)
        tried = active.log is not None and active.tape.layouts  # the probe runs, and knows where the batch lies
        if checked and tried and not active.tape.trusts_samplers:
            check_sampler(module, sampler, path, forward.original, args, kwargs, layouts, active.batch_size)
        detached = {n: p.detach() for n, p in module._parameters.items() if p is not None and p.requires_grad}
        with shown_instead(module, detached):  # autograd computes only the input's gradient
            out = forward.original(*args, **kwargs)
        use = SampledUse(active, module, sampler, layouts)
        if isinstance(out, Tensor):
            return Tap.apply(out, capture.tape.anchor, use, True, *inputs)
        leaves, spec = tree_flatten(out)
        floating = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        tapped = TapMany.apply(capture.tape.anchor, use, len(floating), *(leaves[i] for i in floating), *inputs)
        for i, t in zip(floating, tapped, strict=True):
            leaves[i] = t
        return tree_unflatten(leaves, spec)

    return run
