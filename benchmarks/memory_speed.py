"""Speed and peak memory of every memory layer beside attention of the same width and heads, measured in one run.

    python benchmarks/memory_speed.py                     everything, to runs/memory_speed (long: many hours on two cores)
    python benchmarks/memory_speed.py --quick             one length, chunks 16 and 64, no decoding
    python benchmarks/memory_speed.py --systems titans ttt_mlp --lengths 2048

A *ratio* is the memory layer's tokens/s over the attention layer's, timed in turns; median and quartiles over the rounds.
The *bound* is the ratio at which the layer would run if its counted FLOPs ran at the FLOP/s that the attention layer reaches in
the same rounds; the *share* is ratio / bound. *Peak* is the share of the FLOP/s of a large float32 matrix product.
"forward" runs without gradients; "training" is forward and backward, to the parameters and to the input; "decode" is one token
at a time behind `length` tokens, a whole chunk of them, beside attention with a cache of that length.

Printed at the end: how the time per token grows from the shortest length to the longest, and which rows miss the goals, that is
70 % of the bound in training, and from 2,048 tokens on at most twice attention's memory.
"""

from __future__ import annotations

import math
import textwrap
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
from common import (
    Beside,
    Spread,
    cached,
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

STRETCH = 256  # tokens; a memory layer's FLOPs are counted of multiples of these and of all its periods
MODES = ("forward", "training", "decode")
QUICK = {"lengths": (2048,), "chunks": (16, 64), "modes": MODES[:2]}
PLAIN = {"omeganet_plain": ("omeganet", {"features": nl.memory.Identity(), "network": nl.memory.MLP()})}
GOALS = {"share_of_bound": 0.7, "memory": 2.0, "memory_from": 2048, "growth": 1.2}


@dataclass
class Settings(Beside):
    """Speed and memory of memory layers beside attention.

    systems: names from `nl.memory.names()`, or omeganet_plain, without polynomials; default all.
    seconds: of timing per figure; slow layers take what three rounds take.
    quick: length 2048, chunks 16 and 64, no decoding, where nothing else is said.
    """

    systems: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    chunks: tuple[int, ...] = (16, 64, 256)
    modes: tuple[str, ...] = MODES
    batch: int = 4
    dim: int = 256
    heads: int = 4
    seconds: float = 4.0
    out: Path = field(default_factory=lambda: Path("runs/memory_speed"))


def spec_of(name: str, **sizes: int) -> Any:
    """A memory by its name here."""
    system, choices = PLAIN.get(name, (name, {}))
    return nl.memory.named(system, **sizes, **choices)


def layer(name: str, chunk: int, settings: Settings) -> Any:
    """The layer of a system: its own where there is one (self_modifying → SelfModifying), else the memory layer."""
    spec = spec_of(name, key_dim=settings.dim // settings.heads, chunk=chunk)
    own = getattr(nl.layers, "".join(word.title() for word in name.split("_")), nl.layers.Memory)
    return own(settings.dim, settings.heads, spec)


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


def counting(module: nn.Module, x: torch.Tensor, mode: str) -> Callable[[int], float]:
    """FLOPs of a run on the first tokens of x, as a function of their number."""
    return lambda length: flops(runner(module, x.detach()[:, :length].clone().requires_grad_(), mode))


def runner_state(module: nn.Module, x: torch.Tensor) -> Any:
    """The state behind x."""
    with torch.no_grad():
        return module(x)[1]


def decoding(module: nn.Module, x: torch.Tensor, state: Any, advance: bool) -> Any:
    """Reading the tokens of x one at a time; attention's cache is left as it is, so that its length stands."""

    def decode() -> None:
        with torch.no_grad():
            now = state
            for t in range(x.shape[1]):
                _, after = module(x[:, t : t + 1], now)
                now = after if advance else state

    return decode


def measure(
    name: str, chunk: int, length: int, settings: Settings, peak: float, beside: dict[str, int]
) -> dict[str, Any]:
    """One row of the table. beside: attention's FLOPs by mode and its peak bytes at this length, filled in as needed."""
    torch.manual_seed(settings.seed)
    memory = layer(name, chunk, settings)
    attention = nl.layers.Attention(settings.dim, settings.heads)
    x = torch.randn(settings.batch, length, settings.dim, requires_grad=True)
    periods = (level.period.n for level in memory.levels() if level.period.unit == "token")
    stretch = math.lcm(STRETCH, *periods)
    row: dict[str, Any] = {"system": name, "chunk": chunk, "length": length}
    for mode in settings.modes:
        if mode == "decode":
            few = torch.randn(settings.batch, chunk, settings.dim)
            # A memory costs the same wherever it stands; one that grows has to have read the text.
            state = None if memory.growth == "constant" else runner_state(memory, x)
            of_memory = decoding(memory, few, state, True)
            of_attention = decoding(attention, few, cached(attention, settings.batch, length), False)
            tokens, work = settings.batch * chunk, float(flops(of_memory))
        else:
            of_memory, of_attention = runner(memory, x, mode), runner(attention, x, mode)
            tokens, work = (
                settings.batch * length,
                from_short(counting(memory, x, mode), length, stretch, memory.growth),
            )
        if mode not in beside or mode == "decode":  # of as many tokens as a chunk has
            beside[mode] = flops(of_attention)
        work_attention = beside[mode]
        rounds = interleaved(
            (of_attention, of_memory), budget=settings.seconds, least=3, most=30, clock=settings.clock()
        )
        ratio = spread([a / m for a, m in rounds])
        took, took_attention = spread([m for _, m in rounds]).mid, spread([a for a, _ in rounds]).mid
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

    if "training" in settings.modes:
        if "peak_bytes" not in beside:
            beside["peak_bytes"] = whole(attention)
        row["peak_bytes"], row["attention_peak_bytes"] = whole(memory), beside["peak_bytes"]
    return row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table per length, decoding in one of its own."""
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length]
        for modes in (MODES[:2], MODES[2:]):
            shown = [mode for mode in modes if mode in mine[0]]
            if shown:
                console.print(table(mine, shown, length))


def table(mine: list[dict[str, Any]], shown: list[str], length: int) -> Table:
    """The rows of one length in these modes, with peak memory beside training."""
    sized = "training" in shown
    made = Table(
        title=f"length {length}: tokens/s as a ratio to attention{', and peak memory' if sized else ''}",
        title_justify="left",
    )
    for heading in ("system", "chunk"):
        made.add_column(heading, no_wrap=True)
    for mode in shown:
        for heading in (f"{mode} tokens/s", "ratio (quartiles)", "bound", "share", "peak"):
            made.add_column(heading, justify="right")
    if sized:
        made.add_column("MiB", justify="right")
        made.add_column("× attention", justify="right")
    first = mine[0]
    cells = ["attention", ""]
    for mode in shown:
        got = first[mode]
        cells += [f"{got['attention_tokens_per_second']:,.0f}", "1", "", ""]
        cells.append(f"{got['attention_share_of_matmul_peak']:.0%}")
    made.add_row(*cells, *([f"{first['attention_peak_bytes'] / 2**20:.0f}", "1"] if sized else []), end_section=True)
    for row in mine:
        cells = [row["system"], str(row["chunk"])]
        for mode in shown:
            got = row[mode]
            cells += [f"{got['tokens_per_second']:,.0f}", str(Spread(**got["ratio"])), f"{got['bound']:.2f}"]
            cells += [f"{got['share_of_bound']:.0%}", f"{got['share_of_matmul_peak']:.0%}"]
        if sized:
            times = row["peak_bytes"] / row["attention_peak_bytes"]
            cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{times:.2f}"]
        made.add_row(*cells)
    return made


def growth(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    """Time per token at the longest length over that at the shortest, by system, chunk and mode: 1 is linear in the length."""
    found = {}
    for name, chunk in dict.fromkeys((row["system"], row["chunk"]) for row in rows):
        mine = sorted((r for r in rows if (r["system"], r["chunk"]) == (name, chunk)), key=lambda r: r["length"])
        if len(mine) > 1:
            for mode in (mode for mode in MODES if mode in mine[0]):
                first, last = (r[mode]["tokens_per_second"] for r in (mine[0], mine[-1]))
                found[name, chunk, mode] = first / last
    return found


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that miss a goal, in words."""
    missed = []
    for row in rows:
        what = f"{row['system']}, chunk {row['chunk']}, length {row['length']}"
        if "training" not in row:
            continue
        if (share := row["training"]["share_of_bound"]) < GOALS["share_of_bound"]:
            missed.append(f"{what}: training at {share:.0%} of its bound")
        times = row["peak_bytes"] / row["attention_peak_bytes"]
        if row["length"] >= GOALS["memory_from"] and times > GOALS["memory"]:
            missed.append(f"{what}: {times:.1f} × attention's memory")
    for (name, chunk, mode), factor in growth(rows).items():
        if factor > GOALS["growth"] and spec_of(name).growth == "constant":
            missed.append(
                f"{name}, chunk {chunk}: {mode} takes {factor:.2f} × the time per token at the longest length"
            )
    return missed


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratio over the length, one panel per mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in MODES if mode in rows[0]]
    width = 4.5 * len(modes) + 2
    figure, grid = plt.subplots(1, len(modes), figsize=(width, 4.8), layout="constrained", sharey=True, squeeze=False)
    panels, looks = grid[0], ("-", ":", "--", "-.")
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    names = list(dict.fromkeys(row["system"] for row in rows))
    chunks = sorted({row["chunk"] for row in rows}, reverse=True)
    for axes, mode in zip(panels, modes, strict=True):
        for number, name in enumerate(names):
            for chunk in sorted({row["chunk"] for row in rows if row["system"] == name}):
                mine = sorted(
                    (r for r in rows if (r["system"], r["chunk"]) == (name, chunk)), key=lambda r: r["length"]
                )
                axes.plot(
                    [r["length"] for r in mine],
                    [r[mode]["ratio"]["mid"] for r in mine],
                    color=colors[number % len(colors)],
                    linestyle=looks[chunks.index(chunk) % len(looks)],
                    marker="osv^D"[number // len(colors) % 5],
                    ms=3,
                    label=f"{name}, chunk {chunk}",
                )
        axes.axhline(1, color="#777777", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yscale("log")
        axes.set_xlabel("sequence length (tokens)")
        axes.set_title(mode, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens/s, ratio to attention (higher is better)")
    panels[-1].legend(
        frameon=False, fontsize=6, bbox_to_anchor=(1, 1), loc="upper left", ncols=-(-len(panels[-1].get_lines()) // 40)
    )
    figure.suptitle(textwrap.fill(title, 30 * len(modes) + 60), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def keep(rows: list[dict[str, Any]], peaks: dict[int, float], words: dict[str, Any], settings: Settings) -> None:
    """Write what there is so far."""
    longer = [{"system": n, "chunk": c, "mode": m, "longest_over_shortest": f} for (n, c, m), f in growth(rows).items()]
    found = {"rows": rows, "growth": longer, "missed": judge(rows)}
    about = {"machine": words, "settings": told(settings), "matmul_flops_per_second": peaks}
    write(settings.out / "memory_speed.json", about | found)


def main(settings: Settings) -> None:
    if settings.quick:
        for name, few in QUICK.items():
            if getattr(settings, name) == getattr(Settings(), name):  # not said otherwise
                setattr(settings, name, few)
    if unknown := set(settings.modes) - set(MODES):
        raise SystemExit(f"--modes: {', '.join(sorted(unknown))} is not known; expected some of: {', '.join(MODES)}")
    console, words = settings.begin(170)
    console.print(
        f"batch {settings.batch}, dim {settings.dim}, {settings.heads} heads; a two-layer MLP memory has expansion 4. FLOPs: "
        "matrix products, without what a checkpoint recomputes; causal attention counts half of its square.",
        highlight=False,
    )
    rows, peaks = list[dict[str, Any]](), dict[int, float]()
    for length in settings.lengths:
        peaks[length], beside = matmul_rate(clock=settings.clock()), dict[str, int]()
        console.print(f"length {length}: matmul peak {peaks[length] / 1e9:.0f} GFLOP/s", highlight=False)
        for name in settings.systems or (*nl.memory.names(), *PLAIN):
            spec = spec_of(name)
            # Where the inner gradient does not read the weights, the chunk has no effect: one row says it all.
            chunks = settings.chunks if getattr(spec, "reads_weights", True) else settings.chunks[-1:]
            for chunk in chunks:
                row = measure(name, chunk, length, settings, peaks[length], beside)
                rows.append(row)
                told_of = (
                    f"{m} ratio {row[m]['ratio']['mid']:.2f}, bound {row[m]['bound']:.2f}" for m in settings.modes
                )
                console.print(f"  {name}, chunk {chunk}: {'; '.join(told_of)}", highlight=False)
                keep(rows, peaks, words, settings)  # after every row, as a run is long
    show(rows, console)
    missed = judge(rows)
    console.print("Goals missed:" if missed else "No goal is missed.", highlight=False)
    for line in missed:
        console.print(f"  {line}", highlight=False)
    draw(rows, settings.out / "memory_speed.png", headline(words))
    console.print(f"Written: {settings.out}/memory_speed.json and .png", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
