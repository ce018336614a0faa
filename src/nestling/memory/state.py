"""What a memory carries from call to call: plain tensors, lane first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.state import register

Weights = tuple[Tensor, ...]


def raised(w0: Sequence[Tensor]) -> Weights:
    """Initial weights in at least float32, as fast weights are (C7); constants where gradients are off."""
    live = torch.is_grad_enabled()
    return tuple((w if live else w.detach()).to(torch.promote_types(w.dtype, torch.float32)) for w in w0)


class Tail(NamedTuple):
    """The last c − 1 tokens, for a windowed bias: key, value `[lane, head, c−1, dim]`, ok bool `[lane, c−1]`."""

    key: Tensor
    value: Tensor
    ok: Tensor

    @classmethod
    def empty(cls, like: Tensor, length: int, key_dim: int, value_dim: int) -> Tail:
        """That of lanes that have read nothing, for weights like `[lane, head, in, out]`."""
        lanes, heads = like.shape[:2]
        return cls(
            like.new_zeros(lanes, heads, length, key_dim),
            like.new_zeros(lanes, heads, length, value_dim),
            torch.zeros(lanes, length, dtype=torch.bool, device=like.device),
        )

    def only(self, keep: Tensor) -> Tail:
        """The same tail without the tokens not in `keep` (bool, broadcast to `[lane, c−1]`): zeros stand in their places."""
        ok = self.ok & keep.to(self.ok.device)
        place = ok[:, None, :, None]
        return Tail(torch.where(place, self.key, 0.0), torch.where(place, self.value, 0.0), ok)


@register
class MemoryState(NamedTuple):
    """Fast weights of one memory, per lane.

    anchor    the (dual) weights at the start of the lane's current chunk, `[lane, head, in, out]` a layer
    weights   the (dual) weights after the last token
    momentum  the momentum S after the last token; empty where the rule has none
    tail      the tokens a windowed bias still needs; None otherwise
    position  tokens read since the lane's start or last reset, int64 `[lane]`, on the CPU: schedules never wait for a GPU
    faults    how often a guard had to step in, int64 `[lane]`
    """

    anchor: Weights
    weights: Weights
    momentum: Weights
    tail: Tail | None
    position: Tensor
    faults: Tensor

    @classmethod
    def fresh(cls, weights: Weights, *, momentum: bool = False, tail: Tail | None = None) -> MemoryState:
        """That of lanes that have read nothing; weights `[lane, head, in, out]`, momentum: whether the rule has one."""
        lanes, device = weights[0].shape[0], weights[0].device
        return cls(
            weights,
            weights,
            tuple(w.new_zeros(()).expand_as(w) for w in weights) if momentum else (),  # which takes no room
            tail,
            torch.zeros(lanes, dtype=torch.int64),
            torch.zeros(lanes, dtype=torch.int64, device=device),
        )


class Shapes(NamedTuple):
    """What a memory's `MemoryState` consists of, without lanes.

    weights   shape of each of its weights
    momentum  whether it has a momentum
    tail      tokens of the window tail, and how many numbers each of their keys and values has
    """

    weights: tuple[tuple[int, ...], ...]
    momentum: bool = False
    tail: tuple[int, int, int] = (0, 0, 0)


register(Tail)
