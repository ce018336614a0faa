"""Hand-written gradients against autograd of the formula they stand for, the first and the second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.layers import fused, l2_norm


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def convolution(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    stream, halo = torch.cat([tail, x], 1), tail.shape[1]
    return F.silu(sum(stream[:, halo - j : halo - j + x.shape[1]] * weight[j] for j in range(halo + 1)))


def gated_norm(y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm(y, y.shape[-1:], weight, fused.EPS).transpose(1, 2).flatten(2) * F.silu(gate)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "convolution": (fused.convolve, convolution, ((2, 7, 3), (2, 3, 3), (4, 3))),
    "convolution, shorter than its window": (fused.convolve, convolution, ((2, 2, 3), (2, 3, 3), (4, 3))),
    "heads": (fused.unit_heads, lambda x: l2_norm(x).transpose(1, 2), ((2, 5, 3, 4),)),
    "gated norm": (fused.gated_norm, gated_norm, ((2, 3, 5, 4), (4,), (2, 5, 12))),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    torch.manual_seed(0)
    fast, formula, shapes = CASES[case]
    inputs = tuple(normal(*shape) for shape in shapes)
    torch.testing.assert_close(fast(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradgradcheck(fast, inputs)


@pytest.mark.parametrize("time", [fused.BLOCK, fused.BLOCK + 1, 2 * fused.BLOCK + 17])
def test_convolution_goes_on_over_its_blocks(time: int) -> None:
    torch.manual_seed(0)
    inputs = normal(2, time, 3), normal(2, 3, 3), normal(4, 3)
    grad = torch.randn(2, time, 3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(f(*inputs), inputs, grad) for f in (fused.convolve, convolution))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
