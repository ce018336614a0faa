"""The identities that the papers and specs state, each against a loop written here from its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DeltaGradient,
    DotProduct,
    Full,
    Gates,
    Gradient,
    Identity,
    Matrix,
    MemorySpec,
    Momentum,
    Omega,
)
from nestling.memory.networks.activation import activate, activate_with_slope

D, T = 5, 19


def data(seed: int, heads: int = 1, time: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, unit-norm k, v and two gates in (0, 1), one lane."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, time, D, generator=g, dtype=torch.float64) for _ in range(3))
    a, b = (torch.rand(1, heads, time, generator=g, dtype=torch.float64) for _ in range(2))
    return q, F.normalize(k, dim=-1), v, 0.8 + 0.2 * a, 0.1 + 0.8 * b


def scan(spec: MemorySpec, w0: list[Tensor], *inputs: object) -> Tensor:
    return nl.memory.scan(spec, w0, *inputs)[0][0, 0]  # type: ignore[arg-type]


def matrix0(seed: int = 1) -> Tensor:
    return torch.randn(1, D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(q: Tensor, w: Tensor, update) -> Tensor:
    """y_t = q_t W_t with W_t = update(W_{t−1}, t), row vectors."""
    out, w = [], w[0]
    for t in range(q.shape[2]):
        w = update(w, t)
        out.append(q[0, 0, t] @ w)
    return torch.stack(out)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_linear_attention_is_unnormalized_causal_attention() -> None:
    q, k, v, _, _ = data(0)
    spec = nl.memory.named("linear_attention", key_dim=D)
    close(scan(spec, [torch.zeros(1, D, D).double()], q, k, v), ((q @ k.mT).tril() @ v)[0, 0])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_classics_are_their_equations_at_every_chunk(chunk: int) -> None:
    q, k, v, alpha, beta = data(1)
    w0 = matrix0()

    def outer(t: int, right: Tensor) -> Tensor:
        return torch.outer(k[0, 0, t], right)

    rules = {
        "linear_attention": (Gates(), lambda w, t: w + outer(t, v[0, 0, t])),
        "retnet": (Gates(retention=alpha), lambda w, t: alpha[0, 0, t] * w + outer(t, v[0, 0, t])),
        "deltanet": (
            Gates(lr=beta),
            lambda w, t: w - beta[0, 0, t] * outer(t, k[0, 0, t] @ w - v[0, 0, t]),
        ),
        "gated_deltanet": (
            Gates(lr=beta, retention=alpha),
            lambda w, t: alpha[0, 0, t] * w - beta[0, 0, t] * outer(t, alpha[0, 0, t] * (k[0, 0, t] @ w) - v[0, 0, t]),
        ),
    }
    for name, (gates, update) in rules.items():
        close(scan(nl.memory.named(name, key_dim=D, chunk=chunk), [w0], q, k, v, gates), loop(q, w0, update))


def test_titans_without_momentum_and_decay_at_chunk_1_is_deltanet() -> None:
    """Titans, appendix C."""
    q, k, v, _, beta = data(2)
    titans = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=1)
    deltanet = nl.memory.named("deltanet", key_dim=D)
    w0 = [matrix0()]
    close(scan(titans, w0, q, k, v, Gates(lr=beta)), scan(deltanet, w0, q, k, v, Gates(lr=beta)))


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_titans_matrix_memory_is_equations_13_to_15(chunk: int) -> None:
    q, k, v, alpha, eta = data(3)
    mu = 1 - eta
    spec = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=chunk)
    w0 = matrix0()
    w, s, anchor, out = w0[0], torch.zeros(D, D).double(), w0[0], []
    for t in range(T):
        if t % chunk == 0:
            anchor = w
        gradient = torch.outer(k[0, 0, t], k[0, 0, t] @ anchor - v[0, 0, t])
        s = mu[0, 0, t] * s - eta[0, 0, t] * gradient
        w = alpha[0, 0, t] * w + s
        out.append(q[0, 0, t] @ w)
    close(scan(spec, [w0], q, k, v, Gates(lr=eta, momentum=mu, retention=alpha)), torch.stack(out))


def test_titans_default_network_against_autograd_by_hand() -> None:
    """x + LN(GELU(x W1) W2), gradients at W_{t−1}: chunk 1, straight from Titans, eq. 12–15."""
    q, k, v, alpha, eta = data(4)
    spec = nl.memory.named("titans", key_dim=D, chunk=1)
    w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(0))]

    def m(w: list[Tensor], x: Tensor) -> Tensor:
        return x + F.layer_norm(F.gelu(x @ w[0]) @ w[1], (D,), eps=1e-6)

    w, s, out = [x[0] for x in w0], [torch.zeros_like(x[0]) for x in w0], []
    for t in range(T):
        leaf = [x.detach().requires_grad_() for x in w]
        loss = 0.5 * (m(leaf, k[0, 0, t]) - v[0, 0, t]).square().sum()
        gradients = torch.autograd.grad(loss, leaf)
        s = [0.6 * a - eta[0, 0, t] * g for a, g in zip(s, gradients, strict=True)]
        w = [alpha[0, 0, t] * a + b for a, b in zip(w, s, strict=True)]
        out.append(m(w, q[0, 0, t]))
    gates = Gates(lr=eta, retention=alpha, momentum=torch.full_like(eta, 0.6))
    close(scan(spec, w0, q, k, v, gates), torch.stack(out))


def test_gated_deltanet_is_titans_with_rescaled_step_and_value() -> None:
    """Titans' rule as written, θ = aβ and v/a in place of v (Titans, appendix C; derived)."""
    q, k, v, alpha, beta = data(5)
    gdn = nl.memory.named("gated_deltanet", key_dim=D)
    titans = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=1)
    w0 = [matrix0()]
    plain = Gates(lr=beta, retention=alpha)
    scaled = Gates(lr=alpha * beta, retention=alpha)
    close(scan(titans, w0, q, k, v / alpha[..., None], scaled), scan(gdn, w0, q, k, v, plain))
    assert (scan(titans, w0, q, k, v, plain) - scan(gdn, w0, q, k, v, plain)).abs().max() > 1e-3


