"""`nestling eval`: what a trained model pays for a byte of text it has not seen, and how that changes as it reads on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nestling.config import SettingError
from nestling.learn.config import Overrides

if TYPE_CHECKING:
    from torch import Tensor

    from nestling.learn import Score

CHARACTER = 4  # bytes of a character, at most

Run = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]


@dataclass(frozen=True)
class EvalConfig:
    """Measure a trained model in bits per byte: overall, and by position in the document.

    Every document is read from a fresh memory, which learns while it reads. Without --data it measures on the
    held-out documents of the run.
    """

    run: Run = None
    """The run's folder, or one checkpoint of it. Default: the newest run in runs/."""
    overrides: Overrides = field(default_factory=dict)
    """Settings of the model that differ from the run's and leave its weights' shapes as they are, for example other chunks."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ()
    """Files and folders to measure on instead: all their documents."""
    documents: Number = None
    """So many documents at most (default: all)."""
    limit: int = 16384
    """So many bytes of each document at most."""
    erase_every: Number = None
    """Erase the memory before every N tokens of a document, to see what it is good for (default: never)."""
    readings: int = 1
    """Read every document so many times in a row, the memory carried from one reading to the next."""
    lanes: int = 8
    """Documents read side by side."""
    segment: int = 512
    """Tokens per call of the model; changes speed and memory, no result."""
    json: bool = False
    """Print JSON instead of a table."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""

    def __post_init__(self) -> None:
        for name in ("documents", "limit", "erase_every", "readings", "lanes", "segment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name}: got {value}, but expected at least 1.")


def run(config: EvalConfig) -> int:
    """Measure, print, 0."""
    from rich.console import Console
    from rich.progress import track

    from nestling.learn import evaluate, load_run, passages
    from nestling.learn.evaluation import finite
    from nestling.learn.run import open_corpus

    loaded = load_run(config.run, config.device, config.overrides)
    corpus = open_corpus(config.data or loaded.config.data)
    documents = (*corpus.train, *corpus.heldout) if config.data else corpus.heldout
    texts = list(passages(documents[: config.documents], loaded.tokenizer, config.limit))
    stderr = Console(stderr=True)
    scores = list(
        track(
            evaluate(
                loaded.model,
                texts,
                lanes=min(config.lanes, len(texts)),
                segment=config.segment,
                erase_every=config.erase_every,
                readings=config.readings,
            ),
            f"reading {len(texts)} documents",
            total=len(texts),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
    )
    scores.sort(key=lambda score: score.index)
    finite(scores)
    result = summarize(scores, config.limit) | {"run": str(loaded.checkpoint), "erase_every": config.erase_every}
    if config.json:
        print(json.dumps(result, indent=1))
    else:
        console = Console()
        title = f"{loaded.config.model} {loaded.config.size}, {loaded.checkpoint}"
        console.print(title, style="italic", highlight=False, markup=False, soft_wrap=True)
        console.print(table(result))
    return 0


def summarize(scores: list[Score], limit: int) -> dict[str, object]:
    """Bits per byte overall and by position, each reading apart; position bins double in width up to `limit`."""
    from nestling.learn import bits_per_byte, by_position, mean_and_error

    edges = [0]
    while edges[-1] < limit:
        edges.append(min(max(256, 2 * edges[-1]), limit))

    def numbers(values: Tensor) -> list[float | None]:
        return [None if value != value else round(value, 5) for value in values.tolist()]

    readings = []
    for reading in range(len(scores[0].nats)):
        mean, error, count = mean_and_error(by_position(scores, edges, reading, slack=CHARACTER - 1))
        readings.append(
            {
                "bits_per_byte": bits_per_byte(scores, reading),
                "by_position": {
                    "from": edges[:-1],
                    "to": edges[1:],
                    "bits_per_byte": numbers(mean),
                    "standard_error": numbers(error),
                    "documents": count.tolist(),
                },
            }
        )
    return {"documents": len(scores), "bytes": sum(score.size for score in scores), "readings": readings}


def table(result: dict[str, object]) -> object:
    """The result of `summarize` for people."""
    from rich.table import Table

    readings: list[dict[str, dict[str, list[float | None]]]] = result["readings"]  # type: ignore[assignment]
    shown = Table()
    shown.add_column("position (bytes)", justify="right")
    shown.add_column("documents", justify="right")
    for number in range(len(readings)):
        shown.add_column("bits per byte" + (f", reading {number + 1}" if len(readings) > 1 else ""), justify="right")
    first = readings[0]["by_position"]
    for row, (begin, end) in enumerate(zip(first["from"], first["to"], strict=True)):
        if not first["documents"][row]:
            continue
        cells = []
        for reading in readings:
            mean, error = (reading["by_position"][name][row] for name in ("bits_per_byte", "standard_error"))
            cells.append(f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}"))
        shown.add_row(f"{begin:,} – {end:,}", str(first["documents"][row]), *cells)
    shown.add_section()
    shown.add_row("all bytes", str(result["documents"]), *(f"{reading['bits_per_byte']:.3f}" for reading in readings))
    return shown
