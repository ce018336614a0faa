"""What a memory carries from call to call: plain tensors, lane first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.state import register

Weights = tuple[Tensor, ...]


class Tail(NamedTuple):
    """The last c − 1 tokens, for a windowed bias: key, value `[lane, head, c−1, dim]`, ok bool `[lane, c−1]`."""

    key: Tensor
    value: Tensor
    ok: Tensor

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


register(Tail)
