"""The optimizer laboratory's figures as tables and as one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nestling.bench.optimizer_lab import ENTRIES, Result, reaches
from nestling.bench.optimizers import Problem

COLORS = ("#777777", "#1b6ca8", "#d1495b", "#e08e0b", "#2e933c", "#6a4c93", "#118ab2", "#8d5524", "#000000")


def tell(problems: Mapping[str, Problem], found: Mapping[str, Mapping[str, Result]], console: Console) -> None:
    """One table per problem, best first."""
    table = Table(title="how many of the last gradients carry …", title_justify="left")
    for column in ("", "half of the update", "99 % of it"):
        table.add_column(column, justify="right" if column else "left")
    for name, (half, most) in reaches().items():
        table.add_row(name, str(half), str(most))
    console.print(table)
    for problem, row in found.items():
        task = problems[problem]
        table = Table(title=f"{task.title}, {task.steps} steps", title_justify="left")
        for column in ("", f"{task.unit} (mean ± sd over seeds)", "rate", "CPU ms optimizer", "CPU ms step"):
            table.add_column(column, justify="right" if column else "left")
        for name, result in sorted(row.items(), key=lambda item: item[1].score[0]):
            value, spread = result.score
            words = "diverged" if math.isinf(value) else f"{value:.4g} ± {spread:.2g}"
            own, whole = result.seconds
            rate = f"{result.lr:.2g}" + (" (edge)" if result.at_edge else "")
            table.add_row(name, words, rate, f"{1e3 * own:.2f}", f"{1e3 * whole:.2f}")
        console.print(table)
    console.print(
        "Rates: the best of as many for each, on seeds apart; (edge): the best was the smallest or largest tried.",
        highlight=False,
    )


def draw(problems: Mapping[str, Problem], found: Mapping[str, Mapping[str, Result]], path: Path, *, title: str) -> None:
    """Loss by step and by time, means over seeds, smoothed over a twentieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(found), 2, figsize=(11, 3.6 * len(found)), layout="constrained", squeeze=False)
    for axes, (problem, row) in zip(grid, found.items(), strict=True):
        task = problems[problem]
        for name, result in row.items():
            color = COLORS[list(ENTRIES).index(name) % len(COLORS)]
            whole = [run.losses for run in result.runs if len(run.losses) == task.steps]
            if not whole:
                continue
            curve = smoothed(torch.tensor(whole, dtype=torch.float64).mean(0), max(task.steps // 20, 1))
            steps = torch.arange(1, task.steps + 1)
            axes[0].plot(steps, curve, label=name, color=color, linewidth=1.2)
            axes[1].plot(steps * result.seconds[1], curve, color=color, linewidth=1.2)
        axes[0].set_title(f"{task.title}: training loss", loc="left", fontsize=9)
        axes[0].set_xlabel("steps")
        axes[1].set_xlabel("seconds of the processor (median step × steps)")
        for panel in axes:
            panel.set_yscale("log")
            panel.grid(alpha=0.25)
        if row:
            axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smoothed(curve: torch.Tensor, width: int) -> torch.Tensor:
    """Means over the last `width` values, of fewer at the start."""
    sums = curve.cumsum(0)
    before = torch.cat([torch.zeros(width, dtype=curve.dtype), sums])[: len(curve)]
    return (sums - before) / torch.arange(1, len(curve) + 1).clamp_max(width)
