"""Training speed of whole language models of about 5 M parameters beside the transformer's, measured in one run.

    python benchmarks/model_speed.py                      every model, 4 × 1 024 to 1 × 8 192 tokens, to runs/model_speed (hours)
    python benchmarks/model_speed.py --quick              one stretch of 1 024 tokens
    python benchmarks/model_speed.py --models hope titans_mac --shapes 4x1024 1x8192

A step is the forward pass of next-token prediction from fresh lanes, with every memory running, and the backward pass to all
parameters. A *ratio* is the model's tokens/s over the transformer's, timed in turns; median and quartiles over the rounds. The
*bound* is the ratio at which the model would run if its counted FLOPs ran at the FLOP/s that the transformer reaches in the same
rounds; the *share* is ratio / bound. *MiB/k* is the peak of what a step allocates, per 1 024 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

import nestling as nl
from common import (
    Beside,
    Spread,
    flops,
    from_short,
    headline,
    interleaved,
    matmul_rate,
    peak_bytes,
    spread,
    told,
    write,
)


@dataclass
class Settings(Beside):
    """Training speed of language models beside the transformer.

    models: names from `nl.models.names()`; default all.  shapes: lanes x tokens.  seconds: of timing per figure; a model whose
    round takes twice that gets one.  dim, layers, heads, chunk, window: of every model that has them.  periods: of the levels of
    a continuum, the fastest first, as many as a model has; default: a sixteenth, a quarter and the whole of the text, so that
    levels move as often in a text of any length.  quick: one shape, 1x1024.
    """

    models: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ("4x1024", "2x2048", "1x4096", "1x8192")
    dim: int = 256
    layers: int = 6
    heads: int = 4
    chunk: int = 64
    window: int = 512
    periods: tuple[int, ...] = ()
    seconds: float = 10.0
    out: Path = field(default_factory=lambda: Path("runs/model_speed"))


def model(name: str, settings: Settings, length: int) -> nl.models.LanguageModel:
    """A model at the run's size, as large as the transformer, for texts of this length."""
    torch.manual_seed(settings.seed)
    own: dict[str, Any] = {kind: getattr(settings, kind) for kind in ("chunk", "window")}
    own["periods"] = settings.periods or tuple(max(2, length // 16) * times for times in (1, 4, 16))
    own = {kind: value for kind, value in own.items() if kind in nl.models.settings(name)}
    if "periods" in own:
        with torch.device("meta"):
            own["periods"] = own["periods"][: len(nl.models.build(name, "small").config.periods)]
    return nl.models.build(name, "small", dim=settings.dim, layers=settings.layers, heads=settings.heads, **own)


def step(language: nl.models.LanguageModel, tokens: torch.Tensor) -> Callable[[], None]:
    """A training step without its optimizer, as a function."""

    def run() -> None:
        language.zero_grad(set_to_none=True)
        logits, _ = language(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    return run


def step_flops(language: nl.models.LanguageModel, tokens: torch.Tensor) -> float:
    """FLOPs of a step: of one lane, as they are linear in the lanes."""
    c, (lanes, length) = language.config, (tokens.shape[0], tokens.shape[1] - 1)
    counts = (c.chunk, c.chunk_others, c.window, c.shard, c.global_chunk, *c.periods, *c.locals, *c.refined)
    stretch = math.lcm(128, *(count for count in counts if count))  # tiles have 128 tokens at most
    return lanes * from_short(lambda n: flops(step(language, tokens[:1, : n + 1])), length, stretch, language.growth)


def lanes_and_length(shape: str) -> tuple[int, int]:
    """ "4x1024" → 4, 1024."""
    parts = shape.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SystemExit(f"shapes: {shape!r}; expected lanes x tokens, for example 4x1024")
    return int(parts[0]), int(parts[1])


def measure(name: str, shape: str, settings: Settings, peak: float) -> dict[str, Any]:
    """One row of the table."""
    lanes, length = lanes_and_length(shape)
    tokens = torch.randint(257, (lanes, length + 1), generator=torch.Generator().manual_seed(settings.seed))
    models = [model(n, settings, length) for n in (name, "transformer")]
    mine, transformer = (step(own, tokens) for own in models)
    work, work_transformer = (step_flops(own, tokens) for own in models)
    rounds = interleaved((transformer, mine), budget=settings.seconds, least=3, most=30, clock=settings.clock())
    ratio = spread([a / m for a, m in rounds])
    took, took_transformer = spread([m for _, m in rounds]).mid, spread([a for a, _ in rounds]).mid
    bound, count = work_transformer / work, lanes * length
    return {
        "model": name,
        "shape": shape,
        "length": length,
        "periods": list(models[0].config.periods),
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "ratio": ratio._asdict(),
        "bound": bound,
        "share_of_bound": ratio.mid / bound,
        "tokens_per_second": count / took,
        "transformer_tokens_per_second": count / took_transformer,
        "flops_per_token": work / count,
        "share_of_matmul_peak": work / took / peak,
        "transformer_share_of_matmul_peak": work_transformer / took_transformer / peak,
        "peak_bytes_per_token": peak_bytes(mine) / count,
        "rounds": len(rounds),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table per shape, the fastest first."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = sorted((r for r in rows if r["shape"] == shape), key=lambda r: -r["ratio"]["mid"])
        table = Table(title=f"{shape} tokens: training, as a ratio to the transformer", title_justify="left")
        table.add_column("model", no_wrap=True)
        for heading in ("parameters", "tokens/s", "ratio (quartiles)", "bound", "share", "peak", "MiB/k"):
            table.add_column(heading, justify="right")
        for row in mine:
            table.add_row(
                row["model"],
                f"{row['parameters']:,}",
                f"{row['tokens_per_second']:,.0f}",
                str(Spread(**row["ratio"])),
                f"{row['bound']:.2f}",
                f"{row['share_of_bound']:.0%}",
                f"{row['share_of_matmul_peak']:.0%}",
                f"{row['peak_bytes_per_token'] / 1024:.0f}",
            )
        console.print(table)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Ratio and peak memory per token over the length of a lane."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        mine = sorted((row for row in rows if row["model"] == name), key=lambda r: r["length"])
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "o", "ms": 3}
        lengths = [row["length"] for row in mine]
        panels[0].plot(lengths, [row["ratio"]["mid"] for row in mine], label=name, **style)
        panels[1].plot(lengths, [row["peak_bytes_per_token"] / 1024 for row in mine], label=name, **style)
    panels[0].axhline(1, color="#777777", linewidth=1)
    panels[0].set_ylabel("tokens/s, ratio to the transformer (higher is better)")
    panels[1].set_ylabel("peak memory of a step, KiB a token (lower is better)")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of a lane")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(settings: Settings) -> None:
    if settings.quick:
        settings.shapes = ("1x1024",)
    console, words = settings.begin(130)
    periods = ", ".join(map(str, settings.periods)) or "of a sixteenth, a quarter and the whole of the text"
    console.print(
        f"dim {settings.dim}, {settings.layers} blocks, {settings.heads} heads, chunk {settings.chunk}, "
        f"window {settings.window}, periods {periods}. FLOPs: matrix products, without what a checkpoint recomputes; causal "
        "attention counts half of its square, a window what its blocks compute.",
        highlight=False,
    )
    rows: list[dict[str, Any]] = []
    for shape in settings.shapes:
        peak = matmul_rate(clock=settings.clock())
        console.print(f"{shape}: matmul peak {peak / 1e9:.0f} GFLOP/s", highlight=False)
        for name in settings.models or tuple(nl.models.names()):
            row = measure(name, shape, settings, peak)
            rows.append(row)
            console.print(
                f"  {name}: ratio {row['ratio']['mid']:.2f}, bound {row['bound']:.2f}, {row['rounds']} rounds",
                highlight=False,
            )
            write(  # after every row, as a run is long
                settings.out / "model_speed.json",
                {
                    "machine": words,
                    "settings": told(settings),
                    "rows": rows,
                },
            )
    show(rows, console)
    draw(rows, settings.out / "model_speed.png", headline(words))
    console.print(f"Written: {settings.out}/model_speed.json and .png", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
