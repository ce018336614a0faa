"""Miras: memories of other biases and retentions."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register("moneta", "Moneta: deep memory, L3 bias, L4 retention (Miras, eq. 24–25).", "chunk")
def moneta(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("moneta")))


@register("yaad", "Yaad: deep memory, Huber bias, decay (Miras, eq. 26).", "chunk")
def yaad(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("yaad")))


@register("memora", "Memora: deep memory on the simplex, KL retention (Miras, eq. 27).", "chunk")
def memora(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("memora")))
