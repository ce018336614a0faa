"""Memories of m slots: what Lattice and Trellis share.

Their states are matrices over slots. Gradients of a chunk are taken at the weights of its start, so that inside it

    W_t = α_t W_{t−1} − η_t G_t          G_t: rank one, up to a part along the anchor's own slots

and whatever is not linear in the weights acts at chunk borders (`settle`); with chunk 1 this is the recurrence of every token.
A token's code, its address over the slots, is a slow projection of what the memory is given: the projections stand in w0 behind
the initial states, are read from there at every call and are not part of the state. They are ours, as the papers project the
layer's input, which a memory does not see.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.coefficients import Coefficients
from nestling.memory.draw import Draw
from nestling.memory.gates import Factor, Gates, factor
from nestling.memory.inputs import check_call, check_precision, check_start, check_state, surely, token_guard
from nestling.memory.norm import EPS
from nestling.memory.protocol import Call, Engines, Example, Read, TwoEngines
from nestling.memory.settings import whole_numbers
from nestling.memory.state import MemoryState, Shapes, Weights, raised
from nestling.memory.unit import unit_rows

CODES = ("l2", "rms", "softmax", "none")


class Streams(NamedTuple):
    """Inputs of a scan in the compute dtype; tokens that are not `fine` (bool `[lane, time]`) made harmless.

    tokens         what `SlotMemory.tokens` makes, each `[lane, head, time, dim]`
    lr, retention  `[lane, head, time, pass]`: one entry, or one for each pass where these have their own;  retention `[…, slot]`
                   where each slot has its own
    """

    start: MemoryState
    state: MemoryState
    tokens: Weights
    lr: Tensor
    retention: Factor | None
    fine: Tensor
    reset: Tensor | None
    valid: Tensor | None


class Tile(NamedTuple):
    """Some tokens that are read and written at once.

    tokens           as in `Streams`, each `[lane, head, place, dim]`
    lr, c            step sizes `[lane, head, place]` and coefficients, for each pass
    anchor, weights  those of the chunk's start and of the tile's
    begins           `weights` are the anchor in all lanes
    """

    tokens: Weights
    lr: Sequence[Tensor]
    c: Sequence[Coefficients]
    anchor: Weights
    weights: Weights
    begins: bool


class Moved(NamedTuple):
    """What a tile did: answers `[lane, head, place, dim]`, weights after it, sound bool `[lane, place]`: gradients were finite
    in all heads, and for a report surprise and size of the steps `[lane, head, place]` (gradients, without η)."""

    y: Tensor
    weights: Weights
    sound: Tensor
    surprise: Tensor
    size: Tensor


def rows_of(read: Read) -> slice:
    """Which rows of a tile's coefficients a read takes."""
    return slice(1, None) if read == "after" else slice(None, -1)


def normalized(kind: str, code: Tensor) -> Tensor:
    """A code as it is used: of unit length, of unit mean square, a distribution over the slots, or as it is."""
    if kind == "l2":
        return unit_rows(code)
    if kind == "rms":
        return unit_rows(code) * math.sqrt(code.shape[-1])
    return code.softmax(-1) if kind == "softmax" else code


def unit_slots(w: Tensor) -> Tensor:
    """Every slot, a row `[…, slot, dim]`, put on the unit sphere."""
    return w / slot_norms(w).unsqueeze(-1)


def slot_norms(w: Tensor) -> Tensor:
    """Norm of every slot, at least 1e-6."""
    norms: Tensor = w.square().sum(-1).clamp_min(EPS**2).sqrt()
    return norms


