"""A feed-forward network whose weights each lane moves: gradients of both orders, and how they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.layers.low_rank import Whole
from nestling.layers.mlp import SwiGLU


def test_gradients_of_moved_weights() -> None:
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


def test_the_gradient_lies_as_the_weight_does() -> None:
    mlp = SwiGLU(3, 2)
    moved = tuple(torch.zeros(2, *w.shape, requires_grad=True) for w in (mlp.up.weight, mlp.down.weight))
    for gradient in torch.autograd.grad(mlp(torch.randn(2, 4, 3), moved).square().sum(), moved):
        assert gradient.is_contiguous()
