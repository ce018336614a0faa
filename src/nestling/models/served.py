"""The weights that lanes use while they read, θ₀ + Δ, and how the gradient of θ₀ finds its way.

Where an update is Δ less a constant, the gradients of all the θ₀ + Δ of a call add up on their way through Δ to its start, and
what arrives there is θ₀'s. Adding them up a second time, window by window, would cost as much as the windows' own updates. So
inside of a call θ₀ is a constant, and Δ carries its gradient: it enters at the call's start and after a reset, and leaves at the
end and before a reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.layers.descent import ContinuumState, Used, dense
from nestling.layers.low_rank import Whole
from nestling.layers.stride import Gradients

if TYPE_CHECKING:
    from nestling.models.lm import LanguageModel, ModelState


class Served:
    """θ₀ + Δ, made anew where a level has moved: the slower ones serve for several windows."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def at(self, model: LanguageModel, delta: Sequence[Gradients]) -> list[Gradients]:
        """The weights that the lanes use, of every learning block."""
        return [self.of(model, number, own) for number, own in zip(model.learning, delta, strict=True)]

    def of(self, model: LanguageModel, number: int, delta: Gradients) -> Gradients:
        """Those of one block."""
        together = carried(model, number)
        return tuple(
            tuple(
                self._sum((number, which, n), weight, moved, together)
                for n, (weight, moved) in enumerate(zip(level.weights(), matrices, strict=False))
            )
            for which, (matrices, (_, level)) in enumerate(zip(delta, model.continuum(number).each(), strict=True))
        )

    def _sum(self, key: tuple[int, int, int], weight: Tensor, moved: Tensor, together: bool) -> Tensor:
        known = self._known.get(key)
        # What was made in inference mode is of no use to a window, which is differentiated in any mode.
        if known is None or known[0] is not moved or (known[1].is_inference() and torch.is_grad_enabled()):
            self._known[key] = moved, (weight.detach() if together else weight) + moved
        return self._known[key][1]


def carried(model: LanguageModel, number: int) -> bool:
    """Whether inside a call the gradient of a block's θ₀ goes with that of Δ: an update has to be Δ less a constant."""
    own = model.continuum(number)
    return not model.twice and own.rank is None and own.arrangement != "nested"


def used(model: LanguageModel, state: ModelState, served: Served) -> list[Used]:
    """What the lanes have learned, or with θ₀ where that is carried."""
    return [
        tuple(tuple(map(Whole, level)) for level in served.of(model, number, dense(c.delta)))
        if carried(model, number)
        else c.delta
        for number, c in zip(model.learning, state.continuum, strict=True)
    ]


def enter(model: LanguageModel, state: ModelState) -> ModelState:
    """Inside of a call: what arrives at a carried Δ is θ₀'s too."""
    return _passed(_Entry, model, state)


def leave(model: LanguageModel, state: ModelState) -> ModelState:
    """Outside again: what comes in for Δ alone is none of θ₀'s."""
    return _passed(_Exit, model, state)


def _passed(border: type[torch.autograd.Function], model: LanguageModel, state: ModelState) -> ModelState:
    if not torch.is_grad_enabled():
        return state

    def passed(number: int, own: ContinuumState) -> ContinuumState:
        if not carried(model, number):
            return own
        levels = [level for _, level in model.continuum(number).each()]
        delta = tuple(
            tuple(border.apply(*pair) for pair in zip(level.weights(), matrices, strict=False))  # type: ignore[no-untyped-call]
            for level, matrices in zip(levels, own.delta, strict=True)
        )
        return own._replace(delta=delta)

    owns = zip(model.learning, state.continuum, strict=True)
    return state._replace(continuum=tuple(passed(number, own) for number, own in owns))


class _Entry(torch.autograd.Function):
    """Δ, of weights θ₀ and Δ `[lane, …]`; its gradient is that of both."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, moved: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        asked, both = ctx.needs_input_grad
        if grad is None or not asked:
            return None, grad
        alone = len(grad) == 1 and not both  # else nobody may write to the one through the other
        return grad[0] if alone else grad.sum(0), grad


class _Exit(_Entry):
    """The same, and its gradient that of Δ alone: less what `_Entry` will give to θ₀."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None or not ctx.needs_input_grad[0]:
            return None, grad
        return -grad.sum(0), grad
