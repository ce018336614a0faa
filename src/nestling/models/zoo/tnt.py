"""TNT: a hierarchy of memories, trained in two stages."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.memory import MLP
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


@register(
    "tnt",
    "TNT: Titans with a global memory of large chunks beside local ones that start afresh with every shard (TNT, §4); refined "
    "gives the chunks of its second stage.",
    "locals",
    "refined",
    "shard",
    "global_chunk",
)
def tnt(c: ModelConfig, _: int) -> Block:
    """All memories together are as wide as the one of titans_lmm (ours, so that a block's memories weigh as much)."""
    inner = c.memory("titans", network=MLP(expansion=4 / (1 + len(c.locals))))
    spec = c.memory("tnt", global_=inner, locals=(inner,), chunk=c.locals, shard=c.shard, global_chunk=c.global_chunk)
    return Block(c, Memory(c.dim, c.heads, spec.refined(c.refined) if c.refined else spec))
