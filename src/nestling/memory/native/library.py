"""Builds and loads the C code: once a machine, at the first use, with the machine's own compiler. Without one, nothing is lost
but speed: the engine then runs on the framework's operations.

NESTLING_NATIVE=0 in the environment leaves it out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

FILES = ("scan.c", "matrix.h", "activation.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
    "-pthread",
)
DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
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


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loaded code for single or double precision, or None where it cannot be had; `status` says why."""
    return _load(dtype)[0]


def status() -> str:
    """Whether the C code is used, and if not, why not."""
    return _load(torch.float32)[1]


@cache
def _load(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("NESTLING_NATIVE", "1") == "0":
        return None, "off (NESTLING_NATIVE=0)"
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "off: no C compiler found (cc, gcc or clang)"
    try:
        path = _build(compiler, DEFINES[dtype])
        return ctypes.CDLL(str(path)), f"on, built by {compiler}"
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()
        return None, f"off: {compiler} could not build it ({last[-1] if last else error})"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"off: {error}"


def _build(compiler: str, defines: tuple[str, ...]) -> Path:
    """Path of the shared library, built if this source was not yet built by this compiler for this processor."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((here / name).read_bytes())
    digest.update(" ".join((compiler, *FLAGS, *defines, platform.machine(), _processor())).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestling"
    target = folder / f"scan-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *defines, str(here / "scan.c"), "-o", draft, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(draft, target)  # whole or not at all, also if several processes build at once
    finally:
        Path(draft).unlink(missing_ok=True)
    return target


def _processor() -> str:
    """What -march=native depends on, so that machines that share a home do not share the code."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
