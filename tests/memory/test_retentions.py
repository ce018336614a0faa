"""Links between dual variables and weights: the papers' identities, numerical derivatives, and what may not break."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Bregman,
    Decay,
    ElasticNet,
    Gates,
    Lq,
    LqDual,
    Matrix,
    MemorySpec,
    Retention,
)

from .cases import variants

LINKS: list[Retention] = [
    *(r for r in variants("retentions") if not r.linear),  # every one with a map
    Lq(3.0),
    Lq(2.0),
    LqDual(2.5),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_links_have_the_derivatives_that_autograd_takes(link: Retention) -> None:
    z = normal(0, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(link.link, (z,), eps=1e-6, atol=1e-6)


def test_the_exact_lq_read_out_is_stationary_and_the_printed_one_is_not() -> None:
    """⟨g, W⟩ + ‖W‖_{q'}²/2 with g = −A is stationary at the exact read-out; q' = 4/3 is conjugate to q = 4 (Miras, §5.2)."""
    a = normal(1, 1, 5, 3)
    for q, stationary in ((4.0, (True, False)), (2.0, (True, True))):
        other = q / (q - 1)
        for link, expected in zip((LqDual(q), Lq(q)), stationary, strict=True):
            w = link.link(a).detach().requires_grad_()
            norm = (w.abs() ** other).sum() ** (1 / other)
            (slope,) = torch.autograd.grad(0.5 * norm**2 - (a * w).sum(), w)
            assert (float(slope.abs().max()) < 1e-10) == expected


def test_degrees_of_the_two_read_outs() -> None:
    """Printed, q = 4: degree 3 − q = −1, so twice the dual is half the weights. Exact: degree 1."""
    a = normal(2, 1, 4, 4)
    torch.testing.assert_close(Lq(4.0).link(2 * a), Lq(4.0).link(a) / 2)
    torch.testing.assert_close(LqDual(4.0).link(2 * a), 2 * LqDual(4.0).link(a))


def test_of_a_power_mean_weights_are_as_large_as_their_dual() -> None:
    """Equal entries are left as they are; among normal ones, for q = 4, a 1 becomes about 1/√3, of a plain norm 1/√(3n)."""
    even = normal(15, 1, 6, 7).sign()
    torch.testing.assert_close(LqDual(4.0, mean=True).link(even), even)
    a = normal(16, 1, 60, 50)
    a[0, 0, 0] = 1.0
    kept, lost = (float(LqDual(4.0, mean=mean).link(a)[0, 0, 0]) for mean in (True, False))
    assert kept == pytest.approx(3**-0.5, rel=0.1)
    assert lost == pytest.approx(9000**-0.5, rel=0.1)
    w = normal(17, 2, 5, 4)
    torch.testing.assert_close(LqDual(mean=True).link(LqDual(mean=True).dual(w)), w)


def test_moneta_starts_where_weights_and_dual_agree() -> None:
    spec = nl.memory.named("moneta", key_dim=8)
    for a in spec.init(3, torch.Generator().manual_seed(0)):
        torch.testing.assert_close(spec.retention.link(a), a)
        torch.testing.assert_close((a**4).sum((-2, -1)), torch.ones(3))
    w = normal(3, 2, 5, 4)
    torch.testing.assert_close(LqDual().link(LqDual().dual(w)), w)


@pytest.mark.parametrize("link", [Lq(), LqDual(), Lq(2.5), LqDual(2.5), LqDual(2.5, mean=True)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lq_stays_finite_and_fades_where_the_dual_does(link: Retention, dtype: torch.dtype) -> None:
    """A norm of 0, of 1e-30 or of 1e30 gives finite weights and finite slopes; under the floor, less dual is less weight."""
    base = normal(4, 1, 4, 4).to(dtype)
    base[0, 0, 1] = base[0, 2] = 0.0
    for size in (0.0, 1e-30, 1e-6, 1.0, 1e12):
        a = (size * base).requires_grad_()
        w = link.link(a)
        (slope,) = torch.autograd.grad(w.square().sum() + w.sum(), a)
        assert torch.isfinite(w).all()
        assert torch.isfinite(slope).all()
    assert link.link(1e-6 * base).norm() > link.link(1e-7 * base).norm() > 0


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("q", [2.0, 2.5, 4.0])
def test_the_true_power_of_an_empty_dual_has_its_true_slope(q: float, engine: str) -> None:
    """At entries of 0 it is 0 for every q above 2, as a difference of small steps is, and 1 at q = 2; in both engines."""
    a = torch.zeros(1, 3, 3, dtype=torch.float64)
    a[0, 0] = 1.0
    (slope,) = torch.autograd.grad(LqDual(q).link(a.requires_grad_()).sum(), a)
    bump = 1e-14 * (a.detach() == 0)
    rise = (LqDual(q).link(a.detach() + bump) - LqDual(q).link(a.detach()))[0, 1:] / 1e-14
    torch.testing.assert_close(slope[0, 1:], rise, rtol=0, atol=1e-6)
    spec = MemorySpec(4, 4, Matrix(), L2(), LqDual(q), chunk=2)
    w0 = [w.double().requires_grad_() for w in spec.init(1)]
    inputs = spec.example(torch.Generator().manual_seed(0), heads=1, time=5, dtype=torch.float64)
    y, state = spec.scan(w0, *inputs, engine=engine)
    assert state.faults.tolist() == [0, 0]
    (found,) = torch.autograd.grad(y.square().sum(), w0)
    assert torch.isfinite(found).all()
    assert found.any()


def test_moneta_under_strong_decay_neither_explodes_nor_dies() -> None:
    """The shrinking read-out turned round: decay makes the printed weights grow, up to what the floor allows, and no further."""
    spec = nl.memory.named("moneta", key_dim=4, chunk=4)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, _ = spec.example(torch.Generator().manual_seed(1), time=400)
    still = Gates(lr=torch.zeros(2, 2, 400), retention=torch.full((2, 2, 400), 0.9))
    _, state = spec.scan(w0, q, k, v, still)
    for n, a in ((100, spec.scan(w0, *(x[:, :, :100] for x in (q, k, v)), still[slice(0, 100)])[1]), (400, state)):
        assert a.faults.tolist() == [0, 0]
        for w in a.weights:
            size = float(spec.retention.link(w).norm())
            assert size <= 1e3 * w[0].numel(), n  # ‖W‖ ≤ ‖A‖/floor² with ‖A‖ ≤ √n · floor
    # writes come back at once: the memory is not dead
    after, _ = spec.scan(w0, *(x[:, :, :40] for x in (q, k, v)), Gates(lr=torch.full((2, 2, 40), 0.1)), state)
    frozen, _ = spec.scan(w0, *(x[:, :, :40] for x in (q, k, v)), Gates(lr=torch.zeros(2, 2, 40)), state)
    assert (after[:, :, 20:] - frozen[:, :, 20:]).abs().max() > 0.1


def test_moneta_remembers_at_a_layers_steps_and_not_at_longer_ones() -> None:
    """12 pairs, shown 20 times with the gates that a layer begins with; recalled by the nearest value, 1/12 is luck."""
    spec = nl.memory.named("moneta", key_dim=16)
    w0 = spec.init(4, torch.Generator().manual_seed(1))
    k, v = (normal(n, 1, 4, 12, 16).float() for n in (2, 3))
    k = torch.nn.functional.normalize(k, dim=-1)
    recalled = []
    for share in (1.0, 1 / spec.retention.largest_step):
        lr = torch.full((1, 4, 240), share * spec.largest_steps[0] * 0.27)
        keys, values = (x.repeat(1, 1, 20, 1) for x in (k, v))
        _, state = spec.scan(w0, keys, keys, values, Gates(lr=lr, retention=torch.full_like(lr, 0.98)))
        found = torch.cdist(spec.recall(w0, state.weights, k)[0], v[0]).argmin(-1)
        recalled.append(float((found == torch.arange(12)).double().mean()))
    assert recalled[0] > 0.9
    assert recalled[1] < 0.3


def test_moneta_with_p_2_and_q_2_is_the_delta_rule_with_twice_the_step() -> None:
    """Miras, eq. 24–25: (p, q) = (2, 2), a matrix memory: W_t = αW − 2η kᵀ(kW − v)."""
    spec = nl.memory.named(
        "moneta", key_dim=4, network=Matrix(), chunk=1, bias=nl.memory.Lp(2.0, None), retention=Lq(2.0)
    )
    w = normal(5, 1, 4, 4)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(6), lanes=1, heads=1, time=15, dtype=torch.float64)
    y, _ = spec.scan([w], q, k, v, gates)
    for t in range(15):
        key, eta, alpha = k[0, 0, t], gates.lr[0, 0, t], gates.retention[0, 0, t]
        w = alpha * w - 2 * eta * torch.outer(key, key @ w[0] - v[0, 0, t])
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w[0])


@pytest.mark.parametrize("chunk", [1, 4])
def test_moneta_is_equations_24_and_25_with_the_norm_at_the_end_of_chunks(chunk: int) -> None:
    """A is carried; inside a chunk weights are A_t at the anchor's scale, at its end A_t/‖A_t‖²; chunk 1 is the recurrence."""
    slope, time = 10.0, 14
    spec = nl.memory.named("moneta", key_dim=4, network=Matrix(), chunk=chunk)
    a = normal(7, 1, 4, 4)[0]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(8), lanes=1, heads=1, time=time, dtype=torch.float64)
    y, state = spec.scan([a[None]], q, k, v, gates)
    anchor = a
    for t in range(time):
        scale = (anchor**4).sum() ** -0.5
        e = k[0, 0, t] @ (scale * anchor) - v[0, 0, t]
        g = torch.outer(k[0, 0, t], 3 * torch.tanh(slope * e) * (e**2 + 1e-6))
        a = gates.retention[0, 0, t] * a - gates.lr[0, 0, t] * g
        if (t + 1) % chunk == 0:
            anchor, scale = a, (a**4).sum() ** -0.5
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ (scale * a), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.weights[0][0, 0], a)


