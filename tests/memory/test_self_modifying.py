"""The self-modifying memory: its definition twice (by autograd and by hand), the paper's special cases, guards, two periods."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DeltaGradient,
    DotProduct,
    Full,
    Gates,
    Gradient,
    Matrix,
    MemoryState,
    Momentum,
    Omega,
    Retention,
    SelfModifying,
    Softmax,
)
from nestling.native import without

D, HEADS = 4, 2
IDENTITY = Matrix(init_scale=0.3, identity=True)
NEVER = 1_000_000
BACK = Decay(toward_initial=True)

VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "dot product": {"bias": DotProduct()},
    "without erasing": {"rule": Gradient()},
    "decay first": {"rule": DeltaGradient("after_decay")},
    "momentum": {"rule": Momentum()},
    "momentum as a sum": {"rule": Momentum(), "average": False},
    "momentum and erasing": {"rule": DeltaGradient(with_momentum=True)},
    "no decay": {"retention": Full()},
    "back to the start": {"retention": BACK},
    "back to the start, all else": {
        "retention": BACK,
        "rule": DeltaGradient("after_decay", with_momentum=True),
        "adaptive_q": True,
    },
    "back to the start without erasing": {"retention": BACK, "rule": Gradient()},
    "adaptive q": {"adaptive_q": True},
    "static": {"static": ("k", "v"), "rule": DeltaGradient(with_momentum=True)},
    "unit values": {"unit_values": True},
    "matrices": {"network": IDENTITY, "others": IDENTITY, "bias": DotProduct()},
    "mixed": {"network": MLP(depth=3, expansion=2.0), "others": IDENTITY, "adaptive_q": True},
}


def build(seed: int = 0, **choices: object) -> tuple[SelfModifying, list[Tensor]]:
    """A float64 memory whose last layers, steps and gates are large enough to show, and small enough to be stable."""
    spec = nl.memory.named("self_modifying", key_dim=D, **{"lr_max": 0.15, **choices})
    generator = torch.Generator().manual_seed(seed)
    w0 = []
    for name, w in zip(spec.names, spec.init(HEADS, generator), strict=True):
        w = w.double()
        if name.endswith("weight") or (name[-1].isdigit() and w.std() < 0.05):
            w = 0.3 * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        w0.append(torch.full_like(w, {"lr.bias": 0.5, "retention.bias": 2.0}[name]) if name.endswith("bias") else w)
    return spec, w0


def example(spec: SelfModifying, seed: int = 0, lanes: int = 2, time: int = 20) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(spec.example(generator, lanes=lanes, heads=HEADS, time=time, dtype=torch.float64))


def leaves(state: MemoryState) -> list[Tensor]:
    return nl.state.leaves(state)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(
        a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().amax()))
    )


def same(a: MemoryState, b: MemoryState) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        close(x, y)


def part(inputs: list, first: int, last: int) -> list:
    q, k, v, gates = inputs
    time = slice(first, last)
    return [q[:, :, time], k[:, :, time], v[:, :, time], gates[time]]


def by_pieces(
    spec: SelfModifying, w0: list[Tensor], inputs: list, bounds: list[int], **masks: Tensor | None
) -> tuple[Tensor, MemoryState]:
    state, outputs = None, []
    for first, last in itertools.pairwise(bounds):
        cut = {n: None if m is None else m[:, first:last] for n, m in masks.items()}
        y, state = nl.memory.scan(spec, w0, *part(inputs, first, last), state, **cut)
        outputs.append(y)
    return torch.cat(outputs, 2), state


cases = st.fixed_dictionaries(
    {
        "time": st.integers(1, 16),
        "chunk": st.sampled_from([1, 2, 5, 16]),
        "chunk_others": st.sampled_from([None, 1, 3, 8]),
        "read": st.sampled_from(["before", "after", "boundary"]),
        "tile": st.sampled_from([None, 1, 3]),
        "masks": st.booleans(),
        "share": st.floats(0, 1),
        "seed": st.integers(0, 10_000),
    }
)


@pytest.mark.parametrize("variant", VARIANTS)
@given(case=cases)
def test_the_fast_path_and_every_split_equal_the_definition(variant: str, case: dict) -> None:
    choices = {n: case[n] for n in ("chunk", "chunk_others", "read")}
    spec, w0 = build(case["seed"], **choices, **VARIANTS[variant])
    inputs, time = example(spec, case["seed"], time=case["time"]), case["time"]
    masks: dict[str, Tensor | None] = {"reset": None, "valid": None}
    if case["masks"]:
        generator = torch.Generator().manual_seed(case["seed"])
        masks = {
            "reset": torch.rand(2, time, generator=generator) < 0.15,
            "valid": torch.rand(2, time, generator=generator) < 0.8,
        }
    tensors = [*w0, *inputs[:3], *(gate for _, gate in inputs[3].items())]
    for x in tensors:
        x.requires_grad_()
    runs = []
    at = round(case["share"] * time)
    for run in (
        lambda: nl.memory.scan(spec, w0, *inputs, engine="reference", **masks),
        lambda: nl.memory.scan(spec, w0, *inputs, tile=case["tile"], **masks),
        lambda: by_pieces(spec, w0, inputs, [0, at, time], **masks),
        lambda: by_pieces(spec, w0, inputs, list(range(time + 1)), **masks),
    ):
        y, state = run()
        probe = torch.Generator().manual_seed(7)
        total = (y * torch.randn(y.shape, generator=probe, dtype=y.dtype)).sum()
        for w in (*state.weights, *state.momentum):
            total = total + (w * torch.randn(w.shape, generator=probe, dtype=w.dtype)).sum()
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        runs.append(
            (y, state, [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)])
        )
    (y, state, gradients), *others = runs
    for other_y, other_state, other_gradients in others:
        close(other_y, y)
        same(other_state, state)
        for fast, slow in zip(other_gradients, gradients, strict=True):
            close(fast, slow)


def by_hand(
    spec: SelfModifying, w0: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *, printed: bool = False
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Eq. 86–88 and 90–91 in plain loops for one lane and head, two-layer residual memories, L2: nothing of ours is used.

    printed: with the printed index C⌈t/C⌉, the state at the end of the current chunk, as a first pass finds it.
    """
    named = {name: w[0] for name, w in zip(spec.names, w0, strict=True)}
    w = {m: (named[f"{m}.0"], named[f"{m}.1"]) for m in ("k", "v", "lr", "retention", "main")}
    first = {m: tuple(float(spec.retention == BACK) * u for u in own) for m, own in w.items()}

    def answer(m: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
        return u + F.gelu(u @ m[0]) @ m[1]

    def token(t: int, w: dict, a: dict) -> tuple[Tensor, dict]:
        key, value = answer(a["k"], k[t]), answer(a["v"], v[t])
        key = key / key.norm()
        lr = spec.lr_max * torch.sigmoid(answer(a["lr"], k[t]) @ named["lr.weight"] + named["lr.bias"])
        alpha = torch.sigmoid(answer(a["retention"], k[t]) @ named["retention.weight"] + named["retention.bias"])
        new = {}
        for m, (w1, w2) in w.items():
            z = key @ a[m][0]
            h = F.gelu(z)
            error = (key + h @ a[m][1] - answer(a[m], value))[None]
            density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
            slope = 0.5 * (1 + torch.erf(z / 2**0.5)) + z * density
            beta = lr / (1 + lr * h.square().sum())
            new[m] = (
                alpha * w1 - lr * torch.outer(key, key @ w1) - lr * torch.outer(key, (error @ a[m][1].T)[0] * slope),
                alpha * w2 - beta * torch.outer(h, h @ w2) - lr * torch.outer(h, error[0]),
            )
            new[m] = tuple(u + (1 - alpha) * u0 for u, u0 in zip(new[m], first[m], strict=True))
        return {
            "before": answer(w["main"], q[t]),
            "after": answer(new["main"], q[t]),
            "boundary": answer(a["main"], q[t]),
        }[spec.read], new

    periods = {m: spec.chunk if m == "main" else spec.chunk_others or spec.chunk for m in w}
    anchor, outputs, time = dict(w), [], len(q)
    for t in range(time):
        for m in w:
            if t % periods[m] == 0 and m not in spec.static:
                anchor[m] = w[m]
        used = anchor
        if printed and t % spec.chunk == 0:
            ahead = dict(w)
            for s in range(t, min(t + spec.chunk, time)):
                _, ahead = token(s, ahead, anchor)
        if printed:
            used = ahead
        y, w = token(t, w, used)
        outputs.append(y)
    return torch.stack(outputs), w


@pytest.mark.parametrize("read", ["before", "after", "boundary"])
@pytest.mark.parametrize("retention", [Decay(), BACK], ids=str)
@pytest.mark.parametrize(("chunk", "others"), [(1, None), (4, None), (6, 2), (2, 5)])
def test_both_engines_are_the_papers_equations(chunk: int, others: int | None, retention: Retention, read: str) -> None:
    """Nested Learning, eq. 86–88 at chunk 1, eq. 90–91 read causally otherwise; decay to 0, and to the initial memories."""
    spec, w0 = build(1, chunk=chunk, chunk_others=others, read=read, retention=retention)
    q, k, v, _ = example(spec, lanes=1, time=15)
    expected, end = by_hand(spec, w0, *(x[0, 0] for x in (q, k, v)))
    for engine in ("reference", "chunked"):
        y, state = nl.memory.scan(spec, w0, q, k, v, engine=engine)
        close(y[0, 0], expected, 1e-10)
        for name, weights in spec.split(state.weights).items():
            for mine, theirs in zip(weights, end[name], strict=True):
                close(mine[0, 0], theirs, 1e-10)


@pytest.mark.parametrize("static", [("k",), ("v",), ("k", "v")])
@pytest.mark.parametrize(("chunk", "others"), [(1, None), (4, 3)])
def test_static_generators_stay_as_they_began(chunk: int, others: int | None, static: tuple[str, ...]) -> None:
    """The rows "k static" and "v static" of the paper's ablation: the others learn, by what these answer at first."""
    spec, w0 = build(1, chunk=chunk, chunk_others=others, static=static)
    q, k, v, _ = example(spec, lanes=1, time=15)
    expected, end = by_hand(spec, w0, *(x[0, 0] for x in (q, k, v)))
    adaptive, _ = by_hand(build(1, chunk=chunk, chunk_others=others)[0], w0, *(x[0, 0] for x in (q, k, v)))
    assert (expected - adaptive).abs().max() > 1e-3
    start = spec.split(spec.start(w0, 1).weights)
    for engine in ("reference", "chunked"):
        y, state = nl.memory.scan(spec, w0, q, k, v, engine=engine)
        close(y[0, 0], expected, 1e-10)
        anchors = spec.split(state.anchor)
        for name, weights in spec.split(state.weights).items():
            for mine, theirs, at, first in zip(weights, end[name], anchors[name], start[name], strict=True):
                if name in static:
                    assert torch.equal(at, first)
                else:
                    close(mine[0, 0], theirs, 1e-10)


def test_static_generators_learn_slowly_on_a_carried_segment() -> None:
    spec, w0 = build(1, chunk=4, static=("k",), adaptive_q=True)
    inputs = example(spec, time=6)
    _, state = nl.memory.scan(spec, w0, *inputs)
    w0 = [w.requires_grad_() for w in w0]
    y, after = nl.memory.scan(spec, w0, *inputs, nl.state.detach(state))
    found = dict(zip(spec.names, torch.autograd.grad(y.square().sum(), w0, allow_unused=True), strict=True))
    assert all(found[name] is not None and found[name].any() for name in ("k.0", "k.1"))
    assert found["v.0"] is None or not found["v.0"].any(), "it has been moved, and its state is its own"
    assert after.position.tolist() == [12, 12]


def test_at_chunk_1_the_boundary_is_the_state_before() -> None:
    outputs = {}
    for read in ("before", "after", "boundary"):
        spec, w0 = build(1, chunk=1, read=read)
        outputs[read] = nl.memory.scan(spec, w0, *example(spec))[0]
    close(outputs["boundary"], outputs["before"])
    assert (outputs["after"] - outputs["before"]).abs().max() > 1e-2


def test_the_printed_index_is_acausal_and_ours_is_not() -> None:
    """Eq. 90 as printed takes the current chunk's last state: a later token of the chunk would reach an earlier output."""
    spec, w0 = build(1, chunk=5, lr_max=0.5)
    q, k, v, _ = example(spec, lanes=1, time=10)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 8] += 1
    for printed in (False, True):
        a, b = (by_hand(spec, w0, *(x[0, 0] for x in xs), printed=printed)[0] for xs in ((q, k, v), changed))
        assert (float((a[:8] - b[:8]).abs().max()) > 1e-4) is printed
        assert torch.equal(a[:8], b[:8]) is not printed


