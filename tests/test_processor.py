"""What training does to the process around it, and undoes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from nestling import processor

MIB = 2**20
FAULTS = """
import ctypes, resource
from nestling import processor

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]

def faults():
    "Pages fetched from the system by blocks of 48 MiB, one after another."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = library.malloc(48 * 2**20)
        ctypes.memset(block, 1, 48 * 2**20)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

found = [faults()]
with processor.training(1):
    kept = processor.keep_freed()
    faults()
    found.append(faults())
    with processor.training(1):
        pass
    found.append(faults())
    held = resident()
found.append(faults())
print(kept, *found, held - resident())
"""


def there() -> bool:
    """Whether numbers below the normal ones are computed with."""
    return bool(torch.tensor(1e-40) * 1.0 != 0)


def test_small_numbers_vanish_during_a_run_and_are_back_after_it() -> None:
    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    assert there()
    with processor.training():
        assert there() is not can
        with processor.training():
            pass
        assert there() is not can, "an inner run leaves the outer one's setting"
    assert there()


def test_threads_are_as_before_after_a_run_even_one_that_fails() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with processor.training(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
    with processor.training():
        assert torch.get_num_threads() == before


def run(**environment: str) -> list[str]:
    """What FAULTS prints in a process of its own, whose memory nothing else has been in."""
    plain = {name: value for name, value in os.environ.items() if name not in processor.SAID}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_that_is_freed_stays_during_a_run_and_goes_back_after_it() -> None:
    kept, before, within, after_an_inner_run, behind, returned = run()
    assert kept == "True"
    assert int(before) > 1000
    assert int(within) < int(before) / 20
    assert int(after_an_inner_run) < int(before) / 20, "an inner run leaves the outer one's setting"
    assert int(behind) > 1000
    assert int(returned) > 40 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_what_the_environment_says_of_memory_holds() -> None:
    kept, _, within, *_ = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept == "False"
    assert int(within) > 1000


def test_another_c_library_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """A C library without glibc's functions."""

    for name in processor.SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processor.ctypes, "CDLL", lambda _: Other())
    assert processor.keep_freed() is False
    processor.give_back()
