"""What the papers compare with, at equal parameters. Named `-like` where our source is not the model's own paper."""

from __future__ import annotations

from nestling.layers import Attention, Memory, SlidingAttention
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register("transformer", "Llama-style transformer: causal softmax attention with rotary positions, SwiGLU, RMSNorm.")
def transformer(c: ModelConfig, _: int) -> Block:
    return Block(c, Attention(c.dim, c.heads))


@register("swa_transformer", "The transformer with sliding-window attention: it forgets all but the last tokens.", "window")
def swa_transformer(c: ModelConfig, _: int) -> Block:
    return Block(c, SlidingAttention(c.dim, c.heads, c.window or 1))


@register("retnet", "RetNet's recurrence with a data-dependent scalar decay.", "chunk")
def retnet(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("retnet")))


@register("deltanet", "DeltaNet: matrix memory, delta rule.", "chunk")
def deltanet(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("deltanet")))


@register("gated_deltanet", "Gated DeltaNet: decay, then the delta rule.", "chunk")
def gated_deltanet(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("gated_deltanet")))


@register("ttt", "TTT-MLP as the sequence layer.", "chunk")
def ttt(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("ttt_mlp")))
