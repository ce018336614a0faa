"""Norms. The memories normalize keys of their own; both use the same norm."""

from torch import Tensor, nn

from nestling.layers import fused
from nestling.memory.norm import EPS, l2_norm

__all__ = ["EPS", "RMSNorm", "l2_norm", "rms_norm"]


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension as one step of autograd on a CPU, see `fused`; otherwise as it is there."""

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm(x)` with the gains in x's precision: under autocast a mixture would take the slow path."""
    assert norm.eps is not None
    return fused.rms_norm(x, norm.weight.to(x.dtype), norm.eps)
