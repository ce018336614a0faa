"""Optimizers as associative memories of gradients: drop-in `torch.optim.Optimizer`s (Nested Learning, §3–4 and 7.2)."""

from nestling.optim.adagrad import AdaGradMemory
from nestling.optim.adam import AdamMemory
from nestling.optim.base import GradientMemory, Optimizer
from nestling.optim.deep import DeepMomentum
from nestling.optim.delta import DeltaMomentum
from nestling.optim.dgd import DGD
from nestling.optim.feature import FeatureMomentum
from nestling.optim.inventory import memories
from nestling.optim.joined import Joined
from nestling.optim.levels import from_levels, groups, split
from nestling.optim.m3 import M3
from nestling.optim.momentum import PreconditionedMomentum
from nestling.optim.muon import Muon
from nestling.optim.named import default_lr, describe, make, names, settings_of
from nestling.optim.periodic import Periodic
from nestling.optim.preconditioners import Diagonal, Fixed, Identity, Preconditioner
from nestling.optim.scheduled import Scheduled
from nestling.optim.wrapper import Wrapper, core
from nestling.schedule import Schedule

__all__ = [
    "DGD",
    "M3",
    "AdaGradMemory",
    "AdamMemory",
    "DeepMomentum",
    "DeltaMomentum",
    "Diagonal",
    "FeatureMomentum",
    "Fixed",
    "GradientMemory",
    "Identity",
    "Joined",
    "Muon",
    "Optimizer",
    "Periodic",
    "PreconditionedMomentum",
    "Preconditioner",
    "Schedule",
    "Scheduled",
    "Wrapper",
    "core",
    "default_lr",
    "describe",
    "from_levels",
    "groups",
    "make",
    "memories",
    "names",
    "settings_of",
    "split",
]
