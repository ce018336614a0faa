"""The equalities of the paper: each optimizer beside the rule, or the optimizer of PyTorch, that it must be equal to."""

import copy

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.memory import named, newton_schulz, scan
from nestling.memory.biases import L2, DotProduct
from nestling.memory.features import Identity, Polynomial
from nestling.memory.gates import Gates
from nestling.memory.networks import Matrix
from nestling.optim.base import unit
from nestling.optim.elementwise import optimum

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(steps, *shape, scale=1.0):
    return [scale * normal(*shape, seed=100 + n) for n in range(steps)]


def follow(make, grads, start=None):
    """The course of a parameter under given gradients."""
    w = nn.Parameter(normal(*grads[0].shape) if start is None else start.clone())
    optimizer, course = make([w]), []
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        course.append(w.detach().clone())
    return torch.stack(course)


def assert_same(one, other, grads=None, tolerance=1e-10):
    grads = gradients(9, 4, 6) if grads is None else grads
    torch.testing.assert_close(follow(one, grads), follow(other, grads), rtol=tolerance, atol=tolerance)


# One step of gradient descent, three ways (Nested Learning, eq. 1–3)


def test_gradient_descent_is_proximal_and_follows_the_regularized_leader():
    lr, a, b = 0.1, normal(5, 5), normal(5)
    a = a @ a.T + torch.eye(5, dtype=F64)
    start = normal(5, seed=1)

    def gradient(w):
        return a @ w - b

    def least(linear, center):
        """argmin ⟨linear, W⟩ + ‖W − center‖²/2η by Newton's method, which needs one step on a quadratic."""
        w = torch.zeros(5, dtype=F64, requires_grad=True)
        loss = linear @ w + (w - center).square().sum() / (2 * lr)
        (slope,) = torch.autograd.grad(loss, w)
        return (w - lr * slope).detach()

    steepest, proximal, leader, summed = start.clone(), start.clone(), start.clone(), torch.zeros(5, dtype=F64)
    for _ in range(20):
        summed = summed + gradient(leader)
        steepest = steepest - lr * gradient(steepest)
        proximal = least(gradient(proximal), proximal)
        leader = least(summed, start)
        torch.testing.assert_close(proximal, steepest, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(leader, steepest, rtol=1e-12, atol=1e-12)


# Momentum


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_preconditioned_momentum_with_identity_is_momentum(share):
    assert_same(
        lambda p: optim.PreconditionedMomentum(p, 0.1, share),
        lambda p: torch.optim.SGD(p, 0.1, momentum=share),
    )


def test_momentum_is_a_linear_attention_memory_of_gradients():
    """Keys are places, values −g: m is the state of the sequence memory with decay, read at every place (eq. 33–34)."""
    grads, share, lr = gradients(7, 4, 6), 0.8, 0.1
    spec = named("retnet", key_dim=4, value_dim=6)
    state, course, w = None, [], normal(4, 6)
    ones = torch.ones(1, 1, 4, dtype=F64)
    for g in grads:
        decay = torch.tensor([share, 1.0, 1.0, 1.0], dtype=F64).view(1, 1, 4)  # once a step, with its first row
        eye = torch.eye(4, dtype=F64).view(1, 1, 4, 4)
        w0 = (torch.zeros(1, 4, 6, dtype=F64),)
        _, state = scan(spec, w0, eye, eye, -g.view(1, 1, 4, 6), Gates(lr=ones, retention=decay), state)
        w = w + lr * state.weights[0][0, 0]
        course.append(w)
    torch.testing.assert_close(torch.stack(course), follow(lambda p: optim.PreconditionedMomentum(p, lr, share), grads))


def test_half_of_the_weight_lies_in_the_last_seven_gradients():
    """β = 0.9: terms 0…6 carry 52.2 %, 0…43 carry 99.03 % (§4.3, which counts the index)."""
    w = nn.Parameter(torch.zeros(200, dtype=F64))
    optimizer = optim.PreconditionedMomentum([w], 0.0, 0.9)
    for n in range(200):
        w.grad = torch.zeros_like(w)
        w.grad[n] = 1 - 0.9
        optimizer.step()
    weights = optimizer.state[w]["momentum"].flip(0)
    assert weights[:7].sum() == pytest.approx(0.5217, abs=1e-4)
    assert weights[:44].sum() == pytest.approx(0.9903, abs=1e-4)
    assert weights[:6].sum() < 0.5
    assert weights[:43].sum() < 0.99


def test_a_diagonal_preconditioner_without_momentum_is_rmsprop_or_adagrad():
    assert_same(
        lambda p: optim.PreconditionedMomentum(p, 0.1, 0.0, preconditioner=optim.Diagonal(0.9, 1e-6)),
        lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9, eps=1e-6),
    )
    assert_same(
        lambda p: optim.PreconditionedMomentum(p, 0.1, 0.0, preconditioner=optim.Diagonal(1.0, 1e-6)),
        lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-6),
    )


