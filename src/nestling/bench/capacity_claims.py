"""What the papers claim about capacity, held against what the laboratory measured, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestling.bench.capacity import PRECISIONS, Curve
from nestling.memory import Identity, Polynomial, Powers, Sketch

Found = dict[str, dict[str, Curve]]
"""Curves by experiment and by trial."""


@dataclass(frozen=True)
class Claim:
    """A comparison: what is claimed, whether it holds, and the figures.

    holds: by two standard errors over the seeds; False where the opposite does by as much; None where neither does.
    """

    text: str
    holds: bool | None
    figures: str

    @property
    def verdict(self) -> str:
        return {True: "holds", None: "not seen", False: "refuted"}[self.holds]


def claims(found: Found) -> list[Claim]:
    """Those that the experiments which were run can answer."""
    made: list[Claim] = []
    for claim in (
        *_rules(found),
        *_sizes(found),
        *_networks(found),
        *_features(found),
        *_precision(found),
        *_windows(found),
    ):
        made.append(claim)
    return made


def more(text: str, a: Curve, b: Curve, by: Literal["capacity", "exact"] = "capacity") -> Claim:
    """Claims that a holds more pairs than b: ratios seed by seed, with two standard errors of their logs."""
    first, second = getattr(a, by), getattr(b, by)
    mean, width = mean_and_interval((first / second).log2())
    if bool((torch.minimum(first, second) >= a.ns[-1]).all()):
        return Claim(text, None, f"both hold all {a.ns[-1]}: more were not asked for")
    least = "at least " if bool((first >= a.ns[-1]).any()) else ""
    figures = f"{least}{first.mean():.1f} against {second.mean():.1f} pairs, {2**mean:.2f} ×"
    figures += f" [{2 ** (mean - width):.2f}–{2 ** (mean + width):.2f}]" if math.isfinite(width) else ", one seed"
    return Claim(text, decide(mean, width), figures)


def nearer(text: str, a: Curve, b: Curve, n: int) -> Claim:
    """Claims that a answers with less error than b when n pairs are stored."""
    first, second = (c.error[:, c.ns.index(n)] for c in (a, b))
    mean, width = mean_and_interval((second.clamp_min(1e-30) / first.clamp_min(1e-30)).log2())
    return Claim(text, decide(mean, width), f"error {first.mean():.2g} against {second.mean():.2g}")


def rises(
    text: str, xs: Sequence[float], curves: Sequence[Curve], least: float, by: Literal["capacity", "exact"] = "capacity"
) -> Claim:
    """Claims that capacity rises with x with at least the power `least`: slopes of log capacity over log x, seed by seed."""
    x = torch.tensor(xs, dtype=torch.float32).log2()
    y = torch.stack([getattr(c, by).log2() for c in curves], -1)
    x = x - x.mean()
    mean, width = mean_and_interval(((y - y.mean(-1, keepdim=True)) * x).sum(-1) / x.square().sum())
    return Claim(text, decide(mean - least, width), f"like its power {mean:.2f} ± {width:.2f}")


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Mean and two standard errors, over seeds."""
    return float(values.mean()), 2 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf


def decide(mean: float, width: float) -> bool | None:
    """Whether an interval lies above 0 (True), below (False), or neither."""
    return True if mean - width > 0 else False if mean + width < 0 else None


def _rules(found: Found) -> Iterator[Claim]:
    once, common, again = (found.get(name, {}) for name in ("rule", "correlated", "passes"))
    if once:
        yield more(
            "delta recalls more pairs than Hebbian, shown once, independent keys", once["delta"], once["Hebbian"]
        )
        yield nearer(
            "delta answers nearer than Hebbian once memory is overfull",
            once["delta"],
            once["Hebbian"],
            once["delta"].ns[-1],
        )
        yield more(
            "delta recalls more pairs where every key is bound anew",
            once["delta, bound anew"],
            once["Hebbian, bound anew"],
        )
    if common:
        yield more("delta recalls more pairs where keys have a part in common", common["delta"], common["Hebbian"])
    if again:
        yield more("delta recalls more pairs where they are shown again", again["delta"], again["Hebbian"])
        yield more(
            "delta stores more pairs exactly where they are shown again", again["delta"], again["Hebbian"], "exact"
        )


