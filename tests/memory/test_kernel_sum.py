"""The sum over pairs that never keeps its shares, against its formula as it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.memory import kernel_sum
from nestling.memory.features.exponential import CAP
from nestling.memory.kernel_sum import Kind, Sum, summed


def inputs(large: float = 1.0) -> list[Tensor]:
    """x, log s, share, and two sets of pairs with weights of their own and one with weights for every token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    x, theta, share = large * normal(4, 5), normal(1, 1)[0] * 0.3, normal(4, 1).sigmoid()
    made = [x, theta, share]
    for count, rows in ((7, 1), (3, 1), (4, 4)):
        weight = normal(rows, count).sigmoid()
        made += [normal(count, 5), normal(count, 6), weight.tril() if rows > 1 else weight]
    made[5][:, 1, 0, 2:4] = 0.0  # pairs that are not there
    made[5][0, 2], made[8][0, 2], made[11][0, 2, 0] = 0.0, 0.0, 0.0  # a row to which nothing is
    return [u.requires_grad_() for u in made]


def both(kind: Kind, given: list[Tensor], share: bool) -> tuple[Tensor, Tensor]:
    x, theta, left, *sets = given
    left_or_none = left if share else None
    fast = summed(kind, x, theta, left_or_none, [Sum(*sets[n : n + 3]) for n in (0, 3, 6)])
    flat = [kernel_sum.flat(x.shape[:-2], u, 2) for u in (x, theta, left_or_none, *sets)]
    return fast, kernel_sum._formula(kind, *flat).view(fast.shape)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("peak", [False, True])
@pytest.mark.parametrize(("normalized", "large"), [(True, 1.0), (False, 1.0), (True, 30.0), (False, 30.0)])
def test_it_is_the_formula_with_every_gradient(
    normalized: bool, large: float, peak: bool, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sum, "BLOCK", 3)  # several blocks
    given = inputs(large)
    fast, slow = both(Kind(normalized, peak, rows=2), given, share)
    assert float((fast - slow).detach().abs().max()) <= 1e-12 * max(1.0, float(slow.detach().abs().max()))
    if large > 1:
        exponent = (given[1].exp() * (given[0] @ given[3].mT)).detach()
        assert float(exponent.max()) > CAP  # so that the cap is met
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(fast.shape, generator=generator, dtype=fast.dtype)
    found = torch.autograd.grad((fast * probe).sum(), given, allow_unused=True)
    expected = torch.autograd.grad((slow * probe).sum(), given, allow_unused=True)
    for number, (g, e) in enumerate(zip(found, expected, strict=True)):
        if e is None:
            assert g is None
        else:
            assert g is not None
            assert float((g - e).abs().max()) <= 1e-10 * max(1.0, float(e.abs().max())), number


def test_a_share_of_zero_leaves_the_own_pairs_alone() -> None:
    x, theta, share, *sets = inputs()
    kind = Kind(normalized=True, unit_peak=True, rows=2)
    none_left = torch.zeros_like(share)
    own = summed(kind, x, theta, none_left, [Sum(*sets[n : n + 3]) for n in (0, 3, 6)])
    alone = summed(kind._replace(rows=0), x, theta, None, [Sum(*sets[6:9])])
    torch.testing.assert_close(own, alone)


def test_it_has_a_second_derivative() -> None:
    given = inputs()
    fast, slow = both(Kind(normalized=True, unit_peak=True, rows=2), given, share=True)

    def second(z: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(z.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for g, e in zip(second(fast), second(slow), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-9)


def test_nothing_is_summed_over_no_pairs() -> None:
    x, theta, _, *sets = inputs()
    empty = Sum(sets[0][:, :, :0], sets[1][:, :, :0], sets[2][..., :0])
    assert summed(Kind(True, True, rows=1), x, theta, None, [empty]).sum() == 0


def test_shares_are_not_kept() -> None:
    x, theta, share, *sets = inputs()
    total = 0

    def pack(u: Tensor) -> Tensor:
        nonlocal total
        total += u.numel()
        return u

    many = [Sum(*(u.repeat_interleave(50, d) for u, d in zip(sets[n : n + 3], (2, 2, 3), strict=True))) for n in (0, 3)]
    given = sum(u.numel() for part in many for u in part) + 3 * x.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda u: u):
        summed(Kind(True, True, rows=2), x, theta, share, many)
    assert total < given + 200