def test_a_fixed_preconditioner_maps_every_gradient():
    matrix, grads = normal(4, 4, seed=3), gradients(6, 4, 6)
    mapped = follow(lambda p: torch.optim.SGD(p, 0.1, momentum=0.5), [matrix @ g for g in grads])
    fixed = follow(
        lambda p: optim.PreconditionedMomentum(p, 0.1, 0.5, preconditioner=optim.Fixed(lambda g: matrix @ g)), grads
    )
    torch.testing.assert_close(fixed, mapped)


# Delta momentum


@pytest.mark.parametrize("form", ["matrix", "elementwise"])
def test_delta_momentum_that_erases_nothing_is_momentum(form):
    assert_same(
        lambda p: optim.DeltaMomentum(p, 0.1, 0.9, 0.0, form=form), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )


def written(form, share, erase, lr, grads):
    """Delta momentum from its equation."""
    w, m = normal(*grads[0].shape), torch.zeros_like(grads[0])
    course = []
    for g in grads:
        unit_g = g / g.norm()
        eye = torch.eye(g.shape[1], dtype=F64)
        if form == "matrix":
            m = m @ (share * eye - erase * unit_g.T @ unit_g) - lr * g
        elif form == "elementwise":
            m = m * (share - erase * unit_g.square()) - lr * g
        else:
            m = m @ (share * eye - g.T @ g) - lr * g
        w = w + m
        course.append(w)
    return torch.stack(course)


@pytest.mark.parametrize("form", ["matrix", "elementwise", "printed"])
def test_delta_momentum_is_its_equation(form):
    grads = gradients(8, 4, 6, scale=0.1)
    made = follow(lambda p: optim.DeltaMomentum(p, 0.1, 0.9, 0.6, form=form), grads)
    torch.testing.assert_close(made, written(form, 0.9, 0.6, 0.1, grads))


@pytest.mark.parametrize("erase", [0.3, 20.0])
def test_the_proximal_form_is_the_exact_step_for_a_gradient_of_rank_one(erase):
    """argmin ½‖m gᵀ + P‖² + ‖m − αm_t‖²/2η_d, by least squares, with the values P whose step writes −g."""
    share, rank_one = 0.9, [normal(4, 1, seed=n) @ normal(1, 6, seed=9 + n) for n in range(5)]
    w = nn.Parameter(torch.zeros(4, 6, dtype=F64))
    optimizer = optim.DeltaMomentum([w], 1.0, share, erase, form="proximal")
    m = torch.zeros(4, 6, dtype=F64)
    for g in rank_one:
        value = -torch.eye(4, dtype=F64) * (1 + erase * g.square().sum()) / erase
        system = torch.cat([g, torch.eye(6, dtype=F64) / erase**0.5])
        m = torch.linalg.lstsq(system, torch.cat([value.T, share * m.T / erase**0.5])).solution.T
        w.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(-optimizer.state[w]["momentum"], m)


@pytest.mark.parametrize("erase", [0.3, 20.0])
def test_the_proximal_form_is_its_equation_and_never_turns_a_sign(erase):
    grads, share, m = gradients(6, 4, 6), 0.9, torch.zeros(4, 6, dtype=F64)
    w = nn.Parameter(torch.zeros(4, 6, dtype=F64))
    optimizer = optim.DeltaMomentum([w], 1.0, share, erase, form="proximal")
    for g in grads:
        damped = erase / (1 + erase * g.square().sum())
        m = share * m @ (torch.eye(6, dtype=F64) - damped * g.T @ g) + g
        w.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[w]["momentum"], m)


