"""Nothing is lost, nothing is silent: token guard, border guard, refusals in words."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DotProduct,
    Gates,
    Gradient,
    Huber,
    Lp,
    Lq,
    Matrix,
    MemorySpec,
    Muon,
    Omega,
    Polynomial,
    Powers,
    Sketch,
    Unit,
)
from nestling.memory.protocol import PARTS
from nestling.native import without
from nestling.testing import assert_close, assert_same

from .cases import in_pieces, normal

NAMES = nl.memory.names()
TOKEN = 6


def example(name: str, time: int = 14, **choices: object) -> tuple[MemorySpec, list[Tensor], list]:
    short = {"shard": 8, **({} if choices else {"global_chunk": 4})} if name == "tnt" else {}
    spec = nl.memory.named(name, key_dim=4, **{"chunk": 4, **short, **choices})
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(1))]
    return spec, w0, list(spec.example(torch.Generator().manual_seed(0), time=time, dtype=torch.float64))


def memories(state: object) -> list[nl.memory.MemoryState]:
    """The state, or those of the memories it is made of."""
    return list(getattr(state, "parts", (state,)))


def all_finite(state: object) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in nl.state.leaves(state) if x.is_floating_point())


def written(state: object) -> list[Tensor]:
    """What the first lane's memory has learned: weights, momentum, and those of its pairs that have a weight."""
    found = []
    for m in memories(state):
        found += [*m.weights, *getattr(m, "momentum", ())]
        if (pairs := getattr(m, "pairs", None)) is not None:
            counts = pairs.weight[0].ne(0).any(-1)
            found += [part[:1, counts] for part in pairs[:3]]
        elif not found:  # a window is all it has, and the token is not used from it
            found.append(m.tail.ok[:, -1:] & torch.tensor([[False], [True]]))
    return found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_with_a_non_finite_input_or_gate_writes_nothing(name: str, bad: float) -> None:
    spec, w0, (q, k, v, gates) = example(name)
    for place in ("k", "v", *(n for n, _ in gates.items())):
        kk, vv, broken = k.clone(), v.clone(), gates.map(torch.clone)
        target = {"k": kk, "v": vv}.get(place, getattr(broken, place, None))
        target[0, 1, TOKEN] = bad
        runs = [
            nl.memory.scan(spec, w0, q, kk, vv, broken, engine="reference"),
            nl.memory.scan(spec, w0, q, kk, vv, broken),
        ]
        state, outputs = None, []
        for t in range(q.shape[2]):
            one = slice(t, t + 1)
            y, state = nl.memory.scan(spec, w0, q[:, :, one], kk[:, :, one], vv[:, :, one], broken[one], state)
            outputs.append(y)
        runs.append((torch.cat(outputs, 2), state))
        untouched, _ = nl.memory.scan(spec, w0, q, k, v, gates)
        for y, end in runs:
            assert torch.isfinite(y).all(), place
            assert all_finite(end), place
            assert end.faults.tolist() == [1, 0], place
            torch.testing.assert_close(y, runs[0][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(y[1], untouched[1])  # the other lane never noticed
        _, before = nl.memory.scan(
            spec, w0, q[:, :, :TOKEN], kk[:, :, :TOKEN], vv[:, :, :TOKEN], broken[slice(0, TOKEN)]
        )
        upto = slice(0, TOKEN + 1)
        _, after = nl.memory.scan(spec, w0, q[:, :, upto], kk[:, :, upto], vv[:, :, upto], broken[upto])
        for a, b in zip(written(before), written(after), strict=True):
            assert torch.equal(a[0], b[0]), place


@pytest.mark.parametrize("name", NAMES)
def test_faulty_tokens_leave_finite_outer_gradients(name: str) -> None:
    spec, w0, (q, k, v, gates) = example(name)
    k = k.clone()
    k[0, 0, TOKEN] = float("nan")
    inputs = [x.requires_grad_() for x in (*w0, q, k, v)]
    y, _ = nl.memory.scan(spec, w0, q, k, v, gates)
    for gradient in torch.autograd.grad(y.square().sum(), inputs):
        assert torch.isfinite(gradient).all()


def floating(state: object) -> list[torch.Tensor]:
    return [leaf for leaf in nl.state.leaves(state) if leaf.is_floating_point()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_query_that_is_not_finite_harms_nothing_else(name: str, bad: float) -> None:
    """In itself and on the way back, if nobody asks for that answer."""
    spec, w0, (q, k, v, gates) = example(name)
    untouched, end = nl.memory.scan(spec, w0, q, k, v, gates)
    q = q.clone()
    q[0, 1, TOKEN] = bad
    inputs = [x.requires_grad_() for x in (*w0, q, k, v)]
    for engine in ("chunked", "reference"):
        y, after = nl.memory.scan(spec, inputs[:-3], q, k, v, gates, engine=engine)
        others = torch.ones(y.shape[0], y.shape[2], dtype=torch.bool)
        others[0, TOKEN] = False
        mine = y.transpose(1, 2)[others]
        if name != "self_modifying":  # which makes its values of it
            torch.testing.assert_close(mine, untouched.transpose(1, 2)[others])
            for a, b in zip(floating(after), floating(end), strict=True):
                torch.testing.assert_close(a, b)
        for gradient in torch.autograd.grad(mine.square().sum(), inputs):
            assert torch.isfinite(gradient).all(), engine


@pytest.mark.parametrize("engine", ["chunked", "reference", "step"])
def test_weights_that_overflow_go_back_to_the_anchor_at_the_border(engine: str) -> None:
    """α of 1e30 a token overflows float32 in two tokens, here the chunk's last: finite factors, a non-finite anchor."""
    spec = MemorySpec(4, 4, Matrix(init_scale=1.0), retention=Decay(), chunk=4)
    w0 = spec.init(1, torch.Generator().manual_seed(0))
    q, k, v, _ = spec.example(torch.Generator().manual_seed(1), lanes=2, heads=1, time=4)
    wild = torch.ones(2, 1, 4)
    wild[0, :, 2:] = 1e30
    gates = Gates(retention=wild, lr=torch.full((2, 1, 4), 0.1))
    if engine == "step":
        state = None
        for t in range(4):
            one = slice(t, t + 1)
            _, state = nl.memory.scan(spec, w0, q[:, :, one], k[:, :, one], v[:, :, one], gates[one], state)
    else:
        _, state = nl.memory.scan(spec, w0, q, k, v, gates, engine=engine)
    assert state.faults.tolist() == [1, 0]
    assert torch.equal(state.weights[0][0], w0[0])
    assert torch.equal(state.anchor[0][0], w0[0])
    assert not torch.equal(state.weights[0][1], w0[0])


@pytest.mark.parametrize("name", [n for n in NAMES if nl.memory.named(n).reads_weights])
def test_an_overflowing_factor_is_dropped_and_counted(name: str) -> None:
    """Where the gradient does not read the weights it is the input itself, and the token guard has seen to that."""
    spec, w0, (q, k, v, gates) = example(name)
    k, v = k.float().clone(), v.float().clone()
    k[0, :, TOKEN] = 3e38  # finite, but its square sum is not
    w0 = [w.float() for w in w0]
    q, gates = q.float(), gates.map(lambda g: g.float())
    y, state = nl.memory.scan(spec, w0, q, k, v, gates)
    assert all_finite(state)
    assert torch.isfinite(y).all()
    assert state.faults[0] >= 1
    assert state.faults[1] == 0


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["longhorn", "deep_transformer", "swdt"])
def test_a_step_backwards_is_refused_where_it_divides(name: str, engine: str) -> None:
    """η/(1 + η‖k‖²) has a pole at −1 for a unit key, and a kernels' sum with weights of both signs may be 0."""
    spec, w0, (q, k, v, gates) = example(name)
    lr = gates.lr.clone()
    lr[0, :, TOKEN] = -1.0
    kk = k.clone()
    kk[0, :, TOKEN] = float("nan")
    y, state = nl.memory.scan(spec, w0, q, k, v, Gates(lr=lr), engine=engine)
    expected, _ = nl.memory.scan(spec, w0, q, kk, v, gates, engine=engine)
    assert state.faults.tolist() == [1, 0]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_whose_square_overflows_writes_nothing(name: str, engine: str) -> None:
    """Finite itself, but a norm or an erasing factor made of it is not: as harmless as one that is not finite."""
    spec, w0, (q, k, v, gates) = example(name)
    w0, (q, k, v) = [w.float() for w in w0], (x.float() for x in (q, k, v))
    for place in ("k", "v"):
        kk, vv = k.clone(), v.clone()
        {"k": kk, "v": vv}[place][0, :, TOKEN] = 1e25
        inputs = [x.detach().requires_grad_() for x in (*w0, q, kk, vv)]
        y, state = nl.memory.scan(
            spec, inputs[: len(w0)], *inputs[-3:], gates.map(lambda gate: gate.float()), engine=engine
        )
        assert torch.isfinite(y).all(), place
        assert all_finite(state), place
        assert state.faults.tolist() == [1, 0], place
        for gradient in torch.autograd.grad(y.sum(), inputs, allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all(), place


@pytest.mark.parametrize("engine", ["chunked", "reference", "step"])
def test_an_overflowing_factor_leaves_finite_outer_gradients(engine: str) -> None:
    """Features of a key of 1e12 are 1e24, and what a gated network multiplies of them is no number any more."""
    spec, w0, (q, k, v, gates) = example("atlas_plus")
    k = k.float()
    k[0, :, TOKEN] = 1e12
    inputs = [x.float().requires_grad_() for x in (*w0, q, k, v)]
    start, (q, k, v) = inputs[: len(w0)], inputs[-3:]
    gates = gates.map(lambda gate: gate.float())
    state, outputs = None, []
    for first in range(14) if engine == "step" else (0,):
        part = slice(first, first + 1 if engine == "step" else 14)
        y, state = nl.memory.scan(
            spec,
            start,
            *(x[:, :, part] for x in (q, k, v)),
            gates[part],
            state,
            engine="chunked" if engine == "step" else engine,
        )
        outputs.append(y)
    assert state.faults.tolist() == [1, 0]
    for gradient in torch.autograd.grad(torch.cat(outputs, 2).sum(), inputs, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


def test_report_collects_surprise_update_and_faults() -> None:
    spec, w0, (q, k, v, gates) = example("titans")
    k = k.clone()
    k[0, 0, TOKEN] = float("nan")
    report = nl.Report()
    y, _ = nl.memory.scan(spec, w0, q, k, v, gates, report=report.scope("blocks.0"))
    with without():  # a report is made by the framework's operations, whose roundings are theirs
        silent, _ = nl.memory.scan(spec, w0, q, k, v, gates)
    entry = report["blocks.0"]
    assert torch.equal(y, silent)
    torch.testing.assert_close(y, nl.memory.scan(spec, w0, q, k, v, gates)[0])
    assert list(report) == ["blocks.0"]
    assert entry["surprise"].shape == entry["update"].shape == entry["retention"].shape == (2, 2, 14)
    assert entry["faults"].tolist() == [1, 0]
    kept = 1 - torch.eye(14)[TOKEN]
    assert (entry["update"][0] > 0).all(0).tolist() == kept.bool().tolist()
    # surprise of the first token, by hand: the error at the initial weights, through the layer norm's backward
    prediction = spec.network.trace([w[None] for w in w0], k[:, :, :1])
    errors = spec.network.errors([w[None] for w in w0], prediction, prediction.prediction - v[:, :, :1])
    torch.testing.assert_close(entry["surprise"][..., 0], errors[-1][..., 0, :].norm(dim=-1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nl.memory.named("titan"), "titans"),
        (lambda: nl.memory.named("titans", chunks=3), "chunk"),
        (lambda: nl.memory.named("titans", chunk=0), "chunk is 0"),
        (lambda: nl.memory.named("titans", key_dim=4, value_dim=6), "residual"),
        (lambda: nl.memory.named("memora", rule=nl.memory.DeltaGradient()), "dual"),
        (lambda: nl.memory.Omega(nl.memory.L2(), length=0), "length is 0"),
        (lambda: nl.memory.MLP(depth=0), "depth is 0"),
        (lambda: nl.memory.named("titans", key_dim=True), "titans: key_dim is True; expected a whole number"),
        (lambda: MLP(depth=1.5), r"MLP.depth is 1.5; expected a whole number of at least 1"),
        (lambda: MLP(expansion=float("nan")), "MLP.expansion is nan; expected a finite number above 0"),
        (lambda: MLP(init_scale=float("inf")), "MLP.init_scale is inf"),
        (lambda: Matrix(init_scale="1"), "Matrix.init_scale is '1'; expected a finite number of at least 0"),
        (lambda: Omega(L2(), length=2.5), "Omega.length is 2.5; expected a whole number"),
        (lambda: Omega(8), r"Omega.inner is 8; expected what answers nestling.memory.Bias, such as L2\(\)"),
        (lambda: Omega(L2), r"Omega.inner is the class L2; expected one made of it: L2\(\)"),
        (lambda: Unit(Polynomial), "Unit.inner is the class Polynomial"),
        (lambda: Polynomial(2.5), "Polynomial.degree is 2.5"),
        (lambda: Powers(1.5), "Powers.degree is 1.5"),
        (lambda: Muon(steps=2.5), "Muon.steps is 2.5; expected a whole number of at least 0"),
        (lambda: Muon(iteration=("a", "b", "c")), "expected the three numbers a, b, c"),
        (lambda: Lp(float("inf")), "Lp.p is inf; expected a finite number of at least 1"),
        (lambda: Lp("3"), "Lp.p is '3'; expected a finite number"),
        (lambda: Lq(float("inf")), "Lq.q is inf; expected a finite number of at least 2"),
        (lambda: nl.memory.ElasticNet(float("inf")), "ElasticNet.threshold is inf"),
        (lambda: nl.memory.named("swdt", key_dim=4, span=2.5), "swdt: span is 2.5; expected a whole number"),
        (lambda: nl.memory.named("tnt", key_dim=4, shard=2.5), "tnt: shard is 2.5; expected a whole number"),
    ],
)
def test_impossible_settings_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


SWITCHES = {
    (kind, field.name)
    for kind in map(nl.memory.__dict__.get, nl.memory.__all__)
    if isinstance(kind, type) and is_dataclass(kind)
    for field in fields(kind)
    if field.type in ("bool", bool)
}


def test_what_is_neither_true_nor_false_is_refused_in_words() -> None:
    """In every choice and memory: it would count as true, whatever was meant."""
    assert len(SWITCHES) >= 20
    for kind, setting in SWITCHES:
        own = {field.name for field in fields(kind)}
        sizes = {size: 4 for size in ("key_dim", "value_dim", "slots") if size in own}
        kind(**sizes)
        for given in ("no", 0, 1.0, None):
            with pytest.raises(ValueError, match=f"{setting} is {given!r}; expected True or False"):
                kind(**sizes, **{setting: given})


@pytest.mark.parametrize("name", ["titans", "dot", "self_modifying"])
@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"bias": "l2"}, r"bias is 'l2'; expected what answers nestling.memory.Bias, such as"),
        ({"bias": Gradient()}, r"bias is Gradient\(.*expected what answers nestling.memory.Bias"),
        ({"bias": L2}, r"bias is the class L2; expected one made of it: L2\(\)"),
        ({"retention": None}, "retention is None; expected"),
        ({"network": "mlp"}, "network is 'mlp'; expected"),
        ({"rule": L2()}, r"rule is L2\(\); expected what answers nestling.memory.Rule, such as"),
        ({"features": None}, "features is None; expected what answers nestling.memory.Features"),
        ({"kernel": "exp"}, "kernel is 'exp'; expected"),
        ({"others": DotProduct()}, r"others is DotProduct\(\); expected what answers nestling.memory.Network"),
    ],
)
def test_what_is_no_choice_of_its_kind_is_refused_in_words(name: str, choices: dict, words: str) -> None:
    if not choices.keys() <= {field.name for field in fields(nl.memory.named(name, key_dim=4))}:
        return  # it has no such choice
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        nl.memory.named(name, key_dim=4, **choices)


