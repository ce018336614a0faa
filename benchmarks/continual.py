"""What a changing stream makes a model forget, with the slow weights moving at every step or rarely, by AdamW or by M3.

    python benchmarks/continual.py                                         packages of the embedded corpus, one after the other
    python benchmarks/continual.py --data code/ plays.txt encyclopedia.txt

Runs `nestling train --continual` once for every setting and seed. The learning rate of each is searched over as many values, on a
seed apart, by what is known of all parts at the end; the search is written down.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from common import machine, write
from nestling import optim
from nestling.learn import TrainConfig, train

WAYS = {
    "AdamW, every step": ("adamw", 1),
    "AdamW, every 4 steps": ("adamw", 4),
    "M3, every step": ("m3", 1),
    "M3, every 4 steps": ("m3", 4),
}
MEASURES = ("learned", "kept", "forgetting")
TUNING_SEED = 1000


@dataclass
class Settings:
    """A changing stream, read in several ways.

    tokens: of a run, in equal shares for the parts. overrides: settings of the model, as JSON. documents: held out, measured of
    every part. rates: multiples of the optimizer's default that are tried.
    """

    data: tuple[str, ...] = ()
    model: str = "hope_swa"
    size: str = "tiny"
    overrides: str = '{"periods": [64, 256], "window": 64}'
    tokens: int = 240_000
    lanes: int = 4
    length: int = 256
    documents: int = 4
    seeds: int = 3
    rates: tuple[float, ...] = (1.0, 3.0, 10.0)
    ways: tuple[str, ...] = field(default_factory=lambda: tuple(WAYS))
    out: Path = Path("runs/continual")


def once(way: str, rate: float, seed: int, settings: Settings) -> dict[str, Any]:
    """One run; its table of what is known, and what that comes to."""
    optimizer, every = WAYS[way]
    out = settings.out / f"{way.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    found = out / "continual.json"
    if not found.is_file():  # what was measured before an interruption stands
        config = TrainConfig(
            model=settings.model, size=settings.size, overrides=json.loads(settings.overrides), data=settings.data,
            continual=True, tokens=settings.tokens, lanes=settings.lanes, length=settings.length, schedule="constant",
            optimizer=optimizer, every={"*": every}, lr=rate * optim.default_lr(optimizer), seed=seed,
            eval_documents=settings.documents, checkpoint_every=10**6, threads=1, out=out, resume=out.exists(),
        )  # fmt: skip
        if train(config, Console(quiet=True)).interrupted is not None:
            raise SystemExit(f"stopped; the same command goes on with what is in {settings.out}")
    told: dict[str, Any] = json.loads(found.read_text())
    return {"rate": rate, "seed": seed, **told}


def score(run: dict[str, Any]) -> float:
    kept = run["kept"]
    return kept if kept is not None and math.isfinite(kept) else math.inf


def main(settings: Settings) -> None:
    console = Console(width=120)
    words = machine(0)
    results: dict[str, Any] = {}
    for way in settings.ways:
        console.print(f"measuring {way}", highlight=False)
        search = [once(way, rate, TUNING_SEED, settings) for rate in settings.rates]
        best = min(search, key=score)["rate"]
        runs = [once(way, best, seed, settings) for seed in range(settings.seeds)]
        results[way] = {"rate": best, "search": search, "runs": runs}
        write(
            settings.out / "continual.json",
            {"machine": words, "settings": {**vars(settings), "out": str(settings.out)}, "results": results},
        )
    show(results, settings, console)
    console.print(f"Written: {settings.out}/continual.json", highlight=False)


def show(results: dict[str, Any], settings: Settings, console: Console) -> None:
    """Means and standard deviations over seeds; and where every part ended."""
    parts = [Path(name).name for name in next(iter(results.values()))["runs"][0]["parts"]]
    table = Table(title=f"bits per byte on held-out text, {settings.seeds} seeds", title_justify="left")
    for column in ("", "rate", *MEASURES, *(f"{part}, at the end" for part in parts)):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for way, result in results.items():
        runs = result["runs"]
        columns = [[run[name] for run in runs] for name in MEASURES]
        columns += [[run["bits_per_byte"][-1][n] for run in runs] for n in range(len(parts))]
        cells = [f"{mean(c):.3f} ± {stdev(c):.3f}" if len(c) > 1 else f"{c[0]:.3f}" for c in columns]
        edge = " (edge)" if result["rate"] in (min(settings.rates), max(settings.rates)) else ""
        table.add_row(way, f"× {result['rate']:g}{edge}", *cells)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