@pytest.mark.parametrize(("size", "left"), [(1e200, 0.0), (1e-200, 1.0)])
def test_the_proximal_form_erases_all_or_nothing_and_turns_no_sign(size, left):
    w, g = nn.Parameter(torch.zeros(4, 6, dtype=F64)), normal(4, 1) @ normal(1, 6, seed=1)
    nothing = optim.Fixed(torch.zeros_like)
    optimizer = optim.DeltaMomentum([w], 1.0, 0.9, 0.5, form="proximal", preconditioner=nothing)
    for n in range(2):
        w.grad = size * g
        if n:
            optimizer.state[w]["momentum"].copy_(normal(4, 6, seed=2))
        optimizer.step()
    along = unit(g)[0]
    m = optimizer.state[w]["momentum"]
    torch.testing.assert_close(m @ along.T, 0.9 * left * normal(4, 6, seed=2) @ along.T)
    across = torch.eye(6, dtype=F64) - along.T @ along
    torch.testing.assert_close(m @ across, 0.9 * normal(4, 6, seed=2) @ across)


def test_delta_momentum_is_deltanet_on_the_gradients_rows():
    """With P = 0 for what is written the rule is DeltaNet's erasing of one key; a gradient of one row is one token."""
    grads, erase = gradients(6, 1, 5), 0.7
    spec = named("deltanet", key_dim=5, value_dim=1)
    key = torch.stack([unit(g)[0][0] for g in grads]).view(1, 1, 6, 5)
    # W ← W − β kᵀ(kW − v) writes βkᵀv: v = −‖g‖/β makes it −g.
    value = torch.stack([-g.norm() / erase for g in grads]).view(1, 1, 6, 1)
    lr = torch.full((1, 1, 6), erase, dtype=F64)
    _, state = scan(spec, (torch.zeros(1, 5, 1, dtype=F64),), key, key, value, Gates(lr=lr))
    w = nn.Parameter(torch.zeros(1, 5, dtype=F64))
    optimizer = optim.DeltaMomentum([w], 1.0, 1.0, erase)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(-optimizer.state[w]["momentum"], state.weights[0][0, 0].T)


def test_one_gradient_again_and_again_fills_the_momentum_to_a_fixed_point():
    """α = 1, rank one: m ĝᵀĝ η_d = −ηPg at the end."""
    g = normal(4, 1) @ normal(1, 6, seed=1)
    w = nn.Parameter(torch.zeros(4, 6, dtype=F64))
    optimizer = optim.DeltaMomentum([w], 1.0, 1.0, 0.5)
    for _ in range(100):
        w.grad = g.clone()
        optimizer.step()
    direction = unit(g)[0]
    m = -optimizer.state[w]["momentum"]
    torch.testing.assert_close(0.5 * m @ direction.T @ direction, -g)


def test_a_gradient_across_the_momentum_erases_nothing():
    one, other = torch.zeros(2, 2, 4, dtype=F64)
    one[:, :2], other[:, 2:] = normal(2, 2), normal(2, 2, seed=1)
    assert_same(
        lambda p: optim.DeltaMomentum(p, 0.1, 0.9, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), [one, other]
    )


def test_a_zero_gradient_leaves_the_share_that_is_kept():
    w = nn.Parameter(torch.zeros(3, 3, dtype=F64))
    optimizer = optim.DeltaMomentum([w], 1.0, 0.9, 0.5)
    for g in (normal(3, 3), torch.zeros(3, 3, dtype=F64)):
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum"], 0.9 * normal(3, 3))


# Deep momentum


def position(p, output="identity", memory_lr=1.0, lr=0.1):
    return optim.DeepMomentum(
        p, lr, 0.9, memory_lr, skip=0.0, network=Matrix(), bias=DotProduct(), keys="position", output=output
    )


def test_a_linear_memory_of_places_is_momentum():
    assert_same(position, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))


def test_muon_is_deep_momentum_read_through_newton_schulz():
    grads = gradients(8, 6, 4)
    assert_same(
        lambda p: position(p, "newton_schulz", 0.1, 0.02),
        lambda p: optim.Muon(p, 0.02, 0.0, 0.9, nesterov=False),
        grads,
    )


def test_the_first_step_of_a_deep_memory_whose_last_layer_is_still_is_gradient_descent():
    (g,) = gradients(1, 4, 6)
    first = follow(lambda p: optim.DeepMomentum(p, 0.1, memory_lr=0.0), [g, g])
    torch.testing.assert_close(first, follow(lambda p: torch.optim.SGD(p, 0.1), [g, g]))


