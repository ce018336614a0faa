"""The nested system as a list: what each level weighs, and an optimizer through the same lens (Nested Learning, §3)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestling import optim
from nestling import state as fast
from nestling.layers import Level, Period
from nestling.models.lm import LanguageModel


def weighed(model: LanguageModel, levels: Sequence[Level]) -> list[Level]:
    """The same levels with `weights`, `slow` and `moved` filled in."""
    counts = {name: p.numel() for name, p in model.named_parameters()}
    with torch.no_grad():
        state = model.start(0)  # shapes are all that is asked for
    return [
        replace(
            level,
            weights=_numbers([_at(state, path) for path in level.state_paths if "open" not in path.split(".")]),
            slow=sum(counts[name] for name in level.params),
            moved=sum(counts[name] for name in level.moves),
        )
        for level in levels
    ]


def memories(optimizer: torch.optim.Optimizer) -> list[Level]:
    """What an optimizer remembers of gradients: levels of equal frequency before the weights, which need them to move."""
    return [
        Level(
            f"optimizer.{m.name}",
            Period(m.period, "step"),
            m.network,
            m.bias,
            m.retention,
            m.rule,
            "gradients",
            "generation",
            state_paths=tuple(f"optimizer.{name}" for name in m.tensors),
        )
        for m in optim.memories(optimizer)
    ]


def of_optimizer(optimizer: torch.optim.Optimizer) -> list[Level]:
    """An optimizer alone, whatever it trains: its memories, whose context is the gradients, and the weights, whose context is the
    data. Gradient descent on a linear layer is itself a memory that maps its inputs to the local errors (Nested Learning,
    eq. 8–13).
    """
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    weights = Level(
        "weights",
        Period(1, "step"),
        "a map from the inputs of every layer",
        "dot product of the layer's answer with the error signal, −∂L/∂y",
        "weight decay" if any(group.get("weight_decay") for group in optimizer.param_groups) else "everything",
        name_of(optimizer),
        "data: inputs as keys, errors as values",
        "none",
        slow=count,
        moved=count,
    )
    return sorted([*memories(optimizer), weights], key=lambda level: level.period.key())


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Its class, not that of a wrapper which says how often."""
    return type(optim.core(optimizer)).__name__


def merge(levels: Sequence[Level]) -> list[tuple[Level, tuple[Level, ...]]]:
    """Levels that differ in nothing but their block as one, `blocks.*.mixer.memory`, and which these are, in the order of the
    first. Of a single one the name stays.
    """
    groups: dict[Level, list[Level]] = {}
    for level in levels:
        name = re.sub(r"\d+", "*", level.name, count=1)
        kind = replace(level, name=name, params=(), state_paths=(), weights=0, slow=0, moves=(), moved=0)
        groups.setdefault(kind, []).append(level)
    return [(kind if len(members) > 1 else members[0], tuple(members)) for kind, members in groups.items()]


def _at(state: Any, path: str) -> Any:
    for part in path.split("."):
        if state is None or (not hasattr(state, "_fields") and int(part) >= len(state)):
            return None
        state = getattr(state, part) if hasattr(state, "_fields") else state[int(part)]
    return state


def _numbers(trees: Sequence[Any]) -> int | None:
    """Floating-point numbers in these; None where one is a cache that is still empty."""
    found: list[Tensor] = [leaf for leaf in fast.leaves(tuple(trees)) if leaf.is_floating_point()]
    sizes = [math.prod(leaf.shape[1:]) for leaf in found]
    return None if 0 in sizes else sum(sizes)
