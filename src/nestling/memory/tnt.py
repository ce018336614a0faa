"""TNT: a global memory of large chunks beside local ones that start afresh with every shard (TNT, §4, eq. 5–7 and 13–15).

    o_t = f(V at the start of t's global chunk, q_t) + Σ_i f(W⁽ⁱ⁾_t, q_t P⁽ⁱ⁾_t)

    V      learns in chunks of C_G tokens, is never reset and is read at its chunk's start: it has not seen the current one
    W⁽ⁱ⁾   learns in chunks of C_i tokens; before the first token of every shard of S_i tokens it is the learned initial state
    P⁽ⁱ⁾   projects the query onto the keys of the shard so far; see `projection`

Shards are independent, which is what makes small local chunks affordable; see `shards`. Nothing is seen by nobody where C_G
divides S_i: with S_i < C_G the earlier shards of the current global chunk are.

Three places of the paper are read as its text and appendices have them: the local rule (eq. 6, 14) starts from the anchor, not
from W_{t−1}, which would write a token up to C_i times; the first token of a shard is written and read, not skipped; P runs over
the shard, not the chunk (eq. 7, 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from nestling.memory.draw import Draw
from nestling.memory.gates import Gates
from nestling.memory.inputs import (
    check_call,
    check_dtypes,
    check_owner,
    check_precision,
    check_start,
    surely,
    token_guard,
    widest,
)
from nestling.memory.named import named
from nestling.memory.pieces import FEW, INSIDE, Size, fitting
from nestling.memory.projection import Projecting
from nestling.memory.projection import memory as projecting
from nestling.memory.protocol import Call, Engines, Example, Memory, Part, Read, TwoEngines
from nestling.memory.settings import whole_numbers
from nestling.memory.state import Weights
from nestling.state import leaves, register

GLOBAL_CHUNK = 2048  # in all experiments of the paper
UNIT = 128  # tokens, of which a piece that is made again has a multiple


@register
class TntState(NamedTuple):
    """What TNT carries, per lane.

    parts       states of the memories, the global one first; those of local ones count from their shard's start
    projection  P after the last token, `[lane, head, key_dim, key_dim]` for each length of shards
    position    tokens read since the lane's start or last reset, int64 `[lane]`, on the CPU
    faults      how often a guard had to step in, int64 `[lane]`; a token that all memories refuse counts once
    """

    parts: tuple[Any, ...]
    projection: tuple[Tensor, ...]
    position: Tensor
    faults: Tensor


class Streams(NamedTuple):
    """A checked call in the compute dtype.

    k         NaN at tokens that are not `fine` (bool `[lane, time]`), so that no memory writes them
    w0, gates of each memory
    """

    start: TntState
    state: TntState
    w0: tuple[Weights, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Gates, ...]
    fine: Tensor
    reset: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class Tnt(TwoEngines[Streams, TntState]):
    """The hierarchy. Its gates have the memories' gates side by side: with one local memory lr is `[lane, head, time, 2]`.

    key_dim, value_dim   sizes per head
    global_      the global memory: any memory, or the name of one, or None. It is read at its chunk's start whatever its `read`
    locals       the local memories, each one or its name; a single one stands for as many as `chunk` has entries
    shard        S_i: tokens between two resets, one number or one for each
    chunk        C_i: put into the local memories, one number or one for each. None: their own
    global_chunk C_G: put into the global memory. None: its own, 2048 where it is given by name
    read         put into the local memories. None: their own
    projection   what local memories are asked with: "normalized" q P (ours), "literal" (eq. 7), or "none": q
    steps        largest inner step of each memory, for a layer. None: theirs, which depend on their chunks

    A report has every memory under its own name, "global", "local" (or "local0", "local1", …).

    Raises ValueError for what does not fit together.
    """

    key_dim: int
    value_dim: int
    global_: Memory | str | None = "titans"
    locals: tuple[Memory | str, ...] = ("titans",)
    shard: int | tuple[int, ...] = 2048
    chunk: int | tuple[int, ...] | None = None
    global_chunk: int | None = None
    read: Read | None = None
    projection: Projecting = "normalized"
    steps: tuple[float, ...] | None = None
    name: str = "tnt"
    _guards = False
    _state = TntState

    def __post_init__(self) -> None:
        for field in ("chunk", "shard", "locals"):
            if isinstance(getattr(self, field), list):  # from a configuration file
                self._settle(field, tuple(getattr(self, field)))
        chunks: tuple[int | None, ...] = self.chunk if isinstance(self.chunk, tuple) else (self.chunk,)
        given = (self.locals,) if isinstance(self.locals, Memory | str) else self.locals
        given = given * len(chunks) if len(given) == 1 else given
        chunks = chunks * len(given) if len(chunks) == 1 else chunks
        shards = self.shard if isinstance(self.shard, tuple) else (self.shard,) * len(given)
        for field, count in (("chunk", len(chunks)), ("shard", len(shards))):
            if count != len(given):
                raise ValueError(
                    f"{self.name}: {field} has {count} entries for {len(given)} local memories; expected one number or one "
                    "for each"
                )
        for number in shards:
            whole_numbers(self.name, shard=number)
        if self.projection not in get_args(Projecting):
            raise ValueError(
                f"{self.name}: projection is {self.projection!r}; expected one of: {', '.join(get_args(Projecting))}"
            )
        self._settle("shard", shards)
        self._settle("locals", tuple(self._inner(m, chunk, self.read) for m, chunk in zip(given, chunks, strict=True)))
        if self.global_ is not None:
            own = GLOBAL_CHUNK if isinstance(self.global_, str) else None
            chunk = own if self.global_chunk is None else self.global_chunk
            self._settle("global_", self._inner(self.global_, chunk, "boundary"))
        elif self.global_chunk is not None:
            raise ValueError(
                f"{self.name}: global_chunk is {self.global_chunk}, but there is no global memory: leave one out"
            )
        if not self.memories:
            raise ValueError(f"{self.name}: there is neither a global nor a local memory; expected at least one")
        for derived in ("memories", "shards", "lengths", "shapes", "gate_channels", "projector"):
            getattr(self, derived)  # now, as a compiled step cannot take the lock of a cached property
        if self.steps is not None and len(self.steps) != self.gate_channels.get("lr", 1):
            raise ValueError(
                f"{self.name}: steps has {len(self.steps)} entries; expected {self.gate_channels.get('lr', 1)}"
            )
        if any(memory.growth == "linear" for memory in self.memories):
            self._settle("growth", "linear")

    def _settle(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)  # the dataclass is frozen

    def _inner(self, given: Memory | str, chunk: int | None, read: Read | None) -> Memory:
        """A memory of the hierarchy, with what is put into it."""
        memory = named(given, key_dim=self.key_dim, value_dim=self.value_dim) if isinstance(given, str) else given
        if not isinstance(memory, Memory) or isinstance(memory, Tnt):
            raise ValueError(
                f"{self.name}: {memory!r} cannot be one of its memories; expected a memory that is not itself a hierarchy, or "
                "the name of one"
            )
        if (memory.key_dim, memory.value_dim) != (self.key_dim, self.value_dim):
            raise ValueError(
                f"{self.name}: {memory.name} has key_dim={memory.key_dim}, value_dim={memory.value_dim}; expected those of the "
                f"whole, {self.key_dim} and {self.value_dim}"
            )
        known = {field.name for field in fields(cast(Any, memory))}
        wanted = {name: value for name, value in (("chunk", chunk), ("read", read)) if value is not None}
        if missing := sorted(wanted.keys() - known):
            raise ValueError(
                f"{self.name}: {memory.name} has no setting {', '.join(missing)}, and so cannot be read or written as it has to "
                "be here: choose another memory"
            )
        return cast(Memory, replace(cast(Any, memory), **wanted))

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """All memories, the global one first."""
        return cast(tuple[Memory, ...], (*([] if self.global_ is None else [self.global_]), *self.locals))

    @cached_property
    def shards(self) -> tuple[int | None, ...]:
        """Tokens between two resets of each of `memories`; None: never."""
        own = cast(tuple[int, ...], self.shard)
        return (*([] if self.global_ is None else [None]), *own)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The distinct lengths of shards that need a projection of their own."""
        own = cast(tuple[int, ...], self.shard)
        return () if self.projection == "none" else tuple(dict.fromkeys(own))

    @cached_property
    def projector(self) -> Memory:
        """P of a length of shards, as a memory."""
        return projecting(self.key_dim)

    def refined(self, chunk: int | Sequence[int]) -> Tnt:
        """The same memory with other local chunks, usually smaller ones: the second stage of training (TNT, §4.2).

        Initial weights, gates and the largest steps stay what they are.
        """
        chunks = (chunk,) * len(self.locals) if isinstance(chunk, int) else tuple(chunk)
        if len(chunks) != len(self.locals):
            raise ValueError(
                f"{self.name}: refined to {len(chunks)} chunks, but it has {len(self.locals)} local memories; expected one "
                "number or one for each"
            )
        return replace(self, chunk=chunks, steps=self.largest_steps)

    @property
    def parts(self) -> tuple[Part, ...]:
        names = ["local"] if len(self.locals) == 1 else [f"local{n}" for n in range(len(self.locals))]
        names = names if self.global_ is None else ["global", *names]
        found = []
        for name, memory, shard in zip(names, self.memories, self.shards, strict=True):
            words = memory.describe()
            if shard is not None:
                words["retention"] += f", from the initial weights anew every {shard} tokens"
            found.append(Part(name, memory, words))
        return tuple(found)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of w0: those of the memories one after the other."""
        return tuple(shape for memory in self.memories for shape in memory.shapes)

    @property
    def gates_used(self) -> frozenset[str]:
        return frozenset().union(*(memory.gates_used for memory in self.memories))

    @cached_property
    def gate_channels(self) -> dict[str, int]:
        found = {}
        for gate in sorted(self.gates_used):
            users = self._users(gate)
            if len(users) > 1 or gate in users[0].gate_channels:
                found[gate] = sum(user.gate_channels.get(gate, 1) for user in users)
        return found

    def _users(self, gate: str) -> list[Memory]:
        return [memory for memory in self.memories if gate in memory.gates_used]

    @property
    def reads_weights(self) -> bool:
        """Whether any memory's inner gradient depends on its weights."""
        return any(getattr(memory, "reads_weights", True) for memory in self.memories)

    @property
    def update_period(self) -> int:
        return min(memory.update_period for memory in self.memories)

    @property
    def anchored(self) -> bool:
        return any(memory.anchored for memory in self.memories)

    @property
    def largest_steps(self) -> tuple[float, ...]:
        return self.steps or tuple(step for memory in self._users("lr") for step in memory.largest_steps)

    @property
    def deep(self) -> bool:
        return any(memory.deep for memory in self.memories)

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Initial weights of all memories; V starts from learned weights as the local ones do (ours, the paper does not say)."""
        return tuple(w for memory in self.memories for w in memory.init(heads, generator))

    def apart(self, w0: Sequence[Tensor]) -> tuple[Weights, ...]:
        """w0 by memory."""
        weights = iter(w0)
        return tuple(tuple(next(weights) for _ in memory.shapes) for memory in self.memories)

    def start(self, w0: Sequence[Tensor], lanes: int) -> TntState:
        """State of lanes that have read nothing."""
        check_start(self, w0, lanes)
        heads, d, device = w0[0].shape[0], self.key_dim, w0[0].device
        dtype = torch.promote_types(w0[0].dtype, torch.float32)
        return TntState(
            tuple(memory.start(own, lanes) for memory, own in zip(self.memories, self.apart(w0), strict=True)),
            tuple(torch.zeros(lanes, heads, d, d, dtype=dtype, device=device) for _ in self.lengths),
            torch.zeros(lanes, dtype=torch.int64),
            torch.zeros(lanes, dtype=torch.int64, device=device),
        )

    def _engines(self) -> Engines[TntState]:
        from nestling.memory import tnt_chunked, tnt_reference

        return tnt_reference.scan, tnt_chunked.scan

    def _piece(self, call: Call, tile: int | None) -> Size | None:
        """All memories together, so that what they make of a token is made again at once and gradients are summed once."""
        shape = check_call(self, call)
        if self.growth == "linear":
            return None
        if self._makes_again(call, tile):
            return None
        numbers = sum(i * o for i, o in self.shapes)
        rows = max(sum(i + o for i, o in memory.shapes) for memory in self.memories)
        inside = 2 * numbers + INSIDE * UNIT * (rows + UNIT)
        return fitting(shape, call.q, unit=UNIT, state=2 * numbers, inside=inside, memories=-(-FEW // numbers))

    def _makes_again(self, call: Call, tile: int | None) -> bool:
        """Whether every memory makes again by itself what it needs for its backward pass, so that none is to be cut."""
        weights, gates = self.apart(call.w0), self._gates(call.gates)
        for memory, w0, own in zip(self.memories, weights, gates, strict=True):
            cut = getattr(memory, "_piece", None)
            if cut is None or cut(call._replace(w0=w0, gates=own, state=None), tile) is not None:
                return False
        return True

    def _check_state(self, state: TntState, lanes: int, heads: int) -> None:
        if (len(state.parts), len(state.projection)) != (len(self.memories), len(self.lengths)):
            raise ValueError(
                f"the state has {len(state.parts)} memories and {len(state.projection)} projections; expected "
                f"{len(self.memories)} and {len(self.lengths)}: it does not belong to {self.name}"
            )
        for memory, part in zip(self.memories, state.parts, strict=True):
            if isinstance(memory, TwoEngines):
                check_owner(memory, part, lanes, heads)
        square = (lanes, heads, self.key_dim, self.key_dim)
        for p in state.projection:
            if p.shape != square:
                raise ValueError(
                    f"state.projection has shape {tuple(p.shape)}; expected {square}: the state was made by another memory than "
                    f"{self.name}"
                )
        if state.projection:
            check_dtypes(state.projection)

    def _prepare(self, call: Call) -> Streams:
        lanes, _, _ = check_call(self, call)
        w0, q, k, v, gates, state, reset, valid = call
        start = self.start(w0, lanes)
        state = start if state is None else state
        if state.projection:
            check_precision(state.projection[0].dtype, call)
        dtype = widest(torch.float32, *w0, q, k, v, *state.projection)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        gates = gates.map(lambda gate: gate.to(dtype))
        fine = token_guard((k, k, v), gates)[0]  # the projection's values are keys
        if not surely(fine):
            k = torch.where(fine[:, None, :, None], k, torch.nan)
        return Streams(start, state, self.apart(w0), q, k, v, self._gates(gates), fine, reset, valid)

    def _gates(self, gates: Gates) -> tuple[Gates, ...]:
        """The gates of each memory."""
        mine: list[dict[str, Tensor]] = [{} for _ in self.memories]
        for name, gate in gates.items():
            kind = name.removeprefix("log_")
            users = [n for n, memory in enumerate(self.memories) if kind in memory.gates_used]
            channels = [self.memories[n].gate_channels.get(kind) for n in users]
            pieces = [gate] if kind not in self.gate_channels else torch.split(gate, [c or 1 for c in channels], -1)
            for n, piece, own in zip(users, pieces, channels, strict=True):
                mine[n][name] = piece.squeeze(-1) if own is None and piece.dim() > 3 else piece
        return tuple(Gates(**own) for own in mine)

    def describe(self) -> dict[str, str]:
        """The choices of all memories in words, with gates used and state size per lane and head."""
        parts = self.parts
        words = {
            kind: "; ".join(f"{part.name}: {part.words[kind]}" for part in parts)
            for kind in ("features", "network", "bias", "retention", "rule", "period", "read")
        }
        carried = leaves(self.start(self.init(1), 1))
        asked = {"normalized": "q P of unit norm", "literal": "q P", "none": "q"}[self.projection]
        return {
            "name": self.name,
            **words,
            "projection": f"local memories are asked with {asked}",
            "gates": ", ".join(sorted(self.gates_used)) or "none",
            "state": f"{sum(x.numel() for x in carried if x.is_floating_point())} numbers per lane and head",
        }

    def _example(self, draw: Draw) -> Example:
        """q, k, v of the first memory's example and every memory's gates."""
        generator, lanes, heads, time = draw
        made = [
            memory.example(generator, lanes=lanes, heads=heads, time=time, dtype=torch.float64)
            for memory in self.memories
        ]
        gates: dict[str, Tensor] = {}
        for name in dict(item for example in made for item in example[3].items()):
            kind = name.removeprefix("log_")
            users = [n for n, memory in enumerate(self.memories) if kind in memory.gates_used]
            own = [getattr(made[n][3], name) for n in users]
            if any(gate is None for gate in own):  # what one leaves at its default, the others do too
                continue
            gates[name] = own[0]
            if kind in self.gate_channels:
                wide = [kind in self.memories[n].gate_channels for n in users]
                gates[name] = torch.cat([g if w else g.unsqueeze(-1) for g, w in zip(own, wide, strict=True)], -1)
        return (*made[0][:3], Gates(**gates))
