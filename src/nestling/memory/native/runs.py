"""A layout as the C code reads it: for each lane its tiles, each a run of tokens that follow one another."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestling.memory.layout import Layout
from nestling.memory.native.fields import CLOSES, FRESH


class Runs(NamedTuple):
    """Tiles of every lane.

    table     int32 `[lane, tiles, 4]`: first token, tokens of a window before it, tokens, flags;  tokens 0: no such tile
    longest   tokens of the longest tile
    whole     every tile closes a chunk of every period
    full      every token of the call is in a tile
    fresh     some lane begins anew in the call
    """

    table: Tensor
    longest: int
    whole: bool
    full: bool
    fresh: bool

    @property
    def group(self) -> int:
        """Tiles between two that weights are kept of: those kept and those made again then grow with the root of the length.
        Those kept are of all memories, those made again of one at a time: rather few are kept."""
        return max(1, isqrt(2 * self.table.shape[1]))


def runs(cut: Layout, time: int, tail: Tensor | None = None) -> Runs | None:
    """The runs of a call of `time` tokens; None where a tile's tokens do not follow one another, as around invalid ones.

    tail   bool `[lane, halo]`: which tokens of a window before the call are there
    """
    tokens = cut.tokens.numpy()
    lanes, tiles, width = tokens.shape
    halo = width - cut.size
    table = np.zeros((lanes, tiles, 4), dtype=np.int32)
    first = tokens[..., halo] - halo
    if cut.ok is None:
        before, count = np.zeros_like(first), np.full_like(first, cut.size)
    else:
        there = cut.ok.numpy()
        if tail is not None:
            row = np.arange(lanes)[:, None, None]
            there = there & ((tokens >= halo) | tail.numpy()[row, np.minimum(tokens, halo - 1)])
        before, count = there[..., :halo].sum(-1), there[..., halo:].sum(-1)
        follows = tokens == first[..., None] + np.arange(width)
        if not bool(follows[there].all()):
            return None
    closes = cut.borders.numpy().transpose(2, 1, 0)  # [lane, tiles, period]
    flags = (closes * (CLOSES << np.arange(closes.shape[2]))).sum(-1)
    if cut.reset is not None:
        flags = flags + FRESH * cut.reset.numpy().T
    table[..., 0], table[..., 1], table[..., 2], table[..., 3] = first, before, count, flags
    return Runs(
        torch.from_numpy(table),
        int(count.max()),
        bool(closes[count > 0].all()),
        int(count.sum()) == lanes * time,
        cut.reset is not None,
    )
