"""What every memory answers, and what those with two engines share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from nestling.memory import overflow, pieces
from nestling.memory.draw import Draw
from nestling.memory.gates import Gates
from nestling.memory.inputs import check_kinds
from nestling.memory.report import Report, check_report
from nestling.memory.settings import whole_numbers
from nestling.memory.state import Weights

Read = Literal["after", "before", "boundary"]
Engine = Literal["chunked", "reference"]
Example = tuple[Tensor, Tensor, Tensor, Gates]

PARTS = ("name", "features", "network", "bias", "retention", "rule", "period", "read", "gates", "state")
"""What every memory's `describe` has in words."""


@runtime_checkable
class Memory(Protocol):
    """An associative memory with fast weights. `MemorySpec` is the main one; composites answer the same calls.

    They are frozen dataclasses whose fields are their choices; `scan` returns a registered named tuple as the state.

    key_dim, value_dim   sizes per head
    name                 name of the system, for messages
    growth               "constant", or "linear" where the state grows with the tokens read
    """

    key_dim: int
    value_dim: int
    name: str
    growth: Literal["constant", "linear"] = "constant"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of the initial (slow) weights."""
        ...

    @property
    def gates_used(self) -> frozenset[str]:
        """Names of the gates that have an effect."""
        ...

    @property
    def gate_channels(self) -> dict[str, int]:
        """Size of the last dimension of those gates that have more than one number per head and token."""
        return {}

    @property
    def update_period(self) -> int:
        """Tokens between two changes of the weights that gradients read; 1 where every token changes them."""
        return 1

    @property
    def anchored(self) -> bool:
        """Whether the steps of a chunk add up at its anchor at full size, so that they should be smaller in longer chunks."""
        return False

    @property
    def largest_steps(self) -> tuple[float, ...]:
        """Largest inner step that a layer should take, for each channel of the gate `lr`."""
        return (self.update_period**-0.5 if self.anchored else 1.0,)

    @property
    def deep(self) -> bool:
        """Whether the network has hidden layers."""
        return False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The memories a composite is made of, or itself alone.

        A gate of a composite has those of its parts side by side in its last dimension, in this order; its state has the field
        `parts` with their states.
        """
        return (Part("memory", self, self.describe()),)

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Initial (slow) weights, each `[head, in, out]`."""
        ...

    def start(self, w0: Sequence[Tensor], lanes: int) -> Any:
        """State of lanes that have read nothing, weights in at least float32. Gradients reach w0 through it."""
        ...

    def scan(
        self,
        w0: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None = None,
        state: Any = None,
        *,
        engine: Engine = "chunked",
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
        tile: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Read and write a stretch of tokens, with memory running.

        w0           initial weights from `init`; where a lane is reset, it starts from these
        q, k         `[lane, head, time, key_dim]`;  v `[lane, head, time, value_dim]`
        gates        see `Gates`
        state        what an earlier call returned; None: fresh lanes
        engine       "chunked" (parallel inside chunks) or "reference" (token by token, gradients by autograd; the oracle)
        reset        bool `[lane, time]`: before such a token the lane is put at position 0. Ignored at invalid tokens
        valid        bool `[lane, time]`: a token that is not valid changes nothing and is answered with zeros
        report       collects surprise, update size, gates and faults
        tile         tokens per matrix product; never changes a value

        Returns outputs `[lane, head, time, value_dim]` in q's dtype and the new state.
        """
        ...

    def step(
        self,
        w0: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None = None,
        state: Any = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """One token: `scan` without the time dimension (q, k, v `[lane, head, dim]`, gates `[lane, head]`, masks `[lane]`)."""
        check_kinds(Call(w0, q, k, v, Gates() if gates is None else gates, state, reset, valid))
        y, new = self.scan(
            w0,
            q.unsqueeze(2),
            k.unsqueeze(2),
            v.unsqueeze(2),
            None if gates is None else gates.map(lambda gate: gate.unsqueeze(2)),
            state,
            reset=None if reset is None else reset.unsqueeze(1),
            valid=None if valid is None else valid.unsqueeze(1),
        )
        return y.squeeze(2), new

    def describe(self) -> dict[str, str]:
        """The choices in words: name, features, network, bias, retention, rule, period, read, gates, state (`PARTS`)."""
        ...

    def example(
        self,
        generator: torch.Generator,
        *,
        lanes: int = 2,
        heads: int = 2,
        time: int = 40,
        dtype: torch.dtype = torch.float32,
    ) -> Example:
        """Valid random inputs of every kind the memory reads, inside its stability region."""
        ...


class Part(NamedTuple):
    """One of the memories of a composite: its name there, and its choices in words."""

    name: str
    memory: Memory
    words: dict[str, str]


class Call(NamedTuple):
    """What a scan was called with, unchecked."""

    w0: Sequence[Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    state: Any
    reset: Tensor | None
    valid: Tensor | None


Inputs = TypeVar("Inputs")
State = TypeVar("State")
Engines = tuple[Callable[..., tuple[Tensor, State]], Callable[..., tuple[Tensor, State]]]
"""The reference, of a memory and its inputs, and the chunked engine, which takes `tile` and `report` as well."""


class TwoEngines(Memory, Generic[Inputs, State]):
    """A memory with a reference and a chunked engine. Both are given the same inputs, checked and in the compute dtype."""

    _guards = True
    """Whether what overflows is looked for here, and not by the memories that it is made of."""
    _state: type = object
    """Class of its state; `object`: that is not looked at."""
    _guards_queries = False
    """Whether a query that is not finite is one more reason to refuse a token."""

    @abstractmethod
    def _prepare(self, call: Call) -> Inputs:
        """Check a call, cast it up to at least float32 (C7), find the tokens the guard must skip (C8)."""

    def _check_state(self, state: State, lanes: int, heads: int) -> None:
        """Refuse a state of its class that another memory made. Default: any is taken."""
        return

    @abstractmethod
    def _engines(self) -> Engines[State]:
        """Both engines; imported here, as they import the memory."""

    @abstractmethod
    def _example(self, draw: Draw) -> Example:
        """Valid inputs inside the stability region, in float64."""

    def scan(
        self,
        w0: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None = None,
        state: State | None = None,
        *,
        engine: Engine = "chunked",
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
        tile: int | None = None,
    ) -> tuple[Tensor, State]:
        """Read and write a stretch of tokens, with memory running; arguments as `Memory.scan`."""
        if engine not in ("chunked", "reference"):
            raise ValueError(f"engine is {engine!r}; expected 'chunked' or 'reference'")
        if tile is not None:
            whole_numbers(self.name, tile=tile)
        call = Call(w0, q, k, v, Gates() if gates is None else gates, state, reset, valid)
        check_kinds(call)
        check_report(report)
        reference, chunked = self._engines()

        def plain(call: Call, report: Report | None) -> tuple[Tensor, State, Inputs]:
            x = self._prepare(call)
            y, new = reference(self, x) if engine == "reference" else chunked(self, x, tile=tile, report=report)
            return y.to(q.dtype), new, x

        def run(call: Call) -> tuple[Tensor, State]:
            with torch.autocast(q.device.type, enabled=False):
                if self._guards:
                    halve, guarded = engine == "chunked", self._guards_queries
                    return overflow.read(plain, call, report, self.start, halve=halve, guarded=guarded)
                return plain(call, report)[:2]

        cut = None
        whole = engine == "reference" or report is not None or torch.compiler.is_compiling() or q.shape[2] == 1
        if not (whole or pieces.uncut()):
            cut = pieces.scan(run, call, self._piece(call, tile), self._grown)
        return run(call) if cut is None else cut

    @property
    def _grown(self) -> pieces.Grown | None:
        """Which of a state's tensors grow; see `pieces.scan`. None: none do."""
        return None

    def _piece(self, call: Call, tile: int | None) -> pieces.Size | None:
        """Size of the pieces of a call, which it checks. None: it is not cut."""
        return None

    def example(
        self,
        generator: torch.Generator,
        *,
        lanes: int = 2,
        heads: int = 2,
        time: int = 40,
        dtype: torch.dtype = torch.float32,
    ) -> Example:
        q, k, v, gates = self._example(Draw(generator, lanes, heads, time))
        return q.to(dtype), k.to(dtype), v.to(dtype), gates.map(lambda gate: gate.to(dtype))
