"""Trellis: its gradients, both passes against a literal loop, the rules it becomes, every setting against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import Gates, Trellis
from nestling.memory.compression import BETWEEN, PHI, between, compress, pulled_back

from .cases import normal, slots_equal_their_definition

D, E, M = 4, 3, 5


def plain(**choices: object) -> Trellis:
    """One pass like another: φ and f the identity, nothing normalized."""
    linear = {"phi": "identity", "between": "identity", "code": "none", "value_norm": "none", "value_read_phi": False}
    return Trellis(**{"key_dim": D, "value_dim": E, "slots": M, **linear, **choices})


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def ln(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def tokens(time: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k = (F.normalize(normal(time, D, seed=n), dim=-1) for n in (1, 2))
    return q, k, normal(time, E, seed=3), normal(time, seed=4).sigmoid() / 2, (normal(time, seed=5) + 2).sigmoid()


def weights() -> tuple[Tensor, Tensor, Tensor]:
    return normal(D, M, seed=6), normal(E, M, seed=7), normal(D + E, M, seed=8)


def run(
    spec: Trellis, w0: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor, **options: object
):
    y, state = spec.scan(
        [w[None] for w in w0],
        *(x[None, None] for x in (q, k, v)),
        Gates(lr=lr[None, None], retention=beta[None, None]),
        **options,
    )
    return (y[0, 0], *(w[0, 0] for w in state.weights))


def literal(
    chunk: int, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor, printed: bool = False
) -> list[Tensor]:
    """Both passes of the default system in a loop of rank-one steps."""
    keys, values, projection = weights()
    anchor, outputs = (keys, values), []
    for t in range(len(q)):
        code = F.normalize(torch.cat([k[t], v[t]]) @ projection, dim=-1)
        unit = F.normalize(v[t], dim=-1)
        made = []
        for x, m, a in ((k[t], keys, anchor[0]), (unit, values, anchor[1])):
            z = x @ a
            s = z.sigmoid()
            u = (silu(z) - code) * (s + z * s * (1 - s))
            made.append(beta[t] * m - lr[t] * torch.outer(x, u))
        keys, values = made
        outputs.append(silu(ln(silu(q[t] @ keys)) @ values.T))
        if (t + 1) % chunk == 0:
            anchor = (keys, values)
    return [torch.stack(outputs), keys, values]


@pytest.mark.parametrize("predicts", [True, False])
@pytest.mark.parametrize("phi", PHI)
def test_the_gradient_of_a_compression_layer_is_that_of_autograd(phi: str, predicts: bool) -> None:
    m, k, code = normal(D, M), normal(7, D, seed=1), normal(7, M, seed=2).softmax(-1)
    leaf = m.clone().requires_grad_()
    seen = compress(phi, k @ leaf)
    loss = (0.5 * (seen - code).square() if predicts else -seen * code).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    u = pulled_back(phi, k @ m, code, predicts=predicts)
    torch.testing.assert_close(k.T @ u, gradient, rtol=0, atol=1e-12)
    z = (k @ m).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: pulled_back(phi, z, code, predicts=predicts), z)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_the_passes_is_its_formula_and_finite_at_zero(name: str) -> None:
    x = normal(6, M)
    expected = {
        "ln_silu": ln(silu(x)),
        "l2_silu": silu(x) / silu(x).norm(dim=-1, keepdim=True),
        "softmax": x.exp() / x.exp().sum(-1, keepdim=True),
        "identity": x,
    }[name]
    torch.testing.assert_close(between(name, x), expected, rtol=1e-9, atol=1e-9)
    zero = torch.zeros(2, M, requires_grad=True)
    y = between(name, zero)
    (gradient,) = torch.autograd.grad(y.square().sum(), zero)
    assert torch.isfinite(y).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_both_passes_are_the_literal_loop_of_rank_one_steps(chunk: int, engine: str) -> None:
    spec = Trellis(key_dim=D, value_dim=E, slots=M, chunk=chunk)
    inputs = tokens(18)
    for found, expected in zip(run(spec, weights(), *inputs, engine=engine), literal(chunk, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_read_out_from_a_chunks_end_as_printed_is_another() -> None:
    """The first pass of one chunk in matrices (eq. 12), seen through a second one that stands still."""
    q, k, v, lr, beta = tokens(4)
    keys, values, projection = weights()
    still = plain(chunk=4, gating="separate", phi="silu")
    y, end, same = run(
        still, weights(), q, k, v, torch.stack([lr, 0 * lr], -1), torch.stack([beta, torch.ones_like(beta)], -1)
    )
    torch.testing.assert_close(same, values, rtol=0, atol=0)
    u = pulled_back("silu", k @ keys, torch.cat([k, v], -1) @ projection)
    mu = beta.cumprod(0)
    decays = (mu[:, None] / mu[None] * lr[None]).tril()
    torch.testing.assert_close(end, mu[-1] * keys - k.T @ (decays[-1][:, None] * u), rtol=0, atol=1e-12)

    def read_out(state: Tensor) -> Tensor:
        return (mu[:, None] * (q @ state) - (decays * (q @ k.T)) @ u) @ values.T

    torch.testing.assert_close(y, read_out(keys), rtol=0, atol=1e-11)
    assert (y - read_out(end)).abs().max() > 1e-2


@pytest.mark.parametrize("decays", [False, True])
def test_a_linear_pass_is_the_delta_rule_of_keys_and_codes(decays: bool) -> None:
    """With decay the gradient is taken before it, unlike Gated DeltaNet."""
    q, k, v, lr, beta = tokens(15)
    beta = beta if decays else torch.ones_like(beta)
    keys, values, projection = weights()
    code = torch.cat([k, v], -1) @ projection
    small, outputs = lr / 20, []
    y, end, reverse = run(plain(chunk=1), (keys, values, projection), q, k, v, small, beta)
    for t in range(15):
        keys = beta[t] * keys - small[t] * torch.outer(k[t], k[t] @ keys - code[t])
        values = beta[t] * values - small[t] * torch.outer(v[t], v[t] @ values - code[t])
        outputs.append(q[t] @ keys @ values.T)
    torch.testing.assert_close(y, torch.stack(outputs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, keys, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reverse, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "chunk"), [("deltanet", 1), ("ttt", 4)])
def test_a_linear_pass_is_deltanet_and_in_chunks_ttt(name: str, chunk: int) -> None:
    q, k, v, lr, beta = tokens(15)
    w0 = weights()
    other = nl.memory.named("deltanet", key_dim=D, value_dim=M)
    if name == "ttt":
        other = nl.memory.MemorySpec(D, M, chunk=chunk)
    code = torch.cat([k, v], -1) @ w0[2]
    _, same = other.scan([w0[0][None]], *(x[None, None] for x in (q, k, code)), Gates(lr=lr[None, None]))
    found = run(plain(chunk=chunk), w0, q, k, v, lr, torch.ones_like(beta))[1]
    torch.testing.assert_close(found, same.weights[0][0, 0], rtol=1e-10, atol=1e-10)


def test_without_prediction_and_with_softmax_codes_it_is_abc() -> None:
    q, k, v, lr, _ = tokens(15)
    one = torch.ones_like(lr)
    keys, values, projection = weights()
    spec = plain(objective="dot", code="softmax", between="softmax", chunk=4)
    y, end, reverse = run(spec, (0 * keys, 0 * values, projection), q, k, v, one, one)
    code = (torch.cat([k, v], -1) @ projection).softmax(-1)
    bounded_k, bounded_v, outputs = torch.zeros(M, D).double(), torch.zeros(M, E).double(), []
    for t in range(15):
        bounded_k = bounded_k + torch.outer(code[t], k[t])
        bounded_v = bounded_v + torch.outer(code[t], v[t])
        outputs.append(bounded_v.T @ (bounded_k @ q[t]).softmax(-1))
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-11)
    torch.testing.assert_close(end.T, bounded_k, rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse.T, bounded_v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_without_prediction_and_written_with_what_each_slot_lets_go_it_is_gsa(chunk: int, engine: str) -> None:
    """K ← diag(g) K + (1 − g)ᵀk, V likewise, y = Vᵀ softmax(K q), with a gate for each slot; one slot forgets all at once."""
    q, k, v, lr, _ = tokens(37)
    gate = (normal(37, M, seed=9) + 1).sigmoid()
    gate[20, 2] = 0.0
    one = torch.ones_like(lr)
    spec = plain(objective="dot", gating="slots", code="complement", between="softmax", chunk=chunk)
    assert spec.shapes == ((D, M), (E, M))
    w0 = tuple(w.double() + normal(*w.shape[1:], seed=n) for n, w in enumerate(spec.init(1)))
    y, end, reverse = run(spec, tuple(w[0] for w in w0), q, k, v, one, gate, engine=engine)
    bounded_k, bounded_v, outputs = w0[0][0].T, w0[1][0].T, []
    for t in range(37):
        bounded_k = gate[t].diag() @ bounded_k + torch.outer(1 - gate[t], k[t])
        bounded_v = gate[t].diag() @ bounded_v + torch.outer(1 - gate[t], v[t])
        outputs.append(bounded_v.T @ (bounded_k @ q[t]).softmax(-1))
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-11)
    torch.testing.assert_close(end.T, bounded_k, rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse.T, bounded_v, rtol=0, atol=1e-12)


def test_slots_that_all_keep_the_same_are_the_shared_gate() -> None:
    q, k, v, lr, beta = tokens(23)
    default = {"key_dim": D, "value_dim": E, "slots": M, "chunk": 4}
    shared = run(Trellis(**default), weights(), q, k, v, lr, beta)
    apart = run(Trellis(**default, gating="slots"), weights(), q, k, v, lr, beta[:, None].expand(-1, M))
    for a, b in zip(apart, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_decays_of_slots_neither_overflow_nor_vanish() -> None:
    """A slot that forgets by e^{-60} a token beside one that keeps all, in float32."""
    spec = Trellis(key_dim=D, value_dim=E, slots=M, gating="slots", chunk=16)
    q, k, v, lr, _ = (x[None, None].float() for x in tokens(64))
    log = torch.tensor([-60.0, -1e-4, 0.0, -3.0, -0.5]).expand(1, 1, 64, M)
    w0 = [w[None].float() for w in weights()]
    y, state = spec.scan(w0, q.requires_grad_(), k, v, Gates(lr=lr, log_retention=log))
    z, _ = spec.scan(
        [w.double() for w in w0],
        *(x.double() for x in (q, k, v)),
        Gates(lr=lr.double(), log_retention=log.double()),
        engine="reference",
    )
    assert state.faults.tolist() == [0]
    torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(torch.autograd.grad(y.square().sum(), q)[0]).all()


def test_no_step_is_pure_decay_and_no_retention_leaves_the_last_step_alone() -> None:
    q, k, v, lr, beta = tokens(6)
    w0 = weights()
    spec = Trellis(key_dim=D, value_dim=E, slots=M, chunk=3)
    _, end, reverse = run(spec, w0, q, k, v, 0 * lr, beta)
    torch.testing.assert_close(end, beta.prod() * w0[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse, beta.prod() * w0[1], rtol=0, atol=1e-12)
    _, end, _ = run(spec, w0, q, k, v, lr, 0 * beta)
    code = F.normalize(torch.cat([k[5], v[5]]) @ w0[2], dim=-1)
    # The anchor of the second chunk is what the third token left.
    third = F.normalize(torch.cat([k[2], v[2]]) @ w0[2], dim=-1)
    anchor = -lr[2] * torch.outer(k[2], pulled_back("silu", k[2] @ w0[0], third))
    torch.testing.assert_close(
        end, -lr[5] * torch.outer(k[5], pulled_back("silu", k[5] @ anchor, code)), rtol=0, atol=1e-12
    )


def test_one_key_again_and_again_is_recalled_up_to_what_decay_takes() -> None:
    k, v = F.normalize(normal(1, D), dim=-1).expand(400, D), normal(1, E, seed=1).expand(400, E)
    gamma, beta = torch.full((400,), 0.3, dtype=torch.float64), torch.full((400,), 0.9, dtype=torch.float64)
    code = torch.cat([k[0], v[0]]) @ weights()[2]
    small = plain(chunk=1, value_norm="l2")
    end = run(small, weights(), k, k, v, gamma, beta)[1]
    torch.testing.assert_close(k[0] @ end, 0.3 / 0.4 * code, rtol=1e-9, atol=1e-9)
    end = run(small, weights(), k, k, v, gamma, torch.ones_like(beta))[1]
    torch.testing.assert_close(k[0] @ end, code, rtol=1e-9, atol=1e-9)


def test_the_second_linear_pass_is_lattices_encoding_without_its_normalization() -> None:
    q, k, v, lr, _ = tokens(9)
    w0 = weights()
    lr = lr / 10
    reverse = run(plain(chunk=3), w0, q, k, v, lr, torch.ones_like(lr))[2]
    code = torch.cat([k, v], -1) @ w0[2]
    lattice = nl.memory.Lattice(
        M, E, slots=M, chunk=3, objective="encoding", phi="identity", norm="free", read_norm="none", code="none"
    )
    eye = torch.eye(M, dtype=torch.float64)[None]
    _, state = lattice.scan(
        [w0[1].T[None], eye, eye], *(x[None, None] for x in (code, code, v)), Gates(lr=lr[None, None])
    )
    torch.testing.assert_close(state.weights[0][0, 0].T, reverse, rtol=1e-10, atol=1e-10)


def test_the_chunk_matters_less_the_smaller_the_steps() -> None:
    q, k, v, lr, beta = tokens(16)
    gaps = []
    for scale in (1.0, 0.1, 0.01):
        ends = [
            run(Trellis(key_dim=D, value_dim=E, slots=M, chunk=c), weights(), q, k, v, scale * lr, beta)[1]
            for c in (1, 16)
        ]
        gaps.append(float((ends[0] - ends[1]).abs().max()))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0


@pytest.mark.parametrize("place", ["k", "v"])
def test_a_token_reads_what_it_wrote_itself(place: str) -> None:
    q, k, v, lr, beta = tokens(7)
    spec = Trellis(key_dim=D, value_dim=E, slots=M, chunk=4)
    y = run(spec, weights(), q, k, v, lr, beta)[0]
    other = {"k": k.clone(), "v": v.clone()}
    other[place][5] += 1
    z = run(spec, weights(), q, other["k"], other["v"], lr, beta)[0]
    assert torch.equal(y[:5], z[:5])
    assert (y[5] - z[5]).abs().max() > 1e-3
    before = Trellis(key_dim=D, value_dim=E, slots=M, chunk=4, read="before")
    torch.testing.assert_close(
        run(before, weights(), q, k, v, lr, beta)[0][5],
        run(before, weights(), q, other["k"], other["v"], lr, beta)[0][5],
    )


def test_strong_decay_over_a_long_chunk_stays_finite() -> None:
    q, k, v, lr, _ = (x.float().requires_grad_() for x in tokens(64))
    beta = torch.full((64,), 0.1, requires_grad=True)
    w0 = tuple(w.float() for w in weights())
    y, *_ = run(Trellis(key_dim=D, value_dim=E, slots=M), w0, q, k, v, lr, beta)
    assert torch.isfinite(y).all()
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v, lr, beta)):
        assert torch.isfinite(gradient).all()


MIXTURES = [
    {"gating": "separate"},
    {"phi": "softmax", "code": "softmax", "between": "softmax"},
    {"phi": "l2", "initial": "random", "value_read_phi": False},
    {"phi": "ln", "initial": "random", "between": "l2_silu", "gating": "separate"},
    {"phi": "tanh", "value_norm": "rms", "code": "rms"},
    {"objective": "dot", "value_norm": "none"},
    {"gating": "slots"},
    {"gating": "slots", "code": "complement", "objective": "dot", "phi": "identity", "between": "softmax"},
]


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("mixture", range(len(MIXTURES)))
def test_every_setting_equals_its_definition_in_outputs_state_and_gradients(mixture: int, read: str) -> None:
    spec = Trellis(key_dim=D, value_dim=E, slots=M, chunk=6, read=read, **MIXTURES[mixture])
    generator = torch.Generator().manual_seed(mixture)
    w0 = [w.double() + 0.3 * normal(*w.shape) for w in spec.init(2, generator)]
    slots_equal_their_definition(spec, w0, generator)


def test_derivatives_through_two_chunks_and_both_passes_are_numerical_ones() -> None:
    spec = Trellis(key_dim=2, value_dim=2, slots=3, chunk=3)
    generator = torch.Generator().manual_seed(0)
    w0 = [w.double() + 0.3 * normal(*w.shape) for w in spec.init(1, generator)]
    q, k, v, gates = spec.example(generator, lanes=1, heads=1, time=5, dtype=torch.float64)

    def scanned(*x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, state = spec.scan(x[:3], *x[3:6], Gates(lr=x[6], retention=x[7]))
        return y, *state.weights

    inputs = [x.clone().requires_grad_() for x in (*w0, q, k, v, gates.lr, gates.retention)]
    assert torch.autograd.gradcheck(scanned, inputs)


@pytest.mark.parametrize(
    ("choices", "gates"),
    [({"gating": "separate"}, 4), ({"gating": "slots"}, 6), ({"gating": "slots", "code": "complement"}, 6)],
    ids=lambda x: str(x),
)
def test_passes_and_slots_with_gates_of_their_own_are_moved_by_a_layers_own_parameters(
    choices: dict, gates: int
) -> None:
    torch.manual_seed(0)
    layer = nl.layers.Memory(8, 2, nl.memory.named("trellis", key_dim=4, slots=5, **choices))
    y, state = layer(torch.randn(2, 9, 8))
    (grad,) = torch.autograd.grad(y.square().sum(), layer.gates.weight)
    assert bool((grad.view(2, gates, 8).abs().amax((0, 2)) > 0).all())
    assert state.memory.faults.tolist() == [0, 0]


@pytest.mark.parametrize("code", ["l2", "complement"])
def test_slots_with_gates_of_their_own_keep_every_contract(code: str) -> None:
    nl.testing.check(nl.memory.named("trellis", key_dim=4, slots=3, gating="slots", code=code), cases=3)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"phi": "relu"}, "phi is 'relu'"),
        ({"phi": "l2"}, "initial='random'"),
        ({"phi": "softmax"}, "code='softmax'"),
        ({"slots": 1}, "more slots"),
        ({"gating": "none"}, "gating is 'none'"),
        ({"code": "complement"}, "choose gating='slots'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nl.memory.named("trellis", key_dim=4, **choices)
