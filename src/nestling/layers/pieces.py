"""Cutting a call where lanes have to stop: at the ends of their own windows, counted from their position 0, and at resets.

For what cannot run on through such a border. The pieces of all lanes run side by side, filled up and masked, never looped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import Report
from nestling.memory.layout import layout


class Piece(NamedTuple):
    """Part of a call in which no lane passes the end of its window, nor a reset.

    at       `[lane, n]`: which tokens of the call;  mask: bool, the place is filled;  None: all are
    fresh    bool `[lane]` (CPU): the lane is put at position 0 before;  None: no lane is
    closing  bool `[lane]` (CPU): the lane's window ends with the piece
    length   tokens per lane `[lane]` (CPU)
    """

    at: Tensor
    mask: Tensor | None
    fresh: Tensor | None
    closing: Tensor
    length: Tensor


def pieces(position: Tensor, time: int, reset: Tensor | None, valid: Tensor | None, window: int) -> Iterator[Piece]:
    """Cut a call at every lane's own window ends and resets."""
    cut = layout(position, time, reset, valid, period=window, tile=window, halo=0)
    for number in range(cut.tokens.shape[1]):
        index = cut.tokens[:, number]
        mask = torch.ones_like(index, dtype=torch.bool) if cut.ok is None else cut.ok[:, number]
        count = mask.sum(1)
        longest = int(count.max())
        index, mask = index[:, :longest], mask[:, :longest]
        fresh = None if cut.reset is None or not bool(cut.reset[number].any()) else cut.reset[number]
        yield Piece(index, None if bool(mask.all()) else mask, fresh, cut.border[number], count)


def place(parts: Sequence[Tensor], cut: Sequence[Piece], shape: tuple[int, int], dim: int) -> Tensor:
    """Put the pieces' `[lane, …, n, …]` (time at `dim`) back in the call's order; zeros where no token was."""
    lanes, time = shape
    joined = torch.cat([part.movedim(dim, 1) for part in parts], 1)
    padded = torch.cat([joined, joined.new_zeros(lanes, 1, *joined.shape[2:])], 1)
    source = torch.full((lanes, time + 1), joined.shape[1])
    first = 0
    for piece in cut:
        size = piece.at.shape[1]
        target = piece.at if piece.mask is None else torch.where(piece.mask, piece.at, time)
        source.scatter_(1, target, torch.arange(first, first + size).expand(lanes, -1))
        first += size
    rows = torch.arange(lanes, device=padded.device)[:, None]
    return padded[rows, source[:, :time].to(padded.device)].movedim(1, dim)


def write(held: Tensor, new: Tensor, offset: Tensor, piece: Piece) -> Tensor:
    """`held` `[lane, window, …]` with the piece's `new` `[lane, n, …]` written from place `offset` `[lane]` on."""
    spots = (offset[:, None] + torch.arange(new.shape[1])).to(held.device)
    if piece.mask is not None:
        spots = torch.where(piece.mask.to(held.device), spots, held.shape[1])
    spots = spots.view(*spots.shape, *[1] * (held.dim() - 2)).expand(-1, -1, *held.shape[2:])
    if piece.mask is None:
        return held.scatter(1, spots, new.to(held.dtype))
    padded = F.pad(held, (0, 0) * (held.dim() - 2) + (0, 1))
    return padded.scatter(1, spots, new.to(held.dtype))[:, :-1]


def merge(report: Report, notes: Sequence[Report], cut: Sequence[Piece], time: int) -> None:
    """Hand the pieces' notes on, in the call's order."""
    for level in dict.fromkeys(name for note in notes for name in note):
        scope = report.scope(level) if level else report
        for name in notes[0][level]:
            parts = [note[level][name] for note in notes]
            if parts[0].dim() == 1:
                scope.count(**{name: torch.stack(parts).sum(0)})
            else:
                scope.add(**{name: place(parts, cut, (parts[0].shape[0], time), -1)})
