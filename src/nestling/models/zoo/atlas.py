"""Atlas: memories that learn from a window of tokens."""

from __future__ import annotations

from nestling.layers import Memory, MemoryAsGate, MemoryAsLayer
from nestling.memory import MLP, Polynomial
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


def _features(c: ModelConfig) -> Polynomial:
    """Degree 2, of fewer combinations of a key where keys are short: features weigh in the initial memory."""
    return Polynomial(degree=2, reduce=min(16, max(1, c.dim // c.heads // 6)))


@register("omeganet", "OmegaNet: deep memory of polynomial features, trained on a window (Atlas, §3.2).", "chunk")
def omeganet(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("omeganet", features=_features(c))))


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


@register(
    "atlas_mag",
    "Atlas, memory as gate: sliding-window attention, gated by the memory (Atlas, §6; Titans, §4.2).",
    "chunk",
    "window",
    "persistent",
)
def atlas_mag(c: ModelConfig, _: int) -> Block:
    spec = c.memory("atlas", features=_features(c), network=MLP(leading=True, expansion=2))
    return Block(c, MemoryAsGate(c.dim, c.heads, spec, window=c.window or 1, persistent=c.persistent or 0))


@register(
    "atlas_mal",
    "Atlas, memory as layer: sliding-window attention over what the memory answers (Atlas, §6; Titans, §4.3).",
    "chunk",
    "window",
    "persistent",
)
def atlas_mal(c: ModelConfig, _: int) -> Block:
    spec = c.memory("atlas", features=_features(c), network=MLP(leading=True, expansion=2))
    return Block(c, MemoryAsLayer(c.dim, c.heads, spec, window=c.window or 1, persistent=c.persistent or 0))
