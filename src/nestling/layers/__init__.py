"""Sequence layers over the memories, and what a model needs beside them."""

from nestling.layers.attention import Attention, AttentionState
from nestling.layers.base import Layer
from nestling.layers.context import ContextState, MemoryAsContext
from nestling.layers.continuum import Continuum
from nestling.layers.convolution import ShortConvolution
from nestling.layers.descent import ContinuumState
from nestling.layers.hybrid import MemoryAsGate, MemoryAsLayer
from nestling.layers.level import Level, Period
from nestling.layers.lstm import LSTM, LSTMState
from nestling.layers.memory import Memory, MemoryLayerState
from nestling.layers.mlp import SwiGLU
from nestling.layers.norm import l2_norm
from nestling.layers.persistent import Persistent
from nestling.layers.self_modifying import SelfModifying
from nestling.layers.self_referential import SelfReferential, SelfReferentialState
from nestling.layers.sliding import SlidingAttention, SlidingState

__all__ = [
    "LSTM",
    "Attention",
    "AttentionState",
    "ContextState",
    "Continuum",
    "ContinuumState",
    "LSTMState",
    "Layer",
    "Level",
    "Memory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryLayerState",
    "Period",
    "Persistent",
    "SelfModifying",
    "SelfReferential",
    "SelfReferentialState",
    "ShortConvolution",
    "SlidingAttention",
    "SlidingState",
    "SwiGLU",
    "l2_norm",
]
