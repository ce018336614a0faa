"""The laboratory's figures as tables and as one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nestling.bench.capacity import EXACT, RECALLED
from nestling.bench.capacity_claims import Claim, Found
from nestling.bench.capacity_lab import Experiment

COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#e08e0b", "#6a4c93", "#777777", "#118ab2", "#8d5524", "#000000")


def tell(chosen: dict[str, Experiment], found: Found, made: Sequence[Claim], console: Console) -> None:
    """Print what every trial holds, and what it says of the claims."""
    table = Table(
        title=f"pairs held with recall ≥ {RECALLED:.0%}, and with error ≤ {EXACT:g} (mean ± standard deviation over seeds)",
        title_justify="left",
    )
    for column in ("trial", "step"):
        table.add_column(column)
    for column in ("recalled", "exactly", "recall at most pairs", "error there"):
        table.add_column(column, justify="right")
    for name, curves in found.items():
        table.add_section()
        table.add_row(f"[bold]{chosen[name].title}[/bold]")
        top = chosen[name].ns[-1]
        for curve in curves.values():
            held = [_spread(x, curve.ns) for x in (curve.capacity, curve.exact)]
            recall, error = float(curve.recall[:, -1].mean()), float(curve.error[:, -1].mean())
            table.add_row(f"  {curve.label}", f"{curve.rate:g}", *held, f"{recall:.2f} at {top}", f"{error:.1e}")
    console.print(table)
    verdicts = Table(title="claims: by two standard errors over the seeds, compared seed by seed", title_justify="left")
    for column in ("", "claim", "measured"):
        verdicts.add_column(column)
    style = {"holds": "green", "refuted": "red", "not seen": "yellow"}
    for claim in made:
        verdicts.add_row(f"[{style[claim.verdict]}]{claim.verdict}[/]", claim.text, claim.figures.replace("[", r"\["))
    console.print(verdicts)


def _spread(values: torch.Tensor, ns: Sequence[int]) -> str:
    if bool((values >= ns[-1]).all()):
        return f"≥ {ns[-1]}"
    if bool((values <= ns[0]).all()):
        return f"≤ {ns[0]}"
    return f"{float(values.mean()):.1f} ± {float(deviation(values)):.1f}"


def deviation(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation over seeds, the first dimension; 0 of one seed."""
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def draw(chosen: dict[str, Experiment], found: Found, path: Path, *, title: str) -> None:
    """A panel for each experiment; bands and bars are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, found, strict=False):
        _panel(axes, chosen[name], found, name)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Any, experiment: Experiment, found: Found, name: str) -> None:
    kinds = list(dict.fromkeys(_kind(series.label) for series in experiment.series))
    for series in experiment.series:
        curves = [found[name][trial.label] for trial in series.trials]
        look: dict[str, Any] = {
            "color": COLORS[kinds.index(_kind(series.label)) % len(COLORS)],
            "linestyle": series.style,
            "label": series.label,
            "marker": "o",
            "ms": 3,
            "lw": 1.4,
        }
        if experiment.shows == "recall":
            (curve,) = curves
            mean, spread = curve.recall.mean(0), deviation(curve.recall)
            axes.plot(curve.ns, mean, **look)
            axes.fill_between(
                curve.ns, (mean - spread).clamp(0, 1), (mean + spread).clamp(0, 1), color=look["color"], alpha=0.1, lw=0
            )
            continue
        values = [c.capacity if experiment.shows == "capacity" else c.error[:, -1] for c in curves]
        mean, spread = torch.stack([v.mean() for v in values]), torch.stack([deviation(v) for v in values])
        low = torch.minimum(spread, 0.9 * mean)  # a bar to 0 would leave a logarithmic axis
        axes.errorbar(series.xs, mean, [low, spread], capsize=2, **look)
    axes.set_title(experiment.title, loc="left", fontsize=10)
    axes.set_xlabel(experiment.x)
    words = {"recall": "recall", "capacity": f"pairs recalled to {RECALLED:.0%}", "error": "relative squared error"}
    axes.set_ylabel(words[experiment.shows])
    if experiment.shows != "error":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.set_xticks(experiment.series[0].xs)
    if experiment.shows == "recall":
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(RECALLED, color="#bbbbbb", lw=0.8, zorder=0)
    elif experiment.shows == "error":
        axes.set_yscale("log")
    else:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def _kind(label: str) -> str:
    """What a line's color says."""
    return label.split(",")[0].split(" (")[0]
