"""A long call in pieces, each made again in the backward pass: one piece's inside is there at a time, and the states between.

Lanes do not meet, a stream may be cut anywhere, and heads meet in the guards alone. So a call of many tokens is a loop over
lanes and heads, a few at a time, and along the time: the forward pass keeps the states between pieces, and the backward pass goes
back from piece to piece. Few memories at a time also stay in a core's cache. Should a guard step in where heads were taken
apart, those lanes are done once more with the heads together. A second derivative goes through the whole call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.gates import Gates
from nestling.memory.wanted import wanted
from nestling.state import growing, leaves, tree_map

if TYPE_CHECKING:
    from nestling.memory.protocol import Call

Run = Callable[["Call"], tuple[Tensor, Any]]
Grown = Callable[[Any], Sequence[Tensor]]
Optional = Sequence[Tensor | None]


LEAST = 2  # units of a piece
SMALL = 2**22  # numbers inside of a whole call that is not worth cutting
INSIDE = 4  # numbers that a scan keeps inside for each that goes in or out of a layer
FEW = 2**18  # numbers of the memories that are taken at once: enough for long products, few enough for a cache

WHOLE = slice(None)


class Size(NamedTuple):
    """How much a piece has at most of each."""

    lanes: int
    heads: int
    tokens: int


_FORCED: ContextVar[Size | None] = ContextVar("forced", default=None)
_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def of(size: Size) -> Iterator[None]:
    """Cut every call that can be cut into pieces of this size."""
    token = _FORCED.set(size)
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def whole() -> Iterator[None]:
    """Cut nothing, and make nothing again: what is inside a piece, and for counters of what work there is."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def uncut() -> bool:
    """Whether nothing is to be cut here."""
    return _WHOLE.get()


