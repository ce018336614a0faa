"""What the levels of a continuum do with gradients when a window closes (Nested Learning, eq. 71 and 72).

What the outer loop sees of an update (the paper does not say) is a setting, `outer`:

    first_order  the gradients are constants: θ₀ is trained where it serves, η through the updates it makes
    full         the gradients are differentiated in turn: the exact gradient of all that the model computes
    n            full, but with every n-th update of a level, counted from the lane's position 0, all that it has learned becomes
                 a constant: no gradient passes more than n − 1 of its updates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import state as fast
from nestling.layers.low_rank import Kept, Whole, full, like
from nestling.layers.stride import Gradients, Matrices, Stride, Window, lanes, per_chunk, strides
from nestling.memory.inputs import surely
from nestling.state import register

if TYPE_CHECKING:
    from nestling.layers.continuum import Continuum
    from nestling.layers.pieces import Piece
    from nestling.memory import Report

T = TypeVar("T")
Held = TypeVar("Held", bound=tuple[Kept, ...])
Outer = Literal["first_order", "full"] | int
Signal = Literal["task", "local"]
Moved = tuple[tuple[Kept, ...], ...]
"""Like `Gradients`, some of them as products of low rank."""
Used = tuple[tuple[Kept | Whole, ...], ...]
"""The same, or the weights with them."""


@register
class ContinuumState(NamedTuple):
    """Fast weights of one continuum, per lane.

    delta    Δ = θ − θ₀ of every level
    pending  Σ η∇L since the level's last update; empty for levels that are updated with every window
    base     nested: the deviation that a level is put back to; empty otherwise, and for the slowest
    moving   nested: Σ η∇L of a level since its base last moved, with the step size of the level that moves it
    faults   gradients or updates left out because they were not finite, int64 `[lane]`
    memory   what the inner rule remembers, per level and weight matrix; empty for gradient descent
    """

    delta: Moved
    pending: Moved
    base: Moved
    moving: Moved
    faults: Tensor
    memory: tuple[tuple[tuple[Tensor, ...], ...], ...] = ()


def check_outer(outer: object) -> None:
    """Refuse what is no setting."""
    if outer in ("first_order", "full"):
        return
    if not isinstance(outer, int) or isinstance(outer, bool) or outer < 2:
        raise ValueError(
            f"Continuum: outer is {outer!r}; expected first_order, full, or a whole number n of at least 2: truncated, so that "
            "gradients pass n − 1 updates of a level"
        )


def learn(
    owns: Sequence[Continuum], states: Sequence[ContinuumState], gradients: Sequence[Gradients], window: Window
) -> list[ContinuumState]:
    """See `Continuum.learn`; of several continua, side by side. All levels that are due move at once, by gradients taken at the
    old weights."""
    kinds = {(g.dtype, g.device) for own in gradients for level in own for g in level}
    if len(kinds) > 1:
        apart = zip(owns, states, gradients, strict=True)
        return [_learn(own, state, strides([own], [g], window)[0], window) for own, state, g in apart]
    taken = zip(owns, states, strides(owns, gradients, window), strict=True)
    return [_learn(own, state, stride, window) for own, state, stride in taken]


def _learn(own: Continuum, state: ContinuumState, taken: dict[int, Stride], window: Window) -> ContinuumState:
    for number, stride in taken.items():
        if own.rule.erases:
            state = _take_in(own, state, number, stride, window)
        if stride.bad is not None:
            state = state._replace(faults=state.faults + stride.bad)
        state = _descend(own, state, number, stride, window)
        if number in own.slower:
            state = _move_base(own, state, number, stride, window)
    return state


def note(report: Report, before: ContinuumState, after: ContinuumState, piece: Piece) -> None:
    """Size of every level's update, at the token that closed its chunk: `update` `[lane, level, n]`; and the faults."""
    last = F.one_hot((piece.length - 1).clamp_min(0), piece.at.shape[1])
    sizes = [
        torch.stack([(b - a).square().sum((1, 2)) for a, b in zip(x, y, strict=True)]).sum(0).sqrt()
        for x, y in zip(dense(before.delta), dense(after.delta), strict=True)
        if x
    ]
    size = torch.stack(sizes, 1).detach()
    report.add(update=size[:, :, None] * last.to(size.device)[:, None])
    report.count(faults=after.faults - before.faults)


