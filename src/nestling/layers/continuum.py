"""The Continuum Memory System: a chain of feed-forward blocks that learn at different periods (Nested Learning, §7.1).

    y = MLP^(f_k)( … MLP^(f_1)(x))                        eq. 70, each block pre-norm and residual: u + MLP(RMSNorm(u))
    θ ← θ − Σ_{t in chunk} η ∇_θ L_t   after C^(ℓ) tokens  eq. 71, L the language-model loss

As state every lane keeps the deviation Δ = θ − θ₀ and what has been summed up since the level's last update; the weights used
are the live θ₀ + Δ, so that the outer loop trains θ₀ on every segment, and a reset is Δ = 0. When the gradients are taken is the
language model's business (`nestling.models.windows`), as they come from its loss; here is what a level does with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.level import Level, Period
from nestling.layers.mlp import SwiGLU
from nestling.memory.inputs import surely
from nestling.optim.inner import Gradient, InnerRule
from nestling.state import register

Moved = tuple[tuple[Tensor, ...], ...]
"""Per level, per weight matrix, `[lane, out, in]`; a level that does not learn from tokens has no matrices here."""


@register
class ContinuumState(NamedTuple):
    """Fast weights of one continuum, per lane.

    delta    Δ = θ − θ₀ of every level
    pending  Σ η∇L since the level's last update; empty for levels that are updated with every window
    faults   gradients or updates left out because they were not finite, int64 `[lane]`
    memory   what the inner rule remembers, per level and weight matrix; empty for gradient descent
    """

    delta: Moved
    pending: Moved
    faults: Tensor
    memory: tuple[tuple[tuple[Tensor, ...], ...], ...] = ()


class FeedForward(nn.Module):
    """One level: u + MLP(RMSNorm(u)), with the step size η = softplus(rate) of its inner updates (where it has any)."""

    def __init__(self, dim: int, hidden: int, rate: float | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, hidden)
        if rate is not None:
            self.rate = nn.Parameter(torch.tensor([rate + math.log(-math.expm1(-rate))]))

    def forward(self, u: Tensor, moved: tuple[Tensor, ...] = ()) -> Tensor:
        """u `[lane, time, dim]`; moved: what each lane adds to the weights of the MLP."""
        y: Tensor = u + self.mlp(self.norm(u), moved)
        return y

    def weights(self) -> tuple[Tensor, Tensor]:
        """θ₀: the matrices that tokens may move. Norm gains stay slow."""
        return self.mlp.up.weight, self.mlp.down.weight


class Continuum(nn.Module):
    """Sequential CMS (Nested Learning, eq. 70, 71 and 73), first applied = fastest (as drawn in its Figure 5).

    Args:
        dim: width.
        hidden: hidden width of every level.
        periods: tokens between two updates of each level, multiples of the fastest; None: never updated by tokens, the
            ordinary feed-forward block. `(None,)`, the default, is a transformer's.
        rate: initial η, one learned positive number per level (the paper does not say); None: the rule's own. It gets a
            gradient where an update is served inside a stretch that the outer loop differentiates: train on segments longer
            than the period.
        clip: largest norm of one window's (mean) gradient of one level.
        mean: average the gradients of a chunk instead of summing them, so that a useful η does not depend on the period.
        rule: how a level descends (eq. 71's f): `Gradient`, `Momentum`, `Adam` or `M3` of `nestling.optim.inner`, whose
            memories are part of the state. A chunk is one of their steps.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        periods: Sequence[int | None] = (None,),
        *,
        rate: float | None = None,
        clip: float = 1.0,
        mean: bool = True,
        rule: InnerRule | None = None,
    ) -> None:
        super().__init__()
        finite = [p for p in periods if p is not None]
        if not periods or any(not isinstance(p, int) or isinstance(p, bool) or p < 2 for p in finite):
            raise ValueError(
                f"Continuum: periods are {tuple(periods)}; expected at least one level, and at least 2 tokens each: "
                "the error of a token is known when the next one has come"
            )
        if any(p % min(finite) for p in finite):
            raise ValueError(
                f"Continuum: periods {tuple(finite)} must be multiples of the fastest, {min(finite)}: "
                "a gradient is taken once per fastest period"
            )
        self.rule: InnerRule = Gradient() if rule is None else rule
        rate = self.rule.rate if rate is None else rate
        if not 0 < rate < math.inf or not clip > 0:
            raise ValueError(f"Continuum: rate is {rate} and clip {clip}; expected positive numbers, the rate finite")
        self.periods, self.clip, self.mean = tuple(periods), clip, mean
        self.window = min(finite, default=None)
        """Tokens between two gradients: the fastest period. None: nothing here learns from tokens."""
        self.levels_ = nn.ModuleList(FeedForward(dim, hidden, None if p is None else rate) for p in periods)

    def start(self, lanes: int) -> ContinuumState | None:
        """Δ = 0 in every lane; None where nothing learns."""
        if self.window is None:
            return None

        def zeros(learns: bool, level: FeedForward) -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(lanes, *w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
                for w in (level.weights() if learns else ())
            )

        return ContinuumState(
            tuple(zeros(p is not None, level) for p, level in self._each()),
            tuple(zeros(p not in (None, self.window), level) for p, level in self._each()),
            torch.zeros(lanes, dtype=torch.int64, device=self.levels_[0].weights()[0].device),  # type: ignore[operator]
            self._remembers(tuple(zeros(p is not None, level) for p, level in self._each())),
        )

    def _remembers(self, weights: Moved) -> tuple[tuple[tuple[Tensor, ...], ...], ...]:
        """What the rule knows at first of weights like these; () for a rule without a memory."""
        found = tuple(tuple(self.rule.start(w) for w in level) for level in weights)
        return found if any(x for level in found for x in level) else ()

    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of a state's matrices without the lane: of each level's Δ, then of what it has pending."""
        own = [(p, tuple(tuple(w.shape) for w in level.weights())) for p, level in self._each()]
        return (
            *(shapes if p is not None else () for p, shapes in own),
            *(shapes if p not in (None, self.window) else () for p, shapes in own),
        )

    def forward(self, u: Tensor, delta: Moved | None = None) -> Tensor:
        """u `[lane, time, dim]` → the same; delta: the lanes' Δ of every level, None: all levels at θ₀."""
        for number, (_, level) in enumerate(self._each()):
            u = level(u, () if delta is None else delta[number])
        return u

    def learn(
        self, state: ContinuumState, gradients: Moved, targets: int, closing: Tensor, position: Tensor
    ) -> ContinuumState:
        """What the levels do when a window closes.

        gradients  of Σ_t L_t over the window's targets, per lane, like `state.delta`; constants (first-order outer gradient)
        targets    how many L_t the sum has
        closing    bool `[lane]` (CPU): lanes whose window closes now; the others are left alone
        position   `[lane]` (CPU): tokens read by then, which says what is due

        All levels that are due move at once, by gradients taken at the old weights. A gradient whose squared norm is not finite
        is left out, an update that would not be finite is forgotten; both are counted.
        """
        delta, pending, faults, memory = list(state.delta), list(state.pending), state.faults, list(state.memory)
        assert self.window is not None
        for number, (period, level) in enumerate(self._each()):
            if period is None:
                continue
            found = gradients[number]
            size = torch.stack([g.square().sum((1, 2)) for g in found]).sum(0).sqrt()
            if self.mean:
                size = size / targets
            finite = size.isfinite()
            faults = faults + (~finite & closing.to(finite.device))
            use = closing.to(finite.device) & finite
            scale = (self.clip / size).clamp_max(1) / (targets * period / self.window if self.mean else 1)
            if not surely(use):  # before any product, or NaN would reach the rate's gradient
                scale = torch.where(use, scale, 0.0)
                found = tuple(torch.where(_lanes(use, g), g, 0.0) for g in found)
            rate = F.softplus(level.rate.to(scale.dtype))
            step = scale if memory else rate * scale  # a rule with a memory scales what it answers
            steps = tuple(_lanes(step, g) * g for g in found)
            if period != self.window:
                steps = tuple(p + s for p, s in zip(state.pending[number], steps, strict=True))
                pending[number] = steps
            due = closing & (position % period == 0)
            if not bool(due.any()):
                continue
            moves = steps
            kept: tuple[tuple[Tensor, ...], ...] = ()
            if memory:
                answers = [self.rule.step(s, m) for s, m in zip(steps, memory[number], strict=True)]
                moves, kept = tuple(rate * d for d, _ in answers), tuple(m for _, m in answers)
            new = tuple(d - s for d, s in zip(state.delta[number], moves, strict=True))
            total = sum(d.sum((1, 2)) for d in new)
            assert isinstance(total, Tensor)
            broken = due.to(finite.device) & ~total.isfinite()
            faults = faults + broken
            take = due.to(finite.device) & ~broken
            done = due.to(finite.device)
            delta[number] = _where(take, new, state.delta[number])
            if memory:
                memory[number] = tuple(_where(take, a, b) for a, b in zip(kept, memory[number], strict=True))
            if period != self.window:
                pending[number] = _where(done, tuple(torch.zeros_like(s) for s in steps), steps)
        return ContinuumState(tuple(delta), tuple(pending), faults, tuple(memory))

    def levels(self) -> list[Level]:
        """Those that learn from tokens."""
        first = next((n for n, period in enumerate(self.periods) if period == self.window), None)
        return [
            Level(
                f"level{number}",
                Period(period, "token"),
                f"u + SwiGLU(RMSNorm(u)), hidden width {level.mlp.down.weight.shape[1]}",
                "next-token cross entropy of the whole model",
                "everything, as a deviation from the slow weights",
                f"{self.rule} on the chunk's " + ("mean" if self.mean else "sum"),
                "activations, and errors by backpropagation",
                "backpropagation",
                state_paths=(
                    f"delta.{number}",
                    f"pending.{number}",
                    f"memory.{number}",
                    *(["faults"] if number == first else []),
                ),
            )
            for number, (period, level) in enumerate(self._each())
            if period is not None
        ]

    def _each(self) -> list[tuple[int | None, FeedForward]]:
        return list(zip(self.periods, self.levels_, strict=True))  # type: ignore[arg-type]


def _lanes(per_lane: Tensor, like: Tensor) -> Tensor:
    return per_lane.view(-1, *[1] * (like.dim() - 1))


def _where(mask: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if surely(mask):
        return a
    return tuple(torch.where(_lanes(mask, x), x, y) for x, y in zip(a, b, strict=True))
