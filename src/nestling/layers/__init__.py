"""Sequence layers over the memories, and what a model needs beside them."""

from nestling.layers.attention import Attention, AttentionState
from nestling.layers.base import Layer
from nestling.layers.continuum import Continuum, ContinuumState
from nestling.layers.convolution import ShortConvolution
from nestling.layers.level import Level, Period
from nestling.layers.memory import Memory, MemoryLayerState
from nestling.layers.mlp import SwiGLU
from nestling.layers.norm import l2_norm
from nestling.layers.self_modifying import SelfModifying

__all__ = [
    "Attention",
    "AttentionState",
    "Continuum",
    "ContinuumState",
    "Layer",
    "Level",
    "Memory",
    "MemoryLayerState",
    "Period",
    "SelfModifying",
    "ShortConvolution",
    "SwiGLU",
    "l2_norm",
]