@pytest.mark.parametrize("read", ["before", "after", "boundary"])
@pytest.mark.parametrize(("chunk", "others"), [(5, 2), (3, 8), (1, 4)])
def test_a_later_token_reaches_no_earlier_output(chunk: int, others: int, read: str) -> None:
    spec, w0 = build(2, chunk=chunk, chunk_others=others, read=read)
    inputs = example(spec, time=14)
    y, _ = nl.memory.scan(spec, w0, *inputs)
    for token in (0, 4, 6, 13):
        for which in range(3):
            changed = [x.clone() for x in inputs[:3]]
            changed[which][0, :, token] += 1
            z, _ = nl.memory.scan(spec, w0, *changed)
            assert torch.equal(z[0, :, :token], y[0, :, :token])
            assert torch.equal(z[1], y[1])


def only_main(
    rule: object, bias: object, retention: object = None, read: str = "after"
) -> tuple[SelfModifying, list[Tensor]]:
    """Matrix memories at chunk 1, of which only the main one moves within a test's length."""
    choices = {} if retention is None else {"retention": retention}
    return build(
        3, network=IDENTITY, others=IDENTITY, rule=rule, bias=bias, chunk=1, chunk_others=NEVER, read=read, **choices
    )


def generated(spec: SelfModifying, w0: list[Tensor], inputs: list) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """k, v̂_main, η, α by hand, with v̂ from the states of a token-by-token run. Matrix memories."""
    named = dict(zip(spec.names, w0, strict=True))
    _, xk, xv, _ = inputs
    k = F.normalize(xk @ named["k.0"], dim=-1)
    v = xv @ named["v.0"]
    logit = {g: (xk @ named[f"{g}.0"] @ named[f"{g}.weight"] + named[f"{g}.bias"])[..., 0] for g in spec.gates}
    alpha = torch.sigmoid(logit["retention"]) if "retention" in logit else None
    state, targets = None, []
    for t in range(xk.shape[2]):
        main = named["main.0"] if state is None else spec.split(state.weights)["main"][0]
        targets.append(v[:, :, t, None] @ main)
        _, state = nl.memory.scan(spec, w0, *part(inputs, t, t + 1), state)
    return k, torch.cat(targets, 2), spec.lr_max * torch.sigmoid(logit["lr"]), alpha


