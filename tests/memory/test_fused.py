"""Products with hand-written gradients against autograd of the sums they stand for, the first and the second."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.memory import fused
from nestling.memory.coefficients import products
from nestling.memory.gates import Factor

SIDES = pytest.mark.parametrize(("narrow", "wide"), [(2, 3), (3, 2)])
MOMENTUM = pytest.mark.parametrize("momentum", [False, True])
DECAY = pytest.mark.parametrize("decay", [False, True])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@SIDES
@MOMENTUM
@DECAY
def test_read(narrow: int, wide: int, momentum: bool, decay: bool) -> None:
    torch.manual_seed(0)
    h, w, x, c, r = (
        normal(2, 4, narrow),
        normal(2, narrow, wide),
        normal(2, 5, narrow),
        normal(2, 4, 5),
        normal(2, 5, wide),
    )
    keep = normal(2, 4) if decay else None
    s, carry = (normal(2, narrow, wide), normal(2, 4)) if momentum else (None, None)
    z = fused.read(h, w, keep, s, carry, x, c, r)
    for t in range(4):
        running = w if keep is None else keep[:, t, None, None] * w
        if s is not None and carry is not None:
            running = running + carry[:, t, None, None] * s
        running = running - torch.einsum("bi,bia,bio->bao", c[:, t], x, r)
        torch.testing.assert_close(z[:, t], (h[:, t, None] @ running)[:, 0])
    assert torch.autograd.gradcheck(fused.read, (h, w, keep, s, carry, x, c, r))
    assert torch.autograd.gradgradcheck(fused.read, (h, w, keep, s, carry, x, c, r))


@SIDES
@MOMENTUM
@DECAY
def test_advance(narrow: int, wide: int, momentum: bool, decay: bool) -> None:
    torch.manual_seed(0)
    w, x, a, r = normal(2, narrow, wide), normal(2, 5, narrow), normal(2, 5), normal(2, 5, wide)
    keep = normal(2) if decay else None
    s, carry = (normal(2, narrow, wide), normal(2)) if momentum else (None, None)
    expected = w if keep is None else keep[:, None, None] * w
    if s is not None and carry is not None:
        expected = expected + carry[:, None, None] * s
    expected = expected - torch.einsum("bi,bia,bio->bao", a, x, r)
    torch.testing.assert_close(fused.advance(w, keep, s, carry, x, a, r), expected)
    assert torch.autograd.gradcheck(fused.advance, (w, keep, s, carry, x, a, r))
    assert torch.autograd.gradgradcheck(fused.advance, (w, keep, s, carry, x, a, r))


def test_parts_shared_by_several_memories_get_the_gradients_of_all() -> None:
    """W may have a dimension that the others lack."""
    torch.manual_seed(0)
    shapes = (2, 1, 4, 3), (2, 5, 3, 2), (2, 1, 4), (2, 1, 6, 3), (2, 1, 4, 6), (2, 5, 6, 2)
    h, w, keep, x, c, r = (normal(*shape) for shape in shapes)
    found = fused.read(h, w, keep, None, None, x, c, r)
    expected = keep.unsqueeze(-1) * (h @ w) - (c * (h @ x.mT)) @ r
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    inputs = h, w, keep, x, c, r
    for a, b in zip(*(torch.autograd.grad(z, inputs, grad) for z in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_products_of_gates() -> None:
    torch.manual_seed(0)
    log = normal(2, 5)
    found = products(Factor(log))
    for t in range(6):
        for s in range(6):
            expected = log[:, s:t].sum(-1).exp() if s <= t else torch.zeros(2, dtype=torch.float64)
            torch.testing.assert_close(found[:, t, s], expected)
    assert torch.autograd.gradcheck(lambda x: products(Factor(x)), log)
    assert torch.autograd.gradgradcheck(lambda x: products(Factor(x)), log)
