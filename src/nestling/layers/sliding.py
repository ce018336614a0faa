"""Causal softmax attention over the last tokens only: constant memory and cost per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.base import Layer
from nestling.layers.level import Level, Period
from nestling.layers.rotary import rotate
from nestling.layers.stream import Places, advance_position, kept_of, places
from nestling.layers.stretch import attend, ongoing
from nestling.memory import Report
from nestling.memory.inputs import surely
from nestling.optim.joined import Joined
from nestling.state import register


@register
class SlidingState(NamedTuple):
    """Rotated keys and values of the last tokens since the reset, `[lane, window − 1, head, head_dim]`, the newest last, zeros
    where there was none; position `[lane]`, CPU; tokens left out as not finite, int64 `[lane]`."""

    key: Tensor
    value: Tensor
    position: Tensor
    faults: Tensor


class SlidingAttention(Layer):
    """Multi-head attention over the last `window` tokens, the token's own included (Nested Learning, eq. 63; Atlas, eq. 18).

    Args:
        dim: width.  heads: number of heads, dividing dim into an even head width.
        window: tokens that a token sees.
        base: of the rotary frequencies.
        output: False leaves out the last projection: y are the heads side by side.
    """

    def __init__(self, dim: int, heads: int, window: int, base: float = 10_000.0, *, output: bool = True) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"SlidingAttention: dim {dim} and heads {heads}; expected heads of equal, even width")
        if window < 1:
            raise ValueError(f"SlidingAttention: window is {window}; expected at least 1")
        self.heads, self.head_dim, self.window, self.base = heads, dim // heads, window, base
        self.qkv = Joined(dim, 3 * dim, parts=3, bias=False)
        self.out = nn.Linear(dim, dim, bias=False) if output else None

    def start(self, lanes: int) -> SlidingState:
        empty = self.qkv.weight.new_zeros(lanes, self.window - 1, self.heads, self.head_dim)
        zeros = torch.zeros(lanes, dtype=torch.int64)
        return SlidingState(empty, empty, zeros, zeros.to(empty.device))

    def forward(
        self,
        x: Tensor,
        state: SlidingState | None = None,
        *,
        prefix: Tensor | None = None,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, SlidingState]:
        """As a layer's; prefix `[lane or 1, tokens, dim]`: inputs before position 0 that every token sees beside its window."""
        lanes, time, _ = x.shape
        state = self.start(lanes) if state is None else state
        if time == 0:
            return x, state
        if valid is not None and surely(valid):
            valid = None
        own = kept_of(self._project, x, reset, valid)
        (qkv,), reset, valid = own.rows, own.reset, own.valid
        plain = reset is None and valid is None
        if plain and prefix is None and ongoing() and (read := self._go_on(qkv, state)):
            y, state = read
            y = y.flatten(2)
            return y if self.out is None else self.out(y), state
        at = places(reset, valid, lanes, time, x.device)
        before = state.position.to(x.device)[:, None]
        position = torch.where(at.start >= 0, at.rank - at.start, at.rank + before)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(u, position, self.base) for u in (q, k))
        first = torch.where(at.start >= 0, at.start, -before)  # rank of the first token since the reset
        if valid is not None:  # valid tokens side by side, in order
            order = torch.where(valid.to(x.device), at.rank, time)
            q, k, v, first = (_pack(u, order) for u in (q, k, v, first))
        keys, values = _join(state.key, k), _join(state.value, v)
        fresh = plain and not torch.compiler.is_compiling() and not bool(state.position.any())
        y = self._attend(q, keys, values, first, prefix, plain=plain, fresh=fresh).flatten(2)
        if valid is not None:
            y = y.gather(1, at.rank[..., None].expand(-1, -1, y.shape[2]))
        moved = advance_position(state.position, at)
        key, value = (self._tail(u, at, -before, reset, valid) for u in (keys, values))
        y = own.answered(y if self.out is None else self.out(y))
        return y, own.ended(SlidingState(key, value, moved, state.faults), self.start)

    def levels(self) -> list[Level]:
        return [
            Level(
                "attention",
                Period(0, "token"),
                network=f"set of the last {self.window} pairs",
                bias="L2, weighted by exp(q·k)",
                retention=f"the last {self.window} tokens",
                rule="non-parametric solution",
                flow="tokens",
                transfer="direct",
                params=self.own(),
                state_paths=("key", "value", "position", "faults"),
            )
        ]

    def _project(self, x: Tensor) -> tuple[Tensor]:
        return (self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim),)

    def _go_on(self, qkv: Tensor, state: SlidingState) -> tuple[Tensor, SlidingState] | None:
        """`attend`, where all lanes see equally many earlier tokens."""
        seen = state.position.clamp_max(self.window - 1)
        visible = int(seen[0])
        if not bool((seen == visible).all()):
            return None
        read = attend(qkv, state.key, state.value, state.position, self.base, visible=visible, window=self.window)
        if read is None:
            return None
        y, key, value = read
        return y, SlidingState(key, value, state.position + qkv.shape[1], state.faults)

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, first: Tensor, prefix: Tensor | None, *, plain: bool, fresh: bool
    ) -> Tensor:
        """Queries of rank 0 …; keys and values stand a window before: that of rank r at r + window. `[lane, time, head, dim]`.

        The first window of tokens is one block, as it alone can look behind the call's start; those that follow are cut finer,
        so that a query is not multiplied with many more keys than it sees.
        """
        time, window = q.shape[1], self.window
        head, fine = min(time, window), max(window // 4, min(window, 64))
        fixed = self._fixed(prefix, q)
        behind = 0 if fresh else window
        if fresh and prefix is None:
            k, v = (u[:, window : window + head].transpose(1, 2) for u in (keys, values))
            y = F.scaled_dot_product_attention(q[:, :head].transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
        else:
            y = self._blocks(
                q[:, :head], keys[:, window - behind :], values[:, window - behind :], first, fixed, behind, head
            )
        if time == head:
            return y
        rest = self._blocks(
            q[:, head:],
            keys[:, head:],
            values[:, head:],
            None if plain else first[:, head:] - head,
            fixed,
            window,
            fine,
        )
        return torch.cat([y, rest], 1)

    def _blocks(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor | None,
        fixed: tuple[Tensor, Tensor],
        behind: int,
        size: int,
    ) -> Tensor:
        """Queries in blocks of `size`, each with the keys of the block and those `behind` it.

        first  ranks of the first key that queries may see, counted from the first query's; None: the window is all that limits
        """
        lanes, time = q.shape[:2]
        blocks = -(-time // size)
        q, keys, values = (F.pad(u, (0, 0, 0, 0, 0, blocks * size - time)) for u in (q, keys, values))
        own, seen = (torch.arange(n, device=q.device) for n in (size, behind + size))
        ahead = seen - behind - own[:, None]  # rank of a key, counted from its query's
        mask = ((ahead <= 0) & (ahead > -self.window)).expand(1, 1, -1, -1)
        if first is not None:
            rank = torch.arange(blocks, device=q.device).view(-1, 1, 1) * size + seen - behind
            limit = F.pad(first[:, :time], (0, blocks * size - time)).view(lanes, blocks, size, 1)
            mask = mask & (rank >= limit)
        k, v = (
            torch.cat([p.expand(lanes, blocks, *p.shape[2:]), _windows(u, blocks, size, behind)], 2)
            for p, u in zip(fixed, (keys, values), strict=True)
        )
        return _attention(q, k, v, mask)[:, :time]

    def _fixed(self, prefix: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, `[lane or 1, 1, tokens, head, head_dim]`."""
        if prefix is None:
            none = like.new_zeros(1, 1, 0, self.heads, self.head_dim)
            return none, none
        _, k, v = self._project(prefix)[0].unbind(2)
        ahead = torch.arange(-prefix.shape[1], 0, device=k.device).expand(prefix.shape[0], -1)
        return rotate(k, ahead, self.base).unsqueeze(1), v.unsqueeze(1)

    def _tail(self, stream: Tensor, at: Places, start: Tensor, reset: Tensor | None, valid: Tensor | None) -> Tensor:
        """The last window − 1 of a stream in which rank r stands at r + window."""
        if reset is None and valid is None:
            # A copy: a view would keep all of the stream for as long as the state lives.
            return stream[:, stream.shape[1] - self.window + 1 :].clone(memory_format=torch.contiguous_format)
        rank = at.total[:, None] + torch.arange(1 - self.window, 0, device=stream.device)
        rows = torch.arange(len(rank), device=stream.device)[:, None]
        keep = rank >= torch.where(at.last[:, None] >= 0, at.last[:, None], start)
        return torch.where(keep[..., None, None], stream[rows, rank + self.window], 0.0)


def _pack(x: Tensor, order: Tensor) -> Tensor:
    """x `[lane, time, …]` → token t at place order[t]; what is ordered to the end is dropped, zeros stand in its place."""
    packed = x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])
    return packed.scatter(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x), x)[:, :-1]


def _join(tail: Tensor, new: Tensor) -> Tensor:
    """The tail of window − 1, behind one place that nobody sees, and the new tokens."""
    return torch.cat([F.pad(tail.to(new.dtype), (0, 0, 0, 0, 1, 0)), new], 1)


def _windows(stream: Tensor, blocks: int, size: int, behind: int) -> Tensor:
    """What blocks of `size` tokens look at: `[lane, block, behind + size, head, head_dim]`."""
    return torch.stack([stream[:, n * size : n * size + behind + size] for n in range(blocks)], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q `[lane, block · size, head, dim]`, k, v `[lane, block, seen, head, dim]`, mask `[lane or 1, block or 1, size, seen]`;
    what the mask lacks of the keys stands before it and is seen."""
    lanes, blocks, size = *k.shape[:2], mask.shape[2]
    q = q.reshape(lanes * blocks, size, *q.shape[2:])
    mask = F.pad(mask, (k.shape[2] - mask.shape[3], 0), value=True)
    mask = mask[0] if mask.shape[:2] == (1, 1) else mask.expand(lanes, blocks, -1, -1).flatten(0, 1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.unsqueeze(1)
    )
    return y.transpose(1, 2).reshape(lanes, blocks * size, *q.shape[2:])
