"""The structures of the C code, field for field."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

DEPTH = 4
POINTER = ctypes.c_void_p
INT = ctypes.c_int
FRESH, CLOSES = 1, 2  # flags of a run; that of a second period's border is twice CLOSES

Group = tuple[Tensor, ...]


class Network(ctypes.Structure):
    """`Network` of network.h."""

    _fields_ = [
        ("depth", INT),
        ("width", INT * (DEPTH + 1)),
        *((name, INT) for name in ("activation", "residual", "norm", "gated")),
        ("epsilon", ctypes.c_double),
    ]


BIASES = ("dot", "l2", "lp", "huber_coordinate", "huber_norm", "huber_mixture")


class Bias(ctypes.Structure):
    """`Bias` of bias.h; kind: one of `BIASES`."""

    _fields_ = [("kind", INT), *((name, ctypes.c_double) for name in ("power", "slope", "epsilon", "cap"))]


class Cell(ctypes.Structure):
    """`Cell` of tile.h."""

    _fields_ = [
        ("network", Network),
        ("bias", Bias),
        *((name, INT) for name in ("before", "boundary", "momentum", "erases", "window")),
    ]


class Store(ctypes.Structure):
    """`Store` of runs.h."""

    _fields_ = [
        (name, POINTER * DEPTH)
        for group in ("w s a start", "w_end s_end a_end", "from_w from_s from_a", "of_w of_s of_a of_start")
        for name in group.split()
    ]


LANES = ("lanes", "heads", "time", "tiles", "longest", "group", "apart", "threads")
MADE = ("past", "logs", "projection")
STREAMS = ("q", "k", "v", "lr", "retention", "momentum", "erase", "window", *MADE)


LINKS = ("identity", "softmax", "lq")


class Link(ctypes.Structure):
    """`Link` of scan.h; kind: one of `LINKS`."""

    _fields_ = [("kind", INT), *((name, ctypes.c_double) for name in ("power", "floor"))]


class Features(ctypes.Structure):
    """`Features` of polynomial.h."""

    _fields_ = [(name, INT) for name in ("in_", "base", "degree")]


class Scan(ctypes.Structure):
    """`Scan` of scan.h."""

    _fields_ = [
        ("cell", Cell),
        ("link", Link),
        ("features", Features),
        ("store", Store),
        *((name, INT) for name in (*LANES, "tail")),
        ("runs", POINTER),
        ("fine", POINTER),
        *((name, POINTER) for name in STREAMS),
        *((name, POINTER) for name in ("y", "kept", "broken", "of_y")),
        *((f"of_{name}", POINTER) for name in STREAMS),
    ]


class Iteration(ctypes.Structure):
    """`Iteration` of newton_schulz.h."""

    _fields_ = [("steps", INT), *((name, ctypes.c_double) for name in ("a", "b", "c", "epsilon"))]


class Directed(Scan):
    """`Directed` of directed.c; acts: the flag of runs at whose end the rule acts."""

    _fields_ = [("iteration", Iteration), ("acts", INT)]


OBJECTIVES = ("decoding", "similarity", "encoding")
READ_NORMS = ("token", "chunk", "none")


class Lattice(Scan):
    """`Lattice` of lattice.h; objective, norms: which of `OBJECTIVES`, `READ_NORMS`."""

    _fields_ = [*((name, INT) for name in ("objective", "norms", "retracts")), ("epsilon", ctypes.c_double)]


PHI = ("identity", "silu")
BETWEEN = ("ln_silu", "l2_silu", "identity")
SECOND = ("code", "lr_2", "retention_2")


class Trellis(Scan):
    """`Trellis` of trellis.c; phi, between: which of `PHI`, `BETWEEN`."""

    _fields_ = [
        *((name, POINTER) for name in SECOND),
        *((f"of_{name}", POINTER) for name in SECOND),
        *((name, INT) for name in ("phi", "between", "predicts", "reads_phi")),
        *((name, ctypes.c_double) for name in ("norm_epsilon", "unit_epsilon")),
    ]


PAIRS = ("key", "write", "weight", "still")


class Kernel(Scan):
    """`Kernel` of kernel.c."""

    _fields_ = [
        *((name, INT) for name in ("normalized", "unit_peak")),
        ("cap", ctypes.c_double),
        *((name, INT) for name in ("span", "count", "room", "halo", "opens")),
        ("scale", POINTER),
        *((name, POINTER) for name in PAIRS),
        *((f"{name}_end", POINTER) for name in PAIRS),
        *((f"from_{name}", POINTER) for name in PAIRS),
        *((f"of_{name}", POINTER) for name in PAIRS),
        ("of_scale", POINTER),
    ]


CHANNEL = ("q", "k", "v", "lr", "retention", "erase")


class Channel(ctypes.Structure):
    """`Scan` of channel.c."""

    _fields_ = [
        ("store", Store),
        *((name, INT) for name in (*LANES, "in_", "out", "erases", "before", "logs")),
        ("runs", POINTER),
        ("fine", POINTER),
        *((name, POINTER) for name in CHANNEL),
        *((name, POINTER) for name in ("y", "kept", "broken", "of_y")),
        *((f"of_{name}", POINTER) for name in CHANNEL),
    ]


ASKED = ("q", "k", "v", "momentum", "lr_weight", "retention_weight", "lr_bias", "retention_bias")


class SelfModifying(ctypes.Structure):
    """`Scan` of self_modifying.c."""

    _fields_ = [
        ("cells", Cell * 2),
        ("stores", Store * 2),
        *((name, INT) for name in ("generators", "key", "value", "query", "lr", "retention")),
        *((name, INT) for name in (*LANES, "unit_values", "after_decay", "average")),
        *((name, ctypes.c_double) for name in ("lr_max", "step", "epsilon")),
        ("runs", POINTER),
        ("fine", POINTER),
        *((name, POINTER) for name in ASKED),
        *((name, POINTER) for name in ("y", "kept", "broken", "of_y")),
        *((f"of_{name}", POINTER) for name in ASKED),
    ]


def point(structure: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Set the fields of these names to where their tensors lie; None: null."""
    for name, x in tensors.items():
        setattr(structure, name, None if x is None else x.data_ptr())
