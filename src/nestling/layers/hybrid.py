"""A memory and sliding-window attention in one layer: memory as gate and memory as layer (Titans, §4.2 and §4.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nestling import state as fast
from nestling.layers.base import Layer
from nestling.layers.level import Level
from nestling.layers.memory import Memory
from nestling.layers.norm import EPS, rms_norm
from nestling.layers.persistent import Persistent
from nestling.layers.sliding import SlidingAttention, SlidingState
from nestling.layers.stream import Kept, kept_around
from nestling.memory import Memory as AnyMemory
from nestling.memory import Report
from nestling.state import register


@register
class GateState(NamedTuple):
    """Of both branches."""

    memory: Any
    attention: SlidingState


@register
class ChainState(NamedTuple):
    """Of memory and attention, and what the memory answered at the persistent tokens, `[lane, number, dim]`."""

    memory: Any
    attention: SlidingState
    prefix: Tensor | None


H = TypeVar("H", GateState, ChainState)


class _Hybrid(Layer):
    """What both have: a memory behind persistent tokens, and attention that always sees these. A token that is not finite is left
    out of both, and the attention counts it.

    Args:
        dim: width.  heads: of both.
        spec: any named or made memory, each of whose heads has width dim / heads.
        window: of the attention.  persistent: number of persistent tokens.
    """

    def __init__(self, dim: int, heads: int, spec: AnyMemory, *, window: int, persistent: int) -> None:
        super().__init__()
        self.memory = Persistent(Memory(dim, heads, spec, output=False), persistent, dim)
        self.attention = SlidingAttention(dim, heads, window, output=False)
        self.memory_norm = nn.RMSNorm(dim, eps=EPS)
        self.out = nn.Linear(dim, dim, bias=False)
        self.growth = self.memory.growth

    def _ended(self, own: Kept, state: H) -> H:
        """The state after the call, see `Kept.ended`."""
        if own.emptied is not None and bool(own.emptied.any()):
            state = fast.where(own.emptied, self.start(len(own.emptied)), state, keep=("faults",))
        return state._replace(attention=own.ended(state.attention, self.attention.start))

    def levels(self) -> list[Level]:
        found = []
        # What follows both, and a norm of the attention's answers.
        beside = self.own("memory", "attention", "memory_norm")
        for part, layer, more in (
            ("memory", self.memory, ("memory_norm.weight",)),
            ("attention", self.attention, beside),
        ):
            first, *others = (replace(level.under(part), name=level.name) for level in layer.levels())
            found += [replace(first, params=(*first.params, *more)), *others]
        return found


class MemoryAsGate(_Hybrid):
    """MAG (Titans, eq. 26–28): x̃ = [P ‖ x],  y = SWA(x̃),  o = (RMSNorm(y) ∘ σ(RMSNorm(M(x̃)))) W_o.

    From the paper: the branches, persistent tokens that every query sees, a memory that reads x̃, normalization of both by
    learned vectors and a non-linearity. Ours: σ, and that it gates the attention; W_o once, in place of one in each branch.
    """

    def __init__(self, dim: int, heads: int, spec: AnyMemory, *, window: int, persistent: int) -> None:
        super().__init__(dim, heads, spec, window=window, persistent=persistent)
        self.attention_norm = nn.RMSNorm(dim, eps=EPS)

    def start(self, lanes: int) -> GateState:
        return GateState(self.memory.start(lanes), self.attention.start(lanes))

    def forward(
        self,
        x: Tensor,
        state: GateState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, GateState]:
        state = self.start(x.shape[0]) if state is None else state
        own = kept_around(x, reset, valid)
        (x,), masks = own.rows, {"reset": own.reset, "valid": own.valid, "report": report}
        tokens = self.memory.tokens
        prefix = None if tokens is None else torch.stack([tokens])
        m, memory = self.memory(x, state.memory, **masks)
        y, attention = self.attention(x, state.attention, prefix=prefix, **masks)
        o = rms_norm(y, self.attention_norm) * torch.sigmoid(rms_norm(m, self.memory_norm))
        return own.answered(self.out(o)), self._ended(own, GateState(memory, attention))


class MemoryAsLayer(_Hybrid):
    """MAL (Titans, eq. 29–31): x̃ = [P ‖ x],  y = RMSNorm(M(x̃)),  o = SWA(y) W_o.

    From the paper: the chain; what the memory answers at the persistent tokens is what every query of the attention sees. Ours:
    the norm between the two.
    """

    def start(self, lanes: int) -> ChainState:
        prefix, memory = self._opening(lanes)
        return ChainState(memory, self.attention.start(lanes), prefix)

    def forward(
        self,
        x: Tensor,
        state: ChainState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, ChainState]:
        state = self.start(x.shape[0]) if state is None else state
        own = kept_around(x, reset, valid)
        (x,), reset, valid = own.rows, own.reset, own.valid
        masks = {"reset": reset, "valid": valid, "report": report}
        prefix = state.prefix
        fresh = reset if reset is None or valid is None else reset & valid
        if prefix is not None and fresh is not None and bool(fresh.any()):  # the slow weights may have moved since
            opened, _ = self._opening(x.shape[0])
            assert opened is not None
            prefix = torch.where(fresh.any(1).to(x.device)[:, None, None], opened, prefix)
        m, memory = self.memory(x, state.memory, **masks)
        y, attention = self.attention(rms_norm(m, self.memory_norm), state.attention, prefix=prefix, **masks)
        return own.answered(self.out(y)), self._ended(own, ChainState(memory, attention, prefix))

    def levels(self) -> list[Level]:
        memory, *others = super().levels()
        return [replace(memory, state_paths=(*memory.state_paths, "prefix")), *others]

    def _opening(self, lanes: int) -> tuple[Tensor | None, Any]:
        y, state = self.memory.opening(lanes)
        return None if y is None else rms_norm(y, self.memory_norm).expand(lanes, -1, -1), state