def test_a_class_that_answers_a_kind_by_itself_is_one() -> None:
    """It need not inherit it; see docs/extending.md."""

    @dataclass(frozen=True)
    class Own:
        window = 1
        reads_prediction = True

        def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
            return L2().loss(prediction, value)

        def error(self, prediction: Tensor, value: Tensor) -> Tensor:
            return L2().error(prediction, value)

    (own, w0, inputs), (known, _, _) = example("titans", bias=Own()), example("titans", bias=L2())
    assert_close(own.scan(w0, *inputs)[0], known.scan(w0, *inputs)[0], "outputs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gates": Gates(momentum=torch.ones(2, 2, 14))}, "no such gate"),
        ({"gates": Gates(lr=torch.ones(2, 14))}, "gates.lr has shape"),
        ({"q": torch.ones(2, 2, 13, 4)}, "shape"),
        ({"reset": torch.ones(2, 14)}, "reset is torch.float32"),
        ({"engine": "quick"}, "engine is 'quick'"),
        ({"tile": 0}, "tile is 0"),
        ({"w0": []}, "w0"),
        ({"heads": 3}, "heads"),
        ({"state": "other"}, "state"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change: dict, words: str) -> None:
    spec, w0, (q, k, v, gates) = example("deltanet")
    q = change.get("q", q)
    gates = change.get("gates", gates)
    w0 = change.get("w0", w0)
    options = {n: change[n] for n in ("reset", "engine", "tile") if n in change}
    if "heads" in change:
        w0 = spec.init(3)
    state = None
    if "state" in change:
        state = nl.memory.named("titans", key_dim=4).start(nl.memory.named("titans", key_dim=4).init(2), 2)
    with pytest.raises(ValueError, match=words):
        nl.memory.scan(spec, w0, q, k, v, gates, state, **options)