def test_a_linear_memory_of_rows_recalls_past_gradients_by_likeness():
    """Dot product: M = −η_m Σ αⁱ kᵀk/rows, so the update is −(g + ‖g‖ k M) written out."""
    grads, lr, share, rate = gradients(5, 3, 4), 0.1, 0.8, 0.3
    made = follow(lambda p: optim.DeepMomentum(p, lr, share, rate, network=Matrix(), bias=DotProduct()), grads)
    w, m, course = normal(3, 4), torch.zeros(4, 4, dtype=F64), []
    for g in grads:
        k = g / g.norm() * 3**0.5
        m = share * m - rate / 3 * k.T @ k
        w = w - lr * (g - g @ m)
        course.append(w)
    torch.testing.assert_close(made, torch.stack(course))


@pytest.mark.parametrize("bias", [L2(), DotProduct()])
def test_the_memory_descends_on_its_written_objective(bias):
    """θ ← αθ − η_m ∇ mean ℓ(m(k), −k), by autograd."""
    (g,) = gradients(1, 5, 4)
    w = nn.Parameter(torch.zeros(5, 4, dtype=F64))
    optimizer = optim.DeepMomentum([w], 0.1, 0.9, 0.5, bias=bias)
    w.grad = g
    optimizer.step()  # the last layer leaves 0, so that both have a gradient
    before = [optimizer.state[w][f"weight{n}"].clone().requires_grad_() for n in range(2)]
    optimizer.step()
    k = g / g.norm() * 5**0.5
    made = nn.functional.gelu(k @ before[0]) @ before[1]
    found = torch.autograd.grad(bias.loss(made, -k).mean(), before)
    for n in range(2):
        torch.testing.assert_close(optimizer.state[w][f"weight{n}"], (0.9 * before[n] - 0.5 * found[n]).detach())
    assert found[0].abs().max() > 0


# Feature maps


def test_momentum_in_the_features_of_the_identity_is_momentum():
    assert_same(
        lambda p: optim.FeatureMomentum(p, 0.1, 0.9, features=Identity()),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    )


@pytest.mark.parametrize(
    "kind", [optim.Fixed(lambda g: normal(4, 4, seed=3) @ g), optim.Diagonal(0.9)], ids=["matrix", "diagonal"]
)
def test_preconditioned_features_of_the_identity_are_preconditioned_momentum(kind):
    """m ← αm − ηPφ(g) with φ = id (eq. 51 and 46)."""
    assert_same(
        lambda p: optim.FeatureMomentum(p, 0.1, 0.9, features=Identity(), preconditioner=kind),
        lambda p: optim.PreconditionedMomentum(p, 0.1, 0.9, preconditioner=kind),
    )


def test_polynomial_features_weigh_past_gradients_by_likeness():
    """k(c) = 1 + c + c²/2: every past row counts 1 + cos times."""
    grads, lr, share = gradients(5, 3, 4), 0.1, 0.8
    made = follow(lambda p: optim.FeatureMomentum(p, lr, share, features=Polynomial(2)), grads)
    w, course = normal(3, 4), []
    for t, g in enumerate(grads):
        for i, past in enumerate(grads[: t + 1]):
            alike = nn.functional.cosine_similarity(g, past, dim=1)[:, None]
            w = w - lr * share ** (t - i) * (1 + alike) * past
        course.append(w)
    torch.testing.assert_close(made, torch.stack(course))


# Adam and AdaGrad


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_recovered(decay):
    for shape in ((4, 6), (5,), ()):
        assert_same(
            lambda p: optim.AdamMemory(p, 0.1, (0.8, 0.95), 1e-6, weight_decay=decay),
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-6, weight_decay=decay),
            gradients(12, *shape),
        )


def test_without_correction_it_is_adam_with_the_factors_removed():
    grads, (b1, b2) = gradients(6, 4, 6), (0.8, 0.95)
    plain = follow(lambda p: optim.AdamMemory(p, 0.1, (b1, b2), 1e-300, bias_correction=False), grads)
    w, previous, course = normal(4, 6), normal(4, 6), []
    adam = follow(lambda p: torch.optim.Adam(p, 0.1, (b1, b2), 1e-300), grads)
    for t, here in enumerate(adam, 1):
        w = w + (here - previous) * (1 - b1**t) / (1 - b2**t) ** 0.5
        previous = here
        course.append(w)
    torch.testing.assert_close(plain, torch.stack(course))


