"""`nestling demo`: train a memory model and a transformer on real text, then show what the memory brings."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a model on the embedded corpus for about three minutes and a same-size transformer on equal tokens, then measure both
    on held-out documents: bits per byte by position, with the memory running, erased at every segment, and on a second reading.
    """

    model: str = "hope"
    """Which memory model."""
    size: str = "small"
    """How large."""
    minutes: float = 3.0
    """How long to train the memory model; the transformer then gets as many tokens."""
    segment: int = 256
    """Tokens after which the comparison forgets, and the transformer's window."""
    documents: int = 16
    """Held-out documents to measure on."""
    seed: int = 0
    """Sets the initial weights and the order of the documents."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where everything goes (default runs/demo-DATE-TIME)."""

    def __post_init__(self) -> None:
        for name, least in (("segment", 8), ("documents", 2)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}: got {getattr(self, name)}, but expected at least {least}.")
        if not 0 < self.minutes < float("inf"):
            raise SettingError(f"minutes: got {self.minutes}, but expected a number above 0.")
        if self.model == "transformer":
            raise SettingError("model: the demo compares a memory model with a transformer, so name a memory model.")


def run(config: DemoConfig) -> int:
    """Train both, measure, print the table, write the plot. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from nestling.bench.adaptation import draw, measure
    from nestling.learn import TrainConfig, load_run, mean_and_error, train
    from nestling.learn.folder import check_free
    from nestling.stream import ByteTokenizer, standard_library

    console = Console(highlight=False)
    out = config.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # What would fail after minutes of training fails now.
    check_free(out)
    length = 16 * config.segment
    long = [d for d in standard_library().heldout if len(d.text) >= length][: config.documents]
    if len(long) < 2:
        raise SettingError(
            f"segment: got {config.segment}, but no two held-out documents are {length:,} characters long."
        )
    common = TrainConfig(size=config.size, seed=config.seed, length=config.segment, eval_documents=0)
    console.rule(f"1. {config.model} learns the embedded corpus")
    first = train(replace(common, model=config.model, minutes=config.minutes, out=out / config.model))
    if first.interrupted is not None:
        return 128 + first.interrupted
    console.rule("2. a transformer of the same size reads as many tokens")
    # carry=1: it forgets at every segment, as it will be measured.
    other = train(replace(common, model="transformer", tokens=first.tokens, out=out / "transformer", carry=1))
    if other.interrupted is not None:
        return 128 + other.interrupted

    console.rule("3. both read documents they have never seen")
    model, baseline = load_run(first.out).model, load_run(other.out).model
    result = measure(model, baseline, long, ByteTokenizer(), segment=config.segment, length=length)
    table = Table(
        title=f"Bits per byte by position, {len(result.names)} held-out documents (± standard error)",
        title_justify="left",
    )
    table.add_column("tokens", justify="right")
    words = {
        "running": "memory running",
        "erased": "memory erased",
        "transformer": "transformer",
        "second": "second reading",
    }
    for word in words.values():
        table.add_column(word, justify="right")
    stats = {name: mean_and_error(rows) for name, rows in result.rows.items()}
    for b in range(len(result.edges) - 1):
        cells = [f"{stats[name][0][b]:.3f} ± {stats[name][1][b]:.3f}" for name in words]
        table.add_row(f"{result.edges[b]}–{result.edges[b + 1]}", *cells)
    console.print(table)
    for worse, says in (("erased", "erasing the memory"), ("transformer", "the transformer")):
        gain, error = result.gain("running", worse)
        console.print(
            f"At the last position the running memory saves {gain[-1]:+.3f} ± {error[-1]:.3f} bits per byte over {says} "
            "(paired by document)."
        )
    again, error = mean_and_error((result.rows["running"] - result.rows["second"]).mean(1, keepdim=True))[:2]
    console.print(
        f"A second reading of the same document costs {again[0]:+.3f} ± {error[0]:.3f} bits per byte less than the first."
    )
    plot = out / "adaptation.png"
    draw(
        result,
        plot,
        title=f"{config.model} {config.size}, {first.tokens:,} training tokens, seed {config.seed}",
        segment=config.segment,
    )
    console.print(
        f"\nPlot: {plot}\nTry next: nestling train --size small --minutes 30 · nestling levels --help",
        markup=False,
        soft_wrap=True,
    )
    return 0
