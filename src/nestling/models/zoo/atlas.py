"""Atlas: memories that learn from a window of tokens."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.memory import Polynomial
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


def _features(c: ModelConfig) -> Polynomial:
    """Degree 2, of fewer combinations of a key where keys are short: features weigh in the initial memory."""
    return Polynomial(degree=2, reduce=min(16, max(1, c.dim // c.heads // 6)))


@register("omeganet", "OmegaNet: deep memory trained on a window (Atlas, §3.2), identity features.", "chunk")
def omeganet(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("omeganet")))


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


@register(
    "atlas",
    "Atlas: deep memory of polynomial features, trained on a window by Muon (Atlas, §5).",
    "chunk",
)
def atlas(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("atlas", features=_features(c))))
