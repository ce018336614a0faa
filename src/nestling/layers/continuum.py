"""The Continuum Memory System: a chain of feed-forward blocks that learn at different periods (Nested Learning, §7.1).

    y = MLP^(f_k)( … MLP^(f_1)(x))                        eq. 70, each block pre-norm and residual: u + MLP(RMSNorm(u))
    θ ← θ − Σ_{t in chunk} η ∇_θ L_t   after C^(ℓ) tokens  eq. 71, L the language-model loss

Three arrangements (§7.1 of the paper):

    sequential   the chain above; all initial weights θ₀ are slow                                          eq. 73
    nested       the chain (eq. 72); a level's initial weights are fast weights of the next slower level, which moves them every
                 period of its own by the gradients summed up at the adapted weights (MAML of first order), and puts the faster
                 level back to them
    independent  y = u + Σ_ℓ a_ℓ MLP^(f_ℓ)(RMSNorm(u)): side by side on the same input, a_ℓ learned, 1/k at first     eq. 74

As state every lane keeps the deviation Δ = θ − θ₀ and what has been summed up since the level's last update; the weights used
are the live θ₀ + Δ, so that the outer loop trains θ₀ on every segment, and a reset is Δ = 0. When the gradients are taken is the
language model's business (`nestling.models.windows`), as they come from its loss; what a level does with them is in `descent`.
Levels may also learn by losses of their own, `error="local"`: then the continuum reads tokens by itself, see `local`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers import descent, local
from nestling.layers.descent import ContinuumState, Moved, Outer, Signal, Used
from nestling.layers.level import Level, Period
from nestling.layers.low_rank import Kept, LowRank, Whole, used, zeros
from nestling.layers.mlp import SwiGLU
from nestling.layers.norm import RMSNorm
from nestling.layers.stride import Gradients, Window
from nestling.memory import L2, Bias
from nestling.memory.biases import reads_threshold
from nestling.memory.norm import EPS
from nestling.memory.rules.delta import erasure
from nestling.optim.inner import Gradient, InnerRule

Arrangement = Literal["sequential", "nested", "independent"]


class FeedForward(nn.Module):
    """One level, without its residual path, with the step size η = softplus(rate) of its inner updates (where it has any)."""

    def __init__(self, dim: int, hidden: int, rate: float | None, *, values: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, hidden)
        if rate is not None:
            self.rate = nn.Parameter(torch.empty(1))
            self.step_by(rate)
        self.value = nn.Parameter(torch.full((dim,), local.FIRST_GAIN)) if values else None

    @torch.no_grad()
    def step_by(self, rate: float) -> None:
        """Make η this positive number."""
        self.rate.fill_(rate + math.log(-math.expm1(-rate)))

    def forward(self, u: Tensor, moved: tuple[Kept | Whole, ...] = ()) -> Tensor:
        """MLP(RMSNorm(u)), u `[lane, time, dim]`; moved: what each lane adds to the weights of the MLP, or uses instead."""
        y: Tensor = self.mlp(self.norm(u), moved)
        return y

    def said(self, u: Tensor, moved: tuple[Kept | Whole, ...]) -> tuple[Tensor, ...]:
        """What each weight matrix would lose if it forgot all that it says to its inputs: Σ_t (W x_t)x_tᵀ/‖x_t‖² `[lane, out,
        in]`. u and moved as in `forward`.
        """
        with torch.autocast(u.device.type, enabled=False):
            up, down = (used(w, d) for w, d in zip(self.weights(), moved, strict=True))
            x = self.norm(u.to(self.norm.weight.dtype)).to(up.dtype)
            first = x @ up.mT
            gate, value = first.chunk(2, -1)
            hidden = F.silu(gate) * value

            def lost(x: Tensor, read: Tensor) -> Tensor:
                return erasure(x, read, 1 / (x.square().sum(-1, keepdim=True) + EPS**2)).mT

            return lost(x, first), lost(hidden, hidden @ down.mT)

    def weights(self) -> tuple[Tensor, Tensor]:
        """θ₀: the matrices that tokens may move. Norm gains stay slow."""
        return self.mlp.up.weight, self.mlp.down.weight


class Continuum(nn.Module):
    """A CMS (Nested Learning, eq. 70–74) of any number of levels, applied in the order given: fastest first as drawn in its
    Figure 5, or otherwise.

    Args:
        dim: width.
        hidden: hidden width of every level.
        periods: tokens between two updates of each level, multiples of the fastest; None: never updated by tokens, the
            ordinary feed-forward block. `(None,)`, the default, is a transformer's.
        rate: initial η, one learned positive number per level (the paper does not say); None: the rule's own. It gets a
            gradient where an update is served: on carried states too, where the outer loop takes them through
            `nestling.layers.carried.reattached`, as `Learner` does; not with a number as `outer`, nor with nested levels of
            a rank, where the period has to be shorter than the segment.
        clip: largest norm of one window's (mean) gradient of one level.
        mean: average the gradients of a chunk instead of summing them, so that a useful η does not depend on the period.
        rule: how a level descends (eq. 71's f): `Gradient`, `Momentum`, `DGD`, `Adam` or `M3` of `nestling.optim.inner`, whose
            memories are part of the state. A chunk is one of their steps. Initial weights of nested levels move by gradient
            descent; a level that is put back to them remembers nothing.
        arrangement: "sequential", "nested" or "independent". Nested levels stand from fast to slow or from slow to fast, every
            period a multiple of the next faster one.
        outer: what the outer loop sees of an update: "first_order", "full", or a whole number n ≥ 2, truncated; see `descent`. It
            changes gradients alone. Beyond first order the graph of every window's gradient is built too, in every mode, and
            attention is computed by its formula. Default: "first_order"; with `local` errors, whose values learn through the
            updates alone, "full".
        error: what a level learns from: "task", the language model's loss (the paper); "local", a loss of its own, see `local`.
            Of a level's slow gain g, its `value`, the outer loop sees only updates that are made and served in one of its
            segments, in as far as their gradients were taken in it: hardly any of a level whose period is as long as a segment
            or longer, and none where it is a multiple of the segment. What a cut state has learned is a sum over tokens that
            are gone, from which the share of each channel's gain cannot be told, so that it is not handed on as η is.
        bias: the loss of `local` errors, default ½‖·‖².
        rank: what a lane has learned of a matrix is kept as a product of this rank, see `low_rank`; where a product would not be
            smaller, and by default everywhere, in full. Only for rules without a memory.
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
        arrangement: Arrangement = "sequential",
        outer: Outer | None = None,
        error: Signal = "task",
        bias: Bias | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        finite = [p for p in periods if p is not None]
        if error not in get_args(Signal):
            raise ValueError(f"Continuum: error is {error!r}; expected {', '.join(get_args(Signal))}")
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
        if arrangement not in get_args(Arrangement):
            raise ValueError(f"Continuum: arrangement is {arrangement!r}; expected {', '.join(get_args(Arrangement))}")
        rising = finite == sorted(finite)
        if arrangement == "nested" and any(slow % fast for fast, slow in pairwise(finite if rising else finite[::-1])):
            raise ValueError(
                f"Continuum: periods {tuple(finite)} of nested levels must go from fast to slow or from slow to fast, each a "
                "multiple of the next faster one"
            )
        outer = ("first_order" if error == "task" else "full") if outer is None else outer
        descent.check_outer(outer)
        if error == "local" and outer == "first_order":
            raise ValueError(
                "Continuum: outer is 'first_order' with error='local'; expected full, or a number of updates: the values of a "
                "local loss learn through the updates alone"
            )
        self.error: Signal = error
        self.bias: Bias = L2() if bias is None else bias
        if self.bias.window > 1 or reads_threshold(self.bias):
            raise ValueError(
                f"Continuum: bias is {self.bias}; expected a loss of one token without a threshold, as L2() or DotProduct()"
            )
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"Continuum: rank is {rank!r}; expected a whole number of at least 1, or None: in full")
        if rank is not None and self.rule.start(torch.zeros(1, 1, 1)):
            raise ValueError(
                f"Continuum: rank is {rank}, and {self.rule} remembers matrices as large as the weights; expected a rule without "
                "a memory, as Gradient(), or rank=None"
            )
        self.rank = rank
        self.periods, self.clip, self.mean, self.arrangement = tuple(periods), clip, mean, arrangement
        self.outer: Outer = outer
        learning = [n for n, p in enumerate(periods) if p is not None]
        self.slower = dict(pairwise(learning if rising else learning[::-1])) if arrangement == "nested" else {}
        """Nested: which level moves the initial weights of which."""
        self.window = min(finite, default=None)
        """Tokens between two gradients: the fastest period. None: nothing here learns from tokens."""
        self.levels_ = nn.ModuleList(
            FeedForward(dim, hidden, None if p is None else rate, values=error == "local" and p is not None)
            for p in periods
        )
        self.share = (
            nn.Parameter(torch.full((len(periods),), 1 / len(periods))) if arrangement == "independent" else None
        )

    def start(self, lanes: int) -> ContinuumState | None:
        """Δ = 0 in every lane; None where nothing learns."""
        if self.window is None:
            return None

        def none(learns: bool, level: FeedForward) -> tuple[Kept, ...]:
            return tuple(zeros(w, lanes, self.rank) for w in level.weights()) if learns else ()

        return ContinuumState(
            tuple(none(p is not None, level) for p, level in self.each()),
            tuple(none(p not in (None, self.window), level) for p, level in self.each()),
            tuple(none(n in self.slower, level) for n, (_, level) in enumerate(self.each())),
            tuple(none(n in self.slower, level) for n, (_, level) in enumerate(self.each())),
            torch.zeros(lanes, dtype=torch.int64, device=self.levels_[0].weights()[0].device),  # type: ignore[operator]
            self._remembers(tuple(none(p is not None, level) for p, level in self.each())),
        )

    def _remembers(self, weights: Moved) -> tuple[tuple[tuple[Tensor, ...], ...], ...]:
        """What the rule knows at first of weights like these; () for a rule without a memory, as with products always."""
        found = tuple(tuple(self.rule.start(w) for w in level if isinstance(w, Tensor)) for level in weights)
        return found if any(x for level in found for x in level) else ()

    def shapes(self, state: ContinuumState | None = None) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of a state's matrices without the lane, field after field, level after level, and at last of what the rule
        remembers. None: those that fit."""
        state = self.start(0) if state is None else state
        assert state is not None

        def shape(x: Kept) -> tuple[int, ...]:
            parts = x if isinstance(x, LowRank) else (x,)
            return tuple(n for part in parts for n in part.shape[1:])

        weights = tuple(tuple(shape(w) for w in level) for field in state[:4] for level in field)
        return weights + tuple(tuple(shape(x) for matrix in level for x in matrix) for level in state.memory)

    def forward(self, u: Tensor, delta: Used | None = None) -> Tensor:
        """u `[lane, time, dim]` → the same; delta: the lanes' Δ of every level, or θ₀ + Δ; None: all levels at θ₀."""
        return self.chain(u, delta)[0]

    def chain(self, u: Tensor, delta: Used | None = None) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and what every level was given."""
        x, inputs = u, list[Tensor]()
        for number, (_, level) in enumerate(self.each()):
            moved = () if delta is None else delta[number]
            inputs.append(u if self.share is None else x)
            answer = level(inputs[-1], moved)
            u = u + (answer if self.share is None else self.share[number] * answer)
        return u, inputs

    @property
    def alone(self) -> bool:
        """Whether its levels learn without the language model's loss, so that it carries a state as a sequence layer does."""
        return self.error == "local" and self.window is not None

    def learn(
        self, state: ContinuumState, gradients: Gradients, targets: int, closing: Tensor, position: Tensor
    ) -> ContinuumState:
        """What the levels do when a window closes.

        gradients  of Σ_t L_t over the window's targets, per lane, like `state.delta`; with a history where `outer` wants it;
                   for a rule that erases, behind those of every level, `FeedForward.said`
        targets    how many L_t the sum has
        closing    bool `[lane]` (CPU): lanes whose window closes now; the others are left alone
        position   `[lane]` (CPU): tokens read by then, which says what is due

        All levels that are due move at once, by gradients taken at the old weights. A gradient whose squared norm is not finite
        is left out, an update that would not be finite is forgotten; both are counted.
        """
        return descent.learn([self], [state], [gradients], Window(targets, closing, position))[0]

    def levels(self) -> list[Level]:
        """Those that learn from tokens."""
        movers = {slow: fast for fast, slow in self.slower.items()}
        first = next((n for n, period in enumerate(self.periods) if period == self.window), None)
        kept = "continuum." if self.alone else ""
        more = local.paths(self) if self.alone else {}
        task = self.error == "task"
        transfer = "backpropagation" if task else "initialization"
        return [
            Level(
                f"level{number}",
                Period(period, "token"),
                f"{'u +' if self.share is None else 'a ·'} SwiGLU(RMSNorm(u)), hidden width {level.mlp.down.weight.shape[1]}",
                "next-token cross entropy of the whole model"
                if task
                else f"{self.bias}, of its answer and its next input",
                "everything, as a deviation from the slow weights"
                + (f", of rank {self.rank} at most" if self.rank else ""),
                f"{self.rule} on the chunk's " + ("mean" if self.mean else "sum"),
                "activations, and errors by backpropagation" if task else "activations",
                f"{transfer}, and the initial weights of the next faster level" if number in movers else transfer,
                params=tuple(f"levels_.{number}.{name}" for name, _ in level.named_parameters()),
                state_paths=(
                    f"{kept}delta.{number}",
                    f"{kept}pending.{number}",
                    f"{kept}memory.{number}",
                    *(f"{kept}{field}.{movers[number]}" for field in ("base", "moving") if number in movers),
                    *([f"{kept}faults"] if number == first else []),
                    *more.get(number, ()),
                ),
            )
            for number, (period, level) in enumerate(self.each())
            if period is not None
        ]

    def each(self) -> list[tuple[int | None, FeedForward]]:
        return list(zip(self.periods, self.levels_, strict=True))  # type: ignore[arg-type]