def test_dot_product_with_erasing_is_deltanet_on_self_made_values() -> None:
    """Nested Learning, eq. 92 with the sign of its gradient, α = 1: DeltaNet with β = η and values M_{t−1}(v)."""
    spec, w0 = only_main(DeltaGradient("with_decay"), DotProduct(), Full())
    inputs = example(spec)
    k, target, lr, _ = generated(spec, w0, inputs)
    deltanet = nl.memory.named("deltanet", key_dim=D)
    main = [w0[spec.names.index("main.0")]]
    y, _ = nl.memory.scan(spec, w0, *inputs)
    close(y, nl.memory.scan(deltanet, main, inputs[0], k, target, Gates(lr=lr))[0])


def test_dot_product_with_erasing_and_decay_is_gated_deltanet_with_rescaled_gates() -> None:
    """β = η/α, v → αv̂ (derived)."""
    spec, w0 = only_main(DeltaGradient("with_decay"), DotProduct())
    inputs = example(spec)
    k, target, lr, alpha = generated(spec, w0, inputs)
    main = [w0[spec.names.index("main.0")]]
    gates = Gates(lr=lr / alpha, retention=alpha)
    gated = nl.memory.named("gated_deltanet", key_dim=D)
    y, _ = nl.memory.scan(spec, w0, *inputs)
    close(y, nl.memory.scan(gated, main, inputs[0], k, alpha[..., None] * target, gates)[0])


