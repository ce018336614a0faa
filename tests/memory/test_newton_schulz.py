"""Newton–Schulz against the singular value decomposition, against torch's own, and at the ends of its range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

from nestling.memory.newton_schulz import newton_schulz

from .cases import normal

SHAPES = pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 2, 6, 16), (5, 5)])


@SHAPES
@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_the_printed_polynomial_of_the_singular_values(shape: tuple[int, ...], steps: int) -> None:
    x = normal(*shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(newton_schulz(x, steps), u @ s.diag_embed() @ vh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_singular_values_are_near_1(shape: tuple[int, int], steps: int) -> None:
    s = torch.linalg.svdvals(newton_schulz(normal(*shape), steps))
    assert 0.6 < float(s.min()) < float(s.max()) < 1.2
    if steps == 10:  # the cubic gets there, the quintic never does
        s = torch.linalg.svdvals(newton_schulz(normal(*shape), steps, iteration="cubic"))
        assert float((s - 1).abs().max()) < 1e-4


def test_the_cubic_converges_to_the_polar_factor_and_leaves_it_alone() -> None:
    x = normal(2, 6, 9)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = newton_schulz(x, 40, iteration="cubic")
    torch.testing.assert_close(found, u @ vh, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(newton_schulz(found, 40, iteration="cubic"), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (12, 12)])
def test_equal_to_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch orthogonalizes in bfloat16: near there, and equal once its cast is taken out."""
    x = normal(*shape)
    muon = (3.4445, -4.7750, 2.0315), 5, 1e-7
    rounded = _muon._zeropower_via_newtonschulz(x.clone(), *muon).double()
    for found in (newton_schulz(x, dtype=torch.bfloat16), newton_schulz(x)):
        error = float((found - rounded).norm() / rounded.norm())
        assert 1e-4 < error < 0.06, "the default is not computed in bfloat16"
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    exact = _muon._zeropower_via_newtonschulz(x.clone(), *muon)
    torch.testing.assert_close(newton_schulz(x), exact, rtol=1e-10, atol=1e-10)


@SHAPES
def test_transposition_commutes(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-3, 1e6, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    x = normal(2, 6, 16).float()
    eps = 0.0 if scale < 1e-12 else 1e-12
    torch.testing.assert_close(newton_schulz(scale * x, eps=eps), newton_schulz(x), rtol=1e-4, atol=1e-4)


def test_zero_gives_zero_with_a_gradient_of_zero_and_its_neighbors_notice_nothing() -> None:
    x = normal(3, 4, 6)
    x[1] = 0
    x.requires_grad_()
    y = newton_schulz(x)
    assert not y[1].any()
    torch.testing.assert_close(y[0], newton_schulz(x[0]), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    assert not newton_schulz(1e-13 * normal(2, 3)).any()
    assert newton_schulz(torch.full((2, 3), float("nan"))).isnan().all()


@pytest.mark.parametrize("iteration", ["quintic", "cubic", (2.0, -1.5, 0.5)])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 3)])
def test_gradients_equal_numerical_ones(shape: tuple[int, ...], iteration: str) -> None:
    x = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 3, iteration=iteration), x)
    assert torch.autograd.gradgradcheck(lambda x: newton_schulz(x, 2, iteration=iteration), x)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 0), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    x = normal(6, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = newton_schulz(x)
    assert found.dtype == dtype
    assert torch.equal(found, newton_schulz(x.float()).to(dtype))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"iteration": "quartic"}, "quintic"),
        ({"iteration": (1.0, 2.0)}, "three numbers"),
        ({"dtype": torch.float16}, "underflows"),
        ({"iteration": ("a", "b", "c")}, "three numbers"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"x": torch.ones(3)}, "matrices"),
        ({"x": torch.ones(0, 3)}, r"shape \(0, 3\); expected matrices .* that have entries"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "dtype torch.int64; expected a real floating point tensor"),
        ({"x": torch.ones(2, 3, dtype=torch.complex64)}, "dtype torch.complex64; expected a real"),
    ],
)
def test_impossible_settings_are_refused_in_words(options: dict, words: str) -> None:
    x = options.pop("x", torch.ones(2, 3))
    with pytest.raises((ValueError, TypeError), match=words):
        newton_schulz(x, **options)
