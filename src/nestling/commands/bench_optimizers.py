"""`nestling bench optimizers`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError, did_you_mean


@dataclass(frozen=True)
class OptimizersConfig:
    """Run every optimizer on a landscape, a sequence of tasks and text, with an equal budget of tuning.

    The learning rate is searched over the same number of values for each, on seeds apart; the search is written down.
    """

    problems: tuple[str, ...] = ()
    """Which of landscape, tasks and text; none: all."""
    optimizers: tuple[str, ...] = ()
    """Which optimizers, as the tables name them; none: all."""
    seeds: int = 3
    """How many seeds give the figures."""
    seed: int = 0
    """The first seed."""
    threads: int = 1
    """Threads of PyTorch."""
    quick: bool = False
    """Short runs, to see what it does; the figures mean little."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/optimizers")
    """Folder for optimizers.json and optimizers.png."""

    def __post_init__(self) -> None:
        for name, number in (("seeds", self.seeds), ("threads", self.threads)):
            if number < 1:
                raise SettingError(f"{name} is {number}, but expected at least 1.")


def run(config: OptimizersConfig) -> int:
    """Measure, print, and write; 0."""
    import torch
    from rich.console import Console

    from nestling import __version__
    from nestling.bench import optimizer_lab as lab
    from nestling.bench.optimizer_report import draw, tell
    from nestling.bench.optimizers import problems

    known = problems(config.quick)
    for setting, asked, names in (
        ("problems", config.problems, list(known)),
        ("optimizers", config.optimizers, list(lab.ENTRIES)),
    ):
        for name in asked:
            if name not in names:
                raise SettingError(f"{setting}: there is none named {name!r}.{did_you_mean(name, names)}")
    chosen = {name: known[name] for name in known if name in config.problems or not config.problems}
    optimizers = [name for name in lab.ENTRIES if name in config.optimizers or not config.optimizers]
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    begun, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        found = lab.measure(
            chosen,
            optimizers,
            seeds=config.seeds,
            seed=config.seed,
            told=lambda name: console.print(f"measuring {name}", highlight=False),
        )
    finally:
        torch.set_num_threads(threads)
    took = time.perf_counter() - begun
    tell(chosen, found, console)
    about = {
        "nestling": __version__,
        "torch": torch.__version__,
        "threads": config.threads,
        "seeds": config.seeds,
        "seed": config.seed,
        "tuning_seeds": [n + config.seed for n in lab.TUNING_SEEDS],
        "rates": list(lab.RATES),
        "quick": config.quick,
        "seconds": round(took, 1),
    }
    lab.save(found, config.out / "optimizers.json", about=about)
    words = f"nestling {__version__}, {config.seeds} seeds from {config.seed}"
    draw(chosen, found, config.out / "optimizers.png", title=words)
    console.print(f"{took:.0f} seconds. Written: {config.out}/optimizers.json and .png", highlight=False)
    return 0