def test_l2_without_the_erasing_factor_is_the_delta_rule_with_decay() -> None:
    spec, w0 = only_main(Gradient(), L2())
    inputs = example(spec)
    k, target, lr, alpha = generated(spec, w0, inputs)
    w, outputs = w0[spec.names.index("main.0")].expand(2, -1, -1, -1), []
    for t in range(k.shape[2]):
        kt, now = k[:, :, t, None], (slice(None), slice(None), t, None, None)
        w = alpha[now] * w - lr[now] * kt.mT @ (kt @ w - target[:, :, t, None])
        outputs.append(inputs[0][:, :, t, None] @ w)
    y, _ = nl.memory.scan(spec, w0, *inputs)
    close(y, torch.cat(outputs, 2))


def test_l2_with_erasing_recalls_half_of_a_repeated_pair() -> None:
    """η/(1 − α + 2η) at α = 1: the old content is erased twice (derived). v ⟂ k keeps v̂ where it is."""
    spec, w0 = only_main(DeltaGradient("with_decay"), L2(), Full())
    named = dict(zip(spec.names, w0, strict=True))
    named["k.0"][:], named["v.0"][:] = torch.eye(D), torch.eye(D)
    k, v = torch.zeros(1, HEADS, 200, D).double(), torch.zeros(1, HEADS, 200, D).double()
    k[..., 0], v[..., 1] = 1, 1
    y, state = nl.memory.scan(spec, list(named.values()), k, k, v)
    target = v[:, :, :1] @ named["main.0"]
    close(y[:, :, -1:], 0.5 * target)
    close(spec.split(state.weights)["main"][0][:, :, 1:2], target)


