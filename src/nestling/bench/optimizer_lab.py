"""The optimizer laboratory: every optimizer on every problem, with an equal budget of tuning, and the search written down.

Tuned is the learning rate alone, over the same number of values for each, a grid round the optimizer's default, by the mean score
on seeds of its own; the figures come from other seeds. A run that leaves the finite numbers scores infinity.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import nn

from nestling import optim
from nestling.bench.optimizers import Problem, Trial
from nestling.learn.checkpoint import replace_file

TUNING_SEEDS = (1000, 1001)
CLIP = 10.0
"""Largest gradient norm, for all alike: without it the landscape's first step decides."""


@dataclass(frozen=True)
class Entry:
    """An optimizer as the laboratory runs it: its name in `nestling.optim.names()`, and settings that make it what it is here."""

    name: str
    settings: Mapping[str, Any]
    layers: bool = False
    """Whether it needs layers: hidden matrices, or their inputs. Left out where a problem has none."""


ENTRIES = {
    "SGD": Entry("sgd", {}),
    "AdamW": Entry("adamw", {"fused": False}),
    "Muon": Entry("muon", {}, layers=True),
    # Muon with a second moment: M3 without its slow memory
    "AdaMuon-like": Entry("m3", {"slow_weight": 0.0}, layers=True),
    "M3": Entry("m3", {}, layers=True),
    "delta momentum": Entry("delta_momentum", {}),
    "deep momentum": Entry("deep_momentum", {}),
    "feature momentum": Entry("feature_momentum", {}),
    "DGD": Entry("dgd", {}, layers=True),
}


@dataclass(frozen=True)
class Run:
    """One run: the loss of every step, the score, and the processor's seconds per step of the optimizer alone (median)."""

    optimizer: str
    problem: str
    lr: float
    seed: int
    losses: tuple[float, ...]
    score: float
    seconds: float
    step_seconds: float
    """Of a whole step: forward, backward and the optimizer (median)."""


@dataclass(frozen=True)
class Result:
    """An optimizer on a problem: the search, and the runs with the rate that it found."""

    search: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def lr(self) -> float:
        return self.runs[0].lr

    @property
    def at_edge(self) -> bool:
        """Whether the best rate was the smallest or largest that was tried: a wider search might find a better one."""
        tried = sorted(run.lr for run in self.search)
        return self.lr in (tried[0], tried[-1])

    @property
    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over seeds."""
        scores = [run.score for run in self.runs]
        finite = all(map(math.isfinite, scores))
        return (
            (mean(scores), stdev(scores) if len(scores) > 1 and finite else math.nan)
            if finite
            else (math.inf, math.nan)
        )

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the optimizer's step and of the whole step, medians over the runs."""
        return median(r.seconds for r in self.runs), median(r.step_seconds for r in self.runs)


def make(entry: Entry, trial: Trial, lr: float) -> torch.optim.Optimizer:
    """The optimizer over what a trial trains."""
    module = trial.module
    groups: list[dict[str, Any]] = (
        optim.split(module, trial.outer) if entry.name in ("muon", "m3") else [{"params": list(module.parameters())}]
    )
    return optim.make(entry.name, module, groups, lr=lr, weight_decay=0.0, **entry.settings)


def stepped(trial: Trial, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float, float]:
    """One step of training: its loss, and the processor's seconds for the optimizer's part and for all, which other work on the
    machine does not change. Nothing moves by a loss that is not finite.
    """
    began = time.process_time()
    optimizer.zero_grad()
    loss = trial.loss(step)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value, math.nan, math.nan
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trial.module.parameters(), CLIP)
    middle = time.process_time()
    optimizer.step()
    ended = time.process_time()
    return value, ended - middle, ended - began


def once(name: str, problem: str, task: Problem, lr: float, seed: int) -> Run:
    """One run of an optimizer on a problem; the rate falls linearly to 0 in its last third, for all alike."""
    trial = task.make(seed)
    optimizer = make(ENTRIES[name], trial, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 3 * (1 - n / task.steps)))
    losses, moving, whole = [], [], []
    for step in range(task.steps):
        loss, own, all_of_it = stepped(trial, optimizer, step)
        losses.append(loss)
        if not math.isfinite(loss):
            break
        schedule.step()
        moving.append(own)
        whole.append(all_of_it)
    finite = math.isfinite(losses[-1])
    score = trial.score() if finite else math.inf
    return Run(
        name, problem, lr, seed, tuple(losses), score if math.isfinite(score) else math.inf,
        median(moving) if moving else math.nan, median(whole) if whole else math.nan,
    )  # fmt: skip


