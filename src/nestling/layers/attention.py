"""Causal softmax attention with rotary positions and a key-value cache: the baseline every memory is compared with."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.base import Layer
from nestling.layers.level import Level, Period
from nestling.layers.rotary import rotate
from nestling.layers.stream import Places, advance_position, kept_of, places
from nestling.layers.stretch import attend
from nestling.memory import Report
from nestling.optim.joined import Joined
from nestling.state import register


@partial(register, grows={"key": 1, "value": 1})
class AttentionState(NamedTuple):
    """Rotated keys and values of all tokens since the reset, `[lane, capacity, head, head_dim]`; position `[lane]`, CPU; tokens
    left out as not finite, int64 `[lane]`."""

    key: Tensor
    value: Tensor
    position: Tensor
    faults: Tensor


class Attention(Layer):
    """Multi-head causal attention (Nested Learning, eq. 62: Nadaraya–Watson regression over all tokens so far).

    Args:
        dim: width.  heads: number of heads, dividing dim into an even head width.
        base: of the rotary frequencies. Angles are computed in float64, so that far positions stay exact.
    """

    growth: Literal["constant", "linear"] = "linear"

    def __init__(self, dim: int, heads: int, base: float = 10_000.0) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"Attention: dim {dim} and heads {heads}; expected heads of equal, even width")
        self.heads, self.head_dim, self.base = heads, dim // heads, base
        self.qkv = Joined(dim, 3 * dim, parts=3, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def start(self, lanes: int) -> AttentionState:
        empty = self.qkv.weight.new_zeros(lanes, 0, self.heads, self.head_dim)
        zeros = torch.zeros(lanes, dtype=torch.int64)
        return AttentionState(empty, empty, zeros, zeros.to(empty.device))

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, AttentionState]:
        lanes, time, dim = x.shape
        state = self.start(lanes) if state is None else state
        if time == 0:
            return x, state
        own = kept_of(self._project, x, reset, valid)
        (qkv,), reset, valid = own.rows, own.reset, own.valid
        simple = reset is None and valid is None
        aligned = simple and bool((state.position == state.key.shape[1]).all())
        if aligned and (
            read := attend(qkv, state.key, state.value, state.position, self.base, visible=state.key.shape[1])
        ):
            y, key, value = read
            return self.out(y.flatten(2)), AttentionState(key, value, state.position + time, state.faults)
        at = places(reset, valid, lanes, time, x.device)
        before = state.position.to(x.device)[:, None]
        position = torch.where(at.start >= 0, at.rank - at.start, at.rank + before)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(u, position, self.base) for u in (q, k))
        keys = torch.cat([state.key.to(k.dtype), k], 1)
        values = torch.cat([state.value.to(v.dtype), v], 1)
        fresh = simple and state.key.shape[1] == 0
        mask = None if fresh else self._mask(state, at, valid, time).unsqueeze(1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        y = own.answered(self.out(y.transpose(1, 2).reshape(lanes, time, dim)))
        moved = advance_position(state.position, at)
        if aligned:
            return y, own.ended(AttentionState(keys, values, moved, state.faults), self.start)
        return y, own.ended(self._compact(keys, values, state, at, valid, moved), self.start)

    def levels(self) -> list[Level]:
        return [
            Level(
                "attention",
                Period(0, "token"),
                network="growing set of pairs",
                bias="L2, weighted by exp(q·k)",
                retention="everything",
                rule="non-parametric solution",
                flow="tokens",
                transfer="direct",
                params=self.own(),
                state_paths=("key", "value", "position", "faults"),
            )
        ]

    def _project(self, x: Tensor) -> tuple[Tensor]:
        return (self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim),)

    def _mask(self, state: AttentionState, at: Places, valid: Tensor | None, time: int) -> Tensor:
        """bool `[lane, time, capacity + time]`: cached tokens unless reset since; own segment's tokens up to itself."""
        device = at.rank.device
        slots = torch.arange(state.key.shape[1], device=device)
        cached = (slots < state.position.to(device)[:, None])[:, None] & (at.start < 0)[..., None]
        own = torch.ones(time, time, dtype=torch.bool, device=device).tril() & (
            at.start[..., None] == at.start[:, None]
        )
        if valid is not None:  # an invalid token sees itself, so that its unused answer is finite
            own = (own & valid.to(device)[:, None]) | torch.eye(time, dtype=torch.bool, device=device)
        return torch.cat([cached, own], -1)

    def _compact(
        self, keys: Tensor, values: Tensor, state: AttentionState, at: Places, valid: Tensor | None, position: Tensor
    ) -> AttentionState:
        """Keep the tokens since the last reset, first in the cache, zeros behind."""
        device = keys.device
        slots = torch.arange(state.key.shape[1], device=device)
        old = (slots < state.position.to(device)[:, None]) & (at.last < 0)[:, None]
        new = at.start == at.last[:, None]
        new = new & (at.rank >= at.last[:, None])
        if valid is not None:
            new = new & valid.to(device)
        keep = torch.cat([old, new], 1)
        capacity = int(position.max())
        order = (~keep).long().argsort(dim=1, stable=True)[:, :capacity]
        filled = torch.arange(capacity, device=device) < position.to(device)[:, None]
        rows = torch.arange(keys.shape[0], device=device)[:, None]
        key, value = (torch.where(filled[..., None, None], x[rows, order], 0.0) for x in (keys, values))
        return AttentionState(key, value, position, state.faults)
