"""What a continuum has learned before its state was cut from its history, as a function of its step sizes again.

A level that descends with steps of a size η' along directions that are constants to the outer loop has learned

    Δ = −η' Σ_i d_i,    so that    ∂L/∂η' = ⟨∂L/∂Δ, Δ⟩ / η'

whenever these steps were made (derived; for as long as η' was as it is now). An outer loop that cuts the state between its steps
would see only the updates that are served in the same segment: none of a level whose period is the segment's length or longer.
With this the step sizes are trained by what was learned in all of the carried text, as θ₀ is.

What is summed up for an update to come is of the same form, and so are the initial weights of nested levels, with the step size
of the level that moves them. Directions depend on earlier updates as well: that part is left out, as it is within a segment
where the outer gradient is of first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.layers.descent import ContinuumState, along
from nestling.layers.low_rank import Kept, LowRank, full

if TYPE_CHECKING:
    from nestling.layers.continuum import Continuum, FeedForward

SMALLEST = 1e-20  # a step size


def reattached(own: Continuum, state: ContinuumState) -> ContinuumState:
    """The same state, equal to the bit, from which gradients reach the step sizes η of its levels.

    Where `outer` is a number of updates it stays as it is: no gradient is to pass more of them. So do nested levels that are kept
    as products: what is theirs and what is their initial weights' cannot be told apart.
    """
    if not torch.is_grad_enabled() or isinstance(own.outer, int):
        return state
    if own.slower and own.rank is not None:
        return state
    delta, pending, base, moving = (list(field) for field in state[:4])
    for number, (period, level) in enumerate(own.each()):
        if period is None:
            continue
        size = own.rule.size(_rate(level))
        if not state.memory:  # a rule with a memory takes its size when it answers
            pending[number] = _made(size, pending[number])
        if number in own.slower:  # its initial weights are another level's to move
            mover, since = _rate(own.each()[own.slower[number]][1]), base[number]
            alone = tuple((full(x) - full(b)).detach() for x, b in zip(delta[number], since, strict=True))
            delta[number] = _made(mover, _made(size, delta[number], alone), since)
            base[number], moving[number] = _made(mover, since), _made(mover, moving[number])
        else:
            delta[number] = _made(size, delta[number])
    return state._replace(delta=tuple(delta), pending=tuple(pending), base=tuple(base), moving=tuple(moving))


def _rate(level: FeedForward) -> Tensor:
    """η."""
    return F.softplus(level.rate)


def _made(size: Tensor, whole: tuple[Kept, ...], parts: Sequence[Kept] | None = None) -> tuple[Kept, ...]:
    """Matrices, the parts of which were made by steps of this size; None: all of them were."""

    def one(x: Kept, part: Kept) -> Kept:
        if isinstance(x, LowRank):  # one factor for both, as the product is what was made
            return x._replace(left=_Made.apply(size, x.left, x.left))  # type: ignore[no-untyped-call]
        made: Tensor = _Made.apply(size, x, part)  # type: ignore[no-untyped-call]
        return made

    return tuple(one(x, part) for x, part in zip(whole, whole if parts is None else parts, strict=True))


class _Made(torch.autograd.Function):
    """x; what arrives at it is also the gradient of the size of the steps that made a part of it, ⟨∂x, part⟩ / size."""

    @staticmethod
    def forward(ctx: Any, size: Tensor, x: Tensor, part: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(size, part)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        size, part = ctx.saved_tensors
        if grad is None:
            return None, None, None
        total = along(grad, part).sum().to(size.dtype)
        # With steps of size 0 nothing was made, nor is it known what would have been; a little more than 0 is not to overflow.
        of_size = torch.where(size == 0, 0.0, total / size.clamp_min(SMALLEST))
        return of_size, grad, None
