"""Norms. The memories normalize keys of their own; both use the same norm."""

from nestling.memory.norm import EPS, l2_norm

__all__ = ["EPS", "l2_norm"]
