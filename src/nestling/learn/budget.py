"""How much a run may read: a number of tokens, or as many as fit into some minutes.

Tokens are the clock of a run; time is only how the clock is set. A budget in minutes is turned into tokens
once, from the speed of the first steps (the very first is left out: it pays for allocation), and from then on
the run is as deterministic as one given in tokens. Should the machine change its speed so much that the end
would miss the time asked for by more than a twentieth, the total is set anew. Progress, which drives the
learning rate, is then bent, never broken: it is linear in the tokens from where it stands to 1 at the new
total, so that the schedule is always complete and has no jump. Whoever keeps checkpoints writes one whenever
`observe` says that the total changed; then a resumed run never continues from before a decision that time made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nestling.config import SettingError

CALIBRATION_STEPS = 12
TOLERANCE = 0.05


@dataclass
class Budget:
    """Exactly one of `tokens` (≥ 1) and `minutes` (> 0) is given; the other fields are the budget's memory (see
    `state_dict`).
    """

    tokens: int | None = None
    minutes: float | None = None
    total: int | None = None
    """Tokens after which the run is complete; None until a budget in minutes has been calibrated."""
    bend_tokens: int = 0
    bend_progress: float = 0.0
    mark_tokens: int = 0
    mark_seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.minutes is None):
            raise SettingError(
                f"budget: give either tokens or minutes (got tokens={self.tokens}, minutes={self.minutes})."
            )
        if self.tokens is not None and self.tokens < 1:
            raise SettingError(f"tokens: got {self.tokens}, but a run needs at least 1.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise SettingError(f"minutes: got {self.minutes}, but a run needs more than 0 (and an end).")
        if self.tokens is not None:
            self.total = self.tokens

    def progress(self, tokens: int) -> float:
        """The share of the budget spent after `tokens`: 0 at the start and while calibrating, 1 at the end."""
        if self.total is None:
            return 0.0
        if tokens >= self.total:
            return 1.0
        share = (tokens - self.bend_tokens) / (self.total - self.bend_tokens)
        return self.bend_progress + (1 - self.bend_progress) * share

    def observe(self, tokens: int, seconds: float) -> bool:
        """Take note that `tokens` were read after `seconds` of running; called once after every step.

        Returns True if the total was set or changed. Without `minutes` it does nothing, so a run in tokens
        never looks at the clock.
        """
        if self.minutes is None:
            return False
        self.steps += 1
        limit = 60 * self.minutes
        if self.steps == 1:
            self.mark_tokens, self.mark_seconds = tokens, seconds
        if self.total is None:
            # A step may be slow beside a short budget: then fewer of them must do.
            if self.steps < CALIBRATION_STEPS and (self.steps == 1 or seconds < 0.1 * limit):
                return False
        elif seconds - self.mark_seconds < TOLERANCE * limit or tokens >= self.total:
            return False
        read, took = tokens - self.mark_tokens, max(seconds - self.mark_seconds, 1e-6)
        self.mark_tokens, self.mark_seconds = tokens, seconds
        expected_end = seconds if self.total is None else seconds + (self.total - tokens) * took / max(read, 1)
        if self.total is not None and abs(expected_end - limit) <= TOLERANCE * limit:
            return False
        self.bend_progress, self.bend_tokens = self.progress(tokens), tokens
        self.total = tokens + max(int((limit - seconds) * read / took), 1)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain numbers; `Budget(**state)` is the same budget."""
        return asdict(self)