def test_a_gate_may_be_given_once_only() -> None:
    spec, w0, (q, k, v, gates) = example("retnet")
    twice = Gates(retention=gates.retention, log_retention=gates.retention.log())
    with pytest.raises(ValueError, match="both given"):
        nl.memory.scan(spec, w0, q, k, v, twice)
    once, _ = nl.memory.scan(spec, w0, q, k, v, Gates(log_retention=gates.retention.log(), lr=gates.lr))
    plain, _ = nl.memory.scan(spec, w0, q, k, v, gates)
    torch.testing.assert_close(once, plain)


def test_the_reference_refuses_inference_mode() -> None:
    spec, w0, inputs = example("titans")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        nl.memory.scan(spec, w0, *inputs, engine="reference")


@pytest.mark.parametrize("name", NAMES)
def test_every_system_describes_itself(name: str) -> None:
    words = nl.memory.describe(name, key_dim=8)
    assert words["name"] == name
    for part in (*PARTS, "cost", "equation", "source", "notes"):
        assert words.get(part), f"{name} does not describe its {part}"
    for part in ("features", "network", "bias", "retention", "rule"):
        assert not re.search(r"\b[A-Z]\w*\(", words[part]), (
            f"{part} is told as Python, {words[part]!r}: give that class a __str__ that says it in words"
        )
    spec = nl.memory.named(name, key_dim=8)
    kept = nl.state.leaves(spec.start(spec.init(1), 1))
    if spec.growth == "constant":
        assert words["state"].startswith(f"{sum(x.numel() for x in kept if x.is_floating_point())} numbers per lane")


