"""`nestling bench optimizers`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError, check_threads, did_you_mean

Data = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Steps = Annotated[int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="")]


@dataclass(frozen=True)
class OptimizersConfig:
    """Run every optimizer on landscapes, a sequence of tasks, pictures and text, with an equal budget of tuning.

    The learning rate is searched over the same number of values for each, on seeds apart; the search is written down.
    """

    problems: tuple[str, ...] = ()
    """Which of landscape, banana, tasks, digits, images and text; none: all (digits need scikit-learn, images --data)."""
    optimizers: tuple[str, ...] = ()
    """Which optimizers, as the tables name them; none: all."""
    seeds: int = 3
    """How many seeds give the figures."""
    seed: int = 0
    """The first seed."""
    threads: int = 1
    """Threads of PyTorch."""
    data: Data = None
    """Pictures for a vision transformer: a folder with one of images for every class, or with MNIST-like files."""
    pixels: int = 32
    """Side to which images of --data are cut and scaled, a multiple of 4 (MNIST-like files keep theirs)."""
    steps: Steps = None
    """Steps of every run (default: 300, of text 600)."""
    resume: bool = False
    """Go on with what is in the folder: what was measured there, with the same settings, is not measured again."""
    quick: bool = False
    """Short runs, to see what it does; the figures mean little."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/optimizers")
    """Folder for optimizers.json and optimizers.png."""

    def __post_init__(self) -> None:
        check_threads(self.threads)
        for name, number in (("seeds", self.seeds), ("steps", 1 if self.steps is None else self.steps)):
            if number < 1:
                raise SettingError(f"{name} is {number}, but expected at least 1.")
        if self.pixels < 4 or self.pixels % 4:
            raise SettingError(f"pixels is {self.pixels}, but expected a multiple of 4.")


def run(config: OptimizersConfig) -> int:
    """Measure, print, and write; 0."""
    import torch
    from rich.console import Console

    from nestling import __version__, processor
    from nestling.bench import optimizer_lab as lab
    from nestling.bench.optimizer_report import draw, tell
    from nestling.bench.optimizers import RATES, WIDE, problems
    from nestling.bench.pictures import MISSING

    console = Console()
    known = problems(config.quick, steps=config.steps, data=config.data, pixels=config.pixels)
    if "digits" not in known and (not config.problems or "digits" in config.problems):
        if "digits" in config.problems:
            raise SettingError(MISSING)
        console.print(f"left out: {MISSING}", highlight=False)
    if "images" in config.problems and config.data is None:
        raise SettingError("images: expected --data, a folder of pictures.")
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
    about = {
        "nestling": __version__,
        "torch": torch.__version__,
        "threads": config.threads,
        "seeds": config.seeds,
        "seed": config.seed,
        "tuning_seeds": [n + config.seed for n in lab.TUNING_SEEDS],
        "rates": list(RATES),
        "rates_of_landscapes": list(WIDE),
        "steps": config.steps,
        "quick": config.quick,
        "data": None if config.data is None else str(config.data),
    }
    before = None
    if config.resume and (config.out / "optimizers.json").is_file():
        try:
            before = lab.load(config.out / "optimizers.json", about=about)
        except ValueError as error:
            raise SettingError(f"resume: {error}.") from error
    begun = time.perf_counter()
    with processor.training(config.threads):
        found = lab.measure(
            chosen,
            optimizers,
            seeds=config.seeds,
            seed=config.seed,
            before=before,
            told=lambda name: console.print(f"measuring {name}", highlight=False),
            kept=lambda found: lab.save(found, config.out / "optimizers.json", about=about),
        )
    took = time.perf_counter() - begun
    found = {name: {o: row[o] for o in lab.ENTRIES if o in row} for name in known if (row := found.get(name))}
    tell(known, found, console)
    lab.save(found, config.out / "optimizers.json", about={**about, "seconds": round(took, 1)})
    words = f"nestling {__version__}, {config.seeds} seeds from {config.seed}"
    draw(known, found, config.out / "optimizers.png", title=words)
    console.print(f"{took:.0f} seconds. Written: {config.out}/optimizers.json and .png", highlight=False)
    return 0
