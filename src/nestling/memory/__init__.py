"""Associative memories that learn while they read: five choices, a reference, an engine, named systems."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nestling.memory import systems
from nestling.memory.biases import KL, L2, Bias, DotProduct, EpsilonInsensitive, Huber, Lp, Omega, Robust
from nestling.memory.cost import Cost, cost
from nestling.memory.features import Exponential, Features, Identity, Polynomial, Powers, Sketch, Unit
from nestling.memory.gates import Gates
from nestling.memory.kernel import KernelMemory, KernelState
from nestling.memory.lattice import Lattice
from nestling.memory.named import Entry, describe, describe_and_count, entry, named, names, register
from nestling.memory.networks import MLP, GatedMLP, Matrix, Network, Trace, Vector
from nestling.memory.newton_schulz import newton_schulz
from nestling.memory.protocol import Engine, Memory, Part
from nestling.memory.report import Report
from nestling.memory.retentions import (
    Bregman,
    Decay,
    Divergence,
    ElasticNet,
    ElasticStep,
    Full,
    Lagged,
    Lq,
    LqDual,
    Retention,
    Scaled,
    Settled,
    Softmax,
    SoftmaxLag,
)
from nestling.memory.rules import DeltaGradient, Directed, Gradient, Implicit, Leader, Momentum, Muon, Nesterov, Rule
from nestling.memory.self_modifying import SelfModifying
from nestling.memory.spec import MemorySpec
from nestling.memory.state import MemoryState, Tail
from nestling.memory.tnt import Tnt, TntState
from nestling.memory.trellis import Trellis


def scan(
    spec: Memory,
    w0: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates | None = None,
    state: Any = None,
    engine: Engine = "chunked",
    **options: Any,
) -> tuple[Tensor, Any]:
    """`spec.scan(w0, q, k, v, gates, state, engine=engine, reset=…, valid=…, report=…, tile=…)`; see `Memory.scan`."""
    return spec.scan(w0, q, k, v, gates, state, engine=engine, **options)


__all__ = [
    "KL",
    "L2",
    "MLP",
    "Bias",
    "Bregman",
    "Cost",
    "Decay",
    "DeltaGradient",
    "Directed",
    "Divergence",
    "DotProduct",
    "ElasticNet",
    "ElasticStep",
    "Entry",
    "EpsilonInsensitive",
    "Exponential",
    "Features",
    "Full",
    "GatedMLP",
    "Gates",
    "Gradient",
    "Huber",
    "Identity",
    "Implicit",
    "KernelMemory",
    "KernelState",
    "Lagged",
    "Lattice",
    "Leader",
    "Lp",
    "Lq",
    "LqDual",
    "Matrix",
    "Memory",
    "MemorySpec",
    "MemoryState",
    "Momentum",
    "Muon",
    "Nesterov",
    "Network",
    "Omega",
    "Part",
    "Polynomial",
    "Powers",
    "Report",
    "Retention",
    "Robust",
    "Rule",
    "Scaled",
    "SelfModifying",
    "Settled",
    "Sketch",
    "Softmax",
    "SoftmaxLag",
    "Tail",
    "Tnt",
    "TntState",
    "Trace",
    "Trellis",
    "Unit",
    "Vector",
    "cost",
    "describe",
    "describe_and_count",
    "entry",
    "named",
    "names",
    "newton_schulz",
    "register",
    "scan",
    "systems",
]