def test_a_cost_is_that_of_its_products() -> None:
    """Linear attention, one tile of 64 tokens: the prediction at the anchor, the read, Q Kᵀ, its product with V, and Kᵀ V."""
    spec = nl.memory.named("linear_attention", key_dim=8, value_dim=4)
    counted = nl.memory.cost(spec, time=64)
    small, gram, mixed = 64 * 8 * 4, 64 * 64 * 8, 64 * 64 * 4
    assert counted.flops == 2 * (3 * small + gram + mixed) / 64
    assert counted.state == 2 * 8 * 4


DEAD = {name: (name, {}) for name in NAMES} | {
    "omeganet, Huber, no threshold given": ("omeganet", {"bias": Omega(Huber(), length=3)}),
    "swla, monomials": ("swla", {"features": Polynomial(2), "bias": Omega(DotProduct(), length=3)}),
    "atlas, sketch": ("atlas", {"features": Sketch(2, 5), "bias": Omega(L2(), length=3)}),
    "dot, window": ("dot", {"bias": Omega(L2(), length=3)}),
    "swdt, boundary": ("swdt", {"span": 3, "read": "boundary"}),
    "tnt, omeganet": ("tnt", {"locals": ("omeganet",), "global_": None}),
}


@pytest.mark.parametrize("c", [True, False], ids=["C", "no C"])
@pytest.mark.parametrize("case", DEAD)
def test_where_a_refused_token_stood_the_state_is_the_same_in_every_way_to_read(case: str, c: bool) -> None:
    """As a whole, one by one and in the reference; and so are gradients, with those of the feature map's own numbers (C2, C4)."""
    name, choices = DEAD[case]
    spec, w0, (q, k, v, gates) = example(name, 9, **choices)
    gates = Gates(
        **{gate: x for gate, x in gates.items() if gate not in ("threshold", "lr")}
    )  # what stands for none given
    w0 = [w.requires_grad_() for w in w0]
    window = getattr(spec, "bias", L2()).window
    for place in range(9 - max(2, min(3, window)), 9):
        bad = k.clone()
        bad[0, 0, place] = torch.nan
        found = []
        with nullcontext() if c else without():
            for bounds, engine in (([0, 9], "reference"), ([0, 9], "chunked"), (range(10), "chunked")):
                y, state = in_pieces(spec, w0, (q, bad, v, gates), bounds, engine=engine)
                kept = [x for x in (y, *nl.state.leaves(state)) if x.is_floating_point()]
                total = sum((x * normal(*x.shape, seed=n)).sum() for n, x in enumerate(kept))
                gradients = torch.autograd.grad(total, w0, allow_unused=True)
                found.append((state, [torch.zeros(1) if g is None else g for g in gradients]))
        for state, gradients in found[1:]:
            assert_same(state, found[0][0])
            for a, b in zip(gradients, found[0][1], strict=True):
                assert_close(a, b, f"a gradient, token {place} refused")
        for m in memories(found[0][0]):
            if getattr(m, "tail", None) is not None:
                gone = ~m.tail.ok[:, None, :, None]
                assert not m.tail.key.where(gone, 0.0).any()
                assert not m.tail.value.where(gone, 0.0).any()


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize(
    ("name", "own", "other", "words"),
    [
        ("omeganet", {"bias": Omega(L2(), 8)}, {"bias": Omega(L2(), 4)}, r"state.tail, .*, 3, .*expected .*, 7, "),
        ("omeganet", {"bias": Omega(L2(), 4)}, {"bias": Omega(L2(), 8)}, r"state.tail, .*, 7, .*expected .*, 3, "),
        (
            "omeganet",
            {"bias": Omega(L2(), 4)},
            {"bias": Omega(Huber(), 4)},
            r"state.tail, .*, 5\)\); expected .*, 4\)\)",
        ),
        ("omeganet", {"bias": Omega(L2(), 4)}, {"bias": L2()}, r"state.tail, .* has shapes None; expected"),
        ("titans", {}, {"rule": Gradient()}, "the state has no momentum; expected one"),
        ("titans", {"rule": Gradient()}, {}, "the state has a momentum; expected none"),
        ("titans", {}, {"network": MLP(depth=3)}, "state has 3 weights; expected 2"),
        ("titans", {}, {"network": MLP(expansion=2)}, r"state.weights\[0\] has shape .* expected"),
        ("swdt", {"span": 4}, {"span": 8}, r"state.tail, .*, 8, .*expected .*, 4, .*another memory"),
    ],
)
def test_a_state_of_other_choices_is_refused_in_words(
    name: str, own: dict, other: dict, words: str, time: int, engine: str
) -> None:
    (spec, w0, inputs), (maker, w1, _) = example(name, time, **own), example(name, time, **other)
    with pytest.raises(ValueError, match=words):
        spec.scan(w0, *inputs, maker.start(w1, 2), engine=engine)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("time", [1, 4, 9])
