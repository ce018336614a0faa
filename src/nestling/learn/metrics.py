"""What a run writes down: `metrics.jsonl`, one line a step, and the loss curve drawn from it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from nestling.learn.checkpoint import replace_file


class MetricsLog:
    """Append-only lines of JSON, `{"step": 1, …}` first; at any moment a file holds each step once and at most
    one torn last line.

    Args:
        path: the file; it is made if it is not there.
        step: the step the run goes on from. Lines of later steps were written by a process that died before its next
            checkpoint, and are dropped: the steps come again.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        if path.exists():
            kept = [
                line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step
            ]
            replace_file(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run; see close

    def write(self, **values: Any) -> None:
        """Append one line. What JSON has no number for (nan, inf) becomes null."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to disk; done before each checkpoint, so that no checkpoint is ahead of its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if _step(line) < math.inf]


def draw_curve(metrics: list[dict[str, Any]], path: Path, title: str, held_out: float | None = None) -> None:
    """Draw the training loss (bits per byte, every step and smoothed) over the text read, as a PNG at `path`.

    held_out: bits per byte on held-out text at the end, drawn as a point at the right edge.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    points = [(line["tokens"], line["bits_per_byte"]) for line in metrics if line["bits_per_byte"] is not None]
    if not points:
        return
    unit, name = (1e6, "million") if points[-1][0] >= 2e6 else (1e3, "thousand")
    x = [tokens / unit for tokens, _ in points]
    raw = [bits for _, bits in points]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, raw, color="#4c78a8", alpha=0.25, linewidth=0.8, label="every step")
    smooth = _smooth(raw)
    axes.plot(x, smooth, color="#4c78a8", linewidth=2, label=f"smoothed (end {smooth[-1]:.3f})")
    if held_out is not None:
        axes.plot([x[-1]], [held_out], "o", color="#e45756", label=f"held-out documents ({held_out:.3f})")
    # The first steps fall from 8 bits; the picture is about what comes after, so the top is cut where most of it lies.
    bottom = min(min(smooth), math.inf if held_out is None else held_out) - 0.15
    axes.set_ylim(bottom, max(min(max(raw), 8.2) + 0.1, bottom + 1))
    axes.set_xlim(0, x[-1] * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel(f"text read [{name} tokens]")
    axes.set_ylabel("loss [bits per byte]")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _step(line: str) -> float:
    """The step a line tells of; infinite for a torn line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the run, without the pull of its start (as Adam
    corrects its own).
    """
    keep = 1 - 1 / max(len(values) / 30, 1)
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth
