"""`nestling bench capacity`: how many pairs every kind of memory holds, and what that says of the papers' claims."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError, check_threads, did_you_mean


@dataclass(frozen=True)
class CapacityConfig:
    """Store random pairs in many memories, and measure how many each holds.

    Puts to the test what the papers claim: delta against Hebbian, networks, polynomial features, precision, windows of tokens.
    """

    experiments: tuple[str, ...] = ()
    """Which experiments, by name; none: all of them."""
    seeds: int = 12
    """How many seeds give the figures; others, always the same, choose the step sizes."""
    seed: int = 0
    """The first seed; the others are the numbers behind it, and each is what it is alone."""
    threads: int = 1
    """Threads of PyTorch."""
    quick: bool = False
    """Small and few, to see what it does; the figures mean little."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/capacity")
    """Folder for capacity.json and capacity.png."""

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.seeds < 1:
            raise SettingError(f"seeds is {self.seeds}, but expected at least 1.")
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}, but expected at least 0: those below choose the step sizes.")


def run(config: CapacityConfig) -> int:
    """Measure, print, and write; 0."""
    import torch
    from rich.console import Console

    from nestling import __version__, processor
    from nestling.bench import capacity_lab as lab
    from nestling.bench.capacity_claims import claims
    from nestling.bench.capacity_report import draw, tell

    known = lab.experiments(config.quick)
    for name in config.experiments:
        if name not in known:
            raise SettingError(f"experiments: there is none named {name!r}.{did_you_mean(name, known)}")
    chosen = {name: known[name] for name in known if name in config.experiments or not config.experiments}
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    begun = time.perf_counter()
    with processor.training(config.threads):
        found = lab.run(
            chosen, seeds=config.seeds, seed=config.seed, told=lambda name: console.print(f"measuring: {name}")
        )
    took, made = time.perf_counter() - begun, claims(found)
    tell(chosen, found, made, console)
    about = {
        "nestling": __version__,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} × {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": config.threads,
        "seeds": config.seeds,
        "seed": config.seed,
        "quick": config.quick,
        "seconds": round(took, 1),
    }
    console.print(" · ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    lab.save(found, made, config.out / "capacity.json", about=about)
    words = f"nestling {__version__}, {config.seeds} seeds from {config.seed}; bands and bars: one standard deviation"
    draw(chosen, found, config.out / "capacity.png", title=words)
    console.print(f"Written: {config.out}/capacity.json and .png", highlight=False)
    return 0
