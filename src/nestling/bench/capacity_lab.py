"""The capacity laboratory: what the papers claim about how much a memory holds, put to the test.

Every experiment is a few trials of `nestling.bench.capacity` beside each other, one panel of the plot. What they say about the
claims is in `nestling.bench.capacity_claims`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nestling.bench.capacity import PRECISIONS, Trial, measure
from nestling.bench.capacity_claims import Claim, Found
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DeltaGradient,
    DotProduct,
    Features,
    GatedMLP,
    Gradient,
    Identity,
    Implicit,
    Matrix,
    MemorySpec,
    Omega,
    Polynomial,
    Powers,
    Rule,
    Sketch,
)

Shows = Literal["recall", "capacity", "error"]


@dataclass(frozen=True)
class Series:
    """One line of a panel: the recall of one trial over n, or a figure of several trials over xs.

    The label's part before a comma or bracket goes by the line's color, the rest by its style.
    """

    label: str
    trials: tuple[Trial, ...]
    xs: tuple[float, ...] = ()
    style: str = "-"


@dataclass(frozen=True)
class Experiment:
    """One panel. shows: recall over n; or capacity (by recall), or the error at the last n, over each series' xs."""

    title: str
    x: str
    ns: tuple[int, ...]
    series: tuple[Series, ...]
    shows: Shows = "recall"


def matrix(key_dim: int, value_dim: int, rule: Rule, features: Features | None = None, **choices: Any) -> MemorySpec:
    """A matrix memory whose rule erases on the running weights, or does not: chunk has no effect."""
    return MemorySpec(key_dim, value_dim, bias=DotProduct(), rule=rule, features=features or Identity(), **choices)


STYLES = {"float32": "-", "bfloat16": "--", "float16": ":"}
HEBB, DELTA = Gradient(), DeltaGradient("after_decay")
STEPS = (0.1, 0.25, 0.5, 1.0)


def experiments(quick: bool = False) -> dict[str, Experiment]:
    """All panels by name; `quick`: a few small ones of each kind, for a first look."""
    long = (2, 4, 8, 16) if quick else (2, 4, 8, 16, 32, 64, 128, 256, 512)
    few = 2 if quick else 8
    rules = (("Hebbian", HEBB), ("delta", DELTA))

    def lines(**how: Any) -> Iterable[Series]:
        for dashed, words in ((False, ""), (True, ", bound anew")):
            for name, rule in rules:
                trial = Trial(name + words, matrix(32, 32, rule), rates=STEPS, rewrite=dashed, **how)
                yield Series(trial.label, (trial,), style="--" if dashed else "-")

    common = (Trial(n, matrix(32, 32, rule), rates=STEPS, correlation=0.3) for n, rule in rules)
    again = (Trial(n, matrix(32, 32, rule), rates=STEPS, passes=few) for n, rule in rules)
    dims = (8, 16) if quick else (8, 16, 32, 64)
    sizes = (
        Series(n, tuple(Trial(f"{n}, d = {d}", matrix(d, 32, rule), rates=STEPS) for d in dims), dims)
        for n, rule in rules
    )
    return {
        "rule": Experiment("Shown once (d = 32)", "pairs", long[:8], tuple(lines())),
        "correlated": Experiment(
            "Shown once, keys share 30 % of their square",
            "pairs",
            long[:8],
            tuple(Series(t.label, (t,)) for t in common),
        ),
        "passes": Experiment(
            f"Shown {few} times (d = 32)", "pairs", long[:8], tuple(Series(t.label, (t,)) for t in again)
        ),
        "key_dim": Experiment("Shown once, by key dimension", "key dimension", long, tuple(sizes), "capacity"),
        "network": Experiment(f"Shown {few} times, dashed once (d = 16)", "pairs", long[:8], _networks(few)),
        "features": Experiment(
            "Features of keys of 8 dimensions", "number of features", long, _features(few, quick), "capacity"
        ),
        "precision": Experiment(
            f"Rounded at every token, shown {few} times (d = 16)", "pairs", long[2:8], _precision(few, quick)
        ),
        "floor": Experiment("4 pairs, shown 32 times (d = 16)", "degree", (4,), _floor(quick), "error"),
        "decay": Experiment(
            "The last 16 of a long text, α = 0.999 (d = 64)",
            "tokens",
            (16, 32) if quick else (64, 256, 1024, 2048),
            _decay(),
        ),
        "window": Experiment("Omega: windows (d = 16), shown once", "window", long[:7], _windows(quick), "capacity"),
    }


