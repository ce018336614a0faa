"""Titans: a deep memory alone, and with attention in three ways."""

from __future__ import annotations

from nestling.layers import Memory, MemoryAsContext, MemoryAsGate, MemoryAsLayer, Persistent
from nestling.memory import MLP
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register(
    "titans_lmm",
    "Titans without attention: deep memory, momentum, decay, persistent tokens (Titans, §4.4).",
    "chunk",
    "persistent",
)
def titans_lmm(c: ModelConfig, _: int) -> Block:
    return Block(c, Persistent(Memory(c.dim, c.heads, c.memory("titans")), c.persistent or 0, c.dim))


@register(
    "titans_mac",
    "Titans, memory as context: attention within a segment, to what the memory recalls for it (Titans, §4.1).",
    "chunk",
    "window",
    "persistent",
)
def titans_mac(c: ModelConfig, _: int) -> Block:
    spec = c.memory("titans", network=MLP(expansion=2))
    return Block(c, MemoryAsContext(c.dim, c.heads, spec, segment=c.window or 1, persistent=c.persistent or 0))


@register(
    "titans_mag",
    "Titans, memory as gate: sliding-window attention, gated by the memory (Titans, §4.2).",
    "chunk",
    "window",
    "persistent",
)
def titans_mag(c: ModelConfig, _: int) -> Block:
    spec = c.memory("titans", network=MLP(expansion=2))
    return Block(c, MemoryAsGate(c.dim, c.heads, spec, window=c.window or 1, persistent=c.persistent or 0))


@register(
    "titans_mal",
    "Titans, memory as layer: sliding-window attention over what the memory answers (Titans, §4.3).",
    "chunk",
    "window",
    "persistent",
)
def titans_mal(c: ModelConfig, _: int) -> Block:
    spec = c.memory("titans", network=MLP(expansion=2))
    return Block(c, MemoryAsLayer(c.dim, c.heads, spec, window=c.window or 1, persistent=c.persistent or 0))
