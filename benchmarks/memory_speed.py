"""Speed and peak memory of every memory layer beside attention of the same width and heads, measured in one run.

    python benchmarks/memory_speed.py                     everything, to runs/memory_speed (long: over an hour on two cores)
    python benchmarks/memory_speed.py --quick             one length
    python benchmarks/memory_speed.py --systems titans ttt_mlp --lengths 2048

A *ratio* is the memory layer's tokens/s over the attention layer's, timed in turns; median and quartiles over the rounds.
The *bound* is the ratio at which the layer would run if its counted FLOPs ran at the FLOP/s that the attention layer reaches in
the same rounds; the *share* is ratio / bound. *Peak* is the share of the FLOP/s of a large float32 matrix product.
"forward" runs without gradients; "training" is forward and backward, to the parameters and to the input.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

import nestling as nl
from common import Spread, flops, interleaved, machine, matmul_rate, peak_bytes, spread, write

COUNTED = 512  # tokens at which a memory layer's FLOPs are counted; they are linear in the length
MODES = ("forward", "training")


@dataclass
class Settings:
    """Speed and memory of memory layers beside attention.

    systems: names from `nl.memory.names()`; default all.  seconds: of timing per figure; slow layers take what three rounds take.
    threads: default PyTorch's own.  quick: one length, 2048.
    cpu_time: one thread, timed by the processor time it gets, not the clock on the wall: for a machine that is busy otherwise.
    """

    systems: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    chunks: tuple[int, ...] = (16, 64)
    batch: int = 4
    dim: int = 256
    heads: int = 4
    seconds: float = 4.0
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    cpu_time: bool = False
    out: Path = field(default_factory=lambda: Path("runs/memory_speed"))


def clock(settings: Settings) -> Callable[[], float]:
    return time.process_time if settings.cpu_time else time.perf_counter


def layer(name: str, chunk: int, settings: Settings) -> Any:
    """The memory layer of a system, or None where the library has no layer for it."""
    spec = nl.memory.named(name, key_dim=settings.dim // settings.heads, chunk=chunk)
    if isinstance(spec, nl.memory.MemorySpec | nl.memory.Tnt):
        return nl.layers.Memory(settings.dim, settings.heads, spec)
    own = getattr(nl.layers, "".join(word.title() for word in name.split("_")), None)
    return None if own is None else own(settings.dim, settings.heads, spec)


def runner(module: nn.Module, x: torch.Tensor, mode: str) -> Any:
    """One run of a layer as a function."""

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = module(x)
        y.square().mean().backward()

    return forward if mode == "forward" else training


def measure(name: str, chunk: int, length: int, settings: Settings, peak: float) -> dict[str, Any] | None:
    """One row of the table."""
    torch.manual_seed(settings.seed)
    memory = layer(name, chunk, settings)
    if memory is None:
        return None
    attention = nl.layers.Attention(settings.dim, settings.heads)
    x = torch.randn(settings.batch, length, settings.dim, requires_grad=True)
    short = x.detach()[:, :COUNTED].clone().requires_grad_()
    row: dict[str, Any] = {"system": name, "chunk": chunk, "length": length}
    for mode in MODES:
        of_memory, of_attention = runner(memory, x, mode), runner(attention, x, mode)
        work = flops(runner(memory, short, mode)) * length / short.shape[1]
        work_attention = flops(of_attention)
        of_attention()
        rounds = interleaved(
            (of_attention, of_memory), budget=settings.seconds, least=3, most=30, clock=clock(settings)
        )
        ratio = spread([a / m for a, m in rounds])
        took, took_attention = spread([m for _, m in rounds]).mid, spread([a for a, _ in rounds]).mid
        tokens = settings.batch * length
        bound = work_attention / work
        row[mode] = {
            "ratio": ratio._asdict(),
            "bound": bound,
            "share_of_bound": ratio.mid / bound,
            "tokens_per_second": tokens / took,
            "attention_tokens_per_second": tokens / took_attention,
            "flops_per_token": work / tokens,
            "attention_flops_per_token": work_attention / tokens,
            "share_of_matmul_peak": work / took / peak,
            "attention_share_of_matmul_peak": work_attention / took_attention / peak,
            "rounds": len(rounds),
        }
    del x

    def whole(module: nn.Module) -> int:
        module.zero_grad(set_to_none=True)
        return peak_bytes(
            lambda: runner(module, torch.randn(settings.batch, length, settings.dim, requires_grad=True), "training")()
        )

    row["peak_bytes"], row["attention_peak_bytes"] = whole(memory), whole(attention)
    return row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table per length."""
    for length in sorted({row["length"] for row in rows}):
        table = Table(title=f"length {length}: tokens/s as a ratio to attention, and peak memory", title_justify="left")
        for heading in ("system", "chunk"):
            table.add_column(heading, no_wrap=True)
        for mode in MODES:
            for heading in (f"{mode} tokens/s", "ratio (quartiles)", "bound", "share", "peak"):
                table.add_column(heading, justify="right")
        table.add_column("MiB", justify="right")
        table.add_column("× attention", justify="right")
        mine = [row for row in rows if row["length"] == length]
        first = mine[0]
        cells = ["attention", ""]
        for mode in MODES:
            got = first[mode]
            cells += [f"{got['attention_tokens_per_second']:,.0f}", "1", "", ""]
            cells.append(f"{got['attention_share_of_matmul_peak']:.0%}")
        table.add_row(*cells, f"{first['attention_peak_bytes'] / 2**20:.0f}", "1", end_section=True)
        for row in mine:
            cells = [row["system"], str(row["chunk"])]
            for mode in MODES:
                got = row[mode]
                cells += [f"{got['tokens_per_second']:,.0f}", str(Spread(**got["ratio"])), f"{got['bound']:.2f}"]
                cells += [f"{got['share_of_bound']:.0%}", f"{got['share_of_matmul_peak']:.0%}"]
            times = row["peak_bytes"] / row["attention_peak_bytes"]
            table.add_row(*cells, f"{row['peak_bytes'] / 2**20:.0f}", f"{times:.2f}")
        console.print(table)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratio over the length, one panel per mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row["system"] for row in rows))
    largest = max(row["chunk"] for row in rows)
    for axes, mode in zip(panels, MODES, strict=True):
        for number, name in enumerate(names):
            for chunk in sorted({row["chunk"] for row in rows if row["system"] == name}):
                mine = sorted(
                    (r for r in rows if (r["system"], r["chunk"]) == (name, chunk)), key=lambda r: r["length"]
                )
                axes.plot(
                    [r["length"] for r in mine],
                    [r[mode]["ratio"]["mid"] for r in mine],
                    color=f"C{number}",
                    linestyle="-" if chunk == largest else ":",
                    marker="o",
                    ms=3,
                    label=f"{name}, chunk {chunk}",
                )
        axes.axhline(1, color="#777777", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("sequence length (tokens)")
        axes.set_title(mode, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens/s, ratio to attention (higher is better)")
    panels[1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(settings: Settings) -> None:
    if settings.cpu_time:
        settings.threads = 1  # the processor time of several would count those that wait
    torch.set_flush_denormal(True)  # as training by the command line does
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.quick:
        settings.lengths = (2048,)
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 170))
    words = machine(settings.seed) | {"timed by": "processor time" if settings.cpu_time else "wall clock"}
    console.print(" · ".join(f"{name} {value}" for name, value in words.items()), highlight=False)
    console.print(
        f"batch {settings.batch}, dim {settings.dim}, {settings.heads} heads; a two-layer MLP memory has expansion 4. FLOPs: "
        "matrix products, without what a checkpoint recomputes; causal attention counts half of its square.",
        highlight=False,
    )
    rows: list[dict[str, Any]] = []
    peaks = {}
    for length in settings.lengths:
        peaks[length] = peak = matmul_rate(clock=clock(settings))
        console.print(f"length {length}: matmul peak {peak / 1e9:.0f} GFLOP/s", highlight=False)
        for name in settings.systems or tuple(nl.memory.names()):
            spec = nl.memory.named(name)
            # Where the inner gradient does not read the weights, the chunk has no effect: one row says it all.
            chunks = settings.chunks if getattr(spec, "reads_weights", True) else settings.chunks[-1:]
            for chunk in chunks:
                row = measure(name, chunk, length, settings, peak)
                if row is None:
                    console.print(f"{name}: no layer yet, left out", highlight=False)
                    continue
                rows.append(row)
                got = row["training"]
                console.print(f"  {name}, chunk {chunk}: training ratio {got['ratio']['mid']:.2f}", highlight=False)
    show(rows, console)
    write(
        settings.out / "memory_speed.json",
        {
            "machine": words,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()},
            "matmul_flops_per_second": peaks,
            "rows": rows,
        },
    )
    draw(rows, settings.out / "memory_speed.png", " · ".join(f"{name} {value}" for name, value in words.items()))
    console.print(f"Written: {settings.out}/memory_speed.json and .png", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
