"""How many pairs does a memory hold? n random pairs are written, and then every key is asked for its value.

    recall   share of the keys whose answer is nearest, of all n values, to their own: what a reader could still tell apart
    error    Σ‖M(k) − v‖²/Σ‖v‖²: 0 is stored exactly, 1 is no better than answering 0
    capacity the largest n with recall at least 0.9, interpolated in log n; `exact`: the largest with error at most 0.1

Keys are of unit norm, uniform or with a common part; values are normal. Seeds are heads, and each draws keys, values, initial
weights and orders from a generator of its own: its figures are the same with others beside it or without. Step sizes are tried
on seeds of their own, the same ones whatever is measured (`TUNING`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.memory import Features, Gates, MemorySpec, MemoryState
from nestling.memory.networks.base import at
from nestling.memory.retentions import linked

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
RECALLED, EXACT = 0.9, 0.1
TUNING = range(-12, 0)  # seeds that choose step sizes, none of which gives figures


@dataclass(frozen=True)
class Trial:
    """One way to store pairs.

    label        what its curve is called
    spec         the memory
    passes       how often all pairs are shown, in a new order each time
    rates        step sizes to choose from
    precision    of features and weights: rounded to it after every token (the sums themselves are float32's)
    correlation  share of a key's square that is one direction common to all keys
    rewrite      all keys are bound a second time, to new values, and these are asked for
    retention    share that is kept at every token, where the memory decays
    asked        only the last so many pairs are asked for; None: all
    solved       not written at all: the weights of a matrix are the least-squares solution, what the features can hold at best
    """

    label: str
    spec: MemorySpec
    passes: int = 1
    rates: tuple[float, ...] = (1.0,)
    precision: Precision = "float32"
    correlation: float = 0.0
    rewrite: bool = False
    retention: float | None = None
    asked: int | None = None
    solved: bool = False


@dataclass(frozen=True)
class Curve:
    """What a trial measured: recall and error `[seed, n]` at the chosen rate."""

    label: str
    ns: tuple[int, ...]
    recall: Tensor
    error: Tensor
    rate: float

    @property
    def capacity(self) -> Tensor:
        """Of each seed, by recall."""
        return crossing(self.ns, self.recall, RECALLED)

    @property
    def exact(self) -> Tensor:
        """Of each seed, by error, which counts as at most 1: a jump between two n is put near the first."""
        return crossing(self.ns, -self.error.clamp(max=1), -EXACT)

    def to_json(self) -> dict[str, Any]:
        """Every number."""
        return {
            "label": self.label,
            "rate": self.rate,
            "n": list(self.ns),
            "recall": self.recall.tolist(),
            "error": self.error.tolist(),
            "capacity": self.capacity.tolist(),
            "exact": self.exact.tolist(),
        }


@dataclass(frozen=True)
class Rounded(Features):
    """Features computed and kept in a lower precision."""

    inner: Features
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.inner}, in {str(self.dtype).removeprefix('torch.')}"

    def width(self, key_dim: int) -> int:
        return self.inner.width(key_dim)

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        return self.inner.shapes(key_dim)

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return self.inner.init(key_dim, heads, generator)

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        low = self.inner.apply(x.to(self.dtype), tuple(w.to(self.dtype) for w in own))
        return low.to(x.dtype)


def measure(trial: Trial, ns: Sequence[int], *, seeds: int = 6, seed: int = 0) -> Curve:
    """Store n pairs for each n, and ask for them. Seeds `seed`, `seed` + 1, … give the figures, `TUNING` chooses the rate.

    Each is what it would be alone. Trials of equal sizes meet the same pairs, so that they can be compared seed by seed.
    """
    rates = len(trial.rates)
    tuned = TUNING if rates > 1 else ()
    generators = [torch.Generator().manual_seed(own) for own in (*range(seed, seed + seeds), *tuned)]
    both = len(generators)
    drawn = [_pairs(trial, max(ns), own) for own in generators]
    keys, values = (torch.cat(parts, 1).repeat(1, rates, 1, 1) for parts in zip(*drawn, strict=True))
    spec = _at_precision(trial)
    initial = [spec.init(1, own) for own in generators]
    w0 = tuple(torch.cat(parts).repeat(rates, 1, 1) for parts in zip(*initial, strict=True))
    lr = torch.tensor(trial.rates).repeat_interleave(both).view(1, -1, 1)
    found = []

    def score(state: MemoryState, n: int) -> tuple[Tensor, Tensor]:
        last = slice(0 if trial.asked is None else max(0, n - trial.asked), n)
        return _score(answer(spec, w0, state, keys[:, :, last]), values[:, :, last])

    with torch.no_grad():
        if trial.solved:
            for n in ns:
                found.append(score(solve(spec, w0, keys[:, :, :n], values[:, :, :n]), n))
        elif trial.passes == 1 and not trial.rewrite:
            state, before = None, 0
            for n in ns:
                state = write(trial, spec, w0, keys[:, :, before:n], values[:, :, before:n], lr, state)
                found.append(score(state, n))
                before = n
        else:
            for n in ns:
                shown, bound = _shown(trial, keys[:, :, :n], values[:, :, :n], generators)
                state = write(trial, spec, w0, shown, bound, lr)
                found.append(score(state, n))
    recall, error = (torch.stack(part, -1).view(rates, both, -1) for part in zip(*found, strict=True))
    best = int((recall - error.clamp(max=1))[:, seeds:].mean((1, 2)).argmax()) if tuned else 0
    return Curve(trial.label, tuple(ns), recall[best, :seeds], error[best, :seeds], trial.rates[best])


def write(
    trial: Trial,
    spec: MemorySpec,
    w0: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    lr: Tensor,
    state: MemoryState | None = None,
) -> MemoryState:
    """The state after these pairs; below float32 its weights are rounded after every token."""
    dtype: torch.dtype = getattr(torch, trial.precision)
    keep = None if trial.retention is None else torch.full_like(lr, trial.retention).to(dtype).to(lr.dtype)
    gates, time = Gates(lr=lr, retention=keep), keys.shape[2]
    if trial.precision == "float32":
        return spec.scan(w0, keys, keys, values, gates.map(lambda g: g.expand(-1, -1, time)), state)[1]

    def low(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(w.to(dtype).to(w.dtype) for w in weights)

    for t in range(time):
        k, v = keys[:, :, t : t + 1], values[:, :, t : t + 1]
        new = spec.scan(w0, k, k, v, gates, state)[1]
        state = new._replace(anchor=low(new.anchor), weights=low(new.weights), momentum=low(new.momentum))
    assert state is not None
    return state


def solve(spec: MemorySpec, w0: Sequence[Tensor], keys: Tensor, values: Tensor) -> MemoryState:
    """The state whose weights answer these keys best: of least squared error, and of all such the smallest."""
    features = spec.features.apply(keys, w0[spec.network.depth :]).double()
    weights = torch.linalg.lstsq(features, values.double(), driver="gelsd").solution.float()
    state: MemoryState = spec.start(w0, 1)
    return state._replace(anchor=(weights,), weights=(weights,))


def answer(spec: MemorySpec, w0: Sequence[Tensor], state: MemoryState, q: Tensor) -> Tensor:
    """M(q) at the weights as they stand: a read that writes nothing."""
    weights = tuple(linked(spec.retention, w, a) for w, a in zip(state.weights, state.anchor, strict=True))
    return spec.network.apply(at(weights), spec.features.apply(q, w0[spec.network.depth :]))


def crossing(ns: Sequence[int], scores: Tensor, least: float) -> Tensor:
    """Of each row of scores `[seed, n]`: the largest n with at least `least`, interpolated in log n; at most the last n.

    A row that never has it counts as the first n: nothing smaller was measured.
    """
    found = []
    for row in scores.tolist():
        last = max((i for i, score in enumerate(row) if score >= least - 1e-6), default=None)  # NaN is below
        if last is None or last == len(row) - 1:
            found.append(float(ns[0] if last is None else ns[-1]))
            continue
        high, low = row[last], row[last + 1]
        share = (high - least) / (high - low) if math.isfinite(low) else 0.0
        found.append(ns[last] * (ns[last + 1] / ns[last]) ** share)
    return torch.tensor(found)


def _at_precision(trial: Trial) -> MemorySpec:
    if trial.precision == "float32":
        return trial.spec
    return replace(trial.spec, features=Rounded(trial.spec.features, getattr(torch, trial.precision)))


def _pairs(trial: Trial, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A seed's keys `[1, 1, n, key_dim]` of unit norm, and values."""

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    common = unit(1, 1, 1, trial.spec.key_dim)
    apart = unit(1, 1, n, trial.spec.key_dim)
    apart = (
        torch.nn.functional.normalize(apart - (apart * common).sum(-1, keepdim=True) * common, dim=-1)
        if trial.correlation
        else apart
    )
    keys = trial.correlation**0.5 * common + (1 - trial.correlation) ** 0.5 * apart
    return keys, torch.randn(1, 1, n, trial.spec.value_dim, generator=generator)


def _shown(trial: Trial, keys: Tensor, values: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The stream: all pairs in a new order each pass, every seed's own; with `rewrite`, other values for the same keys first."""
    n, rates = keys.shape[2], keys.shape[1] // len(generators)
    orders = [torch.cat([torch.randperm(n, generator=own) for _ in range(trial.passes)]) for own in generators]
    order = torch.stack(orders).repeat(rates, 1)[None, :, :, None]
    shown, bound = (x.take_along_dim(order, 2) for x in (keys, values))
    if trial.rewrite:
        old = torch.cat([torch.randn(1, 1, n, values.shape[-1], generator=own) for own in generators], 1)
        shown, bound = torch.cat([keys, shown], 2), torch.cat([old.repeat(1, rates, 1, 1), bound], 2)
    return shown, bound


def _score(answers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Recall and error, each `[head]`; an answer that is not finite recalls nothing."""
    finite = torch.isfinite(answers).all(-1)
    distances = values.square().sum(-1).unsqueeze(-2) - 2 * torch.nan_to_num(answers) @ values.mT  # less what all have
    right = (distances.argmin(-1) == torch.arange(values.shape[2])) & finite
    error = (answers - values).square().sum((-2, -1)) / values.square().sum((-2, -1))
    return right.float().mean(-1)[0], torch.nan_to_num(error, nan=math.inf, posinf=math.inf)[0]
