"""One-token decoding: a memory layer or model at an early and a late position, and the attention layer with its growing cache.

    python benchmarks/decode_speed.py                  positions 1 k and 100 k, to runs/decode_speed
    python benchmarks/decode_speed.py --quick          positions 1 k and 10 k
    python benchmarks/decode_speed.py --models titans_lmm --systems

The two positions are reached by reading that many tokens. Then both decode, token by token in turns, a whole period of the
slowest fast level at a time (several, where it is short), so that each round has every kind of token in it. Printed: time per
token, and the ratio late / early, median and quartiles over the rounds. The goal is at most 1.10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

import nestling as nl
from common import Spread, cached, machine, screen, seconds, spread, told, write
from nestling import processor

SEGMENT = 2048  # tokens read at a time on the way to a position
LEAST = 32  # tokens per timed round, in whole periods
GOAL = 1.10


@dataclass
class Settings:
    """Decoding speed at two positions.

    systems: memory layers, by names from `nl.memory.names()`.  models: from `nl.models.names()`, those of constant state.
    rounds: periods timed.  lanes: decoded at once.  cache: lengths of attention's cache.  threads: default PyTorch's own.
    """

    systems: tuple[str, ...] = ("titans", "ttt_mlp", "omeganet", "gated_deltanet", "linear_attention")
    models: tuple[str, ...] = ("hope", "titans_lmm", "gated_deltanet")
    size: str = "small"
    early: int = 1_000
    late: int = 100_000
    cache: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 100_000)
    dim: int = 256
    heads: int = 4
    chunk: int = 16
    lanes: int = 1
    rounds: int = 9
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    out: Path = field(default_factory=lambda: Path("runs/decode_speed"))


def period(levels: list[nl.layers.Level]) -> int:
    """Tokens after which every fast level has had its border."""
    return int(max([1, *(level.period.n for level in levels if level.period.unit == "token")]))


def compare(
    step: Callable[[Any, int], Any], read: Callable[[int], Any], span: int, settings: Settings
) -> dict[str, Any]:
    """Decode from the two positions in turns; `step(state, number)` and `read(tokens)` return a state."""
    states = [read(position) for position in (settings.early, settings.late)]
    tokens = span * -(-LEAST // span)
    times: list[list[float]] = []

    def one(which: int, number: int) -> None:
        states[which] = step(states[which], number)

    for turn in range(settings.rounds + 1):
        spent = [0.0, 0.0]
        for number in range(turn * tokens, (turn + 1) * tokens):
            for which in (0, 1) if number % 2 else (1, 0):
                spent[which] += seconds(partial(one, which, number))
        if turn:  # the first round warms up
            times.append([t / tokens for t in spent])
    ratio = spread([late / early for early, late in times])
    early, late = (spread([t[which] for t in times]).mid for which in (0, 1))
    return {
        "seconds_early": early,
        "seconds_late": late,
        "ratio": ratio._asdict(),
        "period": span,
        "rounds": len(times),
    }


def of_layer(name: str, settings: Settings) -> dict[str, Any]:
    spec = nl.memory.named(name, key_dim=settings.dim // settings.heads, chunk=settings.chunk)
    layer = nl.layers.Memory(settings.dim, settings.heads, spec)
    x = torch.randn(settings.lanes, SEGMENT, settings.dim)

    def read(tokens: int) -> Any:
        state = layer.start(settings.lanes)
        for first in range(0, tokens, SEGMENT):
            _, state = layer(x[:, : min(SEGMENT, tokens - first)], state)
        return state

    def step(state: Any, number: int) -> Any:
        place = number % SEGMENT
        return layer(x[:, place : place + 1], state)[1]

    return compare(step, read, period(layer.levels()), settings)


def of_model(name: str, settings: Settings) -> dict[str, Any]:
    model = nl.models.build(name, size=settings.size)
    tokens = torch.randint(model.config.vocab_size, (settings.lanes, SEGMENT))

    def read(count: int) -> Any:
        state = model.start(settings.lanes)
        for first in range(0, count, SEGMENT):
            _, state = model(tokens[:, : min(SEGMENT, count - first)], state)
        return state

    def step(state: Any, number: int) -> Any:
        place = number % SEGMENT
        return model(tokens[:, place : place + 1], state)[1]

    return compare(step, read, period(model.levels()), settings)


def of_attention(settings: Settings) -> list[dict[str, Any]]:
    """The attention layer with caches of growing length, filled with random keys and values."""
    layer = nl.layers.Attention(settings.dim, settings.heads)
    x = torch.randn(settings.lanes, 1, settings.dim)

    states = {length: cached(layer, settings.lanes, length) for length in settings.cache}
    times: dict[int, list[float]] = {length: [] for length in settings.cache}
    for turn in range(10 * settings.rounds):
        for length, state in states.items():
            took = seconds(partial(layer, x, state))
            if turn >= settings.rounds:
                times[length].append(took)
    first = times[settings.cache[0]]
    return [
        {
            "cache": length,
            "seconds": spread(mine).mid,
            "ratio": spread([late / early for early, late in zip(first, mine, strict=True)])._asdict(),
        }
        for length, mine in times.items()
    ]


def show(rows: list[dict[str, Any]], attention: list[dict[str, Any]], settings: Settings, console: Console) -> None:
    table = Table(title=f"decoding at positions {settings.early:,} and {settings.late:,}", title_justify="left")
    for heading in ("", "period", "ms early", "ms late", f"late / early (quartiles), goal ≤ {GOAL:.2f}", "rounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["period"]),
            f"{1e3 * row['seconds_early']:.3f}",
            f"{1e3 * row['seconds_late']:.3f}",
            str(Spread(**row["ratio"])),
            str(row["rounds"]),
        )
    console.print(table)
    table = Table(title="attention layer with a key-value cache", title_justify="left")
    for heading in ("tokens in the cache", "ms a token", "ratio to the shortest (quartiles)"):
        table.add_column(heading, justify="right")
    for row in attention:
        table.add_row(f"{row['cache']:,}", f"{1e3 * row['seconds']:.3f}", str(Spread(**row["ratio"])))
    console.print(table)


def main(settings: Settings) -> None:
    processor.settle(settings.threads)
    if settings.quick:
        settings.late, settings.cache = 10_000, (1_000, 10_000)
    torch.manual_seed(settings.seed)
    words = machine(settings.seed)
    console = screen(120, words)
    rows = []
    with torch.no_grad():
        for name in settings.systems:
            rows.append({"name": f"layer {name}, chunk {settings.chunk}", **of_layer(name, settings)})
        for name in settings.models:
            rows.append({"name": f"model {name}, {settings.size}", **of_model(name, settings)})
        attention = of_attention(settings)
    show(rows, attention, settings, console)
    result = {"machine": words, "settings": told(settings), "goal": GOAL, "rows": rows, "attention": attention}
    write(settings.out / "decode_speed.json", result)
    console.print(f"Written: {settings.out}/decode_speed.json", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