def orthonormal(heads: int, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Random rows of unit norm `[head, rows, columns]`, orthogonal as far as there is room."""
    drawn = torch.randn(heads, rows, columns, generator=generator)
    if rows <= columns:
        basis, r = torch.linalg.qr(drawn.mT)
        drawn = (basis * r.diagonal(0, -2, -1).sign().unsqueeze(-2)).mT
    return F.normalize(drawn, dim=-1)


@dataclass(frozen=True)
class SlotMemory(TwoEngines[Streams, MemoryState]):
    """The part of the protocol that slot memories share; finished ones are `Lattice` and `Trellis`.

    key_dim, value_dim   sizes per head
    slots                m, the number of slots of a head
    chunk                period of the anchor in tokens
    read                 token t is answered "after" its own write, "before" it, or from the chunk's start ("boundary")
    """

    key_dim: int
    value_dim: int
    slots: int = 64
    chunk: int = 16
    read: Read = "after"
    name: str = "slots"
    _state = MemoryState

    def __post_init__(self) -> None:
        whole_numbers(self.name, key_dim=self.key_dim, value_dim=self.value_dim, slots=self.slots, chunk=self.chunk)
        self.choose("read", ("after", "before", "boundary"))

    def choose(self, field: str, known: tuple[str, ...]) -> None:
        """Refuse a setting that is not known."""
        if (given := getattr(self, field)) not in known:
            raise ValueError(f"{self.name}: {field} is {given!r}; expected one of: {', '.join(map(repr, known))}")

    @property
    def passes(self) -> int:
        """Sets of gates: `lr` and `retention` have so many entries."""
        return 1

    @property
    def per_slot(self) -> bool:
        """Whether each slot has a retention of its own; slots are then the states' columns."""
        return False

    @property
    def slotwise(self) -> bool:
        """Whether slots keep different shares, so that a tile's coefficients are those of every slot."""
        return self.per_slot

    @property
    @abstractmethod
    def states(self) -> int:
        """How many of w0 are initial states; the others are projections."""
        ...

    @property
    def reads_weights(self) -> bool:
        """The inner gradient depends on the weights, so that the anchor matters."""
        return True

    @property
    def update_period(self) -> int:
        return self.chunk

    @property
    def anchored(self) -> bool:
        return True

    @property
    def gate_channels(self) -> dict[str, int]:
        if self.per_slot:
            return {"retention": self.slots}
        return {} if self.passes == 1 else dict.fromkeys(sorted(self.gates_used), self.passes)

    def state_shapes(self, heads: int) -> Shapes:
        return Shapes(tuple((heads, *shape) for shape in self.shapes[: self.states]))

    @abstractmethod
    def tokens(
        self, slow: Weights, q: Tensor, k: Tensor, v: Tensor, retention: Factor | None, fine: Tensor
    ) -> tuple[Weights, Tensor]:
        """What engines are given of every token, and which tokens are still fine; slow: the projections."""
        ...

    def settle(self, weights: Weights) -> Weights:
        """What happens to the weights at a chunk's end, and to the initial ones."""
        return weights

    @abstractmethod
    def tile(self, x: Tile) -> Moved:
        """Answer and write a tile."""
        ...

    @abstractmethod
    def loss(self, tokens: Weights, weights: Weights) -> Tensor:
        """The written loss, summed over `[lane, head, 1, dim]` tokens: its gradient is the definition's G."""
        ...

    def written(self, tokens: Weights, anchor: Weights, weights: Weights, gradients: Weights) -> Weights:
        """The definition's G of a token at the running weights, from the gradients at the anchor. Default: these."""
        return gradients

    @abstractmethod
    def answer(self, tokens: Weights, anchor: Weights, weights: Weights) -> Tensor:
        """What the memory answers to the tokens' queries at fixed weights."""
        ...

    def start(self, w0: Sequence[Tensor], lanes: int) -> MemoryState:
        """State of lanes that have read nothing; weights in at least float32."""
        check_start(self, w0, lanes)
        first = self.settle(raised(w0[: self.states]))
        return MemoryState.fresh(tuple(w.expand(lanes, *w.shape) for w in first))

    def _engines(self) -> Engines[MemoryState]:
        from nestling.memory import slots_chunked, slots_reference

        return slots_reference.scan, slots_chunked.scan

    def _check_state(self, state: MemoryState, lanes: int, heads: int) -> None:
        check_state(self.name, state, state.momentum, lanes, heads, self.state_shapes(heads))

    def _prepare(self, call: Call) -> Streams:
        lanes, heads, time = check_call(self, call)
        w0, q, k, v, gates, state, reset, valid = call
        start = self.start(w0, lanes) if state is None or reset is not None else state  # read after resets only
        state = start if state is None else state
        dtype = check_precision(state.weights[0].dtype, call)
        fine, (k, v), gates = token_guard((k.to(dtype), v.to(dtype)), gates.map(lambda gate: gate.to(dtype)))
        slow = tuple(w.to(dtype) for w in w0[self.states :])
        retention = factor(gates.retention, gates.log_retention, dtype)
        tokens, fine = self.tokens(slow, q.to(dtype), k, v, retention, fine)
        lr = q.new_ones(lanes, heads, time, dtype=dtype) if gates.lr is None else gates.lr
        if lr.dim() == 3:
            lr = lr.unsqueeze(-1).expand(*lr.shape, self.passes)
        if retention is not None and retention.log.dim() == 3:
            retention = retention.map(lambda gate: gate.unsqueeze(-1))
        return Streams(start, state, tokens, lr, retention, fine, reset, valid)

    def described(self, **words: str) -> dict[str, str]:
        """`describe` with what a leaf has to say."""
        numbers = sum(rows * columns for rows, columns in self.shapes[: self.states])
        return {
            "name": self.name,
            **words,
            "period": f"{self.chunk} tokens",
            "read": self.read,
            "gates": ", ".join(sorted(self.gates_used)),
            "state": f"{2 * numbers} numbers per lane and head",
        }

    def _example(self, draw: Draw) -> Example:
        """Random q, k of unit norm, v of about unit norm, steps of at most 1/√chunk and retention near 1."""
        q, k, v = draw.unit(self.key_dim), draw.unit(self.key_dim), draw.normal(self.value_dim) * self.value_dim**-0.5
        each = () if self.passes == 1 else (self.passes,)
        made = {"lr": draw.share(*each) * self.chunk**-0.5}
        if "retention" in self.gates_used:
            made["retention"] = draw.share(*((self.slots,) if self.per_slot else each), shift=4)
        return q, k, v, Gates(**made)


def sound_rows(fine: Tensor, raw: Tensor) -> Tensor:
    """Fine tokens whose projected rows `[lane, head, time, dim]` have finite squares, as their norms need."""
    return fine & torch.isfinite(raw.detach().square().sum((1, 3)))


def refused(x: Streams, lanes: Tensor, t: int) -> Streams:
    """The inputs with token t of some lanes (bool `[lane]`) refused."""
    at = torch.zeros_like(x.fine)
    at[:, t] = lanes
    acts = ~at[:, None, :, None]
    return x._replace(
        tokens=tuple(torch.where(acts, u, 0.0) for u in x.tokens),
        lr=torch.where(acts, x.lr, 0.0),
        retention=None if x.retention is None else x.retention.masked(acts),
        fine=x.fine & ~at,
    )


def harmless(fine: Tensor, x: Tensor) -> Tensor:
    """Rows `[lane, head, time, dim]` of tokens that are not fine made 0."""
    return x if surely(fine) else torch.where(fine[:, None, :, None], x, 0.0)