def _take_in(own: Continuum, state: ContinuumState, number: int, stride: Stride, window: Window) -> ContinuumState:
    """For a rule that erases: what the weights said to a window's inputs, `FeedForward.said`, summed up where the rule keeps it,
    in lanes whose gradients are whole."""
    assert own.window is not None
    tokens = own.window - own.alone  # without the model's loss, a level is not asked at the last
    use = window.closing.to(stride.scale.device)
    use = use if stride.bad is None else use & ~stride.bad
    said = tuple(torch.where(lanes(use, x), x, 0.0) for x in stride.said)
    share = use.to(said[0].dtype) / per_chunk(own, own.periods[number], replace(window, targets=tokens))
    steps = _scaled(share, said)
    kept = tuple((m[0] + s, *m[1:]) for m, s in zip(state.memory[number], steps, strict=True))
    return state._replace(memory=_put(state.memory, number, kept))


def _descend(own: Continuum, state: ContinuumState, number: int, stride: Stride, window: Window) -> ContinuumState:
    """A level's own update, with its inner rule."""
    period = own.periods[number]
    assert period is not None
    remembers, slow, found = bool(state.memory), period != own.window, stride.found
    # A rule with a memory scales what it answers.
    size = stride.scale / per_chunk(own, period, window) if remembers else stride.size
    steps: Matrices = ()
    if slow:
        steps = _moved(state.pending[number], size, found)
    elif remembers:
        steps = _scaled(size, found)
    due = window.due(period)
    if due is not None:
        memory, old = state.memory, state.delta[number]
        kept: tuple[Matrices, ...] = ()
        if remembers:
            answers = [own.rule.step(s, m) for s, m in zip(steps, memory[number], strict=True)]
            share = own.rule.size(stride.rate)
            new = tuple(full(x) - share * d for x, (d, _) in zip(old, answers, strict=True))
            kept = tuple(m for _, m in answers)
        else:
            new = _less(old, steps) if slow else _moved(old, size, found, -1)
        delta, broken = _update(own, old, new, due)
        if remembers:
            take = due if broken is None else due.to(broken.device) & (~broken | own.rule.erases)
            # sums of a chunk end with it in any case
            kept = tuple(where(take, a, b) for a, b in zip(kept, memory[number], strict=True))
            memory = _put(memory, number, tuple(_cut(own, m, period, window) for m in kept))
        delta = _cut(own, delta, period, window)
        state = _counted(state._replace(delta=_put(state.delta, number, delta), memory=memory), broken)
        if slow:
            steps = where(due, tuple(torch.zeros_like(s) for s in steps), steps)
    if slow:
        held = _hold(own, window.closing, steps, state.pending[number])
        state = state._replace(pending=_put(state.pending, number, held))
    return state


def _move_base(own: Continuum, state: ContinuumState, number: int, stride: Stride, window: Window) -> ContinuumState:
    """Nested: the next slower level moves the initial weights of this one, by its gradients at the adapted weights (MAML of first
    order), and puts it back to them."""
    period, mover = own.each()[own.slower[number]]
    assert period is not None
    size = F.softplus(mover.rate.to(stride.scale.dtype)) * stride.scale / per_chunk(own, period, window)
    steps = _moved(state.moving[number], size, stride.found)
    due = window.due(period)
    if due is not None:
        base, broken = _update(own, state.base[number], _less(state.base[number], steps), due)
        base = _cut(own, base, period, window)
        steps = where(due, tuple(torch.zeros_like(s) for s in steps), steps)
        delta = where(due, base, state.delta[number])
        memory = state.memory
        if memory:
            anew = (own.rule.start(full(d)) for d in delta)
            fresh = tuple(where(due, a, b) for a, b in zip(anew, memory[number], strict=True))
            memory = _put(memory, number, fresh)
        moved = state._replace(
            base=_put(state.base, number, base), delta=_put(state.delta, number, delta), memory=memory
        )
        state = _counted(moved, broken)
    held = _hold(own, window.closing, steps, state.moving[number])
    return state._replace(moving=_put(state.moving, number, held))


