"""Nested Learning: Hope."""

from __future__ import annotations

from nestling.layers import SelfModifying
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register(
    "hope",
    "Hope: self-modifying Titans and a continuum of feed-forward levels that learn from the model's own loss "
    "(Nested Learning, §8.3).",
    "chunk",
    "periods",
)
def hope(c: ModelConfig, _: int) -> Block:
    mixer = SelfModifying(c.dim, c.heads, c.memory("self_modifying", unit_values=True))
    return Block(c, mixer, periods=c.periods)
