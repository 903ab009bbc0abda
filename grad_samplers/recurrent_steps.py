"""The recurrences of RNN, GRU and LSTM, forward in place and backward through time once, without autograd's help.

Index letters: T steps, B samples, H hidden features, P features of the state (H, or `proj_size`). The caller hands in
the input's share of the pre-activations for all steps, `pre [T, B, gates * H]`; it is overwritten by the gates. States
are kept as `[T + 1, B, P]` in the order of time: step t goes from entry t to t + 1, or, in reverse, from t + 1 to t.
Backward, everything that is known beforehand is computed for all steps at once, so that a step is one small product
and a few fused operations. Formulas: the documentation of `torch.nn.RNN`, `GRU` and `LSTM`, and their derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """What running forward leaves.

    `states [T + 1, B, P]`; `hidden`: the output of the linear layer on the previous state, up to constants;
    `projected [T, B, H]`: what was projected to the states (None without a projection); `last_cell [B, H]`, LSTM only;
    `kept`: what backward needs.
    """

    states: Tensor
    hidden: Tensor
    kept: tuple[Tensor | None, ...]
    projected: Tensor | None = None
    last_cell: Tensor | None = None


@dataclass(frozen=True)
class Pulled:
    """Gradients of the two pre-activations `[T, B, gates * H]`, the states `[T, B, P]`, the first states `[B, .]`."""

    pre: Tensor
    hidden: Tensor
    first_state: Tensor
    first_cell: Tensor | None = None
    states: Tensor | None = None


def previous(states: Tensor, reverse: bool) -> Tensor:
    """`[T, B, P]`: the state each step starts from."""
    return states[1:] if reverse else states[:-1]


def following(states: Tensor, reverse: bool) -> Tensor:
    """`[T, B, P]`: the state each step ends with."""
    return states[:-1] if reverse else states[1:]


def _steps(x: Tensor, reverse: bool) -> Sequence[Tensor]:
    """The entries of the first dimension in the order in which the steps run."""
    found = x.unbind(0)
    return found[::-1] if reverse else found


def _states(first: Tensor, length: int, reverse: bool) -> Tensor:
    states = first.new_empty(length + 1, *first.shape)
    states[-1 if reverse else 0] = first
    return states


def _chunks(x: Tensor, n: int, reverse: bool) -> list[Sequence[Tensor]]:
    return [_steps(part, reverse) for part in x.chunk(n, dim=-1)]


class Rnn:
    """`h' = act(pre + W h)`, times `scale`."""

    gates = 1

    def __init__(self, relu: bool):
        self.relu = relu

    def forward(
        self, pre: Tensor, h0: Tensor, c0: Any, w_hh: Tensor, b_hh: Any, w_hr: Any, scale: Tensor | None, reverse: bool
    ) -> Trace:
        hs = _states(h0, len(pre), reverse)
        w, states = w_hh.t().contiguous(), _steps(hs, reverse)
        scales = None if scale is None else _steps(scale, reverse)
        activate = torch.relu_ if self.relu else torch.tanh_
        for t, gate in enumerate(_steps(pre, reverse)):
            activate(gate.addmm_(states[t], w))
            if scales is None:
                states[t + 1].copy_(gate)
            else:
                torch.mul(gate, scales[t], out=states[t + 1])
        return Trace(hs, pre, (pre, w_hh, scale))

    def backward(self, kept: tuple[Any, ...], grad: Tensor, grad_cell: Any, reverse: bool) -> Pulled:
        gate, w, scale = kept
        d = (gate > 0).to(gate.dtype) if self.relu else 1 - gate.square()
        scales = None if scale is None else _steps(scale, reverse)
        ds, dhs = _steps(d, reverse), _steps(_own(grad), reverse)
        for t in range(len(ds) - 1, -1, -1):
            if scales is not None:
                dhs[t].mul_(scales[t])
            ds[t].mul_(dhs[t])
            if t:
                dhs[t - 1].addmm_(ds[t], w)
        return Pulled(d, d, ds[0] @ w)


def _own(grad: Tensor) -> Tensor:
    """The outputs' gradient as a buffer to which each step adds what it passes on to the state before it."""
    return grad.clone(memory_format=torch.contiguous_format)


