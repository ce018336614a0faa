"""Optimizers by name, over groups of a model's parameters: what the command line and `from_levels` make them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from nestling.optim.adagrad import AdaGradMemory
from nestling.optim.adam import AdamMemory
from nestling.optim.base import Optimizer
from nestling.optim.deep import DeepMomentum
from nestling.optim.delta import DeltaMomentum
from nestling.optim.dgd import DGD
from nestling.optim.feature import FeatureMomentum
from nestling.optim.m3 import M3
from nestling.optim.momentum import PreconditionedMomentum
from nestling.optim.muon import Muon

Groups = list[dict[str, Any]]
Maker = Callable[..., torch.optim.Optimizer]


def _adamw(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **{"betas": (0.9, 0.95), "fused": True, **settings})


def _sgd(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, **{"momentum": 0.9, **settings})


def _dgd(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    return DGD(module, params=groups, **{"momentum": 0.9, "coupling": 0.1, "strict": False, **settings})


def _delta(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    tokens = "tokens" in {settings.get("form"), *(group.get("form") for group in groups)}
    return DeltaMomentum(groups, **{"module": module if tokens else None, "strict": False, **settings})


def _ours(kind: type[Optimizer], **defaults: Any) -> Maker:
    def make(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
        return kind(groups, **{**defaults, **settings})

    return make


class Entry(NamedTuple):
    """How it is made, what it is in a phrase, and the learning rate that small models train well with (ours)."""

    make: Maker
    about: str
    lr: float


_ENTRIES = {
    "adamw": Entry(_adamw, "AdamW of PyTorch", 2e-3),
    "sgd": Entry(_sgd, "SGD of PyTorch with momentum 0.9", 0.1),
    "muon": Entry(_ours(Muon, adjust_lr_fn="match_rms_adamw"), "Muon on hidden matrices, Adam on the rest", 2e-3),
    "m3": Entry(_ours(M3), "M3, multi-scale momentum Muon, on hidden matrices, Adam on the rest", 2e-3),
    "dgd": Entry(
        _dgd,
        "delta gradient descent with momentum 0.9 and coupling 0.1; SGD for weights used behind their layers",
        0.1,
    ),
    "delta_momentum": Entry(_delta, "momentum with the delta rule", 0.1),
    "deep_momentum": Entry(_ours(DeepMomentum), "momentum that is a network", 0.3),
    "feature_momentum": Entry(_ours(FeatureMomentum), "momentum in features of the gradient", 0.1),
    "preconditioned_momentum": Entry(_ours(PreconditionedMomentum), "heavy-ball momentum", 0.1),
    "adam_memory": Entry(_ours(AdamMemory, betas=(0.9, 0.95)), "Adam, as the optimal memory of gradients", 2e-3),
    "adagrad_memory": Entry(_ours(AdaGradMemory), "AdaGrad, as the optimal memory of gradients", 2e-2),
}


def names() -> list[str]:
    """All optimizers by name."""
    return sorted(_ENTRIES)


def describe(name: str) -> str:
    """One of them in a phrase. Raises ValueError for one that is not known."""
    return _entry(name).about


def make(name: str, module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """The named optimizer over groups of a module's parameters. Raises ValueError for what it does not know."""
    maker = _entry(name).make
    try:
        return maker(module, groups, **settings)
    except TypeError as error:  # a setting that it does not have
        raise ValueError(f"optimizer {name}: {error}") from error


def takes_matrices(name: str) -> bool:
    """Whether its groups say which parameters are hidden matrices."""
    return name in ("muon", "m3")


def default_lr(name: str) -> float:
    """The learning rate where none is given."""
    return _entry(name).lr


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise ValueError(f"optimizer {name!r} is not known; expected one of: {', '.join(names())}")
    return _ENTRIES[name]
