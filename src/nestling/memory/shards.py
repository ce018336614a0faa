"""Shards side by side: a memory that is reset every S tokens reads its shards in parallel, as lanes (TNT, §4.1.1).

A shard does not see the others, so that a call's shards can be read at once. They are packed into rows of at most S tokens: a
whole shard is a row; what a call begins and ends with, and what resets leave of shards, share rows, with a reset between them.
The part of a shard that was open before the call goes first in its row, which starts from the lane's state; the call's last part
goes last, so that its row ends in the lane's new state. The paper folds whole shards of lanes that are in step; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestling import state as fast

Scan = Callable[..., tuple[Tensor, Any]]
Start = Callable[[int], Any]


class Packing(NamedTuple):
    """Where each token of a call goes.

    token   `[lane, row · size]` int64: the token at each place;  None: the tokens in their own order
    place   `[lane, time]` int64: the place of each token, row · size for one that is not valid;  None as above
    valid   bool `[lane · row, size]`: the place is filled;  None: all are
    reset   bool `[lane · row, size]`: a part begins here that is not a row's first;  None: nowhere
    ends    `[lane]` int64: the row that holds the lane's last part
    """

    rows: int
    size: int
    token: Tensor | None
    place: Tensor | None
    valid: Tensor | None
    reset: Tensor | None
    ends: Tensor

    def put(self, x: Tensor) -> Tensor:
        """`[lane, head, time, …]` → `[lane · row, head, size, …]`."""
        if self.token is not None:
            lanes = torch.arange(x.shape[0], device=x.device)[:, None]
            x = x.transpose(1, 2)[lanes, self.token.to(x.device)].transpose(1, 2)
        return torch.unflatten(x, 2, (self.rows, self.size)).transpose(1, 2).flatten(0, 1)

    def back(self, y: Tensor) -> Tensor:
        """The inverse of `put`, zeros at invalid tokens."""
        y = torch.unflatten(y, 0, (-1, self.rows)).transpose(1, 2).flatten(2, 3)
        if self.place is None:
            return y
        y = torch.nn.functional.pad(y, (0, 0, 0, 1))
        lanes = torch.arange(y.shape[0], device=y.device)[:, None]
        return y.transpose(1, 2)[lanes, self.place.to(y.device)].transpose(1, 2)


def pack(begins: Tensor, valid: Tensor | None, shard: int) -> Packing | None:
    """Pack a call of tokens, some of which begin a shard (bool `[lane, time]`), or None where they make a single row."""
    lanes, time = begins.shape
    fresh = begins.cpu().numpy()
    there = None if valid is None else valid.cpu().numpy()
    packed = [_rows(fresh[n], None if there is None else there[n], shard) for n in range(lanes)]
    rows = max(len(lane) for lane, _ in packed)
    if rows < 2:
        return None
    size = max(sum(map(len, row)) for lane, _ in packed for row in lane)
    token = np.zeros((lanes, rows, size), dtype=np.int64)
    place = np.full((lanes, time), rows * size, dtype=np.int64)
    filled, reset = np.zeros((2, lanes, rows, size), dtype=bool)
    for n, (lane, _) in enumerate(packed):
        for number, row in enumerate(lane):
            run = np.concatenate(row)
            token[n, number, : len(run)], filled[n, number, : len(run)] = run, True
            place[n, run] = number * size + np.arange(len(run))
            reset[n, number, np.cumsum([len(part) for part in row])[:-1]] = True
    ends = torch.tensor([end for _, end in packed])
    whole = rows * size == time and bool(filled.all())
    even = whole and bool((token.reshape(lanes, -1) == np.arange(rows * size)).all())
    return Packing(
        rows,
        size,
        None if even else torch.from_numpy(token).flatten(1),
        None if even else torch.from_numpy(place),
        None if filled.all() else torch.from_numpy(filled).flatten(0, 1),
        torch.from_numpy(reset).flatten(0, 1) if reset.any() else None,
        ends,
    )


def _rows(begins: np.ndarray, there: np.ndarray | None, shard: int) -> tuple[list[list[np.ndarray]], int]:
    """The parts of one lane's shards as rows of at most `shard` tokens, and the row of the last part.

    Row 0 begins with the part that goes on from the state, if the call begins inside a shard.
    """
    tokens = np.arange(len(begins)) if there is None else np.flatnonzero(there)
    if len(tokens) == 0:
        return [], 0
    starts = np.flatnonzero(begins[tokens])
    parts = np.split(tokens, starts[starts > 0])
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return [[first]], 0
    rows: list[list[np.ndarray]] = [[first]]
    room = [shard - len(first)]
    together = len(last) <= room[0]
    if together:
        room[0] -= len(last)
    open_rows = [0]
    for part in parts[1:-1]:
        home = next((n for n in open_rows if len(part) <= room[n]), None)
        if home is None:
            home = len(rows)
            rows.append([])
            room.append(shard)
            open_rows.append(home)
        rows[home].append(part)
        room[home] -= len(part)
        if room[home] == 0:
            open_rows.remove(home)
    if together:
        rows[0].append(last)
        return rows, 0
    home = next((n for n in open_rows if len(last) <= room[n]), len(rows))
    if home == len(rows):
        rows.append([])
    rows[home].append(last)
    return rows, home


def unfold(scan: Scan, packing: Packing, start: Start, state: Any, at_start: Tensor, inputs: Any) -> tuple[Tensor, Any]:
    """Read a packed call: answers in the tokens' own order, and the lanes' new states.

    scan      `scan(inputs, state, reset=…, valid=…)` of the memory
    start     states of so many lanes that have read nothing
    state     of the lanes;  at_start: bool `[lane]`, the call's first token begins a shard
    inputs    a tree of `[lane, head, time, …]`
    """
    rows, lanes = packing.rows, len(packing.ends)
    if bool(at_start.all()):  # nothing goes on from the states but their faults; a fresh state's anchor is its weights
        first = start(lanes * rows)
        faults = torch.cat([state.faults[:, None], first.faults.view(lanes, rows)[:, 1:]], 1).flatten()
        first = first._replace(faults=faults)
    else:
        fresh = start(lanes * (rows - 1))
        others = torch.arange(lanes * (rows - 1)).view(lanes, -1)
        own = fast.where(at_start, fast.take(fresh, others[:, 0]), state, keep=("faults",))
        order = torch.cat([torch.arange(lanes)[:, None], lanes + others], 1)
        first = fast.take(fast.stack([own, fresh]), order.flatten())
    put = cache(packing.put)  # what is read as two things is put there once
    y, ends = scan(fast.tree_map(put, inputs), first, reset=packing.reset, valid=packing.valid)
    faults = ends.faults.view(-1, rows).sum(1)
    new = fast.take(ends, torch.arange(lanes) * rows + packing.ends)
    return packing.back(y), new._replace(faults=faults)