@pytest.mark.parametrize("link", [*LINKS, Decay(toward_initial=True)], ids=str)
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
def test_links_under_momentum_and_a_matrix_memory(link: Retention, read: str) -> None:
    """Mixtures nobody named: both engines agree, lanes out of step, a reset inside."""
    spec = MemorySpec(4, 4, Matrix(init_scale=1.0), L2(), link, nl.memory.Momentum(), chunk=5, read=read)
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(0))]
    example = spec.example(torch.Generator().manual_seed(1), time=17, dtype=torch.float64)
    reset, valid = torch.zeros(2, 17, dtype=torch.bool), torch.ones(2, 17, dtype=torch.bool)
    reset[1, 8], valid[0, :3] = True, False
    slow = spec.scan(w0, *example, engine="reference", reset=reset, valid=valid)
    fast = spec.scan(w0, *example, reset=reset, valid=valid)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-8, atol=1e-8)
    for a, b in zip((*fast[1].weights, *fast[1].momentum), (*slow[1].weights, *slow[1].momentum), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_forgetting_toward_the_initial_state() -> None:
    """W_t − W_0 = α(W_{t−1} − W_0) − η∇ℓ(anchor), by hand; a share of 0 gives W_0 back and 1 keeps all."""
    chunk = 3
    spec = MemorySpec(4, 4, Matrix(), L2(), Decay(toward_initial=True), chunk=chunk)
    start = normal(14, 4, 4)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(15), lanes=1, heads=1, time=14, dtype=torch.float64)
    assert gates.retention is not None
    gates.retention[..., 6] = 0.0
    y, _ = spec.scan([start[None]], q, k, v, gates)
    w = anchor = start
    for t in range(14):
        key = k[0, 0, t]
        step = gates.lr[0, 0, t] * torch.outer(key, key @ anchor - v[0, 0, t])
        w = start + gates.retention[0, 0, t] * (w - start) - step
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w, rtol=1e-10, atol=1e-10)
        anchor = w if (t + 1) % chunk == 0 else anchor
    still = torch.zeros(1, 1, 14, dtype=torch.float64)
    _, state = spec.scan([start[None]], q, k, v, Gates(lr=still, retention=still + 0.9))
    torch.testing.assert_close(state.weights[0][0, 0], start)
    plain = MemorySpec(4, 4, Matrix(), L2(), Decay(), chunk=chunk)
    same = Gates(lr=gates.lr, retention=still + 1)
    torch.testing.assert_close(
        spec.scan([start[None]], q, k, v, same)[0], plain.scan([start[None]], q, k, v, same)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
def test_forgetting_toward_the_initial_state_in_a_deep_memory(read: str) -> None:
    """Engine, step and reference, with the gradients of the initial weights; a reset and an invalid token inside."""
    spec = MemorySpec(4, 4, MLP(), L2(), Decay(toward_initial=True), nl.memory.Momentum(), chunk=4, read=read)
    w0 = [w.double().requires_grad_() for w in spec.init(2, torch.Generator().manual_seed(0))]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=15, dtype=torch.float64)
    gates = gates.map(lambda gate: gate.requires_grad_())
    reset, valid = torch.zeros(2, 15, dtype=torch.bool), torch.ones(2, 15, dtype=torch.bool)
    reset[1, 6], valid[0, 3] = True, False
    runs = []
    for cuts in ("reference", [0, 15], list(range(16))):
        if cuts == "reference":
            y, state = spec.scan(w0, q, k, v, gates, engine="reference", reset=reset, valid=valid)
        else:
            state, outputs = None, []
            for first, last in itertools.pairwise(cuts):
                one = slice(first, last)
                part = (x[:, :, one] for x in (q, k, v))
                y, state = spec.scan(w0, *part, gates[one], state, reset=reset[:, one], valid=valid[:, one])
                outputs.append(y)
            y = torch.cat(outputs, 2)
        total = y.square().sum() + sum(w.square().sum() for w in state.weights)
        gradients = torch.autograd.grad(total, (*w0, *(g for _, g in gates.items())), allow_unused=True)
        runs.append((y, *state.weights, *state.momentum, *(torch.zeros(()) if g is None else g for g in gradients)))
    for fast in runs[1:]:
        for a, b in zip(fast, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_elastic_net_minimizes_its_objective() -> None:
    """⟨−A, W⟩ + ½‖W‖² + γ‖W‖₁ is least at S_γ(A) (Miras, eq. 23): below every perturbation, and exactly 0 inside γ."""
    a, gamma = normal(11, 1, 6, 5), 0.4
    w = ElasticNet(gamma).link(a)

    def objective(w: Tensor) -> float:
        return float(-(a * w).sum() + 0.5 * w.square().sum() + gamma * w.abs().sum())

    assert bool((w[a.abs() <= gamma] == 0).all())
    assert 0 < int((w == 0).sum()) < w.numel()
    for seed in range(200):
        for size in (1e-3, 1e-1, 1.0):
            assert objective(w + size * normal(100 + seed, 1, 6, 5)) > objective(w)
    torch.testing.assert_close(ElasticNet(gamma).link(ElasticNet(gamma).dual(a)), a)


def test_a_weight_under_the_threshold_comes_back() -> None:
    """Evidence gathers in A where a cut on W itself would begin anew each time: one token writes nothing, ten do."""
    spec = MemorySpec(4, 4, Matrix(), nl.memory.DotProduct(), ElasticNet(0.5))
    k = torch.eye(4)[:1].expand(1, 1, 10, 4)
    small = torch.full((1, 1, 10), 0.1)
    y, _ = spec.scan(spec.init(1), k, k, torch.ones(1, 1, 10, 4), Gates(lr=small))
    assert not y[0, 0, :5].any()
    torch.testing.assert_close(y[0, 0, -1], torch.full((4,), 0.5))


def test_the_smooth_threshold_takes_two_thirds_of_the_exact_one() -> None:
    z = torch.tensor([50.0, -50.0], dtype=torch.float64)
    taken = z.abs() - ElasticNet(0.1, smooth=True).link(z).abs()
    torch.testing.assert_close(taken, torch.full_like(z, 0.1 * 2 / torch.pi), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "forward", "back"),
    [("sigmoid", torch.logit, torch.sigmoid), ("tanh", torch.atanh, torch.tanh), ("exp", torch.log, torch.exp)],
)
def test_bregman_in_the_dual_is_mirror_descent_on_the_weights(name, forward, back) -> None:
    """W_t = g(F'(W_{t−1}) − η∇ℓ(W_{t−1})) as printed (Miras, §5.2), token by token, chunk 1."""
    spec = MemorySpec(4, 4, Matrix(), L2(), Bregman(name), chunk=1)
    dual = normal(12, 1, 4, 4)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(13), lanes=1, heads=1, time=20, dtype=torch.float64)
    y, _ = spec.scan([dual], q, k, v, Gates(lr=gates.lr))
    w = back(dual[0])
    for t in range(20):
        key = k[0, 0, t]
        w = back(forward(w) - gates.lr[0, 0, t] * torch.outer(key, key @ w - v[0, 0, t]))
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", 0, 1), ("tanh", -1, 1), ("exp", 0, 1.1e13)])
def test_bregman_stays_finite_and_inside_for_steps_of_a_thousand(name, low: float, high: float) -> None:
    """In float32 a sigmoid saturates to exactly 0 or 1, from where the primal form never returns; the dual does."""
    spec = MemorySpec(4, 4, Matrix(), nl.memory.DotProduct(), Bregman(name))
    k = torch.eye(4)[:1].expand(1, 1, 3, 4)
    v = torch.tensor([1.0, -1.0, 1.0])[None, None, :, None].expand(1, 1, 3, 4) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    y, state = spec.scan(spec.init(1), k, k, v, Gates(lr=torch.tensor([[[1e3, 1e3, 1e3]]])))
    w = spec.retention.link(state.weights[0])
    assert state.faults.tolist() == [0]
    assert bool(((w >= low) & (w <= high)).all())
    torch.testing.assert_close(y[0, 0, 1], spec.retention.link(torch.zeros(4)))  # there and back again


