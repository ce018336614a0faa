"""Runs the tasks of `learning`: every model with equal steps, batches and rates tried, and the whole record kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestling.bench.learning import Scores, Task
from nestling.learn.checkpoint import replace_file

WARMUP, CLIP = 20, 1.0
"""Steps in which the rate rises; largest gradient norm."""


@dataclass(frozen=True)
class Run:
    """One training: scores at its end, what quick looks saw on the way, the loss of every step, processor seconds."""

    task: str
    model: str
    lr: float
    seed: int
    parameters: int
    steps: int
    scores: Scores
    looks: tuple[tuple[int, Scores], ...]
    losses: tuple[float, ...]
    seconds: float

    @property
    def last(self) -> float:
        """The hardest of the scores: the last bin."""
        return [value for name, value in self.scores.items() if not name.startswith("±")][-1]


Found = dict[str, dict[str, tuple[Run, ...]]]


def solved(task: Task, scores: Scores) -> bool:
    """Everything right."""
    return task.higher and min(scores.values()) == 1.0


def once(name: str, task: Task, model: str, lr: float, seed: int) -> Run:
    """Train a model on a task. The rate rises at first and falls linearly to 0 in the last third; solving the task ends it."""
    trial = task.make(seed)
    torch.manual_seed(seed)
    learner = task.entries[model](task.vocabulary)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    losses: list[float] = []
    looks: list[tuple[int, Scores]] = []
    scores: Scores = {}
    began = time.process_time()
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP, 3 * (1 - step / task.steps))
        loss = trial.loss(learner)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % task.every == 0 and step + 1 < task.steps:
            looks.append((step + 1, trial.look(learner)))
            if solved(task, looks[-1][1]) and solved(task, scores := trial.score(learner)):
                break
    else:
        scores = trial.score(learner)
    parameters = sum(p.numel() for p in learner.parameters())
    scores = scores if math.isfinite(losses[-1]) else dict.fromkeys(trial.score(learner), math.nan)
    return Run(
        name, model, lr, seed, parameters, len(losses), scores, tuple(looks), tuple(losses), time.process_time() - began
    )


def measure(
    tasks: Mapping[str, Task],
    only: Sequence[str] = (),
    *,
    seed: int = 0,
    told: Callable[[str], object] = lambda line: None,
    kept: Callable[[Found], object] = lambda found: None,
) -> Found:
    """Runs by task and model, one for each rate tried; only: these models, none: all. kept is called with what there is after
    every model, as a run is long.
    """
    found: Found = {}
    for name, task in tasks.items():
        found[name] = {}
        for model in task.entries:
            if only and model not in only:
                continue
            runs: list[Run] = []
            for lr in task.rates:
                runs.append(once(name, task, model, lr, seed))
                run = runs[-1]
                told(f"{task.title}, {model}, rate {lr:g}: {words(run.scores)}, {run.steps} steps, {run.seconds:.0f} s")
                if solved(task, run.scores):
                    break
            found[name][model] = tuple(runs)
            kept(found)
    return found


def best(task: Task, runs: Sequence[Run]) -> Run:
    """By the last score; the first of equals."""

    def worth(run: Run) -> tuple[float, ...]:
        values = [value for name, value in run.scores.items() if not name.startswith("±")][::-1]
        return tuple(-math.inf if math.isnan(v) else v if task.higher else -v for v in values)

    return max(runs, key=worth)


def words(scores: Scores) -> str:
    """In one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def save(found: Found, path: Path, *, about: Mapping[str, Any]) -> None:
    """Everything as JSON; what is not finite has no number."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        return [plain(x) for x in value] if isinstance(value, list | tuple) else value

    results = {
        task: {model: [asdict(run) for run in runs] for model, runs in row.items()} for task, row in found.items()
    }
    replace_file(path, json.dumps(plain({"about": dict(about), "results": results}), indent=1) + "\n")
