"""A feed-forward network whose weights each lane moves: gradients of both orders, and how they lie in memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.layers.low_rank import Whole
from nestling.layers.mlp import SwiGLU
from nestling.native import without


@pytest.mark.parametrize("native", [True, False])
def test_gradients_of_moved_weights(native: bool) -> None:
    with nullcontext() if native else without():
        check_gradients()


def check_gradients() -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(3, 2).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    up, down = (
        torch.randn(2, *w.shape, dtype=torch.float64, requires_grad=True) for w in (mlp.up.weight, mlp.down.weight)
    )

    def moved(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp(x, (up, Whole(down)))

    for lane, y in enumerate(moved(x, up, down)):
        plain = SwiGLU(3, 2).double()
        plain.up.weight.data, plain.down.weight.data = mlp.up.weight.data + up.data[lane], down.data[lane]
        torch.testing.assert_close(y, plain(x[lane]))
    assert torch.autograd.gradcheck(moved, (x, up, down))
    assert torch.autograd.gradgradcheck(moved, (x, up, down))


def test_rows_go_on_over_their_blocks_and_threads() -> None:
    """In single precision, rows of no whole registers, beside the formula; one gradient alone is as among all."""
    torch.manual_seed(0)
    mlp, count = SwiGLU(21, 37), torch.get_num_threads()
    x = torch.randn(2, 147, 21, requires_grad=True)
    moved = tuple(torch.randn(2, *w.shape).requires_grad_() for w in (mlp.up.weight, mlp.down.weight))
    grad = torch.randn(2, 147, 21)
    try:
        torch.set_num_threads(3)
        y = mlp(x, moved)
        found = torch.autograd.grad(y, (x, *moved), grad, retain_graph=True)
    finally:
        torch.set_num_threads(count)
    up, down = (w + d for w, d in zip((mlp.up.weight, mlp.down.weight), moved, strict=True))
    gate, value = (x @ up.mT).chunk(2, -1)
    expected = (F.silu(gate) * value) @ down.mT
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(found, torch.autograd.grad(expected, (x, *moved), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    for given, among in zip((x, *moved), found, strict=True):
        assert torch.equal(torch.autograd.grad(y, given, grad, retain_graph=True)[0], among)


def test_the_gradient_lies_as_the_weight_does() -> None:
    mlp = SwiGLU(3, 2)
    moved = tuple(torch.zeros(2, *w.shape, requires_grad=True) for w in (mlp.up.weight, mlp.down.weight))
    for gradient in torch.autograd.grad(mlp(torch.randn(2, 4, 3), moved).square().sum(), moved):
        assert gradient.is_contiguous()
