"""What the C code's scans have in common: memories of every lane and head, in banks of one cell each, along a call's runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from nestling.memory.native import fields
from nestling.memory.native.call import Given, run
from nestling.memory.native.runs import Runs
from nestling.memory.state import MemoryState, Weights
from nestling.native import call, library, threads


class Stand(NamedTuple):
    """What a call starts from, or its gradients: weights of all banks' layers one after the other, and the like.

    anchor   (): the weights are the anchor
    start    what a lane begins anew with; (): none does
    """

    weights: Weights
    momentum: Weights
    anchor: Weights
    start: Weights


class Ends(NamedTuple):
    """Outputs, and what a call ends with; anchor (): it is the weights."""

    y: Tensor
    weights: Weights
    momentum: Weights
    anchor: Weights

    @property
    def stand(self) -> tuple[Weights, Weights, Weights]:
        """Anchor, weights and momentum, as a state has them."""
        return self.anchor or self.weights, self.weights, self.momentum

    @staticmethod
    def of(found: tuple[Tensor, MemoryState]) -> Ends:
        """What the framework's way found."""
        y, end = found
        return Ends(y, end.weights, end.momentum, end.anchor)


Again = Callable[[Given, Stand], Ends]

# Tiles between two places that weights are kept of: at least so many. What is kept may be so many times as large as the answers,
# less so many times what is kept at one place.
FEW, ROOM, LESS = 4, 10, 22
_TOGETHER: ContextVar[int] = ContextVar("together", default=1)
T = TypeVar("T")


@contextmanager
def together(count: int) -> Iterator[None]:
    """So many memories answer the same tokens here, so that of each the less is kept."""
    if torch.compiler.is_compiling():  # which knows no such variable, and goes the framework's way
        yield
        return
    token = _TOGETHER.set(count)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def apart(weights: Weights, anchor: Weights) -> Weights:
    """The anchor, or () where it is the weights."""
    pairs = zip(weights, anchor, strict=True)
    same = all(w is a or (not (w.requires_grad or a.requires_grad) and torch.equal(w, a)) for w, a in pairs)
    return () if same else anchor


def stand(state: MemoryState, start: MemoryState, cut: Runs) -> Stand:
    """What a call starts from."""
    own = apart(state.weights, state.anchor)
    return Stand(state.weights, state.momentum, own, start.weights if cut.fresh else ())


def states(state: MemoryState, start: MemoryState, at: Stand) -> tuple[MemoryState, MemoryState]:
    """`start` and `state` with these tensors in them."""
    return (
        start._replace(anchor=at.start, weights=at.start) if at.start else start,
        state._replace(anchor=at.anchor or at.weights, weights=at.weights, momentum=at.momentum),
    )


class Stream(Protocol):
    """What `in_step` asks of a call."""

    @property
    def state(self) -> Any: ...
    @property
    def reset(self) -> Tensor | None: ...
    @property
    def valid(self) -> Tensor | None: ...


def in_step(call: Stream) -> bool:
    """Whether all lanes are at the same position all the time."""
    reset, valid = call.reset, call.valid
    masked = (reset is not None and bool(reset.any())) or (valid is not None and not bool(valid.all()))
    return not masked and (call.state is None or len(set(call.state.position.tolist())) == 1)


