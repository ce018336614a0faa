"""Retention: what a memory keeps of its past."""

from nestling.memory.retentions.base import (
    Lagged,
    Retention,
    Scaled,
    Settled,
    linked,
    per_channel,
    settled,
    toward_initial,
)
from nestling.memory.retentions.bregman import Bregman
from nestling.memory.retentions.decay import Decay
from nestling.memory.retentions.divergence import Divergence
from nestling.memory.retentions.elastic import ElasticNet
from nestling.memory.retentions.elastic_step import ElasticStep
from nestling.memory.retentions.full import Full
from nestling.memory.retentions.lq import Lq, LqDual
from nestling.memory.retentions.softmax import Softmax
from nestling.memory.retentions.softmax_lag import SoftmaxLag

__all__ = [
    "Bregman",
    "Decay",
    "Divergence",
    "ElasticNet",
    "ElasticStep",
    "Full",
    "Lagged",
    "Lq",
    "LqDual",
    "Retention",
    "Scaled",
    "Settled",
    "Softmax",
    "SoftmaxLag",
    "linked",
    "per_channel",
    "settled",
    "toward_initial",
]