def test_no_steps_and_no_decay_leave_static_projections() -> None:
    spec, w0 = build(4, network=IDENTITY, others=IDENTITY, retention=Full(), adaptive_q=True, chunk=3)
    named = dict(zip(spec.names, w0, strict=True))
    named["lr.bias"][:] = -1e4
    q, k, v, _ = example(spec)
    y, state = nl.memory.scan(spec, w0, q, k, v)
    close(y, F.normalize(q @ named["q.0"], dim=-1) @ named["main.0"])
    same(state._replace(position=torch.zeros(2)), spec.start(w0, 2))


def test_what_is_let_go_goes_back_to_the_initial_memories() -> None:
    """Without steps they stay as they began, which decay to 0 takes from them; and where nothing is let go, both are one."""
    runs = {}
    for retention in (BACK, Decay()):
        for lr, alpha in ((-60.0, 0.0), (0.5, 60.0)):
            spec, w0 = build(21, retention=retention, chunk=3)
            for name, w in zip(spec.names, w0, strict=True):
                if name == "retention.weight":
                    w.zero_()
                if name.endswith("bias"):
                    w.fill_({"lr.bias": lr, "retention.bias": alpha}[name])
            q, k, v, _ = example(spec, time=14)
            y, state = spec.scan(w0, q, k, v)
            runs[retention, alpha] = y, spec.start(w0, 2).weights, state.weights
    _, start, end = runs[BACK, 0.0]
    for a, b in zip(end, start, strict=True):
        close(a, b)
    assert all(float(w.abs().max()) < 1e-3 for w in runs[Decay(), 0.0][2])
    close(runs[BACK, 60.0][0], runs[Decay(), 60.0][0])
    for a, b, first in zip(runs[BACK, 60.0][2], runs[Decay(), 60.0][2], runs[BACK, 60.0][1], strict=True):
        close(a, b)
        assert float((a - first).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "rule", [DeltaGradient("with_decay"), DeltaGradient("after_decay", with_momentum=True)], ids=str
)
def test_going_back_keeps_every_contract(rule: DeltaGradient) -> None:
    spec = nl.memory.named("self_modifying", key_dim=D, retention=BACK, rule=rule)
    assert spec.describe()["retention"] == "decay to the initial weights"
    testing.check(spec)


def test_the_initial_memories_learn_on_a_carried_segment() -> None:
    """What is let go returns to the live slow weights, so that they have a gradient behind a detached state."""
    spec, w0 = build(4, retention=BACK)
    q, k, v, _ = example(spec, time=12)
    _, state = spec.scan(w0, q, k, v)
    for w in w0:
        w.requires_grad_()
    y, _ = spec.scan(w0, q, k, v, None, nl.state.detach(state))
    for name, g in zip(spec.names, torch.autograd.grad(y.sum(), w0), strict=True):
        assert float(g.abs().max()) > 0, name


