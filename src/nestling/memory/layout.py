"""Which token goes into which tile.

Every lane's tokens are cut into tiles of at most `tile` tokens. A tile ends early at the lane's own chunk borders (there may be
several periods) and before a reset, so that lanes at different positions, with invalid tokens and resets anywhere, run through
the same products: short tiles are padded and masked, never looped over.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import lcm
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Shared = tuple[int, int, tuple[int, ...], int, int]
"""Phase, time, periods, tile and halo."""


class Layout(NamedTuple):
    """The cut of one call. Tokens are numbered in the stream `[tail (halo tokens) | call]`.

    tokens    `[lane, tiles, halo + size]` int64: the tile's tokens with the `halo` tokens before them
    ok        the same shape, bool: the place is filled;  None: all are, and the tiles are the call cut evenly (no halo)
    borders   bool `[period, tiles, lane]`: the lane's chunk of that period closes with this tile;  `border`: of the first
    begins    for each tile and period: a chunk begins with this tile, in all lanes that have it
    reset     bool `[tiles, lane]`: the lane is put at position 0 before this tile;  None: no reset in the call
    position  `[lane]` after the call
    tail      `[lane, halo]` the tokens that the next call's window needs, and whether each is there
    shared    what alone says how the call is cut, where lanes are in step and none begins anew;  None: more does
    """

    tokens: Tensor
    ok: Tensor | None
    borders: Tensor
    begins: tuple[tuple[bool, ...], ...]
    reset: Tensor | None
    position: Tensor
    tail: Tensor
    tail_ok: Tensor
    size: int
    shared: Shared | None = None

    @property
    def border(self) -> Tensor:
        """Bool `[tiles, lane]`: the borders of the first period, for those who have one only."""
        return self.borders[0]


def layout(
    position: Tensor,
    time: int,
    reset: Tensor | None,
    valid: Tensor | None,
    *,
    period: int | tuple[int, ...],
    tile: int,
    halo: int,
    shifts: tuple[int, ...] = (),
) -> Layout:
    """Cut `time` tokens of lanes that stand at `position` (CPU). `reset` and `valid` are copied to the CPU if need be.

    shifts   of each period: its chunks close so many tokens later than at its multiples;  (): none does
    """
    periods = (period,) if isinstance(period, int) else period
    tile, cycle = min(tile, *periods), lcm(*periods)
    lanes = position.shape[0]
    places = tuple(int(p) for p in position.tolist())
    reset, valid, fresh = _plain(reset, valid, halo)
    if fresh is not None:
        position = torch.where(fresh, 0, position)
        places = tuple(int(p) for p in position.tolist())
    if reset is None and valid is None and len({p % cycle for p in places}) == 1:
        key = places[0] % cycle, time, periods, tile, halo
        shared = _uniform(*key, shifts)
        tiles = shared.tokens.shape[1]
        return shared._replace(
            reset=None if fresh is None else torch.cat([fresh[None], fresh.new_zeros(tiles - 1, lanes)]),
            tokens=shared.tokens.expand(lanes, -1, -1),
            ok=None if shared.ok is None else shared.ok.expand(lanes, -1, -1),
            borders=shared.borders.expand(-1, -1, lanes),
            position=position + time,
            tail=shared.tail.expand(lanes, -1),
            tail_ok=shared.tail_ok.expand(lanes, -1),
            shared=key if fresh is None and not shifts else None,
        )
    if fresh is not None:  # lanes out of step, or some of them
        reset = torch.cat([fresh[:, None], fresh.new_zeros(lanes, time - 1)], 1)
    resets = None if reset is None else reset.cpu().numpy()
    valids = None if valid is None else valid.cpu().numpy()
    return _cut(places, time, resets, valids, periods, tile, halo, shifts)


def _plain(reset: Tensor | None, valid: Tensor | None, halo: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Masks that say nothing are None; resets at the call's start alone are returned apart, bool `[lane]`: lanes stay in step."""
    if valid is not None and bool(valid.all()):
        valid = None
    if reset is None or valid is not None or not bool(reset.any()):
        return (None if reset is None or not bool(reset.any()) else reset), valid, None
    if halo or bool(reset[:, 1:].any()):  # a window's tail is the lane's own
        return reset, valid, None
    return None, valid, reset[:, 0].cpu()