def test_yaad_is_equation_26() -> None:
    """Token by token, a matrix memory: the quadratic step near the value, δ sign(e) beyond the threshold; both are met."""
    spec = nl.memory.named("yaad", key_dim=4, network=Matrix(), chunk=1)
    w, near = normal(9, 4, 4), 0
    q, k, v, gates = spec.example(torch.Generator().manual_seed(10), lanes=1, heads=1, time=30, dtype=torch.float64)
    y, _ = spec.scan([w[None]], q, k, v, gates)
    for t in range(30):
        eta, alpha, limit = (g[0, 0, t] for g in (gates.lr, gates.retention, gates.threshold))
        e = k[0, 0, t] @ w - v[0, 0, t]
        near += int(e.norm() <= limit)
        error = e if e.norm() <= limit else limit * e.sign()
        w = alpha * w - eta * torch.outer(k[0, 0, t], error)
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w)
    assert 0 < near < 30


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Lq(1.5), "Lq.q is 1.5"),
        (lambda: LqDual(4, floor=0.0), "LqDual.floor is 0.0"),
        (lambda: ElasticNet(0.0), "threshold is 0.0"),
        (lambda: Decay(per_channel=True, toward_initial=True), "choose one"),
        (lambda: MemorySpec(4, 4, retention=Decay(toward_initial=True), rule=nl.memory.DeltaGradient()), "goes back"),
        (lambda: Bregman("log"), "Bregman.map is 'log'"),
    ],
)
def test_impossible_retentions_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
