"""How the learning rate moves through a run: warm-up, then a cosine or a trapezoid.

With p the share of the budget that is spent (0…1) and n the tokens read or steps taken so far, the multiplier of the learning
rate is

    warm(n) · shape(p)        warm(n) = min(1, n / warmup)

    cosine     shape(p) = floor + (1 − floor) · ½ (1 + cos πp)
    trapezoid  shape(p) = 1 until p = 1 − decay, then linearly down to floor        [Hägele et al. 2024]
    constant   shape(p) = 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nestling.config import SettingError

Shape = Literal["cosine", "trapezoid", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A multiplier in [0, 1] of tokens read (or steps taken, in any unit) and of the budget's share spent; raises `SettingError`
    for impossible settings.
    """

    shape: Shape = "cosine"
    warmup: int = 0
    """Tokens (or steps) until the full learning rate; never more than a tenth of the budget, once that is known."""
    decay: float = 0.4
    """Share of the budget over which the trapezoid falls."""
    floor: float = 0.0
    """What is left of the learning rate at the end."""

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise SettingError(f"schedule: shape {self.shape!r}, but expected one of {', '.join(get_args(Shape))}.")
        if self.warmup < 0:
            raise SettingError(f"schedule: warmup is {self.warmup} tokens, but expected 0 or more.")
        if not 0 < self.decay <= 1:
            raise SettingError(f"schedule: decay is {self.decay}, but expected a share in (0, 1].")
        if not 0 <= self.floor <= 1:
            raise SettingError(f"schedule: floor is {self.floor}, but expected a share in [0, 1].")

    def __call__(self, tokens: int, progress: float, total: int | None = None) -> float:
        """The multiplier for the step that starts after `tokens`, at share `progress` of a budget of `total`
        tokens (None: not known yet).
        """
        warmup = self.warmup if total is None else min(self.warmup, total // 10)
        # The first step starts at 0 tokens; a multiplier of 0 would waste it, so the ramp starts one tenth up.
        warm = 1.0 if tokens >= warmup else max(tokens / warmup, 0.1)
        p = min(max(progress, 0.0), 1.0)
        if self.shape == "cosine":
            return warm * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * p)))
        if self.shape == "trapezoid" and p > 1 - self.decay:
            return warm * (self.floor + (1 - self.floor) * (1 - p) / self.decay)
        return warm
