"""The equal ways to write one step: each memory of gradients beside the objective that it is said to descend on, by autograd."""

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.memory import newton_schulz
from nestling.memory.biases import DotProduct
from nestling.memory.networks import Matrix
from nestling.optim.elementwise import optimum

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def remembered(make, grads, name="momentum"):
    """What an optimizer remembers after every gradient, with the sign of W ← W + m."""
    w = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer, course = make([w]), []
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        course.append(-optimizer.state[w][name].clone())
    return course


def descend(objective, m, lr):
    """One step of gradient descent on an objective of m."""
    m = m.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(m), m)
    return (m - lr * slope).detach()


def least(objective, like):
    """The minimizer of a quadratic objective, by one step of Newton's method."""
    start = torch.zeros(like.numel(), dtype=F64, requires_grad=True)

    def flat(x):
        return objective(x.view_as(like))

    (slope,) = torch.autograd.grad(flat(start), start)
    bend = torch.autograd.functional.hessian(flat, start.detach())
    return torch.linalg.solve(bend, -slope).view_as(like)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_momentum_three_ways(share):
    """A descent on ⟨m x, δ⟩ + λ/2 ‖m‖², α = 1 − ηλ (eq. 33–34); the proximal step of it; the weighted sum of all gradients.

    A memory without keys or values: g = δxᵀ of one token, η inside.
    """
    eta, steps = 0.1, 6
    tokens = [(normal(4, seed=n), normal(3, seed=50 + n)) for n in range(steps)]
    grads = [torch.outer(delta, x) for x, delta in tokens]
    forget = (1 - share) / eta
    found = remembered(lambda p: optim.PreconditionedMomentum(p, 1.0, share), [eta * g for g in grads])
    gradient = proximal = torch.zeros(3, 4, dtype=F64)
    for t, (x, delta) in enumerate(tokens):
        gradient = descend(lambda m, x=x, d=delta: (m @ x) @ d + forget / 2 * m.square().sum(), gradient, eta)
        before = proximal

        def linear(m, x=x, d=delta, at=before):
            return (m @ x) @ d + forget * (m * at).sum() + (m - at).square().sum() / (2 * eta)

        proximal = least(linear, before)
        summed = -eta * sum(share ** (t - i) * g for i, g in enumerate(grads[: t + 1]))
        for other in (gradient, proximal, summed):
            torch.testing.assert_close(found[t], other, rtol=1e-10, atol=1e-10)


def test_preconditioned_momentum_descends_to_values_p():
    """On ⟨m gᵀ, P⟩ (eq. 46–47), whose slope is P g."""
    p, share = normal(3, 3, seed=9), 0.8
    grads = [normal(3, 4, seed=n) for n in range(5)]
    found = remembered(
        lambda w: optim.PreconditionedMomentum(w, 1.0, share, preconditioner=optim.Fixed(lambda g: p @ g)), grads
    )
    m = torch.zeros(3, 4, dtype=F64)
    for made, g in zip(found, grads, strict=True):
        m = share * m + descend(lambda m, g=g: (m @ g.mT * p).sum(), torch.zeros_like(m), 1.0)
        torch.testing.assert_close(made, m)


@pytest.mark.parametrize("erase", [0.3, 1.0])
def test_delta_momentum_descends_on_a_regression(erase):
    """On ½‖m ĝᵀ + P‖² with unit gradients and values P = I ‖g‖/η_d, at step size η_d (eq. 48–49, derived)."""
    grads = [normal(3, 4, seed=n) for n in range(5)]
    found = remembered(lambda w: optim.DeltaMomentum(w, 1.0, 1.0, erase), grads)
    m = torch.zeros(3, 4, dtype=F64)
    for made, g in zip(found, grads, strict=True):
        unit, value = g / g.norm(), torch.eye(3, dtype=F64) * g.norm() / erase
        m = descend(lambda m, u=unit, v=value: (m @ u.mT + v).square().sum() / 2, m, erase)
        torch.testing.assert_close(made, m)