def test_a_gradient_taken_at_the_decayed_state_is_gated_deltanet() -> None:
    """W' = αW, W ← W' − β∇½‖kW' − v‖², by autograd; Titans takes it before it decays (Titans, appendix C; derived)."""
    q, k, v, alpha, beta = data(6)
    w0 = matrix0()

    def descend(at: Tensor, t: int) -> Tensor:
        leaf = at.detach().requires_grad_()
        loss = 0.5 * (k[0, 0, t] @ leaf - v[0, 0, t]).square().sum()
        return beta[0, 0, t] * torch.autograd.grad(loss, leaf)[0]

    def decayed_first(w: Tensor, t: int) -> Tensor:
        return alpha[0, 0, t] * w - descend(alpha[0, 0, t] * w, t)

    def measured_first(w: Tensor, t: int) -> Tensor:
        return alpha[0, 0, t] * w - descend(w, t)

    gates = Gates(lr=beta, retention=alpha)
    titans = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=1)
    close(scan(nl.memory.named("gated_deltanet", key_dim=D), [w0], q, k, v, gates), loop(q, w0, decayed_first))
    close(scan(titans, [w0], q, k, v, gates), loop(q, w0, measured_first))
    assert (loop(q, w0, decayed_first) - loop(q, w0, measured_first)).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_ttt_linear_primal_equals_its_published_dual_form(chunk: int) -> None:
    """Mini-batch dual: Z̄ = Q W − (η tril(Q Kᵀ)) ∇_Z, with the target v − k on LN's output, step η/d."""
    q, k, v, _, eta = data(6)
    spec = nl.memory.named("ttt_linear", key_dim=D, chunk=chunk)
    w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(0))]
    w, out = w0[0][0], []
    for first in range(0, T, chunk):
        part = slice(first, first + chunk)
        kk, qq, vv = k[0, 0, part], q[0, 0, part], v[0, 0, part]
        z = (kk @ w).requires_grad_()
        loss = 0.5 * (F.layer_norm(z, (D,), eps=1e-6) - (vv - kk)).square().sum()
        (grad,) = torch.autograd.grad(loss, z)
        step = eta[0, 0, part] / D
        z_bar = qq @ w - ((qq @ kk.mT).tril() * step[None]) @ grad
        out.append(qq + F.layer_norm(z_bar, (D,), eps=1e-6))
        w = w - kk.mT @ (step[:, None] * grad)
    close(scan(spec, w0, q, k, v, Gates(lr=eta)), torch.cat(out))


