"""`Scan` of scan.c, field for field."""

from __future__ import annotations

import ctypes

DEPTH = 4
POINTER = ctypes.c_void_p
STREAMS = ("q", "k", "v", "keep", "carry", "write", "keep_s", "write_s", "step", "erase")


class Scan(ctypes.Structure):
    """`Scan` of scan.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("memories", "tiles", "length", "depth", "group", "threads")),
        ("width", ctypes.c_int * (DEPTH + 1)),
        *(
            (name, ctypes.c_int)
            for name in ("activation", "residual", "norm", "reads_prediction", "before", "momentum")
        ),
        ("epsilon", ctypes.c_double),
        *((name, POINTER) for name in STREAMS),
        ("w", POINTER * DEPTH),
        ("s", POINTER * DEPTH),
        ("y", POINTER),
        ("w_end", POINTER * DEPTH),
        ("s_end", POINTER * DEPTH),
        ("kept", POINTER),
        ("broken", POINTER),
        *((f"of_{name}", POINTER) for name in ("y", *STREAMS)),
        ("of_w", POINTER * DEPTH),
        ("of_s", POINTER * DEPTH),
    ]
