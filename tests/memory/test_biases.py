"""Every attentional bias: its closed-form error is the derivative of its written loss, and the papers' identities hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Bias,
    Decay,
    EpsilonInsensitive,
    Gates,
    Gradient,
    Huber,
    Lp,
    Matrix,
    MemorySpec,
    Momentum,
    Omega,
    Robust,
)
from nestling.memory.biases import reads_threshold
from nestling.memory.biases.smooth import EPS, signed_power_integral

from .cases import in_pieces, variants

BIASES: list[Bias] = [
    *(b for b in variants("biases") if not isinstance(b, Omega)),  # every one there is
    Lp(1.0),
    Lp(1.5),
    Lp(1.0, slope=None),
    Lp(2.8, slope=None),
    Lp(4.0, slope=3.0),
    Lp(3.0, cap=0.7),
    Lp(2.5, slope=None, cap=0.7),
    EpsilonInsensitive(0.0),
    Omega(Huber("norm"), length=3),
]


def pairs(bias: Bias, seed: int, rows: int = 200, dim: int = 4) -> tuple[Tensor, Tensor]:
    """Predictions and targets away from every kink: no error and no |‖e‖ − δ| below 1e-3."""
    g = torch.Generator().manual_seed(seed)
    p, v = (torch.randn(rows, dim, generator=g, dtype=torch.float64) for _ in range(2))
    error = p - v
    limit = 0.2 + 2 * torch.rand(rows, 1, generator=g, dtype=torch.float64)
    far = (error.abs() > 1e-3).all(-1) & ((error.abs() - 0.1).abs() > 1e-3).all(-1)
    far &= ((error.abs() - 0.7).abs() > 1e-3).all(-1)
    far &= ((error.abs() - limit).abs() > 1e-3).all(-1) & ((error.norm(dim=-1) - limit[:, 0]).abs() > 1e-3)
    assert far.sum() > rows // 2
    target = torch.cat([v, limit], -1) if reads_threshold(bias) else v
    return p[far], target[far]


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_error_is_the_numerical_derivative_of_the_loss(bias: Bias) -> None:
    p, target = pairs(bias, 0)
    closed, h = bias.error(p, target), 1e-6
    for j in range(p.shape[-1]):
        bump = h * torch.eye(p.shape[-1], dtype=torch.float64)[j]
        numerical = (bias.loss(p + bump, target) - bias.loss(p - bump, target)) / (2 * h)
        torch.testing.assert_close(closed[:, j], numerical, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_autograd_on_the_loss_gives_the_error_and_its_own_gradient(bias: Bias) -> None:
    p, target = (x.requires_grad_() for x in pairs(bias, 1))
    (found,) = torch.autograd.grad(bias.loss(p, target).sum(), p, create_graph=True)
    closed = bias.error(p, target)
    torch.testing.assert_close(found, closed, rtol=1e-9, atol=1e-9)
    probe = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for x in (p, target):
        second = [
            torch.autograd.grad((y * probe).sum(), x, allow_unused=True, retain_graph=True)[0]
            if y.requires_grad
            else None
            for y in (found, closed)
        ]
        a, b = (torch.zeros_like(x) if s is None else s for s in second)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("read", ["after", "boundary"])
@pytest.mark.parametrize("network", [Matrix(init_scale=1.0), MLP()], ids=["matrix", "mlp"])
@pytest.mark.parametrize("bias", [b for b in BIASES if b.reads_prediction], ids=str)
def test_both_engines_and_the_step_agree(bias: Bias, network: Matrix | MLP, read: str) -> None:
    """Outputs, state and the gradient of every input, a reset and an invalid token inside; also one token at a time."""
    for chunk in (1, 5):
        spec = MemorySpec(4, 4, network, bias, Decay(), Momentum(), chunk=chunk, read=read)
        w0 = [w.double().requires_grad_() for w in spec.init(2, torch.Generator().manual_seed(3))]
        q, k, v, gates = spec.example(torch.Generator().manual_seed(4), time=13, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (q, k, v, *(g for _, g in gates.items()))]
        reset, valid = torch.zeros(2, 13, dtype=torch.bool), torch.ones(2, 13, dtype=torch.bool)
        reset[1, 7], valid[0, 3] = True, False
        runs = []
        for engine, cuts in (("reference", [0, 13]), ("chunked", [0, 13]), ("chunked", range(14))):
            y, state = in_pieces(spec, w0, (q, k, v, gates), cuts, reset=reset, valid=valid, engine=engine)
            total = y.square().sum() + sum(w.square().sum() for w in state.weights)
            gradients = torch.autograd.grad(total, (*w0, *inputs), allow_unused=True)
            runs.append((y, *state.weights, *state.momentum, *gradients))
        for fast in runs[1:]:
            for a, b in zip(fast, runs[0], strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_p_of_2_is_twice_l2_and_the_smooth_form_goes_to_the_exact_one() -> None:
    p, v = pairs(L2(), 5)
    torch.testing.assert_close(Lp(2.0, slope=None).error(p, v), 2 * L2().error(p, v))
    torch.testing.assert_close(Lp(1.0, slope=None).error(p, v), EpsilonInsensitive(0.0).error(p, v))
    for exponent in (1.0, 1.5, 3.0):
        gaps = [
            float((Lp(exponent, slope=a).error(p, v) - Lp(exponent, slope=None).error(p, v)).abs().max())
            for a in (10.0, 100.0, 1e5)
        ]
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 5e-3, "what remains is ε"


def test_the_integral_behind_the_smooth_loss() -> None:
    """Exponent 0: ∫ tanh(as) ds = log cosh(ax)/a; and a fine trapezoid for the rest. It is even, and a potential: ≥ 0."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    exact = (torch.cosh(10 * x.clamp(-3, 3))).log() / 10
    torch.testing.assert_close(signed_power_integral(x, 0.0, 10.0), exact, rtol=1e-9, atol=1e-9)
    s = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
    for exponent in (0.5, 2.0, 3.0):
        at = 2.3
        f = torch.tanh(10 * at * s) * ((at * s) ** 2 + EPS) ** (exponent / 2)
        fine = at * torch.trapezoid(f, s)
        found = signed_power_integral(torch.tensor([at, -at], dtype=torch.float64), exponent, 10.0)
        torch.testing.assert_close(found, fine.expand(2), rtol=1e-8, atol=1e-8)