def test_ttt_without_norm_and_residual_is_anchored_titans() -> None:
    q, k, v, _, eta = data(7)
    ttt = nl.memory.named("ttt_linear", key_dim=D, network=Matrix(), chunk=4)
    titans = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=4)
    w0 = [matrix0()]
    close(scan(ttt, w0, q, k, v, Gates(lr=eta)), scan(titans, w0, q, k, v, Gates(lr=eta / D)))


def test_residual_matrix_memory_is_the_plain_one_trained_towards_the_rest() -> None:
    """M(k) = k + kW trained towards v is kW trained towards v − k, with q added to the read-out (Titans; derived)."""
    q, k, v, _, eta = data(8)
    residual = nl.memory.named("titans", key_dim=D, network=MLP(depth=1, norm=False), chunk=3)
    plain = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=3)
    w0 = [matrix0()]
    close(scan(residual, w0, q, k, v, Gates(lr=eta)), q[0, 0] + scan(plain, w0, q, k, v - k, Gates(lr=eta)))


def test_momentum_equals_an_undamped_heavy_ball() -> None:
    q, k, v, _, _ = data(9)
    eta = torch.full((1, 1, T), 0.2, dtype=torch.float64)
    spec = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=1)
    w0 = matrix0()
    previous = current = w0[0]
    out = []
    for t in range(T):
        gradient = torch.outer(k[0, 0, t], k[0, 0, t] @ current - v[0, 0, t])
        previous, current = current, current + 0.7 * (current - previous) - 0.2 * gradient
        out.append(q[0, 0, t] @ current)
    close(scan(spec, [w0], q, k, v, Gates(lr=eta, momentum=torch.full_like(eta, 0.7))), torch.stack(out))


def test_omega_with_window_1_is_the_online_rule_and_longer_windows_differ() -> None:
    q, k, v, alpha, eta = data(10)
    plain = {"key_dim": D, "features": Identity(), "network": MLP()}
    w0 = [w.double() for w in nl.memory.named("omeganet", **plain).init(1, torch.Generator().manual_seed(0))]
    gates = Gates(lr=0.1 * eta, retention=alpha)
    one = nl.memory.named("omeganet", bias=Omega(L2(), length=1), **plain)
    online = nl.memory.named("titans", key_dim=D, rule=Gradient())
    close(scan(one, w0, q, k, v, gates), scan(online, w0, q, k, v, gates))
    wide = nl.memory.named("omeganet", bias=Omega(L2(), length=3), **plain)
    assert (scan(wide, w0, q, k, v, gates) - scan(one, w0, q, k, v, gates)).abs().max() > 1e-3
    only_now = torch.zeros(1, 1, T, 3).double()
    only_now[..., 0] = 1
    close(
        scan(wide, w0, q, k, v, Gates(lr=0.1 * eta, retention=alpha, window=only_now)),
        scan(one, w0, q, k, v, gates),
    )


