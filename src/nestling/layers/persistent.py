"""Persistent memory: learned tokens before a lane's first (Titans, §3.3, eq. 19)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import state as fast
from nestling.layers.base import Layer
from nestling.layers.level import Level
from nestling.memory import Report


class Persistent(Layer):
    """A layer that reads [P ‖ x]: the learned, input-independent tokens P `[number, dim]` before a lane's first, and again at
    every reset. What it answers at them is dropped; its state is the layer's, of a lane that has read P.

    Args:
        layer: any sequence layer of constant growth or not.
        number: of persistent tokens; 0: the layer as it is.
        dim: width.
    """

    def __init__(self, layer: Layer, number: int, dim: int) -> None:
        super().__init__()
        if number < 0:
            raise ValueError(f"Persistent: number is {number}; expected at least 0")
        self.layer = layer
        self.tokens = nn.Parameter(torch.randn(number, dim)) if number else None
        """P. As large as what blocks hand to their sequence layers, which are normalized."""
        self.growth = layer.growth

    def start(self, lanes: int) -> Any:
        return self.opening(lanes)[1]

    def opening(self, lanes: int) -> tuple[Tensor | None, Any]:
        """What the layer answers at P `[1, number, dim]`, and the state behind it."""
        if self.tokens is None:
            return None, self.layer.start(lanes)
        if self.tokens.is_meta:  # shapes alone, which reading leaves as they are
            return self.tokens[None], self.layer.start(lanes)
        y, state = self.layer(torch.stack([self.tokens]), self.layer.start(1))
        return y, fast.tree_map(lambda leaf: leaf.expand(lanes, *leaf.shape[1:]), state)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        lanes, time, _ = x.shape
        state = self.start(lanes) if state is None else state
        fresh = reset if reset is None or valid is None else reset & valid
        if self.tokens is None or time == 0 or fresh is None or not bool(fresh.any()):
            y, state = self.layer(x, state, reset=reset, valid=valid, report=report)
            return y, state
        # Every token moves up by as many P as stand before it: the longer stream is gathered from x and P side by side.
        number, device = len(self.tokens), x.device
        fresh = fresh.to(device)
        place = torch.arange(time, device=device) + number * fresh.cumsum(1)
        length = time + number * int(fresh.sum(1).max())
        ahead = torch.where(fresh[..., None], place[..., None] + torch.arange(-number, 0, device=device), length)
        source = torch.full((lanes, length + 1), -1, device=device)
        source.scatter_(1, place, torch.arange(time, device=device).expand(lanes, -1))
        source.scatter_(1, ahead.flatten(1), torch.arange(time, time + number, device=device).repeat(lanes, time))
        source = source[:, :length]
        filled, index = source >= 0, source.clamp_min(0)
        if valid is not None:
            filled &= F.pad(valid.to(device), (0, number), value=True).gather(1, index)
        both = torch.cat([x, self.tokens.to(x.dtype).expand(lanes, -1, -1)], 1)
        note = None if report is None else Report()
        y, state = self.layer(_gather(both, index), state, reset=source == time, valid=filled, report=note)
        if report is not None and note is not None:
            note.hand_to(report, lambda series: series.gather(-1, _like(place, series)))
        return _gather(y, place), state

    def levels(self) -> list[Level]:
        first, *others = (replace(level.under("layer", ""), name=level.name) for level in self.layer.levels())
        return [replace(first, params=(*first.params, *self.own("layer"))), *others]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x `[lane, time, dim]` at the places index `[lane, n]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _like(place: Tensor, series: Tensor) -> Tensor:
    """place `[lane, n]` as an index of the last dimension of a series `[lane, …, time]`."""
    return place.view(len(place), *[1] * (series.dim() - 2), -1).expand(*series.shape[:-1], -1)
