"""Memory as context: what the memory recalls stands beside the tokens of a segment (Titans, §4.1).

    h_τ = M*_{τ−1}(S^(τ) W_q)         what the memory, as it stood when the segment began, recalls for each of its tokens
    y_τ = Attn([P ‖ h_τ ‖ S^(τ)])     within the segment
    M_τ = M_{τ−1} having read y_τ     token by token
    o_τ = y_τ ⊗ M*(y_τ)                                                                         (Titans, eq. 21–25)

Two things the paper leaves open would let a token see the future: token j sees P, h_i and S_i for i ≤ j only, and its second
read is of the memory that has read y up to j. Segments are counted from a lane's position 0, whatever the calls were.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import state as fast
from nestling.layers.base import Layer
from nestling.layers.level import Level, Period
from nestling.layers.memory import Memory
from nestling.layers.norm import EPS, rms_norm
from nestling.layers.pieces import Piece, merge, pieces, place
from nestling.layers.rotary import rotate
from nestling.layers.stream import kept_of
from nestling.memory import MemorySpec, Report
from nestling.optim.joined import Joined
from nestling.state import register


@register
class ContextState(NamedTuple):
    """What a lane carries.

    memory      the memory layer's state
    boundary    the memory's weights at the start of the segment, per weight `[lane, head, in, out]`
    key, value  rotated, of the segment so far: `[lane, 2, segment, head, head_dim]`, of h and of S, zeros behind
    position    tokens read, int64 `[lane]`, CPU
    faults      tokens left out as not finite, and those of the memory, int64 `[lane]`
    """

    memory: Any
    boundary: tuple[Tensor, ...]
    key: Tensor
    value: Tensor
    position: Tensor
    faults: Tensor


class MemoryAsContext(Layer):
    """MAC, with ⊗ as in `MemoryAsGate`: o = (RMSNorm(y) ∘ σ(RMSNorm(M(y)))) W_o.

    From the paper: the equations above, with as many recalled tokens as the segment has. Ours, where it is silent: the rows of
    y kept are the segment's; the memory's own projections make W_q (without the convolution, which reads y) and serve both
    reads; rotary positions are those within [P ‖ h ‖ S]; RMSNorm before h is attended to.

    Args:
        dim: width.  heads: of attention and memory.
        spec: a memory whose weights can be recalled from while they stand still: any `MemorySpec`.
        segment: tokens C of a segment.  persistent: number of persistent tokens.
        base: of the rotary frequencies.
    """

    def __init__(
        self, dim: int, heads: int, spec: MemorySpec, *, segment: int, persistent: int, base: float = 10_000.0
    ) -> None:
        super().__init__()
        if not isinstance(spec, MemorySpec):
            raise ValueError(
                f"MemoryAsContext: {spec!r} cannot be read without being written; expected a MemorySpec, or choose "
                "MemoryAsGate or MemoryAsLayer"
            )
        if segment < 1 or persistent < 0:
            raise ValueError(
                f"MemoryAsContext: segment is {segment} and persistent {persistent}; expected at least 1 and at least 0"
            )
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"MemoryAsContext: dim {dim} and heads {heads}; expected heads of equal, even width")
        self.heads, self.head_dim, self.segment, self.base = heads, dim // heads, segment, base
        self.tokens = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        """P. As large as what blocks hand to their sequence layers, which are normalized."""
        self.qkv = Joined(dim, 3 * dim, parts=3, bias=False)
        self.memory = Memory(dim, heads, spec, output=False)
        self.recall_norm, self.memory_norm, self.attention_norm = (nn.RMSNorm(dim, eps=EPS) for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)

    def start(self, lanes: int) -> ContextState:
        memory = self.memory.start(lanes)
        empty = self.qkv.weight.new_zeros(lanes, 2, self.segment, self.heads, self.head_dim)
        none = torch.zeros(lanes, dtype=torch.int64)
        return ContextState(memory, memory.memory.weights, empty, empty, none, none.to(empty.device))

    def forward(
        self,
        x: Tensor,
        state: ContextState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, ContextState]:
        lanes, time, dim = x.shape
        state = self.start(lanes) if state is None else state
        if time == 0:
            return x, state
        own = kept_of(lambda x: (self.qkv(x), self.memory.query(x)), x, reset, valid)
        (qkv, asked), reset, valid = own.rows, own.reset, own.valid
        fixed = self._fixed()
        cut = list(pieces(state.position, time, reset, valid, self.segment))
        outputs, notes = [], []
        for piece in cut:
            index = piece.at.to(x.device)[..., None]
            mine, q = (u.gather(1, index.expand(-1, -1, u.shape[2])) for u in (qkv, asked))
            note = None if report is None else Report()
            y, state = self._piece(mine, q, fixed, state, piece, note)
            outputs.append(y)
            notes.append(note)
        if report is not None:
            merge(report, [note for note in notes if note is not None], cut, time)
        y = place(outputs, cut, (lanes, time), 1) if cut else x.new_zeros(lanes, time, dim)
        return own.answered(self.out(y)), own.ended(state, self.start)

    def levels(self) -> list[Level]:
        (memory,) = self.memory.levels()
        norms = ("memory_norm", "recall_norm")  # of what the memory answers
        attention = Level(
            "attention",
            Period(0, "token"),
            network=f"set of the pairs of a segment of {self.segment} tokens",
            bias="L2, weighted by exp(q·k)",
            retention="the segment",
            rule="non-parametric solution",
            flow="tokens, and what the memory recalls for them",
            transfer="direct",
            params=self.own("memory", *norms),
            state_paths=("key", "value", "position", "faults"),
        )
        under = memory.under("memory")
        params = (*under.params, *(f"{norm}.weight" for norm in norms))
        return [
            attention,
            replace(under, name=memory.name, params=params, state_paths=(*under.state_paths, "boundary")),
        ]

    def _piece(
        self,
        qkv: Tensor,
        asked: Tensor,
        fixed: tuple[Tensor, Tensor],
        state: ContextState,
        piece: Piece,
        report: Report | None,
    ) -> tuple[Tensor, ContextState]:
        """Tokens of one segment of each lane: qkv `[lane, n, 3 · dim]`, the memory's queries asked `[lane, n, dim]`."""
        lanes, n, _ = qkv.shape
        if piece.fresh is not None:
            state = fast.where(piece.fresh, self.start(lanes), state, keep=("faults",))
        mask = None if piece.mask is None else piece.mask.to(qkv.device)
        offset = state.position % self.segment
        q, k, v = self._heads(qkv)
        h = self.memory.recall(asked, state.boundary)
        h_k, h_v = self._heads(F.linear(rms_norm(h, self.recall_norm), self.qkv.weight[h.shape[2] :]))
        within = (offset[:, None] + torch.arange(n)).to(qkv.device)
        persistent = fixed[0].shape[1]
        q, k = (rotate(u, within + persistent + self.segment, self.base) for u in (q, k))
        h_k = rotate(h_k, within + persistent, self.base)
        key, value = (
            torch.stack([self._write(old[:, m], new, within, mask) for m, new in enumerate(both)], 1)
            for old, both in ((state.key, (h_k, k)), (state.value, (h_v, v)))
        )
        seen = torch.arange(self.segment, device=qkv.device) <= within[..., None]
        keys, values = (
            torch.cat([p.expand(lanes, -1, -1, -1), u.flatten(1, 2)], 1).transpose(1, 2)
            for p, u in zip(fixed, (key, value), strict=True)
        )
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=F.pad(torch.cat([seen, seen], -1), (persistent, 0), value=True).unsqueeze(1),
        )
        y = y.transpose(1, 2).flatten(2)
        m, memory = self.memory(y, state.memory, valid=mask, report=report)
        o = rms_norm(y, self.attention_norm) * torch.sigmoid(rms_norm(m, self.memory_norm))
        boundary = state.boundary
        if bool(piece.closing.any()):
            boundary = fast.where(piece.closing, memory.memory.weights, boundary)
            key, value = (fast.where(piece.closing, torch.zeros_like(u), u) for u in (key, value))
        faults = state.faults + memory.memory.faults - state.memory.memory.faults
        return o, ContextState(memory, boundary, key, value, state.position + piece.length, faults)

    def _heads(self, x: Tensor) -> list[Tensor]:
        return list(x.view(*x.shape[:2], -1, self.heads, self.head_dim).unbind(2))

    def _fixed(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens, `[1, number, head, head_dim]`."""
        if self.tokens is None:
            none = self.qkv.weight.new_zeros(1, 0, self.heads, self.head_dim)
            return none, none
        _, k, v = self._heads(self.qkv(torch.stack([self.tokens])))
        return rotate(k, torch.arange(len(self.tokens), device=k.device)[None], self.base), v

    def _write(self, old: Tensor, new: Tensor, within: Tensor, mask: Tensor | None) -> Tensor:
        """old `[lane, segment, head, head_dim]` with the tokens at their places within the segment."""
        index = within if mask is None else torch.where(mask, within, self.segment)
        index = index.clamp_max(self.segment)[..., None, None].expand_as(new)
        return F.pad(old.to(new.dtype), (0, 0, 0, 0, 0, 1)).scatter(1, index, new)[:, : self.segment]