def test_omega_matrix_memory_is_the_rank_c_delta_rule() -> None:
    """W_t = (α I − Σ γ_i k_iᵀk_i) W_{t−1} + Σ γ_i k_iᵀv_i (Atlas, eq. 11, signs derived)."""
    q, k, v, alpha, _ = data(11)
    c, w0 = 3, matrix0()
    gamma = torch.rand(1, 1, T, c, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / c
    choices = {"features": Identity(), "network": Matrix(), "bias": Omega(L2(), length=c)}
    spec = nl.memory.named("omeganet", key_dim=D, chunk=1, **choices)

    def update(w: Tensor, t: int) -> Tensor:
        new = alpha[0, 0, t] * w
        for lag in range(min(c, t + 1)):
            key, value = k[0, 0, t - lag], v[0, 0, t - lag]
            new = new - gamma[0, 0, t, lag] * torch.outer(key, key @ w - value)
        return new

    close(scan(spec, [w0], q, k, v, Gates(retention=alpha, window=gamma)), loop(q, w0, update))


def test_memora_logits_equal_the_printed_recurrence() -> None:
    """W_t = Softmax(α log W_{t−1} − η∇) (Miras, eq. 27) over 50 tokens, against the logit form."""
    q, k, v, alpha, eta = data(12, time=50)
    spec = nl.memory.named("memora", key_dim=D, network=Matrix(init_scale=1.0), chunk=1)
    z0 = matrix0()
    w, out = z0[0].softmax(0), []
    for t in range(50):
        gradient = torch.outer(k[0, 0, t], k[0, 0, t] @ w - v[0, 0, t])
        w = (alpha[0, 0, t] * w.log() - eta[0, 0, t] * gradient).softmax(0)
        out.append(q[0, 0, t] @ w)
    torch.testing.assert_close(
        scan(spec, [z0], q, k, v, Gates(lr=eta, retention=alpha)), torch.stack(out), rtol=1e-12, atol=1e-12
    )
    _, state = nl.memory.scan(spec, [z0], q, k, v, Gates(lr=eta, retention=alpha))
    weights = spec.retention.link(state.weights[0])
    close(weights.sum(-2), torch.ones_like(weights.sum(-2)))
    assert (weights > 0).all()


def test_delta_gradient_descent_erases_twice_with_the_l2_bias() -> None:
    """One repeated pair converges to η/(1 − α + 2η)·v, not to v (Nested Learning, §8; derived)."""
    time, eta, alpha = 400, 0.2, 0.95
    k = F.normalize(torch.randn(1, 1, 1, D, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    v = torch.randn(1, 1, 1, D, generator=torch.Generator().manual_seed(1)).double()
    k, v = k.expand(1, 1, time, D), v.expand(1, 1, time, D)
    spec = MemorySpec(D, D, Matrix(), L2(), Decay(), DeltaGradient("with_decay"), chunk=1)
    full = torch.full((1, 1, time), eta, dtype=torch.float64)
    y = scan(spec, [matrix0()], k, k, v, Gates(lr=full, retention=torch.full_like(full, alpha)))
    close(y[-1], eta / (1 - alpha + 2 * eta) * v[0, 0, 0])


def test_dot_product_dgd_is_gated_deltanet_with_rescaled_gates() -> None:
    """W(αI − ηkkᵀ) + ηvkᵀ is Gated DeltaNet with β = η/α and v → αv (Nested Learning, §8; derived)."""
    q, k, v, alpha, eta = data(13)
    dgd = MemorySpec(D, D, Matrix(), DotProduct(), Decay(), DeltaGradient("with_decay"))
    gdn = nl.memory.named("gated_deltanet", key_dim=D)
    w0 = [matrix0()]
    eta = 0.5 * eta
    close(
        scan(dgd, w0, q, k, v, Gates(lr=eta, retention=alpha)),
        scan(gdn, w0, q, k, alpha[..., None] * v, Gates(lr=eta / alpha, retention=alpha)),
    )


def test_overwriting_a_key_and_orthonormal_recall() -> None:
    """A step of 1 stores exactly: the second value replaces the first, orthonormal keys are all recalled."""
    spec = nl.memory.named("titans", key_dim=D, network=Matrix(), chunk=1)
    keys = torch.eye(D).double()[None, None]
    values = torch.randn(1, 1, D, D, generator=torch.Generator().manual_seed(2)).double()
    _, state = nl.memory.scan(spec, [matrix0()], keys, keys, values)
    close((keys @ state.weights[0]), values)
    y, _ = nl.memory.scan(spec, [matrix0()], keys[:, :, :1], keys[:, :, :1], 2 * values[:, :, :1], None, state)
    close(y[0, 0, 0], 2 * values[0, 0, 0])


@pytest.mark.parametrize(
    "network",
    [
        MLP(),
        MLP(depth=1),
        MLP(depth=3, activation="silu", norm=False),
        MLP(depth=2, activation="gelu_tanh", residual=False),
        Matrix(),
    ],
)
@pytest.mark.parametrize("bias", [L2(), DotProduct()])
def test_closed_form_gradients_equal_numerical_derivatives(network, bias) -> None:
    """x_lᵀδ_l against central differences of the written loss, one entry of every weight at a time."""
    g = torch.Generator().manual_seed(0)
    shapes = network.shapes(4, 4)
    w = [torch.randn(1, *s, generator=g, dtype=torch.float64) for s in shapes]
    k, v = (torch.randn(1, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    trace = network.trace(w, k)
    errors = network.errors(w, trace, bias.error(trace.prediction, v))

    def loss(weights: list[Tensor]) -> Tensor:
        return bias.loss(network.apply(lambda layer, h: h @ weights[layer], k), v).sum()

    for layer, (x, delta) in enumerate(zip(trace.inputs, errors, strict=True)):
        closed, h = x.mT @ delta, 1e-6
        for place in [(0, 0, 0), (0, shapes[layer][0] - 1, 1), (0, 1, shapes[layer][1] - 1)]:
            up, down = [x.clone() for x in w], [x.clone() for x in w]
            up[layer][place] += h
            down[layer][place] -= h
            numerical = (loss(up) - loss(down)) / (2 * h)
            assert abs(float(numerical - closed[place])) < 1e-6 * max(1, abs(float(numerical)))


def test_full_retention_and_momentum_share_the_engine() -> None:
    """A mixture nobody named: matrix, dot product, momentum, erase after decay; engine against reference."""
    spec = MemorySpec(
        D, D, MLP(), L2(), Full(), DeltaGradient("after_decay", with_momentum=True), chunk=5, read="before"
    )
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(3))]
    example = spec.example(torch.Generator().manual_seed(4), time=T, dtype=torch.float64)
    slow, _ = nl.memory.scan(spec, w0, *example, engine="reference")
    fast, _ = nl.memory.scan(spec, w0, *example)
    close(fast, slow)
    assert isinstance(nl.memory.named("titans").rule, Momentum)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activation_slopes_and_their_own_gradients(name: str) -> None:
    """σ' is the derivative of σ, and both may be differentiated by the outer loop (twice, for full outer gradients)."""
    z = torch.linspace(-4, 4, 23, dtype=torch.float64).requires_grad_()
    h, slope = activate_with_slope(name, z)
    (expected,) = torch.autograd.grad(activate(name, z).sum(), z)
    close(h, activate(name, z))
    close(slope, expected)
    assert torch.autograd.gradcheck(lambda x: activate_with_slope(name, x), z)
    assert torch.autograd.gradgradcheck(lambda x: activate_with_slope(name, x), z)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_far_out_are_0_or_the_input(name: str) -> None:
    """σ' is exactly 0 or 1 and σ'' exactly 0, however large the input: no power of it may overflow, and none cancel."""
    far = torch.tensor([3e2, 1e5, 1e9, 1e15, 1e25], requires_grad=True)
    for sign, limit in ((1, 1.0), (-1, 0.0)):
        _, slope = activate_with_slope(name, sign * far)
        assert slope.tolist() == [limit] * 5
        assert torch.autograd.grad(slope.sum(), far)[0].abs().tolist() == [0.0] * 5
