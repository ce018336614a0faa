"""What the models learned, as tables and as one plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nestling.bench.learning import Task
from nestling.bench.learning_lab import Found, best
from nestling.bench.optimizer_report import COLORS


def tell(tasks: Mapping[str, Task], found: Found, console: Console) -> None:
    """One table per task, the models in the order of the task."""
    for name, row in found.items():
        task = tasks[name]
        chosen = {model: best(task, runs) for model, runs in row.items()}
        table = Table(title=f"{task.title}: {task.unit}", title_justify="left")
        table.add_column("")
        for model in chosen:
            table.add_column(model, justify="right")
        runs = list(chosen.values())
        for key in runs[0].scores:
            values = (run.scores[key] for run in runs)
            table.add_row(key, *(f"{100 * value:.1f} %" if task.higher else f"{value:.3f}" for value in values))
        table.add_row("parameters", *(f"{run.parameters:,}" for run in runs))
        table.add_row("rate, of those tried", *(f"{run.lr:g}" for run in runs))
        table.add_row("steps", *(str(run.steps) for run in runs))
        table.add_row("processor seconds", *(f"{run.seconds:.0f}" for run in runs))
        console.print(table)
    console.print("One seed. Of the rates tried the best counts, by the last score.", highlight=False)


def draw(tasks: Mapping[str, Task], found: Found, path: Path, *, title: str) -> None:
    """The hardest score on the way, as quick looks saw it, and for text the scores by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.8), layout="constrained", squeeze=False)
    for axes, (name, row) in zip(grid[0], found.items(), strict=True):
        task = tasks[name]
        for number, (model, runs) in enumerate(row.items()):
            run, color = best(task, runs), COLORS[1 + number]
            keys = [key for key in run.scores if not key.startswith("±")]
            if task.higher:
                points = [*((step, look[keys[-1]]) for step, look in run.looks), (run.steps, run.scores[keys[-1]])]
                axes.plot(*zip(*points, strict=True), label=model, color=color, marker="o", markersize=3)
            else:
                axes.plot(keys, [run.scores[key] for key in keys], label=model, color=color, marker="o", markersize=3)
        axes.set_xlabel("steps" if task.higher else "bytes into the document")
        axes.tick_params(axis="x", labelsize=7)
        axes.set_ylabel(f"{keys[-1]}: {task.unit}" if task.higher and len(keys) > 1 else task.unit, fontsize=8)
        axes.set_title(task.title, loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