class Gru:
    """`r, z = sigmoid(pre + W h + b)`, `n = tanh(pre + r (W h + b))`, `h' = (1 - z) n + z h`, times `scale`."""

    gates = 3

    def forward(
        self, pre: Tensor, h0: Tensor, c0: Any, w_hh: Tensor, b_hh: Any, w_hr: Any, scale: Tensor | None, reverse: bool
    ) -> Trace:
        size = h0.shape[1]
        hs, hidden = _states(h0, len(pre), reverse), torch.empty_like(pre)
        w, states = w_hh.t().contiguous(), _steps(hs, reverse)
        scales = None if scale is None else _steps(scale, reverse)
        both, from_state = _steps(pre[..., : 2 * size], reverse), _steps(hidden[..., : 2 * size], reverse)
        r, z, n = _chunks(pre, 3, reverse)
        new = _steps(hidden[..., 2 * size :], reverse)
        for t, out in enumerate(_steps(hidden, reverse)):
            h = states[t]
            if b_hh is None:
                torch.mm(h, w, out=out)
            else:
                torch.addmm(b_hh, h, w, out=out)
            both[t].add_(from_state[t]).sigmoid_()
            n[t].addcmul_(r[t], new[t]).tanh_()
            torch.lerp(n[t], h, z[t], out=states[t + 1])
            if scales is not None:
                states[t + 1].mul_(scales[t])
        return Trace(hs, hidden, (pre, hidden, hs, w_hh, scale))

    def backward(self, kept: tuple[Any, ...], grad: Tensor, grad_cell: Any, reverse: bool) -> Pulled:
        pre, hidden, hs, w, scale = kept
        r, z, n = pre.chunk(3, dim=-1)
        d_pre, d_hidden = torch.empty_like(pre), torch.empty_like(pre)
        to_r, to_z, to_new = d_hidden.chunk(3, dim=-1)
        to_n = aten.tanh_backward(1 - z, n)
        aten.sigmoid_backward(to_n * hidden.chunk(3, dim=-1)[2], r, grad_input=to_r)
        aten.sigmoid_backward(previous(hs, reverse) - n, z, grad_input=to_z)
        torch.mul(to_n, r, out=to_new)
        scales = None if scale is None else _steps(scale, reverse)
        all_dh = _own(grad)
        ds, dhs, keep, wide = (_steps(x, reverse) for x in (d_hidden, all_dh, z, all_dh.unsqueeze(2)))
        gated = _steps(d_hidden.unflatten(-1, (3, -1)), reverse)
        for t in range(len(ds) - 1, -1, -1):
            if scales is not None:
                dhs[t].mul_(scales[t])
            gated[t].mul_(wide[t])
            if t:
                dhs[t - 1].addcmul_(dhs[t], keep[t]).addmm_(ds[t], w)
        size = 2 * z.shape[-1]
        d_pre[..., :size] = d_hidden[..., :size]
        torch.mul(all_dh, to_n, out=d_pre[..., size:])
        return Pulled(d_pre, d_hidden, torch.addmm(dhs[0] * keep[0], ds[0], w))