@pytest.mark.parametrize("local", ["omeganet", "dot", "gated_deltanet"])
def test_a_hierarchy_looks_at_the_states_of_its_parts(local: str, time: int, engine: str) -> None:
    """Also where a shard begins, from where on they are not read."""
    (own, w0, inputs), (other, w1, _) = (example("tnt", time, locals=(part,), shard=4) for part in ("titans", local))
    with pytest.raises(ValueError, match="made by another memory"):
        own.scan(w0, *inputs, other.start(w1, 2), engine=engine)
    narrow = own.start(w0, 2)
    narrow = narrow._replace(projection=tuple(p[..., :3] for p in narrow.projection))
    with pytest.raises(ValueError, match=r"state.projection has shape \(2, 2, 4, 3\); expected \(2, 2, 4, 4\)"):
        own.scan(w0, *inputs, narrow, engine=engine)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_class_or_precision_is_refused_in_words(name: str) -> None:
    spec, w0, inputs = example(name, 3)
    _, state = spec.scan(w0, *inputs)
    for other in ("tnt", "swdt", "titans"):
        maker, w1, _ = example(other)
        foreign = maker.start(w1, 2)
        if type(foreign) is not type(state):
            with pytest.raises(
                ValueError, match=f"{name}: state is a {type(foreign).__name__}; expected .*another memory"
            ):
                spec.scan(w0, *inputs, foreign)
    with pytest.raises(ValueError, match=f"{name}: state is a tuple; expected"):
        spec.scan(w0, *inputs, (1, 2))
    half = nl.state.tree_map(lambda x: x.half() if x.is_floating_point() else x, state)
    single = nl.state.tree_map(lambda x: x.float() if x.is_floating_point() else x, state)
    for engine in ("chunked", "reference"):
        with pytest.raises(ValueError, match=r"holds torch.float16 .* expected all of it in float32"):
            spec.scan(w0, *inputs, half, engine=engine)
        if name != "swdt":  # whose state is of inputs alone, which go up
            with pytest.raises(TypeError, match=r"has dtype torch.float64, but w0 or the state is torch.float32"):
                spec.scan(w0, *inputs, single, engine=engine)
    low = [w.float() for w in w0], *(x.float() for x in inputs[:3]), inputs[3].map(torch.Tensor.float)
    y, after = spec.scan(*low, state)
    assert y.dtype == torch.float32
    assert {x.dtype for x in nl.state.leaves(after) if x.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("name", ["titans", "trellis", "dot", "self_modifying", "tnt"])
def test_what_is_no_input_is_refused_in_words(name: str, time: int, engine: str) -> None:
    spec, w0, (q, k, v, gates) = example(name, time)
    gate = next(iter(sorted(spec.gates_used)), "lr")
    ones = torch.ones(2, 2, time)
    wide = ones[..., None].expand(*ones.shape, 2) if spec.gate_channels.get(gate) else ones
    for change, error, words in (
        ({"q": q.numpy()}, TypeError, "q is a ndarray; expected a tensor"),
        ({"gates": {"lr": ones}}, TypeError, "gates is a dict; expected nestling.memory.Gates"),
        ({"gates": Gates(**{gate: 0.1})}, TypeError, f"gates.{gate} is a float; expected a tensor"),
        ({"gates": Gates(**{gate: wide * 1j})}, TypeError, f"gates.{gate} has dtype torch.complex64; expected real"),
        ({"reset": [[True] * time] * 2}, TypeError, "reset is a list; expected a tensor"),
        ({"valid": [[True] * time] * 2}, TypeError, "valid is a list; expected a tensor"),
        ({"tile": 2.5}, ValueError, f"{name}: tile is 2.5; expected a whole number of at least 1"),
        ({"tile": 0}, ValueError, "tile is 0"),
        ({"report": {}}, TypeError, r"report is a dict; expected a nestling.Report, or None: .* Report\(\)"),
        ({"w0": None}, ValueError, "w0 is None; expected .* from spec.init"),
        ({"w0": [w.long() for w in w0]}, TypeError, r"w0\[0\] has dtype torch.int64; expected a floating point"),
        ({"w0": [w0[0], w0[1][:1], *w0[2:]]}, ValueError, r"w0\[1\] has shape \(1, .*expected \(2, "),
    ):
        given = {"w0": w0, "q": q, "gates": gates} | change
        if "gates" in change and not spec.gates_used and gate == "lr" and "complex" in words:
            continue  # it has none, which is said first
        with pytest.raises(error, match=words):
            spec.scan(given.pop("w0"), given.pop("q"), k, v, engine=engine, **given)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_heads_or_lanes_that_is_none_is_refused_in_words(name: str) -> None:
    spec = nl.memory.named(name, key_dim=4)
    for heads in (-1, 0, 2.0, True, None):
        with pytest.raises(ValueError, match=f"heads is {heads}; expected a whole number of at least 1"):
            spec.init(heads)
    w0 = spec.init(2)
    for lanes in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match=f"lanes is {lanes}; expected a whole number of at least 0"):
            spec.start(w0, lanes)
    assert len(nl.state.leaves(spec.start(w0, 0))[0]) == 0


def test_a_step_refuses_what_is_no_input_in_words() -> None:
    spec, w0, (q, k, v, _) = example("titans", 1)
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    for change, words in (
        ({"gates": Gates(lr=0.1)}, "gates.lr is a float"),
        ({"gates": {"lr": 0.1}}, "gates is a dict"),
        ({"reset": [True, False]}, "reset is a list"),
    ):
        with pytest.raises(TypeError, match=words):
            spec.step(w0, q, k, v, **change)
