"""The contracts over every named memory: the fast engine is the definition, and no cut of a stream changes anything.

A newly registered system is picked up by name. The oracle is the token-by-token reference with autograd gradients.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling.memory import Gates, Memory

NAMES = nl.memory.names()
HEADS = 2
COINCIDE = {("mamba2_like", "retnet")}
SHORT = {"tnt": {"global_chunk": 7, "shard": 10}}  # periods that a test's few tokens reach


def build(name: str, seed: int, **choices: object) -> tuple[Memory, list[Tensor]]:
    """A small float64 memory whose initial weights are never all zero, so that nothing hides behind an empty memory."""
    spec = nl.memory.named(name, key_dim=4, **SHORT.get(name, {}), **choices)
    generator = torch.Generator().manual_seed(seed)
    w0 = [w.double() for w in spec.init(HEADS, generator)]
    empty = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in w0 if not w.any()]
    return spec, [w if w.any() else empty.pop(0) for w in w0]


def leaves(state: object) -> list[Tensor]:
    return nl.state.leaves(state)


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-8) -> None:
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach(), expected.detach()
    error = (actual.double() - expected.double()).abs().amax() if actual.numel() else torch.zeros(())
    bound = tolerance * max(1.0, float(expected.double().abs().amax()) if expected.numel() else 0.0)
    assert bool(error <= bound), f"{what}: off by {float(error):.2e}, allowed {bound:.2e}"  # NaN fails


def assert_same(a: object, b: object, tolerance: float = 1e-8) -> None:
    for number, (x, y) in enumerate(zip(leaves(a), leaves(b), strict=True)):
        assert_close(x, y, f"state leaf {number}", tolerance)


def cut(x: tuple[Tensor, Tensor, Tensor, Gates], first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Gates]:
    q, k, v, gates = x
    part = slice(first, last)
    return q[:, :, part], k[:, :, part], v[:, :, part], gates[part]


shapes = st.fixed_dictionaries(
    {
        "time": st.integers(1, 40),
        "chunk": st.sampled_from([1, 2, 5, 16, 64]),
        "tile": st.sampled_from([None, 1, 3, 7]),
        "read": st.sampled_from(["after", "before", "boundary"]),
        "seed": st.integers(0, 10_000),
        "masks": st.booleans(),
    }
)


def masks(seed: int, lanes: int, time: int, wanted: bool) -> dict[str, Tensor | None]:
    if not wanted:
        return {"reset": None, "valid": None}
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "reset": torch.rand(lanes, time, generator=generator) < 0.1,
        "valid": torch.rand(lanes, time, generator=generator) < 0.8,
    }


@pytest.mark.parametrize("name", NAMES)
@given(case=shapes)
def test_chunked_equals_reference_in_outputs_state_and_every_gradient(name: str, case: dict) -> None:
    spec, w0 = build(name, case["seed"], chunk=case["chunk"], read=case["read"])
    generator = torch.Generator().manual_seed(case["seed"])
    example = spec.example(generator, heads=HEADS, time=case["time"], dtype=torch.float64)
    if example[3].retention is not None:
        example[3].retention[0, 0, case["time"] // 2] = 0.0  # a gate of exactly 0 is legal
    mask = masks(case["seed"], 2, case["time"], case["masks"])
    inputs = [*w0, *example[:3], *(gate for _, gate in example[3].items())]
    for x in inputs:
        x.requires_grad_()
    runs = []
    for options in ({"engine": "reference"}, {"engine": "chunked", "tile": case["tile"]}):
        y, state = nl.memory.scan(spec, w0, *example, **options, **mask)
        probe = torch.Generator().manual_seed(7)
        total = (y * torch.randn(y.shape, generator=probe, dtype=y.dtype)).sum()
        for w in leaves(state):
            if not w.is_floating_point() or not w.requires_grad:
                continue
            total = total + (w * torch.randn(w.shape, generator=probe, dtype=w.dtype)).sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        runs.append((y.detach(), state, gradients))
    (y, state, gradients), (fast_y, fast_state, fast_gradients) = runs
    assert_close(fast_y, y, "outputs")
    assert_same(fast_state, state)
    for number, (slow, fast) in enumerate(zip(gradients, fast_gradients, strict=True)):
        zero = torch.zeros_like(inputs[number])
        assert_close(zero if fast is None else fast, zero if slow is None else slow, f"gradient {number}")


@pytest.mark.parametrize("name", NAMES)
@given(case=shapes, share=st.floats(0, 1))
def test_splitting_a_stream_changes_nothing(name: str, case: dict, share: float) -> None:
    spec, w0 = build(name, case["seed"], chunk=case["chunk"], read=case["read"])
    time = case["time"]
    example = spec.example(torch.Generator().manual_seed(case["seed"]), heads=HEADS, time=time, dtype=torch.float64)
    mask = masks(case["seed"], 2, time, case["masks"])
    whole, end = nl.memory.scan(spec, w0, *example, **mask)
    at = round(share * time)
    for bounds in ([0, at, time], list(range(time + 1))):
        state, outputs = None, []
        for first, last in itertools.pairwise(bounds):
            part = {n: None if m is None else m[:, first:last] for n, m in mask.items()}
            y, state = nl.memory.scan(spec, w0, *cut(example, first, last), state, **part)
            outputs.append(y)
        assert_close(torch.cat(outputs, 2), whole, f"outputs of the split at {bounds[1]}")
        assert_same(state, end)


@pytest.mark.parametrize("name", NAMES)
def test_dropping_the_state_at_a_split_is_noticed(name: str) -> None:
    spec, w0 = build(name, 3, chunk=4)
    example = spec.example(torch.Generator().manual_seed(3), heads=HEADS, time=20, dtype=torch.float64)
    whole, _ = nl.memory.scan(spec, w0, *example)
    forgetful, _ = nl.memory.scan(spec, w0, *cut(example, 9, 20))
    assert (whole[:, :, 9:] - forgetful).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_lanes_at_different_positions_are_read_as_if_alone(name: str) -> None:
    spec, w0 = build(name, 5, chunk=6)
    example = spec.example(torch.Generator().manual_seed(5), lanes=3, heads=HEADS, time=25, dtype=torch.float64)
    valid = torch.ones(3, 25, dtype=torch.bool)
    for lane, skipped in enumerate((0, 4, 11)):
        valid[lane, :skipped] = False
    y, state = nl.memory.scan(spec, w0, *example, valid=valid)
    for lane, skipped in enumerate((0, 4, 11)):
        one = [x[lane : lane + 1] for x in example[:3]]
        gates = example[3].map(lambda g, lane=lane: g[lane : lane + 1])
        alone, end = nl.memory.scan(spec, w0, *cut((*one, gates), skipped, 25))
        assert_close(y[lane : lane + 1, :, skipped:], alone, f"lane {lane}")
        for x, z in zip(leaves(state), leaves(end), strict=True):
            assert_close(x[lane : lane + 1], z, f"state of lane {lane}")
        assert not y[lane, :, :skipped].any(), "an invalid token is answered with zeros"
    assert state.position.tolist() == [25, 21, 14]


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_never_reaches_an_earlier_output_or_another_lane(name: str, read: str) -> None:
    spec, w0 = build(name, 11, chunk=5, read=read)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(11), heads=HEADS, time=18, dtype=torch.float64)
    y, _ = nl.memory.scan(spec, w0, q, k, v, gates)
    for token in (2, 7, 17):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[0, :, token] = 3 * x[0, :, token] + 1
        z, _ = nl.memory.scan(spec, w0, *changed, gates)
        assert torch.equal(z[0, :, :token], y[0, :, :token])
        assert torch.equal(z[1], y[1])
        assert not torch.equal(z[0, :, token:], y[0, :, token:])


@pytest.mark.parametrize("name", NAMES)
def test_all_modes_give_equal_results(name: str) -> None:
    spec, w0 = build(name, 13, chunk=4)
    example = spec.example(torch.Generator().manual_seed(13), heads=HEADS, time=21, dtype=torch.float64)
    for x in example[:3]:
        x.requires_grad_()
    y, state = nl.memory.scan(spec, w0, *example)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, other = nl.memory.scan(spec, w0, *example)
        assert torch.equal(y.detach(), z)
        for a, b in zip(leaves(state), leaves(other), strict=True):
            assert torch.equal(a.detach(), b)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_within_its_tolerance(name: str) -> None:
    spec, w0 = build(name, 17, chunk=16)
    example = spec.example(torch.Generator().manual_seed(17), heads=HEADS, time=40)
    y, _ = nl.memory.scan(spec, [w.float() for w in w0], *example, engine="reference")
    z, _ = nl.memory.scan(spec, [w.float() for w in w0], *example)
    assert_close(z, y, "float32", 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_are_computed_and_kept_in_float32(name: str, dtype: torch.dtype) -> None:
    spec, w0 = build(name, 19, chunk=8)
    example = spec.example(torch.Generator().manual_seed(19), heads=HEADS, time=24)
    low = [x.to(dtype) for x in example[:3]]
    gates = example[3].map(lambda g: g.to(dtype))
    w0 = [w.float() for w in w0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = nl.memory.scan(spec, w0, *low, gates)
    up, same = nl.memory.scan(spec, w0, *(x.float() for x in low), gates.map(lambda g: g.float()))
    assert y.dtype == dtype
    assert all(w.dtype == torch.float32 for w in leaves(state) if w.is_floating_point())
    assert torch.equal(y, up.to(dtype))
    assert_same(state, same, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_is_the_start_state(name: str) -> None:
    spec, w0 = build(name, 23)
    example = spec.example(torch.Generator().manual_seed(23), heads=HEADS, time=3, dtype=torch.float64)
    for engine in ("chunked", "reference"):
        y, state = nl.memory.scan(spec, w0, *cut(example, 0, 0), engine=engine)
        assert y.shape == (2, HEADS, 0, 4)
        assert_same(state, spec.start(w0, 2), 0.0)
    invalid = torch.zeros(2, 3, dtype=torch.bool)
    y, state = nl.memory.scan(spec, w0, *example, valid=invalid)
    assert not y.any()
    assert_same(state, spec.start(w0, 2), 0.0)


def test_no_system_is_another_under_a_second_name() -> None:
    """Same inputs, same initial weights, gates away from their neutral values: every pair must differ somewhere."""
    outputs: dict[str, Tensor] = {}
    for name in NAMES:
        spec = nl.memory.named(name, key_dim=4, chunk=4)
        generator = torch.Generator().manual_seed(29)
        q, k, v, _ = spec.example(generator, heads=HEADS, time=24, dtype=torch.float64)
        shape = (2, HEADS, 24)
        channels = {n: torch.linspace(1, 0.9, c).double() for n, c in spec.gate_channels.items()}
        neutral = {"lr": 0.3, "momentum": 0.5, "retention": 0.9, "window": 0.7, "threshold": 1.5}
        gates = Gates(
            **{
                n: (x * channels.get(n, torch.ones(1).double())).expand(*shape, spec.gate_channels.get(n, 1))
                if n in spec.gate_channels
                else torch.full(shape, x).double()
                for n, x in neutral.items()
                if n in spec.gates_used
            }
        )
        weights = torch.Generator().manual_seed(31)
        w0 = [torch.randn(HEADS, *s, generator=weights, dtype=torch.float64) for s in spec.shapes]
        outputs[name] = nl.memory.scan(spec, w0, q, k, v, gates)[0]
    for a, b in itertools.combinations(NAMES, 2):
        gap = float((outputs[a] - outputs[b]).abs().max())
        if (a, b) in COINCIDE:  # told apart by where their gates come from, which the notes must say
            assert gap == 0, f"{a} no longer equals {b}"
            assert f"Equal to {b} on equal gates" in nl.memory.describe(a)["notes"]
        else:
            assert gap > 1e-3, f"{a} equals {b}"
