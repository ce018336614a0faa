"""Atlas' transformers: memories over exponential features, of which two keep every token."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register(
    "deep_transformer",
    "DeepTransformer: a deep memory behind softmax attention's kernel (Atlas, §4); it grows.",
    "chunk",
)
def deep_transformer(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("deep_transformer")))


@register("swdt", "SWDT: DeepTransformer over a sliding window of 32 tokens (Atlas, §4).", "chunk")
def swdt(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("swdt")))


@register(
    "dot", "Dot: DeepTransformer that corrects what it predicts, by the Omega rule (Atlas, §4); it grows.", "chunk"
)
def dot(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("dot")))