def fitting(shape: Sequence[int], like: Tensor, *, unit: int, state: float, inside: float, memories: int) -> Size:
    """Pieces of a call `[lane, head, time]` whose insides take as much room as all the states between them.

    like      one of the call's tensors: where there are many cores to fill, all memories are taken at once
    unit      tokens of which a piece has a multiple, LEAST times as many at least
    state     numbers that one memory hands on;  inside: that it keeps of one unit for its backward pass
    memories  to be taken at once, at least
    """
    lanes, heads, time = shape
    if time / unit * lanes * heads * inside < SMALL:
        return Size(lanes, heads, max(1, time))
    memories = max(memories, torch.get_num_threads()) if like.device.type == "cpu" else lanes * heads
    some_heads = min(heads, memories)
    some_lanes = min(lanes, -(-memories // heads))
    units = sqrt(time / unit * lanes * heads * state / (some_lanes * some_heads * inside))
    return Size(some_lanes, some_heads, max(LEAST, round(units)) * unit)


def scan(run: Run, call: Call, size: Size | None, grown: Grown | None = None) -> tuple[Tensor, Any] | None:
    """The call in pieces; None where one piece would do. With and without gradients, so that both give the same bits.

    run     a scan without pieces;  size: of pieces, None: not to be cut
    grown   those of a state's tensors `[lane, token, …]` that grow behind and never change: between pieces they are a part of the
            last state's
    """
    size = size if size is None else _FORCED.get() or size
    lanes, heads, time = call.q.shape[:3]
    if size is None or uncut() or call.q.numel() == 0:
        return None
    if lanes <= size.lanes and heads <= size.heads and time <= size.tokens:
        return None
    work = _Work(run, call, size, grown)
    given = work.given
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in given):
        y, ends, _ = work.forward(given, keep=False)
        return y, work.ended.fill(ends)
    y, *ends = _Pieces.apply(work, *given)  # type: ignore[no-untyped-call]
    return y, work.ended.fill(ends)


class _Tree:
    """A state's structure, which of its leaves are one and the same tensor, and where each of these has its heads."""

    def __init__(self, states: Sequence[Any]) -> None:
        columns = list(zip(*(leaves(state) for state in states), strict=True))
        known: dict[tuple[int, ...], int] = {}
        self.places = [known.setdefault(tuple(map(id, column)), len(known)) for column in columns]
        self.count = len(known)
        place = [2 if grows else 1 for grows in growing(states[0])]  # behind the dimension that grows
        self.heads = [place[self.places.index(n)] for n in range(self.count)]
        self._empty = tree_map(lambda x: x.new_empty(0), states[0])

    def distinct(self, state: Any) -> list[Tensor]:
        """Its tensors, each once."""
        found = dict(zip(reversed(self.places), reversed(leaves(state)), strict=True))
        return [found[n] for n in range(self.count)]

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """A state of this structure."""
        order = iter(self.places)
        return tree_map(lambda _: tensors[next(order)], self._empty)


class _Work:
    """A call, the tensors it is made of in one row, and how it is cut."""

    def __init__(self, run: Run, call: Call, size: Size, grown: Grown | None) -> None:
        self._run = run
        self.size = size
        self._grown = grown if call.reset is None and self.size.lanes == 1 else None  # else there are others in between
        self.shape = tuple(call.q.shape[:3])
        self.names = [name for name, _ in call.gates.items()]
        self.slow = len(call.w0)
        self.began = None if call.state is None else _Tree([call.state])
        self.ended: Any = None
        self.together: set[int] = set()
        """First lanes of parts whose heads are not taken apart."""
        self.trees: list[_Tree] = []
        of_state = [] if self.began is None else self.began.distinct(call.state)
        streams = [call.q, call.k, call.v, *(gate for _, gate in call.gates.items())]
        self.given: list[Tensor | None] = [*call.w0, *streams, call.reset, call.valid, *of_state]
        self.first = [0] * self.shape[0] if call.state is None else call.state.position.tolist()

    def call(self, given: Optional, state: Any) -> Call:
        """The call that such tensors make."""
        from nestling.memory.protocol import Call

        streams = given[self.slow : self.slow + 3 + len(self.names)]
        reset, valid = given[self.slow + len(streams) : self.slow + len(streams) + 2]
        q, k, v, *gates = streams
        assert q is not None
        assert k is not None
        assert v is not None
        w0 = [w for w in given[: self.slow] if w is not None]
        return Call(w0, q, k, v, Gates(**dict(zip(self.names, gates, strict=True))), state, reset, valid)

    def run(self, given: Optional, state: Any) -> tuple[Tensor, Any]:
        with whole():
            return self._run(self.call(given, state))

    def again(self, given: Optional) -> tuple[Tensor, ...]:
        """Everything at once."""
        state = None if self.began is None else self.began.fill([x for x in given[self._states :] if x is not None])
        y, end = self.run(given[: self._states], state)
        return (y, *self.ended.distinct(end))

    @property
    def _states(self) -> int:
        """Where the state's tensors begin."""
        return self.slow + 5 + len(self.names)

    def parts(self) -> list[tuple[slice, slice]]:
        """Lanes and heads that are taken together."""
        lanes, heads, _ = self.shape
        found = []
        for lane in range(0, lanes, self.size.lanes):
            some = heads if lane in self.together else self.size.heads
            few = [WHOLE] if some >= heads else [slice(head, min(head + some, heads)) for head in range(0, heads, some)]
            found += [(slice(lane, min(lane + self.size.lanes, lanes)), own) for own in few]
        return found

    def times(self, lanes: slice) -> list[slice]:
        """Cut at multiples of a piece's tokens, counted from the first of the lanes' start."""
        step, time = self.size.tokens, self.shape[2]
        cuts = [0, *range(step - self.first[lanes.start] % step, time, step), time]
        return [slice(a, b) for a, b in pairwise(cuts) if a < b]

    def view(self, n: int, x: Tensor | None, lanes: slice, heads: slice, time: slice) -> Tensor | None:
        """The part of the tensor number n that belongs to a piece."""
        if x is None:
            return None
        if n < self.slow:
            return x[heads]
        if n < self._states - 2:
            return x[lanes, heads, time]
        if n < self._states:
            return x[lanes, time]
        assert self.began is not None
        return _part(x, lanes, heads, self.began.heads[n - self._states])

    def forward(self, given: Optional, *, keep: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs, the tensors of the last state, and those of the states between pieces."""
        y: Tensor | None = None
        borders, ends, grown = list[Tensor](), list[Any](), list[tuple[int, int, slice, slice]]()
        self.trees = []
        rooms, guarded = list[Tensor](), set[int]()
        for lanes, heads in self.parts():
            state = None
            for number, time in enumerate(self.times(lanes)):
                own = [self.view(n, x, lanes, heads, time) for n, x in enumerate(given)]
                if number == 0 and self.began is not None:
                    state = self.began.fill([x for x in own[self._states :] if x is not None])
                elif number and keep:
                    tree = _Tree([state])
                    self.trees.append(tree)
                    own_borders = tree.distinct(state)
                    for place, x in enumerate([] if self._grown is None else self._grown(state)):
                        n = next(n for n, u in enumerate(own_borders) if u is x)
                        grown.append((len(borders) + n, place, lanes, heads))
                        own_borders[n] = x.new_empty(x.shape[1], 0)
                    borders += own_borders
                before = 0 if state is None else state.faults.sum()
                out, state = self.run(own[: self._states], state)
                if heads != WHOLE and bool(state.faults.sum() != before):
                    guarded.add(lanes.start)
                y = out.new_empty(*self.shape, out.shape[-1]) if y is None else y
                y[lanes, heads, time] = out
            ends.append(state if self._grown is None else self._moved(state, rooms, lanes, heads))
        if guarded:
            self.together |= guarded
            return self.forward(given, keep=keep)
        self.ended = _Tree(ends)
        columns = zip(*(self.ended.distinct(end) for end in ends), strict=True)
        assert y is not None
        joined = [self._joined(column, at) for column, at in zip(columns, self.ended.heads, strict=True)]
        if self._grown is not None:
            for room, left in zip(rooms, self._grown(self.ended.fill(joined)), strict=True):
                joined[next(n for n, x in enumerate(joined) if x is left)] = room
            for n, place, lanes, heads in grown:
                borders[n] = rooms[place][lanes, : borders[n].shape[0], heads]
        return y, joined, borders

    def _moved(self, state: Any, rooms: list[Tensor], lanes: slice, heads: slice) -> Any:
        """A part's last state with what grows left out and put into its place in that of the whole, so that it is there once."""
        assert self._grown is not None
        found = self._grown(state)
        for place, x in enumerate(found):
            if len(rooms) == place:
                rooms.append(x.new_zeros(self.shape[0], x.shape[1], self.shape[1], *x.shape[3:]))
            rooms[place] = _long(rooms[place], torch.Size([max(rooms[place].shape[1], x.shape[1])]))
            rooms[place][lanes, : x.shape[1], heads] = x
        left = {id(x): x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in found}

        def leave(x: Tensor) -> Tensor:
            return left.get(id(x), x)

        return tree_map(leave, state)

    def _joined(self, parts: Sequence[Tensor], at: int) -> Tensor:
        """A tensor of the last state from those of its parts."""
        rows: dict[int, list[Tensor]] = {}
        for part, (own, _) in zip(parts, self.parts(), strict=True):
            rows.setdefault(own.start, []).append(part)
        lanes = [torch.cat(row, at) if len(row) > 1 and row[0].is_floating_point() else row[0] for row in rows.values()]
        longest = max(x.shape[1:2] for x in lanes)
        return torch.cat([_long(x, longest) for x in lanes])

    def backward(self, given: Optional, borders: Sequence[Tensor], grads: Optional, needed: Sequence[bool]) -> Optional:
        """Gradients of what was given, where they are needed."""
        found = [torch.zeros_like(x) if w and x is not None else None for x, w in zip(given, needed, strict=True)]
        last, trees, slow = len(borders), list(self.trees), self._states
        for lanes, heads in reversed(self.parts()):
            back = [
                None if g is None or not g.is_floating_point() else _part(g, lanes, heads, at)
                for g, at in zip(grads[1:], self.ended.heads, strict=True)
            ]
            tree = self.ended
            for number, time in reversed(list(enumerate(self.times(lanes)))):
                mine = [self.view(n, x, lanes, heads, time) for n, x in enumerate(given)]
                own = [_leaf(x, wanted) for x, wanted in zip(mine, needed, strict=True)]
                before = self.began
                if number:
                    before = trees.pop()
                    own[slow:] = [_leaf(x, True) for x in borders[last - before.count : last]]
                    last -= before.count
                d_y = None if grads[0] is None else grads[0][lanes, heads, time]
                found_here = self._back(own, before, tree, (d_y, *back))
                if number:
                    assert before is not None
                    back, tree = list(found_here[slow:]), before
                for n, g in enumerate(found_here[:slow] if number else found_here):
                    into = self.view(n, found[n], lanes, heads, time)
                    if into is not None and g is not None:
                        into.add_(g)
        return found

    def _back(self, own: Optional, before: _Tree | None, tree: _Tree, grads: Optional) -> Optional:
        """Gradients of a piece, made again; tree: of the state behind it."""
        with torch.enable_grad():
            state = None if before is None else before.fill([x for x in own[self._states :] if x is not None])
            y, end = self.run(own[: self._states], state)
        outputs = zip((y, *tree.distinct(end)), grads, strict=True)
        pairs = [
            (x, g if g.shape == x.shape else g[:, : x.shape[1]])
            for x, g in outputs
            if g is not None and x.requires_grad
        ]
        wanted = [x for x in own if x is not None and x.requires_grad]
        if not pairs:
            return [None] * len(own)
        ends, of_ends = zip(*pairs, strict=True)
        del y, end, state
        got = iter(torch.autograd.grad(ends, wanted, of_ends, allow_unused=True))
        return [next(got) if x is not None and x.requires_grad else None for x in own]


def _part(x: Tensor, lanes: slice, heads: slice, at: int) -> Tensor:
    """Of a state's tensor with the heads as its dimension number `at`; what is no number has none."""
    if not x.is_floating_point() or heads == WHOLE:
        return x[lanes]
    return x[lanes, heads] if at == 1 else x[lanes, :, heads]


def _long(x: Tensor, size: torch.Size) -> Tensor:
    """A tensor `[lane, token, …]` of a state that grows with zeros behind, as long as its lanes' longest."""
    if x.shape[1:2] == size:
        return x
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, size[0] - x.shape[1]])


def _leaf(x: Tensor | None, wanted: bool) -> Tensor | None:
    if x is None:
        return None
    return x.detach().requires_grad_(wanted and x.is_floating_point())


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *given: Tensor | None) -> tuple[Tensor, ...]:
        y, ends, borders = work.forward(given)
        ctx.work, ctx.count = work, len(given)
        ctx.save_for_backward(*given, *borders)
        ctx.set_materialize_grads(False)
        return (y, *ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        work: _Work = ctx.work
        saved = ctx.saved_tensors
        given, borders = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            return None, *_by_autograd(work.again, given, grads)
        return None, *work.backward(given, borders, grads, wanted(ctx)[1:])


def _by_autograd(again: Callable[[Optional], tuple[Tensor, ...]], given: Optional, grads: Optional) -> Optional:
    """Gradients that can be differentiated once more.

    To names of their own: where one input was made from another, the way through it is not to be counted here.
    """
    given = [x.view_as(x) if x is not None and x.requires_grad else x for x in given]
    pairs = [(x, g) for x, g in zip(again(given), grads, strict=True) if g is not None and x.requires_grad]
    wanted = [x for x in given if x is not None and x.requires_grad]
    outputs, of_outputs = [x for x, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in given]
