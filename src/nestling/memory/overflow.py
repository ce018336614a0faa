"""Numbers that leave their range inside a call: what they damage is read again, and nothing of it is silent.

The chunk engines take products over all tokens of a tile, in which a later token stands with a factor of 0; and 0 · ∞ is no
number. So that no token is damaged by one behind it, lanes in which something was not finite are read again in two halves, and
these likewise, down to the single token, where the definition's guards act: reading A + B is reading A, then B. Lanes that are
sound are read without those, and come out bit for bit as if nothing had happened.

    weights or momentum that a token makes not finite  go back to the anchor, momentum 0; a fault
    an answer that is not finite                       stays as it is, without derivatives; a fault
    a query that is not finite                         is answered with NaN; a fault

The first is the border guard, which need not wait for the border. A GPU is waited for once a call; a compiled call does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling import state as fast
from nestling.memory.inputs import all_finite, free, overflowed
from nestling.memory.report import Report
from nestling.memory.state import Weights

if TYPE_CHECKING:
    from nestling.memory.protocol import Call

Run = Callable[["Call", "Report | None"], tuple[Tensor, Any, Any]]
"""Answers, the new state, and the inputs as they were prepared."""
Start = Callable[[Sequence[Tensor], int], Any]
"""The state of so many lanes that have read nothing."""


def read(
    run: Run, call: Call, report: Report | None, start: Start, *, halve: bool, guarded: bool
) -> tuple[Tensor, Any]:
    """A call's answers and new state.

    halve    False where `run` goes token after token by itself
    guarded  the token guard looks at queries too, and answers those that are not finite as it does
    """
    whole, asked = guarded or all_finite(call.q), None
    if not whole:
        asked = torch.isfinite(call.q.detach()).all(-1, keepdim=True)
        call = call._replace(q=torch.where(asked, call.q, 0.0))
    y, new, x = _read(run, call, report, start, halve)
    if whole and all_finite(y):
        return y, new
    y = y if asked is None else torch.where(asked, y, torch.nan)
    lost = ~torch.isfinite(y.detach()).all(-1).all(1) & x.fine
    if x.valid is not None:
        lost = lost & x.valid.to(lost.device)
        y = torch.where(x.valid.to(y.device)[:, None, :, None], y, 0.0)
    lost = lost.sum(1)
    if report is not None:
        report.count(faults=lost)
    return y, new._replace(faults=new.faults + lost)


def _read(run: Run, call: Call, report: Report | None, start: Start, halve: bool) -> tuple[Tensor, Any, Any]:
    """The same without the faults of answers."""
    if torch.compiler.is_compiling() or not halve:
        return run(call, report)
    if call.q.shape[2] < 2:
        return _token(run, call, report)
    note = None if report is None else Report()
    y, new, x = run(call, note)
    damaged = _damaged(y, new, x)
    if damaged is not None:
        y, new, note = _again(run, call, report is not None, damaged, start)
    if report is not None and note is not None:
        note.hand_to(report, lambda series: series)
    return y, new, x


def _token(run: Run, call: Call, report: Report | None) -> tuple[Tensor, Any, Any]:
    """A token alone. An answer that is not finite must not be differentiated."""
    y, new, x = run(call, report)
    if y.requires_grad and torch.is_grad_enabled() and free(y) and not all_finite(y):
        lost = ~torch.isfinite(y.detach()).flatten(1).all(1).view(-1, 1, 1, 1)
        if bool(lost.any()):
            unasked, new, x = run(call._replace(q=torch.where(lost, 0.0, call.q)), None)
            y = torch.where(lost, y.detach(), unasked)
    return y, new, x


def _damaged(y: Tensor, new: Any, x: Any) -> Tensor | None:
    """Lanes in which something overflowed, bool `[lane]`, or None."""
    if free(y) and not bool((new.faults != x.state.faults).any()) and all_finite(y, *_numbers(new)):
        return None
    fine = x.fine if x.valid is None else x.fine | ~x.valid.to(x.fine.device)
    more = new.faults - x.state.faults - (~fine).sum(1)  # than the token guard's, which harms nobody
    damaged = (more != 0) | overflowed((y, *_numbers(new)), ())
    damaged = damaged & ~overflowed(_numbers(x.state), ())  # else there is nothing to be saved
    return damaged if bool(damaged.any()) else None


def _numbers(state: Any) -> Weights:
    """Each tensor of real numbers in a state, once."""
    return tuple({id(x): x for x in fast.leaves(state) if x.is_floating_point()}.values())


def _again(run: Run, call: Call, noting: bool, damaged: Tensor, start: Start) -> tuple[Tensor, Any, Report | None]:
    """The damaged lanes in two halves, and the others as if those had read nothing: in a graph that holds no NaN, and the way
    that a call without damage goes."""
    which = damaged.nonzero()[:, 0]
    note = Report() if noting else None
    if bool(damaged.all()):
        return (*_halves(run, call, note, start), note)
    whole = Report() if noting else None
    found, end, _ = run(_silenced(call, damaged, start), whole)
    y, new = _halves(run, _take(call, which), note, start)
    numbers = torch.arange(len(which), device=which.device)
    place = torch.zeros_like(damaged, dtype=torch.int64).index_put((which,), numbers)

    def wide(u: Tensor) -> Tensor:
        return u[place.to(u.device)]

    def merged(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(damaged.to(b.device).view(-1, *[1] * (b.dim() - 1)), wide(a), b)

    both = None if note is None or whole is None else note.merged(whole, merged)
    return merged(y, found), fast.where(damaged, fast.tree_map(wide, new), end), both


def _halves(run: Run, call: Call, report: Report | None, start: Start) -> tuple[Tensor, Any]:
    time = call.q.shape[2]
    outputs, state = [], call.state
    for part in (slice(0, time // 2), slice(time // 2, time)):
        y, state, _ = _read(run, _cut(call, part)._replace(state=state), report, start, True)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def _cut(call: Call, part: slice) -> Call:
    """Some of a call's tokens."""
    reset, valid = (None if mask is None else mask[:, part] for mask in (call.reset, call.valid))
    q, k, v = (u[:, :, part] for u in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v, gates=call.gates[part], reset=reset, valid=valid)


def _take(call: Call, lanes: Tensor) -> Call:
    """Some of a call's lanes."""
    reset, valid = (None if mask is None else mask[lanes.to(mask.device)] for mask in (call.reset, call.valid))
    state = None if call.state is None else fast.take(call.state, lanes)
    q, k, v = (u[lanes] for u in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v, gates=call.gates.map(lambda g: g[lanes]), state=state, reset=reset, valid=valid)


def _silenced(call: Call, lanes: Tensor, start: Start) -> Call:
    """The call with every token of some lanes refused, which stand as they began: large numbers would be met again."""
    mask = lanes.view(-1, 1, 1, 1)
    state = call.state
    if state is not None:
        began = iter(fast.leaves(start(call.w0, len(lanes))))

        def quiet(leaf: Tensor) -> Tensor:
            first = next(began)
            if not leaf.is_floating_point():
                return leaf
            none = first.to(leaf.dtype) if first.shape == leaf.shape else torch.zeros_like(leaf)  # a cache has grown
            return torch.where(lanes.view(-1, *[1] * (leaf.dim() - 1)), none, leaf)

        state = fast.tree_map(quiet, state)
    q, k = torch.where(mask, 0.0, call.q), torch.where(mask, torch.nan, call.k)
    return call._replace(q=q, k=k, state=state)
