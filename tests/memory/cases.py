"""What the tests of memories draw and do alike."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import L2, Bias, Features, Memory, Network, Omega, Retention, Rule
from nestling.memory.protocol import Example
from nestling.testing import cut


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_lane(seed: int, dim: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, unit-norm k, v of one lane and head."""
    q, k, v = normal(3, 1, 1, time, dim, seed=seed)
    return q, F.normalize(k, dim=-1), v


def gate_between(low: float, high: float, seed: int, time: int) -> Tensor:
    """A gate of one lane and head."""
    return low + (high - low) * torch.rand(
        1, 1, time, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def in_pieces(
    spec: Memory, w0: Sequence[Tensor], example: Example, bounds: Sequence[int], **options: Any
) -> tuple[Tensor, Any]:
    """An example read call after call, from each of the bounds to the next; outputs and the last state.

    options: those of a scan, with `reset` and `valid` of the whole.
    """
    state, outputs = None, []
    for first, last in itertools.pairwise(bounds):
        masks = {name: options[name][:, first:last] for name in ("reset", "valid") if name in options}
        q, k, v, gates = cut(example, first, last)
        y, state = spec.scan(w0, q, k, v, gates, state, **{**options, **masks})
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 2), state


def slots_equal_their_definition(spec: Memory, w0: Sequence[Tensor], generator: torch.Generator) -> None:
    """Outputs, weights, anchors and the gradient of every input, with resets and invalid tokens, in tiles of any length."""
    q, k, v, gates = spec.example(generator, time=19, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*w0, q, k, v, *(g for _, g in gates.items()))]
    reset = torch.rand(2, 19, generator=generator) < 0.1
    valid = torch.rand(2, 19, generator=generator) < 0.8
    runs = []
    options: dict[str, Any]
    for options in ({"engine": "reference"}, {"tile": None}, {"tile": 4}):
        y, state = spec.scan(w0, q, k, v, gates, reset=reset, valid=valid, **options)
        total = (y * normal(*y.shape, seed=9)).sum()
        total = total + sum((w * normal(*w.shape, seed=8)).sum() for w in state.weights)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        runs.append((y, *state.weights, *state.anchor, *(torch.zeros(1) if g is None else g for g in gradients)))
    for fast in runs[1:]:
        for a, b in zip(fast, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


BASES: dict[str, type] = {
    "networks": Network,
    "biases": Bias,
    "retentions": Retention,
    "rules": Rule,
    "features": Features,
}
"""The folders of `nestling.memory` that hold a choice's options, and the protocol of each."""


def options(axis: str) -> list[type]:
    """Every option that a file of this folder defines: a new one joins by itself."""
    package = importlib.import_module(f"nestling.memory.{axis}")
    for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(file.name)
    found, todo = set(), [BASES[axis]]
    while todo:
        todo += (subclasses := todo.pop().__subclasses__())
        found |= {c for c in subclasses if is_dataclass(c) and c.__module__.startswith(f"{package.__name__}.")}
    return sorted(found, key=lambda c: c.__name__)


def variants(axis: str) -> list[Any]:
    """Each of them as it is by itself, and with every value of those settings that are a choice of words or yes and no."""
    found: list[Any] = []
    for option in options(axis):
        needed = {"inner": L2()} if option is Omega else {}
        found.append(option(**needed))
        for name, kind in get_type_hints(option).items():
            for value in _values(kind):
                with contextlib.suppress(ValueError):  # words that another option has use for
                    found.append(option(**needed, **{name: value}))
    return [x for n, x in enumerate(found) if x not in found[:n]]


def _values(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is bool:
        return (True, False)
    return tuple(value for part in get_args(kind) for value in _values(part))