def _sizes(found: Found) -> Iterator[Claim]:
    for name in ("Hebbian", "delta"):
        sizes = {
            int(label.rsplit(" ", 1)[1]): c for label, c in found.get("key_dim", {}).items() if label.startswith(name)
        }
        if sizes:
            yield rises(
                f"the capacity of a matrix ({name}) grows with more than the root of the key's dimension",
                [*sizes],
                [*sizes.values()],
                0.5,
            )


def _networks(found: Found) -> Iterator[Claim]:
    curves = {label.split(" (")[0]: curve for label, curve in found.get("network", {}).items()}
    for words, name in (("shown again", ""), ("shown once", ", once")):
        for article, deep in (("an", "MLP"), ("a", "gated MLP")):
            for plain in ("matrix", "matrix of degree-2 features"):
                if curves:
                    yield more(
                        f"{article} {deep} recalls more than a {plain}, pairs {words}",
                        curves[deep + name],
                        curves[plain + name],
                    )


def _features(found: Found) -> Iterator[Claim]:
    curves = found.get("features", {})
    shown = {
        "shown again": next((w for w in ("shown 8 times", "shown 2 times") if f"{Polynomial(1)}, {w}" in curves), ""),
        "shown once": "shown once",
    }
    degrees = [p for p in (1, 2, 3, 4) if f"{Polynomial(p)}, solved" in curves]
    if not degrees:
        return
    sizes = [Polynomial(p).width(8) for p in degrees]
    solved = [curves[f"{Polynomial(p)}, solved"] for p in degrees]
    yield rises(
        "what polynomial features can store exactly grows with more than the root of their number (least squares)",
        sizes,
        solved,
        0.5,
        "exact",
    )
    for words, label in shown.items():
        kernel = [curves[f"{Polynomial(p)}, {label}"] for p in degrees]
        yield more(
            f"degree {degrees[-1]} recalls more than the key itself, pairs {words}",
            kernel[-1],
            curves[f"{Identity()}, {label}"],
        )
        for p in degrees[1:]:
            yield more(f"degree {p} recalls more than degree {p - 1}, pairs {words}", kernel[p - 1], kernel[p - 2])
        yield rises(
            f"capacity grows with more than the root of the number of features, pairs {words}", sizes, kernel, 0.5
        )
        if len(degrees) > 2:
            yield more(
                f"the kernel of degree 3 recalls more than element-wise powers up to 3, pairs {words}",
                kernel[2],
                curves[f"{Powers(3)}, {label}"],
            )
            yield more(
                f"the kernel of degree 3 recalls more than a sketch of as many features, pairs {words}",
                kernel[2],
                curves[f"{Sketch(3, 78)}, {label}"],
            )


def _precision(found: Found) -> Iterator[Claim]:
    held, floor, decay = (found.get(name, {}) for name in ("precision", "floor", "decay"))
    for kept in PRECISIONS[1:]:
        for degree in (1, 2, 3):
            if f"degree {degree}, {kept}" in held:
                yield more(
                    f"float32 recalls more than {kept}, degree {degree}",
                    held[f"degree {degree}, float32"],
                    held[f"degree {degree}, {kept}"],
                )
        for degree in (1, 3):
            if f"{kept}, degree {degree}" in floor:
                full, low = floor[f"float32, degree {degree}"], floor[f"{kept}, degree {degree}"]
                yield nearer(
                    f"float32 stores a few pairs more exactly than {kept}, degree {degree}", full, low, full.ns[-1]
                )
        if decay:
            full, low = decay["float32"], decay[kept]
            mean, width = mean_and_interval(full.recall[:, -1] - low.recall[:, -1])
            first, second = float(full.recall[:, -1].mean()), float(low.recall[:, -1].mean())
            figures = f"recall {first:.2f} against {second:.2f} after {full.ns[-1]:,} tokens"
            yield Claim(
                f"float32 recalls the latest pairs better than {kept}, behind a decay of 0.999",
                decide(mean, width),
                figures,
            )


def _windows(found: Found) -> Iterator[Claim]:
    curves = found.get("window", {})
    for name in ("matrix", "MLP"):
        for length in (4, 8, 16):
            if f"{name}, window {length}" in curves:
                text = f"Omega with a window of {length} recalls more than learning from each token alone ({name})"
                yield more(text, curves[f"{name}, window {length}"], curves[f"{name}, window 1"])
