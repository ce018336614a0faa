"""Retention: what a memory keeps of its past."""

from nestling.memory.retentions.base import Retention
from nestling.memory.retentions.decay import Decay
from nestling.memory.retentions.full import Full
from nestling.memory.retentions.softmax import Softmax

__all__ = ["Decay", "Full", "Retention", "Softmax"]
