"""Lattice and Trellis: memories of a fixed number of slots."""

from __future__ import annotations

from nestling.layers import Memory
from nestling.models.block import Block, ModelConfig
from nestling.models.registry import register


def _slots(c: ModelConfig) -> int:
    """64, as in the papers, but no more than twice a key's width where keys are short: slots weigh in the initial memory."""
    return min(64, 2 * (c.dim // c.heads))


@register(
    "lattice", "Lattice: unit slots, each written only with what is orthogonal to it (Lattice, abstract).", "chunk"
)
def lattice(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("lattice_decode", slots=_slots(c))))


@register("trellis", "Trellis: keys and values compressed into slots in two passes (Trellis, eq. 4–14).", "chunk")
def trellis(c: ModelConfig, _: int) -> Block:
    return Block(c, Memory(c.dim, c.heads, c.memory("trellis", slots=_slots(c))))
