"""Nested Learning: Hope, and other mixers over levels that learn from the model's loss."""

from __future__ import annotations

from nestling.layers import Attention, SelfModifying, SlidingAttention
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


@register(
    "hope_attention",
    "Hope-Attention: softmax attention and Hope's continuum (Nested Learning, §8.3).",
    "periods",
)
def hope_attention(c: ModelConfig, _: int) -> Block:
    return Block(c, Attention(c.dim, c.heads), periods=c.periods)


@register(
    "hope_swa",
    "Sliding-window attention and Hope's continuum, so that the state does not grow (after Nested Learning, §8.3).",
    "periods",
    "window",
)
def hope_swa(c: ModelConfig, _: int) -> Block:
    return Block(c, SlidingAttention(c.dim, c.heads, c.window or 1), periods=c.periods)


@register(
    "ttt_e2e",
    "TTT-E2E: a sliding-window transformer; the last quarter of its blocks carry, beside the static feed-forward network, one "
    "that learns from the model's own loss. The outer gradient is first-order here unless outer says otherwise.",
    "periods",
    "window",
    levels=1,
)
def ttt_e2e(c: ModelConfig, number: int) -> Block:
    learning = number >= c.layers - max(1, c.layers // 4)
    return Block(
        c, SlidingAttention(c.dim, c.heads, c.window or 1), periods=(*c.periods, None) if learning else (None,)
    )
