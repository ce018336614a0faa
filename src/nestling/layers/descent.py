"""What the levels of a continuum do with gradients when a window closes (Nested Learning, eq. 71 and 72).

What the outer loop sees of an update (the paper does not say) is a setting, `outer`:

    first_order  the gradients are constants: θ₀ is trained where it serves, η through the updates it makes
    full         the gradients are differentiated in turn: the exact gradient of all that the model computes
    n            full, but with every n-th update of a level, counted from the lane's position 0, all that it has learned becomes
                 a constant: no gradient passes more than n − 1 of its updates
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import state as fast
from nestling.layers.low_rank import Kept, Whole, full, like
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
Matrices = tuple[Tensor, ...]
Gradients = tuple[Matrices, ...]
"""Per level, per weight matrix, `[lane, out, in]`; a level that does not learn from tokens has no matrices here."""
Moved = tuple[tuple[Kept, ...], ...]
"""The same, some of them as products of low rank."""
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


class Window(NamedTuple):
    """The windows that close now.

    targets   how many losses each has summed
    closing   bool `[lane]` (CPU): lanes whose window closes; the others are left alone
    position  `[lane]` (CPU): tokens read by then, which says what is due
    """

    targets: int
    closing: Tensor
    position: Tensor

    def due(self, period: int) -> Tensor:
        """Lanes in which what has this period moves, bool `[lane]` (CPU)."""
        return self.closing & (self.position % period == 0)


def check_outer(outer: object) -> None:
    """Refuse what is no setting."""
    if outer in ("first_order", "full"):
        return
    if not isinstance(outer, int) or isinstance(outer, bool) or outer < 2:
        raise ValueError(
            f"Continuum: outer is {outer!r}; expected first_order, full, or a whole number n of at least 2: truncated, so that "
            "gradients pass n − 1 updates of a level"
        )


def learn(own: Continuum, state: ContinuumState, gradients: Gradients, window: Window) -> ContinuumState:
    """See `Continuum.learn`. All levels that are due move at once, by gradients taken at the old weights."""
    for number, (period, level) in enumerate(own.each()):
        if period is None:
            continue
        found = gradients[number]
        if own.outer == "first_order":
            found = tuple(g.detach() for g in found)
        count = len(state.delta[number])
        found, said = found[:count], found[count:]
        found, scale, bad = _bounded(own, found, window)
        if own.rule.erases:
            state = _take_in(own, state, number, said, ~bad, window)
        state = state._replace(faults=state.faults + bad)
        rate = F.softplus(level.rate.to(scale.dtype))
        state = _descend(own, state, number, found, scale, rate, window)
        if number in own.slower:
            state = _move_base(own, state, number, found, scale, window)
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


def _bounded(own: Continuum, found: Matrices, window: Window) -> tuple[Matrices, Tensor, Tensor]:
    """The gradients of a level, zeros in lanes that are not to use them; the share of them that the clipping leaves `[lane]`;
    and in which lanes they were not finite."""
    square = torch.stack([_square(own, g) for g in found]).sum(0)
    size = torch.where(square == 0, 1.0, square).sqrt()  # at 0 the root has no slope
    if own.mean:
        size = size / window.targets
    closing = window.closing.to(square.device)
    finite = square.isfinite()
    use, scale = closing & finite, (own.clip / size).clamp_max(1)
    if not surely(use):  # before any product, or NaN would reach the rate's gradient
        scale = torch.where(use, scale, 0.0)
        found = tuple(torch.where(_lanes(use, g), g, 0.0) for g in found)
    return found, scale, ~finite & closing


def _take_in(
    own: Continuum, state: ContinuumState, number: int, said: Matrices, whole: Tensor, window: Window
) -> ContinuumState:
    """For a rule that erases: what the weights said to a window's inputs, `FeedForward.said`, summed up where the rule keeps it,
    in lanes whose gradients are whole."""
    period = own.periods[number]
    assert period is not None
    assert own.window is not None
    tokens = own.window - own.alone  # without the model's loss, a level is not asked at the last
    use = whole & window.closing.to(whole.device)
    said = tuple(torch.where(_lanes(use, x), x, 0.0) for x in said)
    steps = _scaled(_size(own, use.to(said[0].dtype), period, window._replace(targets=tokens)), said)
    kept = tuple((m[0] + s, *m[1:]) for m, s in zip(state.memory[number], steps, strict=True))
    return state._replace(memory=_put(state.memory, number, kept))


def _descend(
    own: Continuum,
    state: ContinuumState,
    number: int,
    found: Matrices,
    scale: Tensor,
    rate: Tensor,
    window: Window,
) -> ContinuumState:
    """A level's own update, with its inner rule."""
    period = own.periods[number]
    assert period is not None
    remembers = bool(state.memory)
    slow = period != own.window
    # A rule with a memory scales what it answers.
    size = _size(own, scale if remembers else rate * scale, period, window)
    steps: Matrices = ()
    if slow:
        steps = _moved(state.pending[number], size, found)
    elif remembers:
        steps = _scaled(size, found)
    due = window.due(period)
    if bool(due.any()):
        memory, old = state.memory, state.delta[number]
        kept: tuple[Matrices, ...] = ()
        if remembers:
            answers = [own.rule.step(s, m) for s, m in zip(steps, memory[number], strict=True)]
            share = own.rule.size(rate)
            new = tuple(full(x) - share * d for x, (d, _) in zip(old, answers, strict=True))
            kept = tuple(m for _, m in answers)
        else:
            new = _less(old, steps) if slow else _moved(old, -size, found)
        delta, broken = _update(own, old, new, due)
        if remembers:
            take = due.to(broken.device) & (~broken | own.rule.erases)  # sums of a chunk end with it in any case
            kept = tuple(where(take, a, b) for a, b in zip(kept, memory[number], strict=True))
            memory = _put(memory, number, tuple(_cut(own, m, period, window) for m in kept))
        delta = _cut(own, delta, period, window)
        state = state._replace(delta=_put(state.delta, number, delta), memory=memory, faults=state.faults + broken)
        if slow:
            steps = where(due, tuple(torch.zeros_like(s) for s in steps), steps)
    if slow:
        held = _hold(own, window.closing, steps, state.pending[number])
        state = state._replace(pending=_put(state.pending, number, held))
    return state


