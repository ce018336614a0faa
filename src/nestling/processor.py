"""How a processor computes while something is trained or measured, and as before after it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of glibc's `mallopt`, and what its own adjustment comes to with large tensors.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
OWN = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
SAID = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Those that this process had when it began."""

_keeping = False


@contextmanager
def training(threads: int | None = None) -> Iterator[None]:
    """On so many threads (None: as it is), and otherwise as `settle` says; at the end as before, but that glibc no longer adjusts
    itself."""
    before, flushed, kept = torch.get_num_threads(), flushes(), _keeping
    settle(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)
        if not kept:
            give_back()


def settle(threads: int | None = None) -> None:
    """What `training` does, for good.

    The smallest numbers become 0, where the processor can do so: gradients of what a memory read long ago fade until they have
    fewer digits than a float32 should have, and a processor takes many times as long over those.
    """
    torch.set_flush_denormal(True)
    keep_freed()
    if threads is not None:
        torch.set_num_threads(threads)


def flushes() -> bool:
    """Whether the smallest numbers become 0 now."""
    return not float(torch.tensor(1e-40) * 1.0)


def keep_freed() -> bool:
    """Memory that is freed stays with the process, for the next tensor; False where that cannot be had.

    glibc, on Linux, fetches every block of 32 MiB and more from the system anew, and the system fills it with zeros page by page:
    at tensors of that size, a quarter of the time of a memory layer's training. What is kept is scattered: a process with little
    else than such tensors held 1.3 to 1.9 times as much as without. Does nothing where the environment says how glibc is to go
    about it.
    """
    global _keeping
    if any(name in os.environ for name in SAID) or not _mallopt(KEEPING):
        return False
    _keeping = True
    return True


def give_back() -> None:
    """No more of `keep_freed`: what is free goes back to the system."""
    global _keeping
    if _keeping:
        _mallopt(OWN)
        ctypes.CDLL(None).malloc_trim(0)
        _keeping = False


def _mallopt(options: dict[int, int]) -> bool:
    """Set glibc's options; False without glibc."""
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version, library.malloc_trim
        return all(library.mallopt(option, value) == 1 for option, value in options.items())
    except (OSError, TypeError, AttributeError):  # another system's, or another C library
        return False