def test_newton_schulz_descends_towards_orthogonality():
    """Eq. 44 is the slope of ½‖O − g‖² + ½‖OᵀO − I‖²; its first step from O = g with ζ = 1/4 is the cubic 1.5 g − 0.5 g gᵀg."""
    g = normal(5, 3)
    g = g / g.norm()
    eye = torch.eye(3, dtype=F64)

    def objective(o):
        return (o - g).square().sum() / 2 + (o.mT @ o - eye).square().sum() / 2

    o = normal(5, 3, seed=1)
    printed = o - 0.1 * (o - g + 2 * o @ (o.mT @ o - eye))
    torch.testing.assert_close(descend(objective, o, 0.1), printed)
    cubic = 1.5 * g - 0.5 * g @ g.mT @ g
    torch.testing.assert_close(descend(objective, g, 0.25), cubic)
    torch.testing.assert_close(newton_schulz(g, 1, iteration="cubic", eps=0.0), cubic)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("target", ["root", "square"])
def test_the_elementwise_memory_is_the_minimizer_of_its_objective(target, ridge):
    """min Σ (m g_i − P)² + λm² (eq. 102), P = √Σg² or Σg², by Newton's method."""
    g = normal(6, 3)
    square = g.square().sum(0)
    p = square if target == "square" else square.sqrt()
    found = least(lambda m: (m * g - p).square().sum() + ridge * m.square().sum(), g[0])
    torch.testing.assert_close(optimum([g.sum(0)], [square], target, 0.0, ridge)[0], found)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_the_full_matrix_memory_is_the_minimizer_of_its_objective(ridge):
    """min_m Σ ‖m g_i − w_i P‖² + λ‖m‖² ⇒ m* = P (Σ w_i g_iᵀ)(Σ g gᵀ + λI)⁻¹ (eq. 106, derived); w are the weights of the mean M.

    With P = H^{1/2} in place of a number it is the step of full-matrix AdaGrad (eq. 111).
    """
    share, grads = 0.6, [normal(4, seed=n) for n in range(7)]
    w = nn.Parameter(torch.zeros(4, dtype=F64))
    optimizer = optim.AdaGradMemory([w], 1.0, 0.0, momentum=share, form="rows", ridge=ridge)
    for t, g in enumerate(grads, 1):
        w.grad = g.clone()
        before = w.detach().clone()
        optimizer.step()
        if t < 4 and not ridge:
            continue  # fewer gradients than numbers: many memories are optimal
        past, weights = grads[:t], [(1 - share) * share ** (t - i) for i in range(1, t + 1)]
        h = sum(torch.outer(g, g) for g in past)

        def objective(m, p, past=past, weights=weights):
            fit = sum((m @ g - v * p).square().sum() for g, v in zip(past, weights, strict=True))
            return fit + ridge * m.square().sum()

        p = normal(3, seed=50)
        mean = sum(v * g for v, g in zip(weights, past, strict=True))
        closed = torch.outer(p, mean) @ torch.linalg.inv(h + ridge * torch.eye(4, dtype=F64))
        torch.testing.assert_close(least(lambda m, p=p: objective(m, p), torch.zeros(3, 4, dtype=F64)), closed)
        one = least(lambda m: objective(m, torch.ones(1, dtype=F64)), torch.zeros(1, 4, dtype=F64))[0]
        values, vectors = torch.linalg.eigh(h)
        torch.testing.assert_close(before - w.detach(), vectors @ (values.clamp_min(0).sqrt() * (vectors.T @ one)))


def test_the_columns_of_a_matrix_share_one_memory():
    """Every column is a vector of the same H, with λ."""
    ridge, grads = 0.4, [normal(4, 3, seed=n) for n in range(5)]
    w = nn.Parameter(torch.zeros(4, 3, dtype=F64))
    optimizer = optim.AdaGradMemory([w], 1.0, 0.0, form="rows", ridge=ridge)
    h = torch.zeros(4, 4, dtype=F64)
    for g in grads:
        w.grad, before, h = g.clone(), w.detach().clone(), h + g @ g.T
        optimizer.step()
        values, vectors = torch.linalg.eigh(h)
        root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
        expected = root @ torch.linalg.inv(h + ridge * torch.eye(4, dtype=F64)) @ g
        torch.testing.assert_close(before - w.detach(), expected)


