"""What it costs to read with small chunks: TNT beside the memory that it has inside, as layers of one width, in training.

    python benchmarks/tnt_speed.py                              one sequence of 8192 tokens, to runs/tnt_speed
    python benchmarks/tnt_speed.py --lengths 16384 --chunks 16

A *ratio* is how many times as many tokens per second TNT trains on as Titans with the same chunk everywhere, timed in turns;
median and quartiles over the rounds. TNT's memory has the fast weights of two such memories, one global and one local. One
thread, by the processor time it gets, so that what else the machine does counts as little as possible.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

import nestling as nl
from common import headline, interleaved, machine, spread, write
from nestling import processor


@dataclass
class Settings:
    """TNT beside Titans. shards: tokens between two resets; the global chunk is 2048."""

    lengths: tuple[int, ...] = (8192,)
    chunks: tuple[int, ...] = (4, 16)
    shards: tuple[int, ...] = (2048, 512)
    batch: int = 1
    dim: int = 256
    heads: int = 4
    rounds: int = 3
    seed: int = 0
    out: Path = field(default_factory=lambda: Path("runs/tnt_speed"))


def training(spec: Any, settings: Settings, length: int) -> Any:
    """Forward and backward of a layer, to its parameters and its input, as a function."""
    torch.manual_seed(settings.seed)
    layer = nl.layers.Memory(settings.dim, settings.heads, spec)
    x = torch.randn(settings.batch, length, settings.dim, requires_grad=True)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].square().mean().backward()

    return run


def measure(length: int, chunk: int, settings: Settings) -> list[dict[str, Any]]:
    """A row for Titans and one for each length of shards."""
    named = {"key_dim": settings.dim // settings.heads, "chunk": chunk}
    specs = {"titans": nl.memory.named("titans", **named)}
    specs |= {f"tnt, shards of {s}": nl.memory.named("tnt", shard=s, **named) for s in settings.shards}
    runs = tuple(training(spec, settings, length) for spec in specs.values())
    rounds = interleaved(
        runs, budget=float("inf"), least=settings.rounds, most=settings.rounds, clock=time.process_time
    )
    rows = []
    for n, name in enumerate(specs):
        ratio = spread([taken[0] / taken[n] for taken in rounds])
        took = spread([taken[n] for taken in rounds]).mid
        tokens = settings.batch * length / took
        rows.append({"length": length, "chunk": chunk, "memory": name, "tokens_per_second": tokens, "ratio": ratio})
    return rows


def main(settings: Settings) -> None:
    processor.settle(1)
    console, words = Console(), machine(settings.seed)
    console.print(headline(words), highlight=False)
    table = Table(title=f"training, batch {settings.batch}, dim {settings.dim}, {settings.heads} heads")
    for heading in ("length", "chunk", "memory", "tokens/s", "ratio (quartiles)"):
        table.add_column(heading, justify="left" if heading == "memory" else "right")
    rows = [r for length in settings.lengths for chunk in settings.chunks for r in measure(length, chunk, settings)]
    for row in rows:
        cells = (row["length"], row["chunk"], row["memory"], f"{row['tokens_per_second']:,.0f}", row["ratio"])
        table.add_row(*map(str, cells))
    console.print(table)
    rows = [row | {"ratio": row["ratio"]._asdict()} for row in rows]
    write(settings.out / "tnt_speed.json", {"machine": words, "rounds": settings.rounds, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