def _scaled(size: Tensor, gradients: Matrices) -> Matrices:
    """size · g in every lane."""
    return tuple(lanes(size, g) * g for g in gradients)


def _moved(old: tuple[Kept, ...], size: Tensor, gradients: Matrices, sign: int = 1) -> Matrices:
    """old ± size · g in every lane."""
    moved: Matrices = _Step.apply(size, sign, *map(full, old), *gradients)  # type: ignore[no-untyped-call]
    return moved


class _Step(torch.autograd.Function):
    """x ± size · g of a level's matrices; gradients g that are constants are multiplied once on the way back."""

    @staticmethod
    def forward(ctx: Any, size: Tensor, sign: int, *given: Tensor) -> Matrices:
        count = len(given) // 2
        ctx.sign = sign
        ctx.save_for_backward(size, *given[count:])
        pairs = zip(given[:count], given[count:], strict=True)
        return tuple(torch.addcmul(x, lanes(size, g), g, value=sign) for x, g in pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size, *found = ctx.saved_tensors
        sized, _, *moving = ctx.needs_input_grad
        sign: int = ctx.sign
        of_size: Tensor | None = None
        of_found: Sequence[Tensor | None] = [None] * len(found)
        if sized:
            parts = (along(grad, g) for grad, g in zip(grads, found, strict=True))
            of_size = sign * torch.stack(list(parts)).sum(0)
        if any(moving[len(found) :]):
            of_found = [lanes(sign * size, grad) * grad for grad in grads]
        return of_size, None, *grads, *of_found


def along(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of matrices' entries, `[lane]`, on a CPU in one pass over both."""
    if a.device.type != "cpu":
        return (a * b).sum((1, 2))
    return torch.stack([torch.dot(x, y) for x, y in zip(a.flatten(1), b.flatten(1), strict=True)])


def _less(old: tuple[Kept, ...], steps: Matrices) -> Matrices:
    """old − steps."""
    return tuple(full(x) - s for x, s in zip(old, steps, strict=True))


def _cut(own: Continuum, x: Held, period: int, window: Window) -> Held:
    """Without its history in lanes where a truncated stretch ends."""
    if isinstance(own.outer, str):
        return x
    ends = window.due(own.outer * period)
    return x if ends is None else where(ends, fast.detach(x), x)


def _update(
    own: Continuum, old: tuple[Kept, ...], new: Matrices, due: Tensor
) -> tuple[tuple[Kept, ...], Tensor | None]:
    """New matrices in lanes that are due, unless they are not finite; and in which lanes they were not, None: in no lane."""
    total = sum(d.detach().sum((1, 2)) for d in new)
    assert isinstance(total, Tensor)
    finite = total.isfinite()
    if surely(finite):
        return _hold(own, due, new, old), None
    broken = due.to(total.device) & ~finite
    return _hold(own, due.to(total.device) & finite, new, old), broken


def _counted(state: ContinuumState, broken: Tensor | None) -> ContinuumState:
    """With the faults of these lanes."""
    return state if broken is None else state._replace(faults=state.faults + broken)


def _hold(own: Continuum, mask: Tensor, new: Matrices, old: tuple[Kept, ...]) -> tuple[Kept, ...]:
    """New matrices in lanes of the mask, in the form of the old ones."""
    exact = own.outer != "first_order"
    return where(mask, tuple(like(x, y, exact=exact) for x, y in zip(new, old, strict=True)), old)


def where(mask: Tensor, a: Held, b: Held) -> Held:
    """Per lane a where the mask is true, else b."""
    if surely(mask):
        return a
    chosen: Held = fast.where(mask, a, b)
    return chosen


def dense(moved: Moved) -> Gradients:
    """All matrices in full."""
    return tuple(tuple(full(x) for x in level) for level in moved)


def _put(items: tuple[T, ...], number: int, item: T) -> tuple[T, ...]:
    return (*items[:number], item, *items[number + 1 :])