def test_the_diagonal_preconditioner_learns_by_gradient_descent():
    """Eq. 41: V ← V − ζ∇½‖V − g²‖² with ζ = 1 − β; the sum descends on −⟨V, g²⟩."""
    grads = [normal(3, 4, seed=n) for n in range(5)]
    for beta, objective in (
        (0.9, lambda v, g: (v - g.square()).square().sum() / 2),
        (1.0, lambda v, g: -(v * g.square()).sum()),
    ):
        kind = optim.Diagonal(beta)
        state, v = kind.start(torch.zeros(3, 4, dtype=F64)), torch.zeros(3, 4, dtype=F64)
        for g in grads:
            made = kind.apply(g, state)
            v = descend(lambda v, g=g, of=objective: of(v, g), v, 1 - beta if beta < 1 else 1.0)
            torch.testing.assert_close(state["square"], v)
            torch.testing.assert_close(made, g / (v.sqrt() + 1e-8))


def test_the_printed_objective_of_deep_momentum():
    """⟨m(u), 1⟩ with a linear m (eq. 50): its slope is uᵀ1, momentum without values."""
    share, rate, grads = 0.8, 0.3, [normal(3, 4, seed=n) for n in range(5)]
    w = nn.Parameter(torch.zeros(3, 4, dtype=F64))
    settings = {"network": Matrix(), "bias": DotProduct(), "preconditioner": optim.Fixed(torch.ones_like)}
    optimizer = optim.DeepMomentum([w], 0.1, share, rate, **settings)
    m = torch.zeros(4, 4, dtype=F64)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        u = g / g.norm() * 3**0.5
        one = torch.full((4,), 0.5, dtype=F64)  # of norm 1, as the memory sees its values
        m = share * m + descend(lambda m, u=u, one=one: (u @ m @ one).mean(), torch.zeros_like(m), rate)
        torch.testing.assert_close(optimizer.state[w]["weight0"], m)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_deep_memory_of_preconditioned_gradients_has_keys_and_values_of_unit_size(scale):
    """Values of other units than the keys, as P = 1/√V makes them, reach the memory at size 1, and come back as they were."""
    kind, (g, again) = optim.Fixed(lambda g: scale * g), (normal(3, 4), normal(3, 4, seed=1))
    courses = []
    for settings in ({"preconditioner": kind}, {}):
        w = nn.Parameter(torch.zeros(3, 4, dtype=F64))
        optimizer = optim.DeepMomentum([w], 0.1 / (scale if settings else 1.0), 0.9, 0.5, **settings)
        for grad in (g, again, g):
            w.grad = grad.clone()
            optimizer.step()
        courses.append(w.detach())
    torch.testing.assert_close(*courses)


def test_momentum_of_adam_needs_no_denominator_where_the_target_is_its_square():
    """P = H takes the denominator away: plain gradient descent with a numerator that forgets all (eq. 104)."""
    grads = [normal(3, 4, seed=n) for n in range(5)]
    weights = []
    for make in (
        lambda w: optim.AdamMemory(w, 0.1, (0.0, 0.9), target="square", bias_correction=False),
        lambda w: torch.optim.SGD(w, 0.1),
    ):
        w = nn.Parameter(torch.zeros(3, 4, dtype=F64))
        optimizer = make([w])
        for g in grads:
            w.grad = g.clone()
            optimizer.step()
        weights.append(w.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("second_moment", ["none", "matched"])
def test_the_slow_memory_of_m3_is_a_momentum_that_moves_every_period(second_moment):
    """A continuum of two levels: M² after a period is the momentum of a `Periodic` group on the gradients before it."""
    grads, period, share = [normal(4, 4, seed=n) for n in range(10)], 3, 0.7
    w = nn.Parameter(torch.zeros(4, 4, dtype=F64))
    m3 = optim.M3([w], 0.1, period=period, slow_momentum=share, second_moment=second_moment)
    slow = []
    for g in grads:
        w.grad = g.clone()
        m3.step()
        slow.append(m3.state[w]["slow"].clone())
    v = nn.Parameter(torch.zeros(4, 4, dtype=F64))
    group = {"params": [v], "every": period}
    level = optim.Periodic(optim.AdamMemory([group], 1.0, (share, 0.9), target="square", bias_correction=False))
    for n, g in enumerate(grads[:-1]):
        v.grad = g.clone()
        level.step()
        if v in level.state and (n + 1) % period == 0:
            torch.testing.assert_close(slow[n + 1], level.state[v]["mean"])
    assert slow[-1].abs().max() > 0
