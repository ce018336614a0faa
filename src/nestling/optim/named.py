"""Optimizers by name, over groups of a model's parameters: what the command line and `from_levels` make them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _ours(kind: type[Optimizer], **defaults: Any) -> Maker:
    def make(module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
        return kind(groups, **{**defaults, **settings})

    return make


_MAKERS: dict[str, tuple[Maker, str]] = {
    "adamw": (_adamw, "AdamW of PyTorch"),
    "sgd": (_sgd, "SGD of PyTorch with momentum 0.9"),
    "muon": (_ours(Muon, adjust_lr_fn="match_rms_adamw"), "Muon on hidden matrices, Adam on the rest"),
    "m3": (_ours(M3), "M3, multi-scale momentum Muon, on hidden matrices, Adam on the rest"),
    "dgd": (
        _dgd,
        "delta gradient descent with momentum 0.9 and coupling 0.1; SGD for weights used behind their layers",
    ),
    "delta_momentum": (_ours(DeltaMomentum), "momentum with the delta rule"),
    "deep_momentum": (_ours(DeepMomentum), "momentum that is a network"),
    "feature_momentum": (_ours(FeatureMomentum), "momentum in features of the gradient"),
    "preconditioned_momentum": (_ours(PreconditionedMomentum), "heavy-ball momentum"),
    "adam_memory": (_ours(AdamMemory, betas=(0.9, 0.95)), "Adam, as the optimal memory of gradients"),
    "adagrad_memory": (_ours(AdaGradMemory), "AdaGrad, as the optimal memory of gradients"),
}


def names() -> list[str]:
    """All optimizers by name."""
    return sorted(_MAKERS)


def describe(name: str) -> str:
    """One of them in a phrase. Raises ValueError for one that is not known."""
    return _maker(name)[1]


def make(name: str, module: nn.Module, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """The named optimizer over groups of a module's parameters. Raises ValueError for what it does not know."""
    maker = _maker(name)[0]
    try:
        return maker(module, groups, **settings)
    except TypeError as error:  # a setting that it does not have
        raise ValueError(f"optimizer {name}: {error}") from error


def takes_matrices(name: str) -> bool:
    """Whether its groups say which parameters are hidden matrices."""
    return name in ("muon", "m3")


def _maker(name: str) -> tuple[Maker, str]:
    if name not in _MAKERS:
        raise ValueError(f"optimizer {name!r} is not known; expected one of: {', '.join(names())}")
    return _MAKERS[name]