def test_adagrad_is_recovered():
    assert_same(lambda p: optim.AdaGradMemory(p, 0.1), lambda p: torch.optim.Adagrad(p, 0.1), gradients(12, 4, 6))


def test_the_classics_are_settings_of_one_memory():
    assert_same(
        lambda p: optim.AdamMemory(p, 0.1, (0.0, 0.9), 1e-6, bias_correction=False),
        lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9, eps=1e-6),
    )
    assert_same(
        lambda p: optim.AdamMemory(p, 0.1, (0.9, 0.9), target="square", bias_correction=False),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.9),
        [0 * g if n == 0 else g for n, g in enumerate(gradients(6, 4, 6))],  # whose first buffer is not damped
    )
    grads = gradients(5, 4, 6)
    signs = follow(lambda p: optim.AdamMemory(p, 0.1, (0.0, 0.0), 0.0, bias_correction=False), grads)
    torch.testing.assert_close(signs, normal(4, 6) - 0.1 * torch.stack([g.sign() for g in grads]).cumsum(0))


@pytest.mark.parametrize("target", ["root", "square"])
def test_the_optimum_minimizes_what_it_is_said_to(target):
    """Σ (m g − P)², by its derivative."""
    g = normal(7, 3)
    square = g.square().sum(0)
    p = square if target == "square" else square.sqrt()
    (m,) = optimum([g.sum(0)], [square], target, 0.0)
    m = m.clone().requires_grad_()
    loss = (m * g - p).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, m)[0], torch.zeros(3, dtype=F64))


def test_full_matrix_adagrad_of_a_vector_is_the_printed_rule():
    """W ← W − η H^{−1/2} M (eq. 111)."""
    grads, share = gradients(9, 4), 0.5
    made = follow(lambda p: optim.AdaGradMemory(p, 0.1, 0.0, momentum=share, form="rows"), grads)
    w, m, h, course = normal(4), torch.zeros(4, dtype=F64), torch.zeros(4, 4, dtype=F64), []
    for g in grads:
        m, h = share * m + (1 - share) * g, h + torch.outer(g, g)
        values, vectors = torch.linalg.eigh(h)
        root = torch.where(values > 1e-9, values, torch.inf).rsqrt()
        w = w - 0.1 * vectors @ (root * (vectors.T @ m))
        course.append(w)
    torch.testing.assert_close(made, torch.stack(course))


# Muon


