"""Nothing is lost, nothing is silent: token guard, border guard, refusals in words."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import Decay, Gates, Matrix, MemorySpec
from nestling.memory.protocol import PARTS
from nestling.native import without

NAMES = nl.memory.names()
TOKEN = 6


def example(name: str, time: int = 14) -> tuple[MemorySpec, list[Tensor], list]:
    short = {"shard": 8, "global_chunk": 4} if name == "tnt" else {}
    spec = nl.memory.named(name, key_dim=4, chunk=4, **short)
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
    ],
)
def test_impossible_settings_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


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