def _networks(passes: int) -> tuple[Series, ...]:
    made = {
        "matrix": MemorySpec(16, 16, bias=L2(), chunk=1),
        "matrix of degree-2 features": matrix(16, 16, Implicit(), Polynomial(2)),
        "MLP": MemorySpec(16, 16, network=MLP(), bias=L2(), chunk=1),
        "gated MLP": MemorySpec(16, 16, network=GatedMLP(), bias=L2(), chunk=1),
    }
    found = []
    for name, spec in made.items():
        weights = sum(i * o for i, o in spec.fast_shapes)
        rates = (0.02, 0.1, 0.5, 1.0) if spec.network.depth == 1 else (0.01, 0.02, 0.05, 0.1, 0.2)
        for shown in (passes, 1):
            label = f"{name} ({weights:,} weights)" if shown > 1 else f"{name}, once"
            found.append(
                Series(label, (Trial(label, spec, passes=shown, rates=rates),), style="-" if shown > 1 else "--")
            )
    return tuple(found)


def _features(passes: int, quick: bool) -> tuple[Series, ...]:
    kernel = tuple(Polynomial(p) for p in range(1, 3 if quick else 5))
    kinds: dict[str, tuple[Features, ...]] = {"polynomial": kernel, "the key itself": (Identity(),)}
    if not quick:
        kinds |= {
            "element-wise powers": tuple(Powers(p) for p in (2, 3, 4)),
            "sketch of degree 3": (Sketch(3, 32), Sketch(3, 78)),
        }

    def trial(features: Features, words: str, **how: Any) -> Trial:
        return Trial(f"{features}, {words}", matrix(8, 32, Implicit(), features), rates=(0.25, 1.0, 100.0), **how)

    found = []
    for words, how in ((f"shown {passes} times", {"passes": passes}), ("shown once", {})):
        for name, maps in kinds.items():
            trials = tuple(trial(f, words, **how) for f in maps)
            found.append(
                Series(f"{name}, {words}", trials, tuple(f.width(8) for f in maps), style="-" if how else "--")
            )
    best = tuple(trial(f, "solved", solved=True) for f in kernel)
    return (*found, Series("least squares (polynomial)", best, tuple(f.width(8) for f in kernel)))


def _of_degree(degree: int) -> Features:
    return Identity() if degree == 1 else Polynomial(degree)


def _precision(passes: int, quick: bool) -> tuple[Series, ...]:
    trials = (
        Trial(f"degree {p}, {kept}", matrix(16, 16, Implicit(), _of_degree(p)), passes=passes, precision=kept)
        for p in ((1, 2) if quick else (1, 2, 3))
        for kept in PRECISIONS
    )
    return tuple(Series(t.label, (t,), style=STYLES[t.precision]) for t in trials)


def _floor(quick: bool) -> tuple[Series, ...]:
    degrees = (1, 2) if quick else (1, 2, 3)
    return tuple(
        Series(
            kept,
            tuple(
                Trial(f"{kept}, degree {p}", matrix(16, 16, Implicit(), _of_degree(p)), 32, (100.0,), kept)
                for p in degrees
            ),
            degrees,
        )
        for kept in PRECISIONS
    )


def _decay() -> tuple[Series, ...]:
    spec = matrix(64, 32, HEBB, retention=Decay())
    return tuple(Series(kept, (Trial(kept, spec, precision=kept, retention=0.999, asked=16),)) for kept in PRECISIONS)


def _windows(quick: bool) -> tuple[Series, ...]:
    lengths = (1, 4) if quick else (1, 2, 4, 8, 16)
    rates = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
    found = []
    for name, network in (("matrix", Matrix()), ("MLP", MLP())):
        specs = (MemorySpec(16, 16, network=network, bias=Omega(L2(), c), chunk=1) for c in lengths)
        trials = tuple(Trial(f"{name}, window {c}", spec, rates=rates) for c, spec in zip(lengths, specs, strict=True))
        found.append(Series(name, trials, lengths))
    return tuple(found)


def run(chosen: dict[str, Experiment], *, seeds: int, seed: int, told: Callable[[str], None] = lambda _: None) -> Found:
    """Measure; `told` hears the name of each experiment before it begins."""
    found: Found = {}
    for name, experiment in chosen.items():
        told(name)
        trials = [trial for series in experiment.series for trial in series.trials]
        found[name] = {t.label: measure(t, experiment.ns, seeds=seeds, seed=seed) for t in trials}
    return found


def save(found: Found, claims: Sequence[Claim], path: Path, **about: Any) -> None:
    """Every number, as JSON."""
    content = {
        **about,
        "claims": [{"claim": c.text, "verdict": c.verdict, "figures": c.figures} for c in claims],
        "experiments": {name: [curve.to_json() for curve in curves.values()] for name, curves in found.items()},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
