"""How far the levels of a continuum go when a window closes: clipping and step sizes, for the levels of a whole model at once.

    g ← g · min(1, c / ‖g‖)      ‖·‖ over a level's matrices, of the mean over the window's targets where the level takes means
    size = η · that share        divided by the losses of the level's chunk, where it takes means

They are a few numbers per lane, for which one level after the other would need some dozen operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.inputs import surely

if TYPE_CHECKING:
    from nestling.layers.continuum import Continuum

Matrices = tuple[Tensor, ...]
Gradients = tuple[Matrices, ...]
"""Per level, per weight matrix, `[lane, out, in]`; a level that does not learn from tokens has no matrices here."""


@dataclass(frozen=True)
class Window:
    """The windows that close now.

    targets   how many losses each has summed
    closing   bool `[lane]` (CPU): lanes whose window closes; the others are left alone
    position  `[lane]` (CPU): tokens read by then, which says what is due
    """

    targets: int
    closing: Tensor
    position: Tensor
    _due: dict[int, tuple[Tensor, bool]] = field(default_factory=dict, compare=False)

    def due(self, period: int) -> Tensor | None:
        """Lanes in which what has this period moves, bool `[lane]` (CPU); None: in no lane."""
        if period not in self._due:
            lanes = self.closing & (self.position % period == 0)
            self._due[period] = lanes, bool(lanes.any())
        lanes, some = self._due[period]
        return lanes if some else None


class Stride(NamedTuple):
    """One level's.

    found  its gradients, zeros in lanes that are not to use them;  said: `FeedForward.said`, for a rule that erases
    scale  the share of them that the clipping leaves, 0 in lanes that are not to use them, `[lane]`
    rate   η `[1]`
    size   by what they are taken for the level's own update `[lane]`
    bad    lanes whose gradients were not finite, bool `[lane]`; None: none
    """

    found: Matrices
    said: Matrices
    scale: Tensor
    rate: Tensor
    size: Tensor
    bad: Tensor | None


def strides(owns: Sequence[Continuum], gradients: Sequence[Gradients], window: Window) -> list[dict[int, Stride]]:
    """Of every continuum, by the numbers of the levels that learn; their matrices are of one dtype, on one device."""
    at = [
        (place, number)
        for place, own in enumerate(owns)
        for number, period in enumerate(own.periods)
        if period is not None
    ]
    levels = [owns[place].each()[number][1] for place, number in at]
    parts = []
    for (place, number), level in zip(at, levels, strict=True):
        count, own = len(level.weights()), gradients[place][number]
        if owns[place].outer == "first_order":
            own = tuple(g.detach() if g.requires_grad else g for g in own)
        parts.append((own[:count], own[count:]))
    flat = [g for found, _ in parts for g in found]
    if all(own.outer == "first_order" for own in owns):
        square = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in flat]).square()  # each in one pass
    else:  # differentiated in some modes, and the same in all
        square = torch.stack([g.square().sum((1, 2)) for g in flat])
    square = square.view(len(at), -1, square.shape[1]).sum(1)  # [level, lane]

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=square.dtype, device=square.device)[:, None]

    means = [owns[place].mean for place, _ in at]
    size = torch.where(square == 0, 1.0, square).sqrt()  # at 0 the root has no slope
    size = size / column([window.targets if mean else 1 for mean in means])
    scale = (column([owns[place].clip for place, _ in at]) / size).clamp_max(1)
    finite, closing = square.isfinite(), window.closing.to(square.device)
    use, bad = finite & closing, None
    if not surely(use):  # before any product, or NaN would reach the rate's gradient
        scale, bad = torch.where(use, scale, 0.0), ~finite & closing
    rate = F.softplus(torch.stack([level.rate for level in levels]).to(square.dtype))
    losses = column([per_chunk(owns[place], owns[place].periods[number], window) for place, number in at])
    strided = rate * scale / losses
    found: list[dict[int, Stride]] = [{} for _ in owns]
    rows = zip(at, parts, scale.unbind(), rate.unbind(), strided.unbind(), use, strict=True)
    for row, ((place, number), (own, said), of_scale, of_rate, of_size, used) in enumerate(rows):
        if bad is not None:
            own = tuple(torch.where(lanes(used, g), g, 0.0) for g in own)
        found[place][number] = Stride(own, said, of_scale, of_rate, of_size, None if bad is None else bad[row])
    return found


def per_chunk(own: Continuum, period: int | None, window: Window) -> float:
    """By what the gradients of a level of this period are divided: the losses of its chunk, where it takes means."""
    assert own.window is not None
    assert period is not None
    return window.targets * period / own.window if own.mean else 1.0


def lanes(per_lane: Tensor, like: Tensor) -> Tensor:
    """A number per lane beside what has more dimensions."""
    return per_lane.view(-1, *[1] * (like.dim() - 1))
