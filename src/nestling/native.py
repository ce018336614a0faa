"""Builds and loads the parts that are written in C: once a machine, at the first use, with the machine's own compiler. Without
one, nothing is lost but speed: everything then runs on the framework's operations.

NESTLING_NATIVE=0 in the environment leaves them out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

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
HERE = Path(__file__).parent
HEADERS = HERE / "memory" / "native"
SCAN = HEADERS / "scan.c"


_AWAY: ContextVar[bool] = ContextVar("away", default=False)
_POISON = 0  # what every library's own is set to
_LOADED: list[Code] = []


class Code(ctypes.CDLL):
    """A loaded part, and how many bytes the structure has that it reads."""

    size = 0


def call(code: Code, entry: str, given: ctypes.Structure, *more: int) -> int:
    """What an entry returns for a structure, which must be as long as the one that the code was built for: Python reads its
    files when it starts, the compiler the C files at their first use, and where all are exchanged in between they need not fit.
    Another structure of the same length is not noticed."""
    if ctypes.sizeof(given) != code.size:
        raise RuntimeError(
            f"{entry}: the C code reads a structure of {code.size} bytes, but Python made one of {ctypes.sizeof(given)}: "
            "the files of Nestling were exchanged while this process ran. Start it again, or set NESTLING_NATIVE=0"
        )
    found: int = getattr(code, entry)(ctypes.byref(given), *more)
    return found


@contextmanager
def without() -> Iterator[None]:
    """Run on the framework's operations alone, whose work its counters see."""
    token = _AWAY.set(True)
    try:
        yield
    finally:
        _AWAY.reset(token)


@contextmanager
def poisoned() -> Iterator[None]:
    """The C code's scratch is filled with NaN before it is used, so that a cell which nobody wrote shows: for tests."""
    before = _POISON
    _poison(1)
    try:
        yield
    finally:
        _poison(before)


def _poison(value: int, *codes: Code) -> None:
    """Set it in these libraries, or in all: those that are loaded, and those that will be."""
    global _POISON
    _POISON = value
    for code in codes or _LOADED:
        with suppress(ValueError):  # one without scratch
            ctypes.c_int.in_dll(code, "nestling_poison").value = value


def library(source: Path, dtype: torch.dtype) -> Code | None:
    """The loaded code for single or double precision, or None where it cannot be had (`status` says why) or is not wanted."""
    return None if _AWAY.get() else _load(source, dtype)[0]


def plain(*given: torch.Tensor) -> bool:
    """Whether somebody looks at every operation (transforms, modes, subclasses), so that none is to pass by the framework."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in given)
    )


def status() -> str:
    """Whether the C code is used, and if not, why not."""
    return _load(SCAN, torch.float32)[1]


def threads(parts: int) -> int:
    """How many to spread independent parts over: as many as the framework uses."""
    return max(1, min(torch.get_num_threads(), parts, 64))


@cache
def _load(source: Path, dtype: torch.dtype) -> tuple[Code | None, str]:
    if os.environ.get("NESTLING_NATIVE", "1") == "0":
        return None, "off (NESTLING_NATIVE=0)"
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "off: no C compiler found (cc, gcc or clang)"
    try:
        code = _built(compiler, source, DEFINES[dtype])
        _LOADED.append(code)
        _poison(_POISON, code)
        with suppress(ValueError):  # one that reads none
            code.size = ctypes.c_size_t.in_dll(code, "nestling_size").value
        return code, f"on, built by {compiler}"
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()
        return None, f"off: {compiler} could not build it ({last[-1] if last else f'exit status {error.returncode}'})"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"off: {error}"


def _built(compiler: str, source: Path, defines: tuple[str, ...]) -> Code:
    """The shared library, built if these files were not yet built, whole, by this compiler for this processor."""
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted(HEADERS.glob("*.h")):
        digest.update(header.read_bytes())
    digest.update(" ".join((compiler, *FLAGS, *defines, platform.machine(), _processor())).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestling"
    target = folder / f"{source.stem}-{digest.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _own(folder)
    if target.exists():
        _own(target)
        if _whole(target):
            return Code(str(target))
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    draft = Path(name)
    try:
        command = [compiler, *FLAGS, *defines, f"-I{HEADERS}", str(source), "-o", name, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
        with draft.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        code = Code(name)  # only what loads is kept
        os.replace(draft, target)  # whole or not at all, also if several processes build at once
    finally:
        draft.unlink(missing_ok=True)
    return code


def _whole(path: Path) -> bool:
    """Whether the file ends with the digest of all before it: reading code that a crash cut short would end the process."""
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _own(path: Path) -> None:
    """Refuse code from where others may write."""
    found = path.lstat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & 0o022 or path.is_symlink()):
        raise PermissionError(f"{path} is not this user's alone: remove it, or name another XDG_CACHE_HOME")


def _processor() -> str:
    """What -march=native depends on, so that machines that share a home do not share the code."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