def in_float64(monkeypatch):
    """The framework's Newton–Schulz, which always rounds to bfloat16, without that rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.double().clone())


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_newton_schulz_is_the_frameworks(shape, monkeypatch):
    from torch.optim._muon import _zeropower_via_newtonschulz

    g = normal(*shape)
    theirs = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert (newton_schulz(g, 5, dtype=torch.bfloat16) - theirs.double()).abs().max() < 0.05
    in_float64(monkeypatch)
    exact = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(newton_schulz(g, 5), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_muon_is_the_frameworks(nesterov, adjust, shape, monkeypatch):
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    grads = gradients(6, *shape)
    ours = follow(lambda p: optim.Muon(p, **settings, ns_dtype="bfloat16"), grads)
    theirs = follow(lambda p: torch.optim.Muon(p, **settings), grads)
    assert (ours - theirs).abs().max() < 0.03 * (theirs - normal(*shape)).abs().max()
    in_float64(monkeypatch)
    assert_same(lambda p: optim.Muon(p, **settings), lambda p: torch.optim.Muon(p, **settings), grads)


def test_what_is_no_matrix_gets_adam():
    assert_same(
        lambda p: optim.Muon(p, 0.1, 0.0), lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.95), 1e-8), gradients(6, 5)
    )
    assert_same(
        lambda p: optim.M3(p, 0.1, matrix=False),
        lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.95), 1e-8),
        gradients(6, 4, 5),
    )


def test_a_convolution_is_the_matrix_it_acts_as():
    grads = gradients(4, 6, 2, 3)
    one = follow(lambda p: optim.Muon(p, 0.1), grads)
    other = follow(lambda p: optim.Muon(p, 0.1), [g.flatten(1) for g in grads], normal(6, 2, 3).flatten(1))
    torch.testing.assert_close(one.flatten(2), other)


@pytest.mark.parametrize("make", [optim.Muon, lambda p, lr, **s: m3(p, lr=lr, second_moment="none", **s)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_joined_matrices_move_as_each_by_itself(make, adjust):
    grads = gradients(5, 12, 6)
    joined = follow(lambda p: make(p, 0.1, parts=3, adjust_lr_fn=adjust), grads)
    for n in range(3):
        here = slice(4 * n, 4 * n + 4)
        alone = follow(lambda p: make(p, 0.1, adjust_lr_fn=adjust), [g[here] for g in grads], normal(12, 6)[here])
        torch.testing.assert_close(joined[:, here], alone)
    whole = follow(lambda p: make(p, 0.1, adjust_lr_fn=adjust), grads)
    assert (whole - joined).abs().max() > 0.01


# M3


def m3(p, **settings):
    return optim.M3(p, **({"lr": 0.1, "period": 3} | settings))


def test_without_a_slow_weight_m3_is_its_fast_part_muon():
    assert_same(
        lambda p: m3(p, slow_weight=0.0, second_moment="none", momentum=0.9),
        lambda p: optim.Muon(p, 0.1, 0.0, 0.9, nesterov=False),
    )


def test_without_a_slow_weight_and_newton_schulz_it_is_adam_without_correction():
    assert_same(
        lambda p: m3(
            p,
            slow_weight=0.0,
            orthogonalize=False,
            second_moment="printed",
            momentum=0.9,
            second_momentum=0.95,
            eps=1e-6,
        ),
        lambda p: optim.AdamMemory(p, 0.1, (0.9, 0.95), 1e-6, bias_correction=False),
    )


@pytest.mark.parametrize("mode", ["matched", "printed", "none"])
@pytest.mark.parametrize("period", [3, 100])
def test_the_first_period_has_no_slow_part(mode, period):
    grads = gradients(8, 4, 6)
    slow, fast = (
        follow(lambda p, a=a: m3(p, second_moment=mode, period=period, slow_weight=a), grads) for a in (0.7, 0.0)
    )
    steps = min(period, 8)
    torch.testing.assert_close(slow[:steps], fast[:steps])
    assert period > 8 or not torch.allclose(slow[3], fast[3])


def test_m3_is_its_algorithm_line_by_line():
    """Algorithm 1 with f terms per period, as means, and its literal sums."""
    grads, f, alpha, eps, lr = gradients(11, 4, 6), 3, 0.6, 1e-3, 0.1
    b1, b2, b3 = 0.8, 0.9, 0.7
    for accumulate in ("ema", "sum"):
        w, m1, m2, v, o2 = normal(4, 6), 0, torch.zeros(4, 6, dtype=F64), 0, 0
        keep = (b1, b2, b3) if accumulate == "ema" else (1.0, 1.0, 1.0)
        course = []
        for k in range(0, len(grads), f):
            if k:
                sum_of = sum(grads[k - f : k])
                m2 = keep[2] * m2 + (1 - b3) * (sum_of / f if accumulate == "ema" else sum_of)
                o2 = newton_schulz(m2)
            for g in grads[k : k + f]:
                m1 = keep[0] * m1 + (1 - b1) * g
                v = keep[1] * v + (1 - b2) * g.square()
                w = w - lr * (newton_schulz(m1) + alpha * o2) / (v.sqrt() + eps)
                course.append(w)
        made = follow(
            lambda p, accumulate=accumulate: m3(
                p, momentum=b1, second_momentum=b2, slow_momentum=b3, slow_weight=alpha, eps=eps,
                second_moment="printed", accumulate=accumulate,
            ),
            grads,
        )  # fmt: skip
        torch.testing.assert_close(made, torch.stack(course))


def test_two_means_added_the_slow_one_a_step_behind():
    """NS the identity, no second moment, f = 1."""
    grads, lr, b1, b3 = gradients(7, 4, 4), 0.1, 0.8, 0.6
    made = follow(
        lambda p: m3(
            p, period=1, orthogonalize=False, second_moment="none", momentum=b1, slow_momentum=b3, slow_weight=1.0
        ),
        grads,
    )
    w, fast, slow, course = normal(4, 4), 0, 0, []
    for t, g in enumerate(grads):
        fast = b1 * fast + (1 - b1) * g
        slow = b3 * slow + (1 - b3) * grads[t - 1] if t else 0
        w = w - lr * (fast + slow)
        course.append(w)
    torch.testing.assert_close(made, torch.stack(course))


def test_matched_steps_know_nothing_of_the_gradients_units_and_printed_ones_do():
    for mode, factor in (("matched", 1.0), ("printed", 1e-3)):
        one, other = (
            follow(lambda p, mode=mode: m3(p, second_moment=mode, eps=0.0), gradients(8, 4, 6, scale=c)) - normal(4, 6)
            for c in (1.0, 1e3)
        )
        torch.testing.assert_close(other, factor * one)


def test_in_sums_the_shares_of_momentum_cancel_and_that_of_the_second_moment_is_a_rate():
    grads = gradients(8, 4, 6)
    settings = {"accumulate": "sum", "second_moment": "printed", "eps": 0.0}
    one = follow(lambda p: m3(p, momentum=0.9, slow_momentum=0.9, second_momentum=0.9, **settings), grads)
    other = follow(lambda p: m3(p, momentum=0.5, slow_momentum=0.1, second_momentum=0.9, **settings), grads)
    third = follow(
        lambda p: m3(p, momentum=0.5, slow_momentum=0.1, second_momentum=0.6, lr=0.1 * 2.0, **settings), grads
    )
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, third)  # √((1 − 0.6)/(1 − 0.9)) = 2


def test_the_slow_memory_moves_at_the_start_of_a_period_and_its_clock_counts_every_step():
    w = nn.Parameter(normal(3, 3))
    optimizer, slow = m3([w], period=3), []
    for n, g in enumerate(gradients(8, 3, 3)):
        w.grad = None if n in (3, 4) else g  # a period begins while there is no gradient
        optimizer.step()
        slow.append(optimizer.state[w]["slow"].clone())
    changes = [n for n in range(1, 8) if not torch.equal(slow[n], slow[n - 1])]
    assert changes == [3, 6]
    assert optimizer.param_groups[0]["clock"] == 8


# Delta gradient descent


def linear(x, weight, target, lr, **settings):
    """One DGD step of a linear layer on ½‖Wx − y‖², summed or averaged over tokens; the new weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=F64)
    layer.weight = nn.Parameter(weight.clone())
    optimizer = optim.DGD(layer, lr, **settings)
    loss = 0.5 * (layer(x) - target).square().sum(1)
    (loss.mean() if settings.get("reduction", "mean") == "mean" else loss.sum()).backward()
    optimizer.step()
    return layer.weight.detach()


