"""Packed sequences as padded ones and back, in the order of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Lengths:
    """How long each of B sequences is, and how they were packed. T: the longest."""

    lengths: Tensor  # [B], on the device of the data
    mask: Tensor  # [T, B, 1], True within a sequence
    backwards: Tensor  # [T, B, 1]: for each step the one that mirrors it within its sequence
    packing: PackedSequence

    @staticmethod
    def of(packed: PackedSequence) -> Lengths:
        """From a packed sequence, whether it was sorted by its maker or by `pack_padded_sequence`."""
        device = packed.data.device
        steps = torch.arange(len(packed.batch_sizes))
        lengths = (packed.batch_sizes[:, None] > torch.arange(int(packed.batch_sizes[0]))).sum(0).to(device)
        if packed.unsorted_indices is not None:
            lengths = lengths[packed.unsorted_indices]
        steps = steps.to(device)[:, None]
        mask = steps < lengths
        backwards = torch.where(mask, lengths - 1 - steps, steps)
        return Lengths(lengths, mask[..., None], backwards[..., None], packed._replace(data=packed.data.new_empty(0)))

    def padded(self, packed: PackedSequence) -> Tensor:
        """`[T, B, D]`, zero past the end of a sequence."""
        return pad_packed_sequence(packed)[0]

    def packed(self, x: Tensor) -> PackedSequence:
        """`[T, B, D]` packed as the input was."""
        order = self.packing.sorted_indices
        lengths = self.lengths
        if order is not None:
            x, lengths = x.index_select(1, order), lengths[order]
        return self.packing._replace(data=pack_padded_sequence(x, lengths.cpu()).data)

    def reversed(self, x: Tensor) -> Tensor:
        """Each sequence reversed, its padding left where it is."""
        return x.gather(0, self.backwards.expand(-1, -1, x.shape[2]))

    def last(self, x: Tensor) -> Tensor:
        """`[B, D]`: each sequence's last entry."""
        return x[self.lengths - 1, torch.arange(x.shape[1], device=x.device)]

    def hold_cells(self, gates: Tensor) -> None:
        """Closes the input gates and opens the forget gates of an LSTM past the end: its cells stay as they are."""
        i, f, _, _ = gates.chunk(4, dim=-1)
        i.masked_fill_(~self.mask, -math.inf)
        f.masked_fill_(~self.mask, math.inf)
