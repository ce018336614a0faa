"""What the benchmarks share: interleaved timing, FLOP counts, peak memory, and words about the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl
from nestling import native, processor
from nestling.memory import pieces
from nestling.memory.cost import FLOPS

Run = Callable[[], object]

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says each time that it starts and stops


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    mid: float
    high: float

    def __str__(self) -> str:
        return f"{self.mid:.2f} [{self.low:.2f}–{self.high:.2f}]"


def spread(values: list[float]) -> Spread:
    """Of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(low, median(values), high)


def cached(attention: nl.layers.Attention, lanes: int, length: int) -> nl.layers.AttentionState:
    """Attention's state behind `length` tokens, random keys and values."""
    state = attention.start(lanes)
    key, value = (torch.randn(lanes, length, *u.shape[2:]) for u in (state.key, state.value))
    return state._replace(key=key, value=value, position=torch.full((lanes,), length))


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(
    runs: tuple[Run, ...], *, budget: float, least: int, most: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, ...]]:
    """Rounds of one run of each, so that a slow moment of the machine meets all; seconds `[round][run]`.

    Each runs once before, untimed: memory that a process has not used yet comes from the system, which fills it with zeros page
    by page, an eighth to a fifth of the time of a first step over 8,192 tokens. Goes on for `budget` seconds, within `least` and
    `most` rounds; a single round suffices where one takes twice the budget.
    """
    for run in runs:
        run()
    rounds: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while len(rounds) < most:
        gone = time.perf_counter() - start
        if gone > budget and (len(rounds) >= least or gone > 2 * budget):
            break
        rounds.append(tuple(seconds(run, clock) for run in runs))
    return rounds


def flops(run: Run) -> int:
    """FLOPs of the matrix products of a run (elementwise work counts nothing), nothing recomputed for a checkpoint.

    What `nestling.memory.cost` says of attention and of triangular solves holds here too.
    """

    def plain(function: Callable[..., object], *arguments: object, **_: object) -> object:
        return function(*arguments)

    with (
        mock.patch("nestling.layers.memory.checkpoint", plain),
        mock.patch("nestling.layers.self_referential.checkpoint", plain),
        native.without(),
        pieces.whole(),
        FlopCounterMode(display=False, custom_mapping=FLOPS) as counter,
    ):
        run()
    return int(counter.get_total_flops())


def from_short(count: Callable[[int], float], length: int, stretch: int, growth: str) -> float:
    """FLOPs of a text of this length, `count` giving those of a short one.

    Counting goes the framework's way, which is slow and takes far more memory. A stretch is a multiple of all periods. Where the
    state does not grow, each costs the same but the first, in which there is less to look back at; where it grows by every token,
    each costs so much more than the one before. So two and three of them are counted, and four where it grows, exactly.
    """
    grows = growth == "linear"
    if length % stretch or length < (5 if grows else 4) * stretch:
        return count(length)
    more = length // stretch - 2
    two, three = count(2 * stretch), count(3 * stretch)
    found = two + more * (three - two)
    return found + (more * (more - 1) / 2 * (count(4 * stretch) - 2 * three + two) if grows else 0)


def peak_bytes(run: Run) -> int:
    """Largest sum of what a run has allocated and not freed, by PyTorch's own record of every allocation and release.

    What was there before (the layer's parameters) does not count. Exact and repeatable, which the resident size of a
    process is not: that depends on what the C library keeps for later.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record:
        run()
    kineto = record.profiler
    assert kineto is not None
    found = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def matmul_rate(size: int = 2048, rounds: int = 6, clock: Callable[[], float] = time.perf_counter) -> float:
    """Best FLOP/s of a large float32 product, the machine's peak for our purposes."""
    a = torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ a, clock) for _ in range(rounds))


@dataclass
class Beside:
    """What every benchmark is told that times things beside others.

    threads: default PyTorch's own.
    cpu_time: one thread, timed by the processor time it gets, not the clock on the wall: for a machine that is busy otherwise.
    """

    threads: int | None = None
    seed: int = 0
    quick: bool = False
    cpu_time: bool = False

    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter

    def begin(self, width: int) -> tuple[Console, dict[str, Any]]:
        """Settle the threads, and say on what machine this is: a console for a table of this width, and those words."""
        if self.cpu_time:
            self.threads = 1  # the processor time of several would count those that wait
        processor.settle(self.threads)  # as training by the command line
        words = machine(self.seed) | {"timed by": "processor time" if self.cpu_time else "wall clock"}
        return screen(width, words), words


def screen(width: int, words: dict[str, Any]) -> Console:
    """A console of at least this width where it is no terminal, with the words about the machine as its first line."""
    made = Console()
    made = made if made.is_terminal else Console(width=max(made.width, width))
    made.print(headline(words), highlight=False)
    return made


def headline(words: dict[str, Any]) -> str:
    return " · ".join(f"{name} {value}" for name, value in words.items())


def told(settings: Any) -> dict[str, Any]:
    """The settings of a run, for its record."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}


def machine(seed: int) -> dict[str, Any]:
    """What a number depends on beside the code."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = f"{len(names)} × {names[0]}" if names else processor
    return {
        "nestling": nl.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "dtype": "float32",
        "processor": processor,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
