"""Retention: what a memory keeps of its past."""

from nestling.memory.retentions.base import Retention, Scaled, Settled, linked, per_channel, settled, toward_initial
from nestling.memory.retentions.bregman import Bregman
from nestling.memory.retentions.decay import Decay
from nestling.memory.retentions.divergence import Divergence
from nestling.memory.retentions.elastic import ElasticNet
from nestling.memory.retentions.elastic_step import ElasticStep
from nestling.memory.retentions.full import Full
from nestling.memory.retentions.lq import Lq, LqDual
from nestling.memory.retentions.softmax import Softmax

__all__ = [
    "Bregman",
    "Decay",
    "Divergence",
    "ElasticNet",
    "ElasticStep",
    "Full",
    "Lq",
    "LqDual",
    "Retention",
    "Scaled",
    "Settled",
    "Softmax",
    "linked",
    "per_channel",
    "settled",
    "toward_initial",
]