def test_with_empty_last_layers_the_first_token_is_its_own_key_and_value() -> None:
    """k = x/‖x‖, v = x and v̂ = x, so that the last layers move by −η hᵀ(k − x); η by the read-out of x itself."""
    spec, w0 = build(5, chunk=4)
    named = dict(zip(spec.names, w0, strict=True))
    for name, w in named.items():
        if name.endswith(".1"):
            w.zero_()
    q, x, _, _ = example(spec, time=1)
    y, state = nl.memory.scan(spec, w0, q, x, x)
    close(y, q)
    k = F.normalize(x, dim=-1)
    lr = spec.lr_max * torch.sigmoid(x @ named["lr.weight"] + named["lr.bias"])
    for name, (w1, w2) in spec.split(state.weights).items():
        h = F.gelu(k @ named[f"{name}.0"])
        close(w2, -(lr * h).mT @ (k - x))
        alpha = torch.sigmoid(x @ named["retention.weight"] + named["retention.bias"])
        close(w1, alpha * named[f"{name}.0"] - lr * k.mT @ (k @ named[f"{name}.0"]))


@pytest.mark.parametrize(
    "choices",
    [
        {"chunk": 2},
        {"chunk": 3, "chunk_others": 1, "adaptive_q": True, "read": "after"},
        {"chunk": 2, "retention": BACK},
    ],
)
def test_outer_gradients_pass_gradcheck(choices: dict) -> None:
    """Through v̂, k, the gates, the read-outs and every initial state."""
    spec = nl.memory.named("self_modifying", key_dim=2, network=MLP(expansion=2.0, norm=False), **choices)
    generator = torch.Generator().manual_seed(0)
    w0 = [0.7 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in spec.init(1)]
    inputs = [
        x.requires_grad_() for x in (*w0, *spec.example(generator, lanes=1, heads=1, time=5, dtype=torch.float64)[:3])
    ]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, state = nl.memory.scan(spec, tensors[:-3], *tensors[-3:])
        return y, *state.weights

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_each_bank_moves_its_anchor_at_its_own_borders() -> None:
    spec, w0 = build(6, chunk=4, chunk_others=6)
    inputs = example(spec, time=12)
    state = None
    before = spec.split(spec.start(w0, 2).anchor)
    for t in range(12):
        _, state = nl.memory.scan(spec, w0, *part(inputs, t, t + 1), state)
        after = spec.split(state.anchor)
        for name in after:
            moved = not torch.equal(after[name][0], before[name][0])
            assert moved is ((t + 1) % (4 if name == "main" else 6) == 0), (name, t)
        before = after


def test_read_outs_are_live_on_a_carried_segment() -> None:
    spec, w0 = build(7, chunk=3)
    inputs = example(spec, time=16)
    _, state = nl.memory.scan(spec, w0, *part(inputs, 0, 7))
    state = nl.state.detach(state)
    for w in w0:
        w.requires_grad_()
    y, _ = nl.memory.scan(spec, w0, *part(inputs, 7, 16), state)
    gradients = torch.autograd.grad(y.square().sum(), w0, allow_unused=True)
    for name, gradient in zip(spec.names, gradients, strict=True):
        readout = name.endswith(("weight", "bias"))
        assert (gradient is not None and bool(gradient.abs().max() > 0)) is readout, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["paper", "momentum and erasing", "adaptive q", "matrices"])
