"""Titans."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register("titans_lmm", "Titans without attention: deep memory, momentum, decay (Titans, §4.4).", "chunk")
def titans_lmm(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("titans")))
