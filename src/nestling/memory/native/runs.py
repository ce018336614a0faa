"""A layout as the C code reads it: for each lane its tiles, each a run of tokens that follow one another."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestling.memory.layout import Layout, Shared, layout
from nestling.memory.native.fields import CLOSES, FRESH

# Between two places that weights are kept of, at least: so many tokens, or so many tiles.
TOKENS, TILES = 256, 16


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
        Those kept are of all memories, those made again of one at a time: rather few are kept, of short calls most of all, where
        they weigh more than what the call was given."""
        tiles = self.table.shape[1]
        return max(1, min(tiles, max(isqrt(2 * tiles), min(TILES, TOKENS // max(1, self.longest)))))


def runs(cut: Layout, time: int, tail: Tensor | None = None) -> Runs | None:
    """The runs of a call of `time` tokens; None where a tile's tokens do not follow one another, as around invalid ones.

    tail   bool `[lane, halo]`: which tokens of a window before the call are there: the last ones
    """
    if cut.shared is not None and tail is None:
        return _shared(cut.shared, len(cut.tokens))
    return _made(cut, time, tail)


@lru_cache(maxsize=256)
def _shared(key: Shared, lanes: int) -> Runs | None:
    """Lanes in step: made once, and only read."""
    _, time, periods, tile, halo = key
    with torch.inference_mode(False):
        return _made(
            layout(torch.full((lanes,), key[0]), time, None, None, period=periods, tile=tile, halo=halo), time, None
        )


def _made(cut: Layout, time: int, tail: Tensor | None) -> Runs | None:
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
    begins, closes = _flags(cut)
    flags = begins + closes
    table[..., 0], table[..., 1], table[..., 2], table[..., 3] = first, before, count, flags
    return Runs(
        torch.from_numpy(table),
        int(count.max()),
        _whole(cut, closes[count > 0]),
        int(count.sum()) == lanes * time,
        cut.reset is not None,
    )


def tokens(cut: Layout, time: int) -> Runs:
    """One run for each token of a call, for what goes token by token: whichever may be missing. There is no window."""
    places = cut.tokens.numpy()
    lanes, _, size = places.shape
    there = np.ones_like(places, dtype=bool) if cut.ok is None else cut.ok.numpy()
    place, last = np.arange(size), there.sum(-1, keepdims=True) - 1
    begins, closes = (mark[..., None] for mark in _flags(cut))
    flags = np.where(place == 0, begins, 0) + np.where(place == last, closes, 0)
    there, flags, places = (x.reshape(lanes, -1) for x in (there, flags, places))
    lane, column = np.nonzero(there)
    number = there.cumsum(1)[lane, column] - 1
    table = np.zeros((lanes, int(number.max()) + 1, 4), dtype=np.int32)
    table[lane, number, 0], table[lane, number, 2] = places[lane, column], 1
    table[lane, number, 3] = flags[lane, column]
    whole = _whole(cut, flags[there])
    return Runs(torch.from_numpy(table), 1, whole, len(lane) == lanes * time, cut.reset is not None)


def _flags(cut: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Of each lane's tiles `[lane, tiles]`: that it begins anew before it, and which periods' chunks close with it."""
    borders = cut.borders.numpy().transpose(2, 1, 0)  # [lane, tiles, period]
    closes = (borders * (CLOSES << np.arange(borders.shape[2]))).sum(-1)
    return (np.zeros_like(closes) if cut.reset is None else FRESH * cut.reset.numpy().T), closes


def _whole(cut: Layout, flags: np.ndarray) -> bool:
    """Whether the chunks of every period close with all of these."""
    every = sum(CLOSES << period for period in range(cut.borders.shape[0]))
    return bool((flags & every == every).all())
