"""The tape: what one wrapped model remembers between its forward and the optimizer's step.

A forward of the model is a pass; passes whose backward is still to come belong to one group of records
(a siamese network calls the model twice on the same pairs), and a group ends with the first forward after its backward
or after the next batch was drawn.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gsm import drawn
from gsm.compiled import refuse_compiled_backward
from gsm.contributions import Aside, Contribution, Dense, Paired, Pulled, Record
from gsm.groups import Group
from gsm.layout import Layout, Rows
from gsm.locate import Log, locate

if TYPE_CHECKING:
    from gsm.known import Template
    from gsm.planner import Planner
    from gsm.tracked import Tracked


class Pass:
    """One forward: its batch size, the group its gradients go to, and how often each site was visited."""

    __slots__ = ("batch_size", "group", "tape", "visits", "log", "copied")

    def __init__(self, tape: Tape, batch_size: int, group: Group, log: Log | None = None):
        self.tape, self.batch_size, self.group, self.log = tape, batch_size, group, log
        self.visits: Counter[str] = Counter()
        self.copied: tuple[Tensor, int, Tensor] | None = None

    def layout(self, site: str, x: Tensor, batch_dim: int | None = None) -> Layout | Rows | None:
        """The layout of ``x`` at this site (a parameter's name and the function that uses it)."""
        return locate(self, site, x, batch_dim)

    def in_order(self, x: Tensor) -> Tensor:
        """``x [B, C, T]`` with one channel after the other; layers that share an input share the copy.

        What lies in memory as `[B, T, C]` (an embedding's output, transposed) is taken for an image in channels-last
        layout by PyTorch's convolutions on a CPU, which costs more than the copy (two threads, B=64, 128 to 100
        channels, 5, 128 positions: forward and both backwards 25 ms, of the copy 20).
        """
        if x.is_contiguous() or not x.is_cpu or x.is_inference():
            return x
        part_of_graph = x.requires_grad and torch.is_grad_enabled()
        if self.copied is not None:
            original, version, copy = self.copied
            if original is x and version == x._version and copy.requires_grad is part_of_graph:
                return copy
        copy = x.contiguous()
        self.copied = x, x._version, copy
        return copy


class Tape:
    """The state of one wrapped model. Nothing here knows a layer's formula or an optimizer."""

    def __init__(self, *, mode: str, batch_first: bool, loss_reduction: str, planner: Planner):
        self.mode, self.batch_first, self.loss_reduction, self.planner = mode, batch_first, loss_reduction, planner
        self.names: dict[int, str] = {}
        self.params: list[nn.Parameter] = []
        self.groups: list[Group] = []
        self.layouts: dict[tuple[str, int], Layout | None] = {}
        self.templates: dict[Any, Template] = {}  # what is known of calls seen before (`gsm.known`)
        self.active: Pass | None = None
        self.enabled = True
        self.live = True  # until the capture is removed
        self.trusts_samplers = False  # users' samplers are compared with autograd before the first batch
        self.inside: str | None = None  # the subtree that is running as a whole, if one is
        self.judging = False  # derivatives are asked for that are no backward of a training
        self.calls = 0  # forwards from outside so far
        # Told of forwards from outside (path, args, kwargs; path, module, output, batch size), and of backwards.
        self.before_pass: list[Callable[[str, Any, Any], None]] = []
        self.after_pass: list[Callable[[str, nn.Module, Any, int], None]] = []
        self.after_backward: list[Callable[[], None]] = []
        self._task = self._inner = -1
        #: (rows, records) if the last forward had more rows than the loaders had drawn records for it.
        self.more_rows: tuple[int, int] | None = None
        #: How many records the last forward saw, as far as known; 0 if nothing is.
        self.records = 0
        self._draws, self._largest = drawn.now(), 0
        self._sizes: deque[int] = deque(maxlen=8)  # of the last batches drawn
        # Makes a layer whose input needs no gradient part of the graph; itself never gets one.
        self.anchor = torch.zeros((), requires_grad=True)

    # -- forward ---------------------------------------------------------------------------------------------------

    def begin(self, batch_size: int, log: Log | None = None) -> Pass:
        """Starts a pass; the caller ends it by restoring ``active``."""
        if log is not None:
            return Pass(self, batch_size, Group(batch_size, 1.0), log)
        if torch._C._current_graph_task_id() != -1 and self.groups:
            # Activation checkpointing runs a piece of the forward again, inside the backward of its own group.
            return Pass(self, batch_size, self.groups[-1])
        group = self.groups[-1] if self.groups else None
        if group is None or group.delivered or group.batch_size != batch_size or group.drawn != drawn.now():
            group = Group(batch_size, float(batch_size) if self.loss_reduction == "mean" else 1.0)
            group.drawn = drawn.now()
            if self.mode == "hooks":
                self.groups = [g for g in self.groups if not g.delivered]
            self.groups.append(group)
        self._compare_rows(batch_size)
        return Pass(self, batch_size, group)

    def _compare_rows(self, rows: int) -> None:
        """Notes a batch of more rows than any batch had records that was drawn since the last that this model saw.

        Something between loader and model may have fetched ahead: a batch drawn a little earlier fits as well. Two
        drawn batches in one do not, as a record can be in both.
        """
        if drawn.now() != self._draws:
            sizes = drawn.sizes_since(self._draws)
            self._sizes.extend(sizes)
            self._draws, self._largest = drawn.now(), max(sizes, default=0)
            self.more_rows = None
        fits = rows <= self._largest or rows in self._sizes
        self.records = 0 if not self._largest else rows if fits else min(self._sizes)
        if self._largest and not fits:
            self.more_rows = (rows, self._largest)

    # -- backward --------------------------------------------------------------------------------------------------

    def receive(
        self,
        group: Group,
        record: Record,
        targets: Sequence[tuple[Tensor, Tracked]],
        aside: Aside | None = None,
    ) -> None:
        """Takes the output gradient of one use of one or more parameters; ``aside``: how to take them apart."""
        if not self._asked_for(group):
            return
        if record.batch_size == 0:  # rows of nobody may lack dimensions that samplers need
            for placeholder, target in targets:
                self._add(group, target, Dense(placeholder.new_zeros(0, *placeholder.shape)))
            return
        if self.mode == "hooks" or self.planner.keeps(record, targets[0][1].gsm_name):
            grads = record.gradients()
            for placeholder, target in targets:
                if placeholder not in grads:
                    raise RuntimeError(
                        f"{target.gsm_name} was frozen between this forward and its backward: freeze and unfreeze "
                        "parameters before the forward, or after the step."
                    )
                self._add(group, target, Dense(grads[placeholder]))
            return
        if aside is not None:
            record.layer = aside.small_layer
            grads = record.gradients()
            for placeholder, target in aside.small:
                self._add(group, target, Dense(grads[placeholder]))
            record.layer, targets = aside.large_layer, aside.large
        for placeholder, target in targets:
            self._add(group, target, Paired(record, placeholder))

    def receive_dense(self, group: Group, target: Tracked, grad: Tensor) -> None:
        """Takes a per-sample gradient that autograd itself produced, ``[batch, *target.shape]``."""
        if not self._asked_for(group):
            return
        self._add(group, target, Dense(grad.detach()))

    def receive_layer(self, group: Group, record: Record, params: Sequence[nn.Parameter]) -> None:
        """Takes the output gradient of a whole layer with a registered sampler."""
        if not self._asked_for(group):
            return
        if record.batch_size == 0:
            for p in params:
                self._add_to(group, p, Dense(p.new_zeros(0, *p.shape)))
        elif self.mode == "hooks" or self.planner.keeps(record, self.names.get(id(params[0]))):
            grads = record.gradients()
            for p in params:
                self._add_to(group, p, Dense(grads[p]))
        else:
            for p in params:
                self._add_to(group, p, Paired(record, p))

    def _add(self, group: Group, target: Tracked, contribution: Contribution) -> None:
        if target.gsm_param is not None:
            self._add_to(group, target.gsm_param, contribution)
            return
        for leaf in target.gsm_leaves:
            pulled = Pulled(contribution, target.gsm_value, leaf.gsm_value, target.gsm_isometric)
            assert leaf.gsm_param is not None
            self._add_to(group, leaf.gsm_param, pulled)

    def _add_to(self, group: Group, param: nn.Parameter, contribution: Contribution) -> None:
        if self.mode == "hooks":
            group.add_to_attribute(param, contribution.gradient())
        else:
            group.add(param, contribution)

    def _asked_for(self, group: Group) -> bool:
        """Whether this backward asks for gradients of the parameters; if so, ``group`` has them now.

        One for the gradient of inputs alone does not: `torch.autograd.grad(loss, x)` of an adversarial example, the
        steps of a fixed-point iteration in a backward hook. What it brings to a layer is not the loss's gradient.
        """
        refuse_compiled_backward()
        if self.judging:
            return False
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Per-sample gradients of a backward with create_graph=True are not defined: those captured would "
                "be of the inner derivative. Wrap with mode='functorch' or 'loop', where a loss may hold derivatives "
                "of the model's output (gradient penalties, residuals of differential equations) and a forward its "
                "own (forces from an energy; torch.func.grad works in every mode), or compute them outside the model."
            )
        task = torch._C._current_graph_task_id()
        if task == self._inner:
            return False
        if task != self._task and not torch._C._will_engine_execute_node(get_gradient_edge(self.anchor).node):
            self._inner = task
            return False
        if not self.enabled:
            raise RuntimeError(
                "The hooks were disabled between this forward and its backward, so the gradients would be neither per "
                "sample nor ordinary. If this is the second backward of Opacus's ghost clipping: here one is enough, "
                "call optimizer.step() after the first."
            )
        group.delivered = True
        if not any(g is group for g in self.groups):
            self.groups.append(group)
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(group))
        return True

    def _finish(self, group: Group) -> None:
        self._task = -1
        if self.mode == "hooks":
            for p in self.params:
                if p.requires_grad:
                    group.fill_attribute(p)
        self.planner.settle()
        for callback in self.after_backward:
            callback()

    # -- afterwards ------------------------------------------------------------------------------------------------

    def holds(self, params: Sequence[nn.Parameter]) -> bool:
        """Whether all of ``params`` are captured by this tape."""
        names = self.names
        return self.live and all(id(p) in names and p.requires_grad for p in params)

    def discard(self, params: Sequence[nn.Parameter]) -> None:
        """Forgets what was delivered for ``params``; forwards whose backward is still to come stay."""
        for group in self.groups:
            group.drop(params)
        self.groups = [g for g in self.groups if not g.delivered or g.contributions]

    def norms_of_last_batch(self) -> Tensor:
        """Per-sample gradient norms ``[batch]`` over all parameters of the last backward."""
        delivered = [g for g in self.groups if g.delivered]
        if not delivered:
            raise RuntimeError("There are no per-sample gradients: run a forward and a backward first.")
        return delivered[-1].view(self.params).squared_norms().sum(0).sqrt()
