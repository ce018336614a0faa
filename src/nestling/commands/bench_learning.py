"""`nestling bench learning`: whether small models learn what only their kind of memory should make learnable."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError, check_threads, did_you_mean


@dataclass(frozen=True)
class LearningConfig:
    """Train small models on formal languages, associative recall, selective copying and text, and measure what they learned.

    All of it takes about an hour of one core.
    """

    tasks: tuple[str, ...] = ()
    """Which of parity, aa, recall, copying and text; none: all."""
    models: tuple[str, ...] = ()
    """Which models, as the tables name them; none: all of a task."""
    seed: int = 0
    """Of words, sequences, documents and initial weights."""
    threads: int = 1
    """Threads of PyTorch."""
    quick: bool = False
    """A few steps, to see what it does; the figures mean nothing."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/learning")
    """Folder for learning.json and learning.png."""

    def __post_init__(self) -> None:
        check_threads(self.threads)


def run(config: LearningConfig) -> int:
    """Train, print, and write; 0."""
    import torch
    from rich.console import Console

    from nestling import __version__, processor
    from nestling.bench import learning_lab as lab
    from nestling.bench.learning import tasks
    from nestling.bench.learning_report import draw, tell

    known = tasks(config.quick)
    models = list(dict.fromkeys(model for task in known.values() for model in task.entries))
    for setting, asked, names in (("tasks", config.tasks, list(known)), ("models", config.models, models)):
        for name in asked:
            if name not in names:
                raise SettingError(f"{setting}: there is none named {name!r}.{did_you_mean(name, names)}")
    chosen = {name: task for name, task in known.items() if name in config.tasks or not config.tasks}
    chosen = {
        name: task for name, task in chosen.items() if not config.models or set(config.models) & set(task.entries)
    }
    if not chosen:
        raise SettingError(f"models: {', '.join(config.models)} have no part in {', '.join(config.tasks)}.")
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    began = time.perf_counter()

    def keep(found: lab.Found) -> None:
        about = {
            "nestling": __version__,
            "torch": torch.__version__,
            "threads": config.threads,
            "seed": config.seed,
            "quick": config.quick,
            "seconds": round(time.perf_counter() - began, 1),
        }
        lab.save(found, config.out / "learning.json", about=about)

    with processor.training(config.threads):
        found = lab.measure(
            chosen,
            config.models,
            seed=config.seed,
            told=lambda line: console.print(line, highlight=False),
            kept=keep,
        )
    tell(chosen, found, console)
    draw(chosen, found, config.out / "learning.png", title=f"nestling {__version__}, seed {config.seed}")
    console.print(
        f"{time.perf_counter() - began:.0f} seconds. Written: {config.out}/learning.json and .png", highlight=False
    )
    return 0