def measure(
    problems: Mapping[str, Problem],
    optimizers: Sequence[str],
    *,
    seeds: int,
    seed: int = 0,
    rates: Sequence[float] | None = None,
    before: Mapping[str, Mapping[str, Result]] | None = None,
    told: Callable[[str], object] = lambda name: None,
    kept: Callable[[Mapping[str, Mapping[str, Result]]], object] = lambda found: None,
) -> dict[str, dict[str, Result]]:
    """Results by problem and optimizer.

    rates: in place of the problems' own. before: results that stand, and are not measured again. told: what is measured next.
    kept: called with all results after each, so that a run that is cut short leaves what it has measured.
    """
    found: dict[str, dict[str, Result]] = {problem: dict(row) for problem, row in (before or {}).items()}
    for problem, task in problems.items():
        found.setdefault(problem, {})
        for name in optimizers:
            if name in found[problem] or (ENTRIES[name].layers and not task.layers):
                continue
            told(f"{problem}: {name}")
            default = optim.default_lr(ENTRIES[name].name)
            search = tuple(
                once(name, problem, task, default * rate, tuning + seed)
                for rate in rates or task.rates
                for tuning in TUNING_SEEDS
            )
            runs = tuple(once(name, problem, task, best_rate(search), seed + n) for n in range(seeds))
            found[problem][name] = Result(search, runs)
            kept(found)
    return found


def best_rate(search: Sequence[Run]) -> float:
    """The rate with the lowest mean score; the smallest of equals."""
    scores: dict[float, list[float]] = {}
    for run in search:
        scores.setdefault(run.lr, []).append(run.score)
    return min(sorted(scores), key=lambda lr: mean(scores[lr]))


def reach(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 600) -> tuple[int, int]:
    """How many of the last gradients carry half, and 99 %, of what an optimizer's update is made of.

    Every step's gradient has a direction of its own; what the last update has of each is its weight. For optimizers whose
    update is linear in past gradients.
    """
    w = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer, last = make([w]), torch.ones_like(w)
    for n in range(steps):
        w.grad = torch.zeros_like(w)
        w.grad[n] = 1.0
        before = w.detach().clone()
        optimizer.step()
        moved = (w.detach() - before).abs()
        if float(moved.sum()) > 0:  # it did move in this step
            last = moved
    shares = (last / last.sum()).flip(0).cumsum(0)
    return int((shares < 0.5).sum()) + 1, int((shares < 0.99).sum()) + 1


@cache
def reaches() -> dict[str, tuple[int, int]]:
    """Of momentum with several shares, and of one that moves every fourth step (§4.3)."""

    def momentum(share: float, every: int = 1) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: optim.Periodic(
            optim.PreconditionedMomentum([{"params": params, "every": every}], 1.0, share)
        )

    return {
        "momentum 0.9": reach(momentum(0.9)),
        "momentum 0.95": reach(momentum(0.95)),
        "momentum 0.99": reach(momentum(0.99)),
        "momentum 0.9, every 4 steps": reach(momentum(0.9, 4)),
    }


def save(found: Mapping[str, Mapping[str, Result]], path: Path, *, about: Mapping[str, Any]) -> None:
    """Everything, the search included, as JSON; what diverged has no number."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        return [plain(x) for x in value] if isinstance(value, list | tuple) else value

    results: dict[str, dict[str, dict[str, Any]]] = {
        problem: {
            name: {"search": [asdict(r) for r in x.search], "runs": [asdict(r) for r in x.runs]}
            for name, x in row.items()
        }
        for problem, row in found.items()
    }
    for row in results.values():
        for both in row.values():
            for run in both["search"]:
                del run["losses"]
    replace_file(
        path, json.dumps(plain({"about": dict(about), "reach": reaches(), "results": results}), indent=1) + "\n"
    )


def load(path: Path, *, about: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """What `save` wrote; of the search the losses are not kept. Raises ValueError where it was measured with other settings."""
    told = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(about)).items():
        if told["about"].get(name) != value:
            raise ValueError(f"{path} was measured with {name} {told['about'].get(name)!r}, but now it is {value!r}")

    def number(value: float | None, otherwise: float = math.nan) -> float:
        return otherwise if value is None else value

    def run(entry: Mapping[str, Any]) -> Run:
        return Run(
            entry["optimizer"], entry["problem"], entry["lr"], entry["seed"], tuple(map(number, entry.get("losses", ()))),
            number(entry["score"], math.inf), number(entry["seconds"]), number(entry["step_seconds"]),
        )  # fmt: skip

    return {
        problem: {
            name: Result(tuple(map(run, both["search"])), tuple(map(run, both["runs"]))) for name, both in row.items()
        }
        for problem, row in told["results"].items()
    }