class Lstm:
    """`i, f, o = sigmoid(pre + W h)`, `g = tanh(pre + W h)`, `c' = f c + i g`, `h' = o tanh(c')`.

    The state is projected, if there is a projection, then multiplied by `scale`.
    """

    gates = 4

    def forward(
        self,
        pre: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        b_hh: Any,
        w_hr: Tensor | None,
        scale: Tensor | None,
        reverse: bool,
    ) -> Trace:
        size = c0.shape[1]
        hs, cs = _states(h0, len(pre), reverse), _states(c0, len(pre), reverse)
        squashed = torch.empty_like(previous(cs, reverse))
        projected = None if w_hr is None else torch.empty_like(squashed)
        w, w_r = w_hh.t().contiguous(), w_hh if w_hr is None else w_hr.t()
        i, f, g, o = _chunks(pre, 4, reverse)
        i_and_f, states, cells = (_steps(x, reverse) for x in (pre[..., : 2 * size], hs, cs))
        tanhs, ms = _steps(squashed, reverse), None if projected is None else _steps(projected, reverse)
        scales = None if scale is None else _steps(scale, reverse)
        for t, gate in enumerate(_steps(pre, reverse)):
            gate.addmm_(states[t], w)
            i_and_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            c, h = cells[t + 1], states[t + 1]
            torch.mul(i[t], g[t], out=c).addcmul_(f[t], cells[t])
            torch.tanh(c, out=tanhs[t])
            if ms is None:
                torch.mul(o[t], tanhs[t], out=h)
            else:
                torch.mm(torch.mul(o[t], tanhs[t], out=ms[t]), w_r, out=h)
            if scales is not None:
                h.mul_(scales[t])
        return Trace(hs, pre, (pre, cs, squashed, w_hh, w_hr, scale), projected, cells[-1])

    def backward(self, kept: tuple[Any, ...], grad: Tensor, grad_cell: Tensor | None, reverse: bool) -> Pulled:
        pre, cs, squashed, w, w_hr, scale = kept
        i, f, g, o = pre.chunk(4, dim=-1)
        d = torch.empty_like(pre)
        to_i, to_f, to_g, to_o = d.chunk(4, dim=-1)
        aten.sigmoid_backward(g, i, grad_input=to_i)
        aten.sigmoid_backward(previous(cs, reverse), f, grad_input=to_f)
        aten.tanh_backward(i, g, grad_input=to_g)
        aten.sigmoid_backward(squashed, o, grad_input=to_o)
        all_dh = _own(grad)
        ds, dhs, to_cell, keep = (_steps(x, reverse) for x in (d, all_dh, aten.tanh_backward(o, squashed), f))
        of_cell, of_state = _steps(d.unflatten(-1, (4, -1))[:, :, :3], reverse), _steps(to_o, reverse)
        scales = None if scale is None else _steps(scale, reverse)
        dc = torch.zeros_like(cs[0]) if grad_cell is None else grad_cell.clone()
        wide = dc.unsqueeze(1)
        for t in range(len(ds) - 1, -1, -1):
            if scales is not None:
                dhs[t].mul_(scales[t])
            dm = dhs[t] if w_hr is None else dhs[t] @ w_hr
            dc.addcmul_(dm, to_cell[t])
            of_cell[t].mul_(wide)
            of_state[t].mul_(dm)
            dc.mul_(keep[t])
            if t:
                dhs[t - 1].addmm_(ds[t], w)
        return Pulled(d, d, ds[0] @ w, dc, None if w_hr is None else all_dh)


CELLS: dict[str, Rnn | Gru | Lstm] = {"RNN_TANH": Rnn(False), "RNN_RELU": Rnn(True), "GRU": Gru(), "LSTM": Lstm()}


class Recurrence(torch.autograd.Function):
    """A recurrence that has run, as one node of the graph.

    Takes the cell, the direction, the trace, and what the gradients go to: the pre-activations from the input and
    from the states, the states themselves if they are projected, the first state, the first cell. Returns all states
    `[T, B, P]` and, for an LSTM, the last cell `[B, H]`.
    """

    @staticmethod
    def forward(ctx: Any, cell: Any, reverse: bool, trace: Trace, *links: Tensor | None) -> Any:
        ctx.cell, ctx.reverse = cell, reverse
        ctx.save_for_backward(*trace.kept)
        out = following(trace.states, reverse).clone()  # a copy: the caller may work on it in place
        return out if trace.last_cell is None else (out, trace.last_cell.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cell: Tensor | None = None) -> tuple[Any, ...]:
        pulled = ctx.cell.backward(ctx.saved_tensors, grad, grad_cell, ctx.reverse)
        return None, None, None, pulled.pre, pulled.hidden, pulled.states, pulled.first_state, pulled.first_cell