def test_huber_forms_coincide_in_one_dimension_and_only_the_mixture_jumps() -> None:
    p, target = pairs(Huber(), 6, dim=1)
    errors = [Huber(form).error(p, target) for form in ("coordinate", "norm", "mixture")]
    for other in errors[1:]:
        torch.testing.assert_close(errors[0], other)
    e = torch.nn.functional.normalize(torch.ones(1, 4, dtype=torch.float64), dim=-1)
    zero, limit = torch.zeros(1, 4, dtype=torch.float64), 0.7
    target = torch.cat([zero, torch.full((1, 1), limit, dtype=torch.float64)], -1)
    jumps = {}
    for form in ("coordinate", "norm", "mixture"):
        # "coordinate" has its threshold where a coordinate, not the norm, reaches δ: at ‖e‖ = 2δ for equal coordinates
        at = 2 * limit if form == "coordinate" else limit
        below, above = (Huber(form).error(at * (1 + s * 1e-6) * e, target) for s in (-1, 1))
        jumps[form] = float(above.norm() - below.norm())
    assert jumps["coordinate"] == pytest.approx(0, abs=1e-5)
    assert jumps["norm"] == pytest.approx(0, abs=1e-5)
    assert jumps["mixture"] == pytest.approx(limit * (4**0.5 - 1), abs=1e-5)


def test_value_shift_is_the_worst_of_many() -> None:
    """eq. 17 against a search over the sphere: no shift does more harm, the printed worst one just as much."""
    p, target = pairs(Robust(), 7)
    error, limit = p - target[:, :-1], target[:, -1:]
    loss = Robust().loss(p, target)
    worst = -limit * torch.nn.functional.normalize(error, dim=-1)
    torch.testing.assert_close(0.5 * (error - worst).square().sum(-1), loss, rtol=1e-9, atol=1e-9)
    g = torch.Generator().manual_seed(8)
    for _ in range(300):
        s = limit * torch.nn.functional.normalize(torch.randn(p.shape, generator=g, dtype=torch.float64), dim=-1)
        assert (0.5 * (error - s).square().sum(-1) <= loss + 1e-9).all()


def test_insensitive_margin_writes_nothing() -> None:
    v = torch.zeros(1, 3)
    p = torch.tensor([[0.05, -0.2, 0.3]])
    assert EpsilonInsensitive(0.1).error(p, v).tolist() == [[0.0, -1.0, 1.0]]


def test_huber_with_an_infinite_threshold_is_l2_and_with_0_pure_decay() -> None:
    """Miras, eq. 26 at its two ends."""
    bias = Huber("mixture")
    huber = MemorySpec(4, 4, MLP(), bias, Decay(), Gradient(), chunk=4)
    plain = MemorySpec(4, 4, MLP(), L2(), Decay(), Gradient(), chunk=4)
    w0 = [w.double() for w in huber.init(2, torch.Generator().manual_seed(0))]
    q, k, v, gates = plain.example(torch.Generator().manual_seed(1), time=11, dtype=torch.float64)
    for limit in (1e9, 0.0):
        threshold = torch.full((2, 2, 11), limit, dtype=torch.float64)
        y, state = huber.scan(w0, q, k, v, Gates(lr=gates.lr, retention=gates.retention, threshold=threshold))
        still = Gates(lr=gates.lr if limit else torch.zeros_like(threshold), retention=gates.retention)
        z, expected = plain.scan(w0, q, k, v, still)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(state.weights, expected.weights)


def test_a_threshold_is_1_by_default_and_a_negative_one_is_guarded() -> None:
    spec = MemorySpec(4, 4, Matrix(init_scale=1.0), Huber("norm"), chunk=4)
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(0))]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=9, dtype=torch.float64)
    y, _ = spec.scan(w0, q, k, v, Gates(lr=gates.lr))
    z, _ = spec.scan(w0, q, k, v, Gates(lr=gates.lr, threshold=torch.ones(2, 2, 9)))
    torch.testing.assert_close(y, z)
    assert gates.threshold is not None
    wrong = gates.threshold.clone()
    wrong[1, 0, 4] = -1.0
    _, state = spec.scan(w0, q, k, v, Gates(lr=gates.lr, threshold=wrong))
    assert state.faults.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no such gate"):
        nl.memory.named("titans", key_dim=4).scan(
            nl.memory.named("titans", key_dim=4).init(2), q, k, v, Gates(threshold=wrong)
        )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Lp(0.5), "Lp.p is 0.5"),
        (lambda: Lp(3, slope=0.0), "Lp.slope is 0.0"),
        (lambda: Lp(3, cap=0.0), "Lp.cap is 0.0"),
        (lambda: Huber("norms"), "Huber.form is 'norms'"),
        (lambda: EpsilonInsensitive(-1.0), "epsilon is -1.0"),
    ],
)
def test_impossible_biases_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