def solved(x, weight, target, lr, tokens=1):
    """argmin ½‖Wx − u‖² + ‖W − W_t‖²/2η over all tokens, by least squares on the stacked system."""
    u = -(x @ weight.T - target)
    n = x.shape[1]
    system = torch.cat([x / tokens**0.5, torch.eye(n, dtype=F64) / lr**0.5])
    values = torch.cat([u / tokens**0.5, weight.T / lr**0.5])
    return torch.linalg.lstsq(system, values).solution.T


@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dgd_is_the_exact_solution_of_its_proximal_problem(lr, tokens, reduction):
    x, weight, target = normal(tokens, 5), normal(4, 5, seed=1), normal(tokens, 4, seed=2)
    made = linear(x, weight, target, lr, form="exact", reduction=reduction)
    expected = solved(x, weight, target, lr, tokens if reduction == "mean" else 1)
    torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-8)


def test_the_closed_form_of_one_token():
    x, weight, target, lr = normal(1, 5), normal(4, 5, seed=1), normal(1, 4, seed=2), 0.7
    damped = lr / (1 + lr * x.square().sum())
    gradient = (x @ weight.T - target).T @ x
    expected = weight @ (torch.eye(5, dtype=F64) - damped * x.T @ x) - damped * gradient
    made = linear(x, weight, target, lr, form="exact")
    torch.testing.assert_close(made, expected)
    u = -(x @ weight.T - target)
    torch.testing.assert_close(x @ made.T - u, (x @ weight.T - u) / (1 + lr * x.square().sum()))  # the residual shrinks
    batch = weight + lr * (u.T - weight @ x.T) @ torch.linalg.inv(torch.eye(1, dtype=F64) + lr * x @ x.T) @ x
    torch.testing.assert_close(made, batch)


