"""Nested Learning: Hope, and other mixers over levels that learn from the model's loss.

Hope's settings beside those of the continuum are of its self-modifying memories:

    chunk, chunk_others  periods of the main memory and of the generators; None: the same
    network              of all memories: "mlp", two layers and a residual path (eq. 89), or "matrix" (eq. 92–93)
    adaptive             which of k, v and q are made by memories that learn (the paper's model: k and v; step sizes and decay
                         always are). k and v that are not are made by the same memories, standing still; q by a projection
    dgd                  delta gradient descent, or plain gradient descent on a decaying memory
    momentum             S ← μS − (1 − μ)η∇ℓ, which eq. 88 has not (1 − μ is ours: without it training diverges)
    decay                α < 1

and `periods=[]` leaves an ordinary feed-forward network in place of the continuum.
"""

from __future__ import annotations

from typing import Any

from nestling.layers import Attention, SelfModifying, SlidingAttention
from nestling.memory import Decay, DeltaGradient, Full, Gradient, Matrix, Momentum
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register

PLAIN = {False: Gradient(), True: Momentum()}
MATRIX = Matrix(init_scale=0.02, identity=True)  # an empty one would generate 0 for ever
ABLATION: dict[str, dict[str, Any]] = {
    "Hope": {"momentum": True, "adaptive": ["k", "v", "q"]},
    "without DGD": {"momentum": True, "adaptive": ["k", "v", "q"], "dgd": False},
    "without momentum": {"adaptive": ["k", "v", "q"]},
    "without weight decay": {"momentum": True, "adaptive": ["k", "v", "q"], "decay": False},
    "without CMS": {"momentum": True, "adaptive": ["k", "v", "q"], "periods": []},
    "without inner projection k": {"momentum": True, "adaptive": ["v", "q"]},
    "without inner projection v": {"momentum": True, "adaptive": ["k", "q"]},
    "without inner projection q": {"momentum": True, "adaptive": ["k", "v"]},
}
"""Rows of the paper's ablation (Nested Learning, Table 6) as settings of `hope`. Its first row is not the model of eq. 88, which
has neither momentum nor an adaptive q."""


@register(
    "hope",
    "Hope: self-modifying Titans and a continuum of feed-forward levels that learn from the model's own loss "
    "(Nested Learning, §8.3).",
    "chunk",
    "periods",
    "chunk_others",
    "network",
    "adaptive",
    "dgd",
    "momentum",
    "decay",
    levels=2,
    narrow=True,
)
def hope(c: ModelConfig, _: int) -> Block:
    choices: dict[str, Any] = {
        "rule": (DeltaGradient("with_decay", with_momentum=bool(c.momentum)) if c.dgd else PLAIN[bool(c.momentum)]),
        "retention": Decay() if c.decay else Full(),
        "adaptive_q": "q" in c.adaptive,
        "static": tuple(name for name in ("k", "v") if name not in c.adaptive),
    }
    if c.network == "matrix":
        choices |= {"network": MATRIX, "others": MATRIX}
    memory = c.memory("self_modifying", unit_values=True, chunk_others=c.chunk_others, **choices)
    return Block(c, SelfModifying(c.dim, c.heads, memory), periods=c.periods)


@register(
    "hope_attention",
    "Hope-Attention: softmax attention and Hope's continuum (Nested Learning, §8.3).",
    "periods",
    levels=2,
)
def hope_attention(c: ModelConfig, _: int) -> Block:
    return Block(c, Attention(c.dim, c.heads), periods=c.periods)


@register(
    "hope_swa",
    "Sliding-window attention and Hope's continuum, so that the state does not grow (after Nested Learning, §8.3).",
    "periods",
    "window",
    levels=2,
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