def test_a_faulty_token_writes_into_no_memory_of_its_lane(variant: str, bad: float) -> None:
    spec, w0 = build(8, chunk=4, chunk_others=3, **VARIANTS[variant])
    clean = example(spec, time=12)
    untouched, _ = nl.memory.scan(spec, w0, *clean)
    for place in ("q", "k", "v", *(n for n, _ in clean[3].items())):
        inputs = [*(x.clone() for x in clean[:3]), clean[3].map(torch.clone)]
        target = dict(zip("qkv", inputs, strict=False)).get(place)
        (getattr(inputs[3], place) if target is None else target)[0, 1, 5] = bad
        runs = [
            nl.memory.scan(spec, w0, *inputs, engine="reference"),
            nl.memory.scan(spec, w0, *inputs),
            by_pieces(spec, w0, inputs, list(range(13))),
        ]
        for y, state in runs:
            assert torch.isfinite(y).all()
            assert state.faults.tolist() == [1, 0]
            close(y, runs[0][0])
            same(state, runs[0][1])
            close(y[1], untouched[1])
        ends = [nl.memory.scan(spec, w0, *part(inputs, 0, time))[1] for time in (5, 6)]
        for a, b in zip(*((*e.weights, *e.momentum) for e in ends), strict=True):
            assert torch.allclose(a[0], b[0], rtol=1e-14, atol=1e-14), place  # in tiles of two tokens and of one
            assert not torch.allclose(a[1], b[1], rtol=1e-12, atol=1e-12), place
        assert ends[1].position.tolist() == [6, 6]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_overflows_while_it_is_generated_is_no_write(place: int) -> None:
    """Finite inputs whose key, value, gate or query is not: the norm of 3e38 overflows float32."""
    spec, w0 = build(9, chunk=4, adaptive_q=True)
    w0 = [w.float() for w in w0]
    inputs = [*(x.float().clone() for x in example(spec, time=9)[:3]), Gates()]
    inputs[place][0, :, 6] = 3e38
    runs = [
        nl.memory.scan(spec, w0, *inputs, engine="reference"),
        nl.memory.scan(spec, w0, *inputs),
        by_pieces(spec, w0, inputs, list(range(10))),
    ]
    for y, state in runs:
        assert torch.isfinite(y).all()
        assert state.faults.tolist() == [1, 0]
    ends = [nl.memory.scan(spec, w0, *part(inputs, 0, time))[1] for time in (6, 7)]
    for a, b in zip(ends[0].weights, ends[1].weights, strict=True):
        assert torch.equal(a[0], b[0])


def test_faulty_tokens_leave_finite_outer_gradients() -> None:
    spec, w0 = build(9, chunk=4, adaptive_q=True)
    q, k, v, _ = example(spec, time=9)
    q[0, 0, 2] = k[0, 1, 4] = v[1, 0, 6] = float("nan")
    inputs = [x.requires_grad_() for x in (*w0, q, k, v)]
    y, _ = nl.memory.scan(spec, w0, q, k, v)
    for gradient in torch.autograd.grad(y.square().sum(), inputs):
        assert torch.isfinite(gradient).all()