def test_a_unit_input_gives_the_printed_form():
    """‖x‖ = 1: W(I − η'xxᵀ) − η'∇L with η' = η/(1 + η) (eq. 57), in both forms."""
    x, weight, target, lr = normal(1, 5), normal(4, 5, seed=1), normal(1, 4, seed=2), 0.7
    x = x / x.norm()
    printed = weight - lr / (1 + lr) * (weight @ x.T @ x + (x @ weight.T - target).T @ x)
    for form in ("exact", "normalized"):
        torch.testing.assert_close(linear(x, weight, target, lr, form=form), printed)
    camera_ready = weight @ (torch.eye(5, dtype=F64) - x.T @ x) - lr * (x @ weight.T - target).T @ x
    torch.testing.assert_close(linear(x, weight, target, lr, form="neurips"), camera_ready)


def test_the_limits_of_the_step_size():
    x, weight, target = normal(1, 5), normal(4, 5, seed=1), normal(1, 4, seed=2)
    gradient = (x @ weight.T - target).T @ x
    small = linear(x, weight, target, 1e-6, form="exact")
    torch.testing.assert_close((weight - small) / 1e-6, gradient + weight @ x.T @ x, rtol=1e-4, atol=1e-4)
    large = linear(x, weight, target, 1e12, form="exact")
    torch.testing.assert_close(x @ large.T, target - x @ weight.T, rtol=1e-4, atol=1e-4)  # W x = u
    across = weight - weight @ x.T @ x / x.square().sum()  # rows across x: nothing to erase
    damped = 0.7 / (1 + 0.7 * x.square().sum())
    made = linear(x, across, target, 0.7, form="exact")
    torch.testing.assert_close(made, across - damped * (x @ across.T - target).T @ x)


def test_orthonormal_inputs_at_once_are_the_same_one_after_the_other():
    x = torch.linalg.qr(normal(5, 2)).Q.T
    weight, target = normal(4, 5, seed=1), normal(2, 4, seed=2)
    for form in ("exact", "normalized"):
        once = linear(x, weight, target, 0.7, form=form, reduction="sum")
        after = linear(x[:1], weight, target[:1], 0.7, form=form)
        after = linear(x[1:], after, target[1:], 0.7, form=form)
        torch.testing.assert_close(once, after)


@pytest.mark.parametrize("form", ["exact", "normalized", "neurips"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_coupling_dgd_is_sgd(form, momentum):
    x, target = normal(7, 5), normal(7, 4, seed=2)
    layers = [nn.Linear(5, 4, dtype=F64)]
    layers.append(copy.deepcopy(layers[0]))
    optimizers = [
        optim.DGD(layers[0], 0.1, form=form, coupling=0.0, momentum=momentum),
        torch.optim.SGD(layers[1].parameters(), 0.1, momentum=momentum),
    ]
    for _ in range(5):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)
    torch.testing.assert_close(layers[0].bias, layers[1].bias)


def test_an_inner_memory_with_the_implicit_step_is_dgd_on_a_dot_product():
    """Longhorn's step has the strength η/(1 + η‖k‖²) of the layer's: the same L2 proximal problem, with a given value."""
    k, v = normal(6, 5), normal(6, 4, seed=1)
    spec = named("longhorn", key_dim=5, value_dim=4)
    lr = torch.full((1, 1, 6), 0.7, dtype=F64)
    start = torch.zeros(1, 5, 4, dtype=F64)
    _, state = scan(spec, (start,), k.view(1, 1, 6, 5), k.view(1, 1, 6, 5), v.view(1, 1, 6, 4), Gates(lr=lr))
    weight = torch.zeros(4, 5, dtype=F64)
    for t in range(6):
        x = k[t : t + 1]
        # A loss −⟨Wx, v⟩ makes the layer's own target u = v.
        layer = nn.Linear(5, 4, bias=False, dtype=F64)
        layer.weight = nn.Parameter(weight)
        optimizer = optim.DGD(layer, 0.7, form="exact")
        (-(layer(x) * v[t]).sum()).backward()
        optimizer.step()
        weight = layer.weight.detach()
    torch.testing.assert_close(weight.T, state.weights[0][0, 0])