@lru_cache(maxsize=256)
def _uniform(phase: int, time: int, periods: tuple[int, ...], tile: int, halo: int, shifts: tuple[int, ...]) -> Layout:
    """All lanes in step: cut one and share it."""
    with torch.inference_mode(False):  # what is kept serves training too
        cut = _cut((phase,), time, None, None, periods, tile, halo, shifts)
    even = cut.ok is not None and bool(cut.ok.all()) and halo == 0
    return cut._replace(ok=None) if even else cut


class _Piece(NamedTuple):
    """One lane's part of a tile: tokens before it, its own, for each period whether a chunk begins and closes, a reset."""

    before: np.ndarray
    own: np.ndarray
    begins: list[bool]
    closes: list[bool]
    fresh: bool


def _cut(
    places: tuple[int, ...],
    time: int,
    reset: np.ndarray | None,
    valid: np.ndarray | None,
    periods: tuple[int, ...],
    tile: int,
    halo: int,
    shifts: tuple[int, ...],
) -> Layout:
    lanes = len(places)
    ends = tuple(zip(periods, shifts or [0] * len(periods), strict=True))
    cuts: list[list[_Piece]] = []
    after, tails = [], []
    for lane, place in enumerate(places):
        tokens = np.arange(time) if valid is None else np.flatnonzero(valid[lane])
        starts = [] if reset is None else np.flatnonzero(reset[lane][tokens]).tolist()
        bounds = [0, *starts, len(tokens)]
        position, mine = place, list[_Piece]()
        past = np.arange(halo)
        for number, (first, last) in enumerate(pairwise(bounds)):
            fresh = number > 0
            if fresh:
                position, past = 0, np.arange(0)
            run = tokens[first:last] + halo
            known = np.concatenate([past, run])
            done = 0
            while done < len(run):
                rooms = [period - (position - shift) % period for period, shift in ends]
                size = min(tile, *rooms, len(run) - done)
                here = len(past) + done
                begun = [room == period for room, period in zip(rooms, periods, strict=True)]
                closes = [room == size for room in rooms]
                mine.append(_Piece(known[max(0, here - halo) : here], run[done : done + size], begun, closes, fresh))
                fresh = False
                done, position = done + size, position + size
            past = known[max(0, len(known) - halo) :]
        cuts.append(mine)
        after.append(position)
        tails.append(past)
    tiles = max((len(mine) for mine in cuts), default=0)
    size = max((len(piece.own) for mine in cuts for piece in mine), default=1)
    index = np.zeros((lanes, tiles, halo + size), dtype=np.int64)
    ok = np.zeros((lanes, tiles, halo + size), dtype=bool)
    borders = np.zeros((len(periods), tiles, lanes), dtype=bool)
    fresh_tiles = np.zeros((tiles, lanes), dtype=bool)
    tail = np.zeros((lanes, halo), dtype=np.int64)
    tail_ok = np.zeros((lanes, halo), dtype=bool)
    begins = tuple(
        tuple(all(mine[number].begins[period] for mine in cuts if number < len(mine)) for period in range(len(periods)))
        for number in range(tiles)
    )
    for lane, mine in enumerate(cuts):
        for number, (before, own, _, closes, fresh) in enumerate(mine):
            filled = slice(halo - len(before), halo + len(own))
            index[lane, number, filled] = np.concatenate([before, own])
            ok[lane, number, filled] = True
            borders[:, number, lane], fresh_tiles[number, lane] = closes, fresh
        tail[lane, halo - len(tails[lane]) :] = tails[lane]
        tail_ok[lane, halo - len(tails[lane]) :] = True
    return Layout(
        torch.from_numpy(index),
        torch.from_numpy(ok),
        torch.from_numpy(borders),
        begins,
        torch.from_numpy(fresh_tiles) if fresh_tiles.any() else None,
        torch.tensor(after, dtype=torch.int64),
        torch.from_numpy(tail),
        torch.from_numpy(tail_ok),
        size,
    )
