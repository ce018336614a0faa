"""What a person sees of a run: a progress bar on a terminal, a plain line every few seconds elsewhere. It only
watches.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from nestling.learn.learner import StepResult

PLAIN_SECONDS = 10.0


class Display:
    """Use as a context; `show` once a step, `note` for what a person should know.

    progress: share of the run that is done at the start; console: where to print (default: standard error).
    """

    def __init__(self, progress: float = 0.0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.start_progress = progress
        self.start = self.last_line = self.last_step = time.monotonic()
        self.bits = self.speed = self.weight = 0.0
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                expand=True,
            )
            self.task = self.bar.add_task("train", total=1.0, step=0, text="")
            self.bar.update(self.task, completed=progress)

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, result: StepResult, progress: float, seconds_left: float | None = None) -> None:
        """One step was done and `progress` (0…1) of the run is; seconds_left, where known, replaces the estimate."""
        now = time.monotonic()
        took, self.last_step = now - self.last_step, now
        if not result.skipped:
            self._average(result, took)
        if seconds_left is None and progress > self.start_progress:
            seconds_left = (now - self.start) * (1 - progress) / (progress - self.start_progress)
        text = (
            f"loss {result.loss:.3f} nats · {self.bits / max(self.weight, 1e-9):.3f} bits/byte · "
            f"{self.speed / max(self.weight, 1e-9):,.0f} tokens/s · "
            f"{'time left unknown yet' if seconds_left is None else clock(seconds_left) + ' left'}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=progress, step=result.step, text=text)
        elif now - self.last_line >= PLAIN_SECONDS or result.step == 1:
            self.last_line = now
            self.note(f"step {result.step} · {progress:.0%} · {text}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _average(self, result: StepResult, took: float) -> None:
        """Means over about the last 20 steps; `weight` takes out the pull of the start."""
        keep = 0.95
        self.bits = keep * self.bits + (1 - keep) * result.bits_per_byte
        self.speed = keep * self.speed + (1 - keep) * result.tokens / max(took, 1e-9)
        self.weight = keep * self.weight + (1 - keep)


def clock(seconds: float) -> str:
    """`4:05`, or `2:04:05` from an hour on."""
    whole = max(round(seconds), 0)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