def test_weights_that_overflow_go_back_to_their_anchors() -> None:
    """Steps of 3e38 overflow, and all memories of the lane go back together. A lane that reads zeros writes zeros."""
    spec, w0 = build(10, chunk=8, chunk_others=4, rule=Gradient(), lr_max=3e38)
    w0 = [w.float() for w in w0]
    inputs = [x.float() for x in example(spec, time=3)[:3]]
    for x in inputs:
        x[1] = 0
        x[0, :, 1:] = x[0, :, :1]
    inputs.append(Gates())
    anchor = spec.start(w0, 2).anchor
    for engine in (
        lambda: nl.memory.scan(spec, w0, *inputs, engine="reference"),
        lambda: nl.memory.scan(spec, w0, *inputs),
        lambda: by_pieces(spec, w0, inputs, [0, 1, 2, 3]),
    ):
        _, state = engine()
        assert state.faults[0] > 0 == state.faults[1]
        for a, b, w in zip(state.anchor, anchor, state.weights, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(w[0], b[0])


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_default_settings_stay_bounded_on_a_long_stream(chunk: int) -> None:
    spec = nl.memory.named("self_modifying", key_dim=8, chunk=chunk)
    w0 = spec.init(HEADS, torch.Generator().manual_seed(0))
    q, k, v, _ = spec.example(torch.Generator().manual_seed(1), time=600)
    with torch.no_grad():
        y, state = nl.memory.scan(spec, w0, q, k, v)
    assert state.faults.tolist() == [0, 0]
    assert y.abs().max() < 100
    assert all(w.norm(dim=(-2, -1)).max() < 100 for w in state.weights)


def test_unit_values_stop_the_feedback_of_a_memory_on_its_own_values() -> None:
    largest = []
    for unit in (False, True):
        spec, w0 = build(6, unit_values=unit, chunk=4, lr_max=0.5)
        q, k, v, _ = example(spec, time=400)
        with torch.no_grad():
            _, state = nl.memory.scan(spec, w0, q, F.normalize(k, dim=-1), 4 * v)
        largest.append(max(float(w.abs().max()) for w in state.weights))
    free, unit = largest
    assert unit < 10
    assert not free < 1e6


def test_report_has_the_gates_it_made() -> None:
    spec, w0 = build(11, chunk=4, chunk_others=3)
    q, k, v, _ = example(spec, time=9)
    report = nl.Report()
    y, _ = nl.memory.scan(spec, w0, q, k, v, report=report.scope("main"))
    with without():  # a report is made by the framework's operations, whose roundings are theirs
        assert torch.equal(y, nl.memory.scan(spec, w0, q, k, v)[0])
    close(y, nl.memory.scan(spec, w0, q, k, v)[0])
    entry = report["main"]
    named = dict(zip(spec.names, w0, strict=True))
    x = k[:, :, :1]
    for gate, top in (("lr", spec.lr_max), ("retention", 1.0)):
        assert entry[gate].shape == entry["surprise"].shape == entry["update"].shape == (2, HEADS, 9)
        made = x + F.gelu(x @ named[f"{gate}.0"]) @ named[f"{gate}.1"]
        close(entry[gate][..., :1], top * torch.sigmoid(made @ named[f"{gate}.weight"] + named[f"{gate}.bias"])[..., 0])


def test_split_and_names_are_views_of_the_same_weights() -> None:
    spec, w0 = build(12, adaptive_q=True)
    state = spec.start(w0, 3)
    named = dict(zip(spec.names, w0, strict=True))
    for name, weights in spec.split(state.weights).items():
        for layer, w in enumerate(weights):
            assert torch.equal(w, named[f"{name}.{layer}"].expand(3, -1, -1, -1))
    for a, b in zip(spec.join(spec.split(state.weights)), state.weights, strict=True):
        assert torch.equal(a, b)
    assert [bank.names for bank in spec.banks] == [("k", "v", "lr", "retention", "q"), ("main",)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, HEADS, 50, D, generator=generator).double()
    fresh = nl.memory.named("self_modifying", key_dim=D)
    start = fresh.split(fresh.start([w.double() for w in fresh.init(HEADS, generator)], 1).weights)
    assert (fresh.others.apply(lambda layer, h: h @ start["k"][layer], x) - x).abs().max() < 0.2, "k ≈ x at first"


def test_two_periods_are_described() -> None:
    words = nl.memory.named("self_modifying", chunk=16, chunk_others=64).describe()
    assert words["period"] == "16 tokens (the other memories: 64)"
    assert nl.memory.named("self_modifying").describe()["period"] == "16 tokens"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"value_dim": 3}, "equal sizes"),
        ({"network": Matrix()}, "identity"),
        ({"others": Matrix()}, "identity"),
        ({"chunk_others": 0}, "chunk_others is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"read": "now"}, "read is 'now'"),
        ({"lr_max": 0.0}, "lr_max is 0.0"),
        ({"static": ("lr",)}, "expected a tuple of names among 'k', 'v' and 'q'"),
        ({"static": ("q",)}, "leave it out, or set adaptive_q"),
        ({"bias": Omega(L2(), length=2)}, "one token"),
        ({"retention": Softmax()}, "Decay"),
        ({"expansion": 2}, "no choice expansion"),
    ],
)
def test_impossible_settings_are_refused_in_words(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nl.memory.named("self_modifying", key_dim=4, **choices)


def test_wrong_inputs_are_refused_in_words() -> None:
    spec, w0 = build(13)
    q, k, v, _ = example(spec, time=5)
    other = nl.memory.named("titans", key_dim=D)
    shape = (2, HEADS, 5)
    for arguments, words in (
        ({"w0": w0[:-1]}, "w0 has 13 weights; expected 14"),
        ({"state": other.start(other.init(HEADS), 2)}, "another memory"),
        ({"gates": Gates(lr=torch.ones(shape))}, "no such gate"),
        ({"gates": Gates(momentum=torch.ones(shape))}, "no such gate"),
        ({"engine": "quick"}, "engine is 'quick'"),
        ({"tile": 0}, "tile is 0"),
        ({"valid": torch.ones(2, 5)}, "valid is torch.float32"),
    ):
        options = {"w0": w0, **arguments}
        with pytest.raises(ValueError, match=words):
            nl.memory.scan(spec, options.pop("w0"), q, k, v, **options)
