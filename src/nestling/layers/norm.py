"""Norms. The memories normalize keys of their own; both use the same norm."""

import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory.norm import EPS, l2_norm

__all__ = ["EPS", "l2_norm", "rms_norm"]


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm(x)` with the gains in x's precision: under autocast a mixture would take the slow path."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
