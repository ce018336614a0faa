"""Optimizers by name, over groups of a model's parameters: what the command line and `from_levels` make them from."""

from __future__ import annotations

import inspect
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
    """How it is made, what it is in a phrase, the learning rate that small models train well with (ours), and its class."""

    make: Maker
    about: str
    lr: float
    kind: type[torch.optim.Optimizer]


_ENTRIES = {
    "adamw": Entry(_adamw, "AdamW of PyTorch", 2e-3, torch.optim.AdamW),
    "sgd": Entry(_sgd, "SGD of PyTorch with momentum 0.9", 0.1, torch.optim.SGD),
    "muon": Entry(_ours(Muon, adjust_lr_fn="match_rms_adamw"), "Muon on hidden matrices, Adam on the rest", 2e-3, Muon),
    "m3": Entry(_ours(M3), "M3, multi-scale momentum Muon, on hidden matrices, Adam on the rest", 2e-3, M3),
    "dgd": Entry(
        _dgd,
        "delta gradient descent with momentum 0.9 and coupling 0.1; SGD for weights used behind their layers",
        0.1,
        DGD,
    ),
    "delta_momentum": Entry(_delta, "momentum with the delta rule", 0.1, DeltaMomentum),
    "deep_momentum": Entry(_ours(DeepMomentum), "momentum that is a network", 0.3, DeepMomentum),
    "feature_momentum": Entry(_ours(FeatureMomentum), "momentum in features of the gradient", 0.1, FeatureMomentum),
    "preconditioned_momentum": Entry(_ours(PreconditionedMomentum), "heavy-ball momentum", 0.1, PreconditionedMomentum),
    "adam_memory": Entry(
        _ours(AdamMemory, betas=(0.9, 0.95)), "Adam, as the optimal memory of gradients", 2e-3, AdamMemory
    ),
    "adagrad_memory": Entry(_ours(AdaGradMemory), "AdaGrad, as the optimal memory of gradients", 2e-2, AdaGradMemory),
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


def settings_of(name: str) -> list[str]:
    """What can be set of it beside its learning rate and weight decay. Raises ValueError for one that is not known."""
    return sorted(inspect.signature(_entry(name).kind).parameters.keys() - _SET_ELSEWHERE)


_SET_ELSEWHERE = {"params", "module", "lr", "weight_decay", "matrix", "parts"}


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
