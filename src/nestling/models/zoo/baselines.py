"""What the papers compare with, at equal parameters. Named `-like` where our source is not the model's own paper."""

from __future__ import annotations

from nestling.layers import LSTM, Attention, Memory, SelfReferential, SlidingAttention
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register("transformer", "Llama-style transformer: causal softmax attention with rotary positions, SwiGLU, RMSNorm.")
def transformer(c: ModelConfig, _: int) -> Block:
    return Block(c, Attention(c.dim, c.heads))


@register(
    "swa_transformer", "The transformer with sliding-window attention: it forgets all but the last tokens.", "window"
)
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


@register(
    "mamba2_like",
    "Like Mamba-2: matrix memory, dot-product bias; one step size a token says how much is written and how much forgotten.",
    "chunk",
)
def mamba2_like(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("mamba2_like"), tied=True))


@register(
    "samba_like",
    "Like Samba: blocks of a state space, as in mamba2_like, and of sliding-window attention in turns.",
    "chunk",
    "window",
)
def samba_like(c: ModelConfig, number: int) -> Block:
    return mamba2_like(c, number) if number % 2 == 0 else swa_transformer(c, number)


@register(
    "rwkv7_like",
    "Like RWKV-7: matrix memory, decay by channel, a delta rule whose erasing has a strength of its own.",
    "chunk",
)
def rwkv7_like(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("rwkv7_like"), delta=True))


@register(
    "comba_like",
    "Like Comba: matrix memory, scalar decay, a delta rule whose erasing has a strength of its own.",
    "chunk",
)
def comba_like(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("comba_like"), delta=True))


@register("lstm", "LSTM as the sequence layer.")
def lstm(c: ModelConfig, _: int) -> Block:
    return Block(c, LSTM(c.dim))


@register(
    "srwm", "The self-referential weight matrix: one that makes its own keys, queries and steps (Irie et al., 2022)."
)
def srwm(c: ModelConfig, _: int) -> Block:
    return Block(c, SelfReferential(c.dim, c.heads))