def _move_base(
    own: Continuum, state: ContinuumState, number: int, found: Matrices, scale: Tensor, window: Window
) -> ContinuumState:
    """Nested: the next slower level moves the initial weights of this one, by its gradients at the adapted weights (MAML of first
    order), and puts it back to them."""
    period, mover = own.each()[own.slower[number]]
    assert period is not None
    size = _size(own, F.softplus(mover.rate.to(scale.dtype)) * scale, period, window)
    steps = _moved(state.moving[number], size, found)
    due = window.due(period)
    if bool(due.any()):
        base, broken = _update(own, state.base[number], _less(state.base[number], steps), due)
        base = _cut(own, base, period, window)
        steps = where(due, tuple(torch.zeros_like(s) for s in steps), steps)
        delta = where(due, base, state.delta[number])
        memory = state.memory
        if memory:
            anew = (own.rule.start(full(d)) for d in delta)
            fresh = tuple(where(due, a, b) for a, b in zip(anew, memory[number], strict=True))
            memory = _put(memory, number, fresh)
        state = state._replace(
            base=_put(state.base, number, base),
            delta=_put(state.delta, number, delta),
            memory=memory,
            faults=state.faults + broken,
        )
    held = _hold(own, window.closing, steps, state.moving[number])
    return state._replace(moving=_put(state.moving, number, held))


def _size(own: Continuum, scale: Tensor, period: int, window: Window) -> Tensor:
    """By what a level of this period takes the gradients of a window `[lane]`, of their scale."""
    assert own.window is not None
    return scale / (window.targets * period / own.window) if own.mean else scale


def _scaled(size: Tensor, gradients: Matrices) -> Matrices:
    """size · g in every lane."""
    return tuple(_lanes(size, g) * g for g in gradients)


def _moved(old: tuple[Kept, ...], size: Tensor, gradients: Matrices) -> Matrices:
    """old + size · g in every lane."""
    return tuple(_Step.apply(full(x), size, g) for x, g in zip(old, gradients, strict=True))  # type: ignore[no-untyped-call]


class _Step(torch.autograd.Function):
    """x + size · g; a gradient g that is a constant is multiplied once on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(size, g)
        return torch.addcmul(x, _lanes(size, g), g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size, g = ctx.saved_tensors
        _, sized, moving = ctx.needs_input_grad
        return grad, (grad * g).sum((1, 2)) if sized else None, _lanes(size, g) * grad if moving else None


def _less(old: tuple[Kept, ...], steps: Matrices) -> Matrices:
    """old − steps."""
    return tuple(full(x) - s for x, s in zip(old, steps, strict=True))


def _square(own: Continuum, g: Tensor) -> Tensor:
    """Sum of the squares in every lane."""
    if own.outer != "first_order":
        return g.square().sum((1, 2))  # differentiated in some modes, and the same in all
    size: Tensor = torch.linalg.vector_norm(g, dim=(1, 2))  # in one pass
    return size.square()


def _cut(own: Continuum, x: Held, period: int, window: Window) -> Held:
    """Without its history in lanes where a truncated stretch ends."""
    if isinstance(own.outer, str):
        return x
    ends = window.due(own.outer * period)
    return where(ends, fast.detach(x), x) if bool(ends.any()) else x


def _update(own: Continuum, old: tuple[Kept, ...], new: Matrices, due: Tensor) -> tuple[tuple[Kept, ...], Tensor]:
    """New matrices in lanes that are due, unless they are not finite; and in which lanes they were not."""
    total = sum(d.sum((1, 2)) for d in new)
    assert isinstance(total, Tensor)
    broken = due.to(total.device) & ~total.isfinite()
    return _hold(own, due.to(total.device) & ~broken, new, old), broken


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


def _lanes(per_lane: Tensor, like: Tensor) -> Tensor:
    return per_lane.view(-1, *[1] * (like.dim() - 1))


def _put(items: tuple[T, ...], number: int, item: T) -> tuple[T, ...]:
    return (*items[:number], item, *items[number + 1 :])
