"""A call cut into tiles, what goes from group to group of them, and the way back to a series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestling.memory import pieces
from nestling.memory.gates import Factor
from nestling.memory.inputs import Inputs, surely
from nestling.memory.layout import Layout
from nestling.memory.retentions import per_channel
from nestling.memory.state import Tail, Weights

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

T = TypeVar("T")
GROUP = 4  # tiles recomputed together in the backward pass, at least


class Tiles(NamedTuple):
    """Inputs of a call cut into tiles: `[lane, head, tile, …]`.

    alive, present: bool `[lane, 1, tile, …]`, as in `coefficients`;  None: all
    """

    q: Tensor
    k: Tensor
    v: Tensor
    erase: Tensor | None
    lr: Tensor
    retention: Factor | None
    momentum: Factor | None
    window: Tensor | None
    alive: Tensor | None
    present: Tensor | None

    def groups(self) -> list[Tiles]:
        """Groups of tiles. Taken apart at once, as the gradient of a slice is as large as the whole."""
        size = group_size(self.q.shape[2])
        count = -(-self.q.shape[2] // size)

        def split(x: Tensor | None) -> Sequence[Any]:
            return (None,) * count if x is None else torch.split(x, size, 2)

        def split_gate(x: Factor | None) -> Sequence[Any]:
            if x is None:
                return split(None)
            return [Factor(*parts) for parts in zip(split(x.log), split(x.zero), split(x.value), strict=True)]

        parts = (split_gate(x) if x is None or isinstance(x, Factor) else split(x) for x in self)
        return [Tiles(*part) for part in zip(*parts, strict=True)]


class Group(Protocol[T]):
    """Tiles first … last − 1: outputs, what goes on to the next group, and a note per tile."""

    def __call__(self, first: int, last: int, running: T, /) -> tuple[Tensor, T, list[Weights]]: ...


def behind(tail: Tail | None, k: Tensor, v: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and which of them are usable, behind those of the window before them."""
    if tail is None:
        return k, v, fine
    return torch.cat([tail.key, k], 2), torch.cat([tail.value, v], 2), torch.cat([tail.ok, fine], 1)


def tiles(spec: MemorySpec, x: Inputs, cut: Layout) -> Tiles:
    """A call's inputs, with those of a window before it, cut as the layout says."""
    halo = spec.bias.window - 1
    keys, values, usable = behind(x.state.tail, x.k, x.v, x.fine)
    own = own_tokens(cut, halo)

    def pick(x: Tensor) -> Tensor:
        return gather(x, own, cut)

    lr = pick(x.lr)
    retention = None if x.retention is None else x.retention.map(pick)
    momentum = None if x.momentum is None else x.momentum.map(pick)
    erase = None if x.erase is None else pick(x.erase)
    window = None if x.window is None else pick(x.window)
    if spec.bias.window > 1 and window is None:
        window = lr.new_ones(*lr.shape, spec.bias.window)
    alive, present = None, None
    if cut.ok is not None or not surely(x.fine):
        present = gather(usable.unsqueeze(1), cut.tokens, cut)
        if cut.ok is not None:
            present = present & cut.ok.to(present.device).unsqueeze(1)
        alive = present[..., halo:]
        lr = torch.where(alive, lr, 0.0)
        erase = None if erase is None else torch.where(alive, erase, 0.0)
        if retention is not None:
            retention = retention.masked(alive.unsqueeze(-1) if per_channel(spec.retention) else alive)
        momentum = None if momentum is None else momentum.masked(alive)
    keys, values = gather(keys, cut.tokens, cut), gather(values, cut.tokens, cut)
    return Tiles(pick(x.q), keys, values, erase, lr, retention, momentum, window, alive, present)