class Lanes(ABC):
    """One scan, as a pass of the C code. A subclass says which code and what its structure holds.

    names    of the streams
    fine     bool `[lane, time]`: tokens that act, with those of a window before the call;  None: all
    again    the same by the framework's operations, to be differentiated more than once
    """

    source: Path
    entry: str
    names: tuple[str, ...]

    def __init__(self, name: str, cut: Runs, fine: Tensor | None, again: Again) -> None:
        self.name, self.cut, self.fine, self._again = name, cut, fine, again
        self.broken = torch.zeros(0)
        self._room = ROOM / sqrt(_TOGETHER.get())
        self._code: Any = None
        self._counts = (0, 0, 0, 0)

    @abstractmethod
    def structure(self, streams: Given, stand: Stand) -> Any:
        """The C structure, with what is common to all left out."""

    @abstractmethod
    def stores(self, structure: Any) -> Sequence[tuple[fields.Store, slice]]:
        """Each bank's store, and which layers are its own."""

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        """Room for the gradient of a stream, zeros."""
        return torch.zeros_like(x)

    def width(self, stand: Stand) -> int:
        """Of an answer."""
        return stand.weights[-1].shape[-1]

    def group(self, stand: Stand) -> int:
        """Runs between two that weights are kept of for the backward pass: as few as a core's cache likes, where what is kept
        stays in proportion to the answers, which are as long as the text. Measured so that a layer in training takes at most
        twice attention's memory."""
        tiles, apiece, last = self.cut.table.shape[1], self.keeps(stand), stand.weights[-1]
        answers = last[..., 0, 0].numel() * self.width(stand) * tiles * self.cut.longest
        places = max(0, int(self._room * answers / max(1, apiece)) - LESS)
        return min(self.cut.group, max(FEW, -(-tiles // (places + 1))))

    def keeps(self, stand: Stand) -> int:
        """Numbers that are kept there, of all memories."""
        return sum(w.numel() for group in stand[:3] for w in group)

    def scan(self, streams: Given, stand: Stand) -> Ends | None:
        """None where something was not finite, or tensors are of several kinds."""
        found = self.outputs(streams, stand)
        return None if found is None else Ends(found[0], *self._groups(found[1:])[:3])

    def outputs(self, streams: Given, stand: Stand) -> tuple[Tensor, ...] | None:
        """All that `forward` finds, or None as in `scan`."""
        q = streams[0] if streams[0] is not None else stand.weights[0]
        if not self.cut.whole and not stand.anchor:
            stand = stand._replace(anchor=stand.weights)
        given = [*streams, *(w for group in stand for w in group)]
        if q.numel() == 0 or any(x is not None and (x.dtype != q.dtype or x.device.type != "cpu") for x in given):
            return None
        self._counts = tuple(len(group) for group in stand)  # type: ignore[assignment]
        found = run(self, given)
        return None if bool(self.broken.any()) else found

    def forward(self, given: Given, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        streams, stand = self._split(given)
        c = self._filled(streams, stand)
        like = stand.weights[-1]
        shape = (c.lanes, c.heads, c.time, self.width(stand))
        y = like.new_empty(shape) if self.cut.full else like.new_zeros(shape)
        ends = tuple(tuple(torch.empty_like(w) for w in group) for group in stand[:3])
        kept = None
        if keep:
            groups = -(-c.tiles // c.group) - 1  # the first begins with what is given
            kept = like.new_empty(groups * self.keeps(stand))
        self.broken = torch.zeros(c.lanes * c.heads, dtype=torch.int32)
        fields.point(c, {"y": y, "kept": kept, "broken": self.broken})
        self._point(c, ("w_end", "s_end", "a_end"), ends)
        self._call(c, like.dtype, False)
        return (y, *(w for group in ends for w in group)), () if kept is None else (kept,)

    def backward(self, given: Given, kept: Sequence[Tensor], grads: Given, wanted: Sequence[bool]) -> Given:
        streams, stand = self._split(given)
        c = self._filled(streams, stand)
        named = zip(self.names, streams, strict=True)
        of_streams = tuple(None if x is None else self.like(name, x, c.lanes) for name, x in named)
        *given_first, _ = self._groups(wanted[len(streams) :])
        firsts = zip(stand[:3], given_first, strict=True)
        of_first = tuple(
            tuple(torch.empty_like(w) if asked else None for w, asked in zip(group, own, strict=True))
            for group, own in firsts
        )
        of = (*of_first, tuple(map(torch.zeros_like, stand.start)))
        like = stand.weights[-1]
        of_y = like.new_zeros(c.lanes, c.heads, c.time, self.width(stand)) if grads[0] is None else grads[0]
        fields.point(c, {"kept": kept[0], "of_y": of_y})
        fields.point(c, {f"of_{name}": x for name, x in zip(self.names, of_streams, strict=True)})
        self._point(c, ("from_w", "from_s", "from_a"), self._groups(grads[1:])[:3])
        self._point(c, ("of_w", "of_s", "of_a", "of_start"), of)
        self._call(c, like.dtype, True)
        found = zip(streams, of_streams, strict=True)
        summed = (g if x is None or g is None or x.shape == g.shape else g.sum(0).view(x.shape) for x, g in found)
        return (*summed, *(w for group in of for w in group))

    def again(self, given: Given) -> tuple[Tensor, ...]:
        streams, stand = self._split(given)
        ends = self._again(streams, stand)
        return (ends.y, *ends.weights, *ends.momentum, *(ends.anchor if stand.anchor else ()))

    def _groups(self, tensors: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
        found, first = [], 0
        for count in self._counts:
            found.append(tuple(tensors[first : first + count]))
            first += count
        return found[0], found[1], found[2], found[3]

    def _split(self, given: Given) -> tuple[Given, Stand]:
        count = len(self.names)
        return given[:count], Stand(*self._groups([w for w in given[count:] if w is not None]))

    def _filled(self, streams: Given, stand: Stand) -> Any:
        c, w, cut = self.structure(streams, stand), stand.weights[-1], self.cut
        c.lanes, c.heads, c.tiles = w.shape[0], w.shape[-3], cut.table.shape[1]
        c.longest, c.group, c.apart = cut.longest, self.group(stand), bool(stand.anchor)
        c.threads, c.runs = threads(c.lanes * c.heads), cut.table.data_ptr()
        fields.point(c, {"fine": self.fine, **dict(zip(self.names, streams, strict=True))})
        self._point(c, ("w", "s", "a", "start"), stand)
        return c

    def _point(self, c: Any, names: Sequence[str], groups: Sequence[Given]) -> None:
        for store, layers in self.stores(c):
            for name, group in zip(names, groups, strict=True):
                if group:
                    own = group[layers]
                    getattr(store, name)[: len(own)] = [None if w is None else w.data_ptr() for w in own]

    def _call(self, c: Any, dtype: torch.dtype, backward: bool) -> None:
        self._code = self._code or library(self.source, dtype)  # a backward pass goes the way the forward pass went
        if call(self._code, self.entry, c, int(backward)):
            raise MemoryError(f"{self.name}: no memory for the scratch space of {c.threads} threads")
