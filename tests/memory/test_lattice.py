"""Lattice: gradients by hand, the geometry of orthogonal writing, the rules it becomes, every setting against its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import Gates, Lattice

from .cases import normal, slots_equal_their_definition

OBJECTIVES = ("decoding", "similarity", "encoding")
D, M = 5, 4


def phi(s: Tensor) -> Tensor:
    return s / s.norm(dim=-1, keepdim=True)


def writing(objective: str, s: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Direction h `[dim]` and intensities a `[slot]` of one token, so that slot i takes a_i h P_i."""
    f, n = phi(s), s.norm(dim=-1)
    return {
        "decoding": (v - k @ f, k / n),
        "similarity": (v, k / n),
        "encoding": (v, (k - f @ v) / n),
    }[objective]


def change(objective: str, s: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The step of one token at γ = 1, `[slot, dim]`."""
    h, a = writing(objective, s, k, v)
    f = phi(s)
    return a[:, None] * (h - (f @ h)[:, None] * f)


def spec_of(**choices: object) -> Lattice:
    """One whose codes are the keys and queries themselves, as they are."""
    return Lattice(**{"key_dim": M, "value_dim": D, "slots": M, "code": "none", "norm": "free", **choices})


def plain(spec: Lattice, s: Tensor) -> list[Tensor]:
    """w0 of one head with slots s and projections that change nothing."""
    eye = torch.eye(M, dtype=torch.float64)[None]
    return [s[None], eye, eye.clone()]


def drawn(time: int) -> tuple[Tensor, ...]:
    """Slots s, then q, k, v and the gates μ and γ of so many tokens."""
    s, q, k, v = normal(M, D), normal(time, M, seed=1), normal(time, M, seed=2), normal(time, D, seed=3)
    return s, q, k, v, normal(time, seed=4).sigmoid(), normal(time, seed=5).sigmoid()


def run(
    spec: Lattice,
    s: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    engine: str = "chunked",
    tile: int | None = None,
    **gates: Tensor,
) -> tuple[Tensor, Tensor]:
    y, state = spec.scan(
        plain(spec, s),
        q[None, None],
        k[None, None],
        v[None, None],
        Gates(**{n: g[None, None] for n, g in gates.items()}),
        engine=engine,
        tile=tile,
    )
    return y[0, 0], state.weights[0][0, 0]


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_the_gradient_by_hand_and_by_autograd(objective: str, engine: str) -> None:
    s, k, v = normal(M, D), normal(M, seed=1), normal(D, seed=2)
    leaf = s.clone().requires_grad_()
    f = phi(leaf)
    loss = {
        "decoding": 0.5 * (k @ f - v).square().sum(),
        "similarity": -(k @ f) @ v,
        "encoding": 0.5 * (f @ v - k).square().sum(),
    }[objective]
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(-gradient, change(objective, s, k, v), rtol=0, atol=1e-12)
    _, after = run(
        spec_of(objective=objective), s, k[None], k[None], v[None], engine, lr=torch.tensor([0.3], dtype=torch.float64)
    )
    torch.testing.assert_close(after, s - 0.3 * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_orthogonal_to_its_slot_and_norms_grow_by_pythagoras(objective: str) -> None:
    s, k, v = normal(M, D), normal(1, M, seed=1), normal(1, D, seed=2)
    _, after = run(spec_of(objective=objective), s, k, k, v)
    step = after - s
    assert (step * s).sum(-1).abs().max() < 1e-12
    assert step.norm() > 0.1
    torch.testing.assert_close(after.square().sum(-1), s.square().sum(-1) + step.square().sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_larger_slot_is_the_same_slot_and_turns_less(objective: str) -> None:
    s, k, v = normal(M, D), normal(1, M, seed=1), normal(1, D, seed=2)
    spec = spec_of(objective=objective, read="before")
    y, after = run(spec, s, k, k, v)
    z, larger = run(spec, 3 * s, k, k, v)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(larger - 3 * s, (after - s) / 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunk_one_is_the_recurrence_in_the_form_of_a_gated_linear_attention(objective: str) -> None:
    """s_i ← (μ − a_i(f_i·h)/n_i) s_i + a_i h: the gate on the old state depends on state and input, and is no decay."""
    s, q, k, v, mu, lr = drawn(9)
    spec = spec_of(objective=objective, norm="decay", chunk=1)
    y, end = run(spec, s, q, k, v, retention=mu, lr=lr)
    outputs, beyond = [], False
    for t in range(9):
        h, a = writing(objective, s, k[t], v[t])
        a = lr[t] * a
        gate = mu[t] - a * (phi(s) @ h) / s.norm(dim=-1)
        beyond = beyond or bool((gate > 1).any()) or bool((gate < 0).any())
        s = gate[:, None] * s + a[:, None] * h
        outputs.append(q[t] @ phi(s))
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-12)
    torch.testing.assert_close(end, s, rtol=0, atol=1e-12)
    assert beyond


@pytest.mark.parametrize("read_norm", ["token", "chunk", "none"])
@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_parallel_form_is_the_loop_over_a_chunks_stale_steps(
    objective: str, tile: int | None, read_norm: str
) -> None:
    time, chunk = 17, 5
    s, q, k, v, mu, lr = drawn(time)
    spec = spec_of(objective=objective, norm="decay", chunk=chunk, read_norm=read_norm)
    y, end = run(spec, s, q, k, v, tile=tile, lr=lr, retention=mu)
    outputs, anchor = [], s
    for t in range(time):
        s = mu[t] * s + lr[t] * change(objective, anchor, k[t], v[t])
        norms = {"token": s, "chunk": anchor, "none": phi(s)}[read_norm].norm(dim=-1, keepdim=True)
        outputs.append(q[t] @ (s / norms))
        anchor = s if (t + 1) % chunk == 0 else anchor
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-12)
    torch.testing.assert_close(end, s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("read_norm", ["token", "chunk", "none"])
@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gate_form_is_the_loop_over_running_slots_with_gates_of_the_chunks_start(
    objective: str, tile: int | None, read_norm: str
) -> None:
    """Gates above 1 and below 0 as well, and one that is exactly 0."""
    time, chunk = 17, 5
    s, q, k, v, mu, lr = drawn(time)
    h, a = writing(objective, s, k[2], v[2])
    radial = a * (phi(s) @ h) / s.norm(dim=-1)
    mu[2], lr[2] = 0.5, 0.5 / radial.max()  # the gate of this slot is 0
    outputs, gates, anchor, start = [], list[Tensor](), s, s
    for t in range(time):
        h, a = writing(objective, anchor, k[t], v[t])
        gates.append(mu[t] - lr[t] * a * (phi(anchor) @ h) / anchor.norm(dim=-1))
        s = gates[-1][:, None] * s + lr[t] * a[:, None] * h
        norms = {"token": s, "chunk": anchor, "none": phi(s)}[read_norm].norm(dim=-1, keepdim=True)
        outputs.append(q[t] @ (s / norms))
        anchor = s if (t + 1) % chunk == 0 else anchor
    spec = spec_of(objective=objective, norm="decay", chunk=chunk, read_norm=read_norm, form="gate")
    y, end = run(spec, start, q, k, v, tile=tile, lr=lr, retention=mu)
    assert float(torch.stack(gates).max()) > 1
    assert float(torch.stack(gates).min()) < 0
    assert float(gates[2].abs().min()) < 1e-12
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-10)
    torch.testing.assert_close(end, s, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["retract", "decay", "free"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_forms_are_one_in_chunks_of_one_token_and_where_nothing_is_normalized(objective: str, norm: str) -> None:
    choices = [{"chunk": 1, "norm": norm}]
    if norm != "retract":
        choices.append({"chunk": 5, "norm": norm, "phi": "identity", "read_norm": "none"})
    for own in choices:
        gate, stale = (spec_of(objective=objective, form=form, **own) for form in ("gate", "stale"))
        q, k, v, gates = gate.example(torch.Generator().manual_seed(3), heads=1, time=13, dtype=torch.float64)
        w0 = plain(gate, 0.7 * normal(M, D))
        y, state = gate.scan(w0, q, k, v, gates)
        z, same = stale.scan(w0, q, k, v, gates)
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.weights, same.weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.anchor, same.anchor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_forms_differ_in_second_order(objective: str) -> None:
    """Half the step, a quarter of what is between them, over one chunk: from the second token on."""
    s, k, v = normal(M, D), normal(6, M, seed=1), normal(6, D, seed=2)
    gaps = []
    for size in (2e-3, 1e-3, 5e-4):
        lr = torch.full((6,), size, dtype=torch.float64)
        (_, a), (_, b) = (run(spec_of(objective=objective, form=form), s, k, k, v, lr=lr) for form in ("gate", "stale"))
        gaps.append(float((a - b).norm()))
    assert gaps[0] > 1e-8
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.01)
    first, same = (run(spec_of(objective=objective, form=form), s, k[:1], k[:1], v[:1]) for form in ("gate", "stale"))
    torch.testing.assert_close(first, same, rtol=0, atol=1e-12)


def test_what_is_along_a_chunks_slot_stays_in_both_forms() -> None:
    s, k, v = normal(M, D), normal(9, M, seed=1), normal(9, D, seed=2)
    for objective in OBJECTIVES:
        for form in ("stale", "gate"):
            _, end = run(spec_of(objective=objective, form=form), s, k, k, v, lr=torch.full((9,), 0.2).double())
            assert (end - s).abs().max() > 0.1
            torch.testing.assert_close((end * phi(s)).sum(-1), s.norm(dim=-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("objective", "norm"), [("decoding", "decay"), ("similarity", "free"), ("encoding", "decay")])
def test_the_gate_form_keeps_every_contract(objective: Any, norm: Any) -> None:
    testing.check(Lattice(4, 4, slots=3, chunk=5, form="gate", objective=objective, norm=norm))


@pytest.mark.parametrize(
    ("objective", "norm", "name", "chunk"),
    [
        ("similarity", "free", "linear_attention", 6),
        ("similarity", "decay", "retnet", 6),
        ("decoding", "free", "deltanet", 1),
        ("decoding", "decay", "comba_like", 1),
    ],
)
def test_without_the_normalization_it_is_a_linear_memory(objective: str, norm: str, name: str, chunk: int) -> None:
    spec = spec_of(objective=objective, norm=norm, phi="identity", read_norm="none", chunk=chunk)
    other = nl.memory.named(name, key_dim=M, value_dim=D)
    q, k, v, gates = other.example(torch.Generator().manual_seed(0), heads=1, time=14, dtype=torch.float64)
    gates = replace(gates, delta=None)  # erases as it writes
    s = normal(M, D)
    y, state = spec.scan(plain(spec, s), q, k, v, gates)
    z, same = other.scan([s[None]], q, k, v, gates)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.weights, same.weights, rtol=0, atol=1e-12)


def test_without_the_normalization_encoding_is_the_delta_rule_the_other_way_round() -> None:
    """And with a decay the Oja-like row of Nested Learning: M = αM + ηv(k − Mᵀv)ᵀ (eq. 66–67, transposes as derived)."""
    spec = spec_of(objective="encoding", phi="identity", read_norm="none", chunk=1)
    s, k, v = normal(M, D), normal(14, M, seed=1), normal(14, D, seed=2)
    lr, alpha = normal(14, seed=3).sigmoid() / 4, normal(14, seed=4).sigmoid()
    _, oja = run(
        spec_of(objective="encoding", norm="decay", phi="identity", read_norm="none", chunk=1),
        s,
        k,
        k,
        v,
        lr=lr,
        retention=alpha,
    )
    m = s.mT
    for t in range(14):
        m = alpha[t] * m + lr[t] * torch.outer(v[t], k[t] - m.mT @ v[t])
    torch.testing.assert_close(oja.mT, m, rtol=0, atol=1e-12)
    _, end = run(spec, s, k, k, v, lr=lr)
    other = nl.memory.named("deltanet", key_dim=D, value_dim=M)
    _, same = other.scan([s.mT[None]], *(x[None, None] for x in (v, v, k)), Gates(lr=lr[None, None]))
    torch.testing.assert_close(end.mT, same.weights[0][0, 0], rtol=0, atol=1e-12)


def test_a_small_free_step_is_the_part_of_the_delta_rules_step_across_each_slot() -> None:
    s, k, v = normal(M, D), normal(1, M, seed=1), normal(1, D, seed=2)
    unit = phi(s)
    small = torch.tensor([1e-7], dtype=torch.float64)
    _, after = run(spec_of(), unit, k, k, v, lr=small)
    _, plain_step = run(spec_of(phi="identity", read_norm="none"), unit, k, k, v, lr=small)
    step = plain_step - unit
    across = step - (step * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close((after - unit) / small, across / small, rtol=1e-6, atol=1e-6)


def test_one_slot_asked_by_its_own_answer_is_ojas_rule() -> None:
    spec = spec_of(key_dim=1, slots=1, objective="similarity", chunk=1)
    s = phi(normal(1, D))
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for t in range(6):
        v = normal(D, seed=t + 1)
        answer = s[0] @ v
        expected = s + 0.1 * answer * (v - answer * s)
        _, state = spec.scan(
            [s[None], one, one], one[None], answer * one[None], v[None, None, None], Gates(lr=0.1 * one)
        )
        torch.testing.assert_close(state.weights[0][0, 0], expected, rtol=0, atol=1e-12)
        s = phi(expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_retraction_keeps_slots_on_the_sphere_and_the_angle_of_a_step_is_its_length(objective: str) -> None:
    spec = spec_of(objective=objective, norm="retract", chunk=3)
    s, k, v = normal(M, D), normal(8, M, seed=1), normal(8, D, seed=2)
    start = spec.start(plain(spec, 5 * s), 1)
    torch.testing.assert_close(start.weights[0][0, 0], phi(s), rtol=0, atol=1e-12)
    for time in range(1, 9):
        _, end = run(spec, s, k[:time], k[:time], v[:time])
        unit = (end.norm(dim=-1) - 1).abs() < 1e-12
        assert bool(unit.all()) == (time % 3 == 0)
    _, end = run(
        spec_of(objective=objective, norm="retract", chunk=1),
        s,
        k[:1],
        k[:1],
        v[:1],
        lr=torch.tensor([0.4], dtype=torch.float64),
    )
    cosine = (end * phi(s)).sum(-1)
    tangent = (1 / cosine.square() - 1).sqrt()
    torch.testing.assert_close(tangent, 0.4 * change(objective, phi(s), k[0], v[0]).norm(dim=-1), rtol=1e-9, atol=1e-9)


def test_what_is_known_already_is_not_written() -> None:
    s, k = normal(M, D), normal(1, M, seed=1)
    known = k @ phi(s)
    _, same = run(spec_of(), s, k, k, known)
    torch.testing.assert_close(same, s, rtol=0, atol=1e-12)
    for objective in ("similarity", "encoding"):
        _, after = run(spec_of(objective=objective), s, k, k, 2 * s[1:2])
        moved = (after - s).abs().amax(-1)
        assert moved[1] < 1e-12
        assert moved[[0, 2, 3]].min() > 1e-3


def test_a_slot_turns_to_a_repeated_value_and_never_back() -> None:
    spec = spec_of(norm="retract", chunk=1)
    k = torch.eye(M, dtype=torch.float64)[:1].expand(200, M)
    v = phi(normal(D, seed=3)).expand(200, D)
    y, end = run(spec, normal(M, D), k, k, v, lr=torch.full((200,), 0.3, dtype=torch.float64))
    cosines = y @ v[0]
    assert bool((cosines.diff() >= -1e-12).all())
    assert cosines[0] < 0.9
    torch.testing.assert_close(end[0], v[0], rtol=0, atol=1e-6)


MIXTURES = [
    {"norm": "decay", "objective": "decoding", "code": "rms"},
    {"norm": "decay", "objective": "encoding", "read_norm": "none", "code": "softmax"},
    {"norm": "free", "objective": "similarity", "read_norm": "chunk"},
    {"norm": "free", "objective": "encoding", "slots": 7},
    {"norm": "retract", "objective": "encoding", "read_norm": "none"},
    {"norm": "retract", "objective": "similarity", "code": "none"},
    {"norm": "decay", "objective": "decoding", "phi": "identity", "read_norm": "none"},
    {"form": "gate"},
    {"form": "gate", "norm": "decay", "objective": "encoding", "code": "rms"},
    {"form": "gate", "norm": "decay", "objective": "similarity", "read_norm": "chunk", "slots": 7},
    {"form": "gate", "norm": "free", "objective": "encoding", "read_norm": "none"},
]


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("mixture", range(len(MIXTURES)))
def test_every_setting_equals_its_definition_in_outputs_state_and_gradients(mixture: int, read: str) -> None:
    spec = Lattice(**{"key_dim": 3, "value_dim": D, "slots": M, "chunk": 6, "read": read, **MIXTURES[mixture]})
    generator = torch.Generator().manual_seed(mixture)
    w0 = [w.double() + 0.1 * normal(*w.shape) for w in spec.init(2, generator)]
    slots_equal_their_definition(spec, w0, generator)


@pytest.mark.parametrize("form", ["stale", "gate"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_derivatives_through_two_chunks_are_numerical_ones(objective: str, form: str) -> None:
    spec = Lattice(key_dim=2, value_dim=3, slots=2, chunk=3, objective=objective, norm="decay", form=form)
    generator = torch.Generator().manual_seed(0)
    w0 = [w.double() for w in spec.init(1, generator)]
    q, k, v, gates = spec.example(generator, lanes=1, heads=1, time=5, dtype=torch.float64)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = spec.scan(x[:3], *x[3:6], Gates(lr=x[6], retention=x[7]))
        return y, state.weights[0]

    inputs = [x.clone().requires_grad_() for x in (*w0, q, k, v, gates.lr, gates.retention)]
    assert torch.autograd.gradcheck(run, inputs)


def test_float32_slots_stay_unit_and_finite_in_a_long_stream() -> None:
    spec = nl.memory.named("lattice_decode", key_dim=8, slots=6)
    w0 = spec.init(1)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), lanes=1, heads=1, time=4096)
    with torch.no_grad():
        y, state = spec.scan(w0, q, k, v, gates)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(state.weights[0].norm(dim=-1), torch.ones(1, 1, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"objective": "recoding"}, "objective is 'recoding'"),
        ({"norm": "keep"}, "norm is 'keep'"),
        ({"form": "gates"}, "form is 'gates'"),
        ({"slots": 0}, "slots is 0"),
        ({"phi": "identity"}, "takes slots with their norms"),
        ({"phi": "identity", "norm": "free"}, "read_norm='none'"),
        ({"code": "tanh"}, "code is 'tanh'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nl.memory.named("lattice_decode", key_dim=4, **choices)


def test_a_forget_gate_is_refused_where_retraction_would_undo_it() -> None:
    spec = nl.memory.named("lattice_decode", key_dim=4, slots=3)
    q, k, v, _ = spec.example(torch.Generator().manual_seed(0), time=3)
    with pytest.raises(ValueError, match="no such gate"):
        spec.scan(spec.init(2), q, k, v, Gates(retention=torch.ones(2, 2, 3)))
    with pytest.raises(ValueError, match="made by another memory"):
        spec.scan(
            spec.init(2),
            q,
            k,
            v,
            None,
            nl.memory.named("titans", key_dim=4).start(nl.memory.named("titans", key_dim=4).init(2), 2),
        )


@pytest.mark.parametrize(
    ("name", "size", "allowed"),
    [
        ("lattice_decode", 100, 1e-4),
        ("lattice_similarity", 100, 1e-4),
        ("lattice_encode", 10, 1e-3),
        ("lattice_encode", 1000, 1e3),
    ],
)
def test_float32_where_values_are_parallel_to_slots(name: str, size: float, allowed: float) -> None:
    """What is added and taken away again costs digits, but no norm falls below that of the part along the anchor's slot."""
    spec = nl.memory.named(name, key_dim=8, value_dim=16, slots=8, chunk=16)
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(1))]
    q, k, _, gates = spec.example(torch.Generator().manual_seed(0), time=64, dtype=torch.float64)
    which = torch.randint(8, (2, 64), generator=torch.Generator().manual_seed(2))
    v = size * torch.stack([w0[0][:, n].contiguous() for n in which])
    exact, _ = nl.memory.scan(spec, w0, q, k, v, gates, engine="reference")
    single = [w.float() for w in w0], q.float(), k.float(), v.float(), gates.map(lambda gate: gate.float())
    y, _ = nl.memory.scan(spec, *single)
    error = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < allowed