def by_groups(group: Group[T], count: int, running: T, *, again: bool = True) -> tuple[Tensor, T, list[Weights]]:
    """Run `count` tiles, a few at a time.

    again: in a backward pass a group is computed again instead of kept, so that memory does not grow with its insides.
    Returns outputs `[lane, head, tile, …]`, what goes on to the next call, and notes.
    """
    outputs, notes = [], list[Weights]()
    size = group_size(count)
    for first in range(0, count, size):
        last = min(first + size, count)
        if again and torch.is_grad_enabled() and count > size and not pieces.uncut():
            y, running, noted = checkpoint(
                group, first, last, running, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            y, running, noted = group(first, last, running)
        outputs.append(y)
        notes.extend(noted)
    return torch.cat(outputs, 2), running, notes


def group_size(count: int) -> int:
    """Of `count` tiles: what is kept between groups, and what a group keeps inside, then both grow with the root of the length.

    A tile keeps about twice as much inside as the weights that go from tile to tile.
    """
    return max(GROUP, isqrt(count // 2))


def series(notes: Sequence[Weights], cut: Layout, time: int) -> Weights:
    """Notes of tiles, each a tuple of `[lane, head, place]`, as series `[lane, head, time]`."""
    return tuple(back(torch.stack(parts, 2).unsqueeze(-1), cut, time).squeeze(-1) for parts in zip(*notes, strict=True))


def gather(x: Tensor, index: Tensor, cut: Layout) -> Tensor:
    """`[lane, head, stream, …]` → `[lane, head, tile, place, …]`."""
    if cut.ok is None:
        return x.reshape(*x.shape[:2], *index.shape[1:], *x.shape[3:])
    lanes = torch.arange(index.shape[0], device=x.device)[:, None]
    picked = x.transpose(1, 2)[lanes, index.to(x.device).flatten(1)]
    picked = picked.transpose(1, 2)
    return picked.reshape(*picked.shape[:2], *index.shape[1:], *picked.shape[3:])


def back(y: Tensor, cut: Layout, time: int) -> Tensor:
    """`[lane, head, tile, place, dim]` → `[lane, head, time, dim]`, zeros where no token was."""
    flat = y.flatten(2, 3)
    if cut.ok is None:
        return flat
    halo = cut.tokens.shape[-1] - cut.size
    own = torch.where(cut.ok[..., halo:], cut.tokens[..., halo:] - halo, time).flatten(1).to(y.device)
    out = flat.new_zeros(flat.shape[0], time + 1, flat.shape[1], flat.shape[3])
    lanes = torch.arange(own.shape[0], device=y.device)[:, None].expand_as(own)
    return out.index_put((lanes, own), flat.transpose(1, 2))[:, :time].transpose(1, 2)


def carried(
    tail: Tail, k: Tensor, v: Tensor, fine: Tensor, cut: Layout, mapped: Callable[[Tensor], Tensor] | None = None
) -> Tail:
    """The tail after a call that read these tokens.  mapped: what makes keys what the tail has of them, if anything does."""
    lanes, halo = torch.arange(cut.tail.shape[0], device=k.device)[:, None], tail.ok.shape[1]
    index = cut.tail.to(k.device)
    old, new = index.clamp_max(halo - 1), (index - halo).clamp_min(0)
    read = index >= halo  # in this call

    def last(before: Tensor, here: Tensor) -> Tensor:
        return here if surely(read) else torch.where(read[:, None, :, None], here, pick(before, old))

    def pick(rows: Tensor, at: Tensor) -> Tensor:
        return rows.transpose(1, 2)[lanes, at].transpose(1, 2)

    keys = pick(k, new)
    keys = last(tail.key, keys if mapped is None else mapped(keys))
    there = torch.where(read, fine[lanes, new], tail.ok[lanes, old])
    return Tail(keys, last(tail.value, pick(v, new)), there).only(cut.tail_ok)


def own_tokens(cut: Layout, halo: int) -> Tensor:
    """Indices of the tiles' own tokens in the call (without the tail in front)."""
    return (cut.tokens[..., halo:] - halo).clamp_min(0)
