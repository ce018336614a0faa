"""The contracts over every named memory: the fast engine is the definition, and no cut of a stream changes anything.

A newly registered system is picked up by name. The contracts themselves stand in `nestling.testing`, for any memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import Gates, Memory

NAMES = nl.memory.names()
COINCIDE = {("mamba2_like", "retnet")}
SHORT = {
    "tnt": {"global_chunk": 7, "shard": 10},  # periods that a test's few tokens reach
    "lattice_decode": {"slots": 5},
    "lattice_similarity": {"slots": 3},
    "lattice_encode": {"slots": 4},
    "trellis": {"slots": 5},
}

cases = st.builds(
    testing.Case,
    time=st.integers(1, 40),
    chunk=st.sampled_from([1, 2, 5, 16, 64]),
    tile=st.sampled_from([None, 1, 3, 7]),
    read=st.sampled_from(testing.READS),
    seed=st.integers(0, 10_000),
    masks=st.booleans(),
)


def small(name: str) -> Memory:
    spec: Memory = nl.memory.named(name, key_dim=4, **SHORT.get(name, {}))
    return spec


@pytest.mark.parametrize("name", NAMES)
@given(case=cases)
def test_chunked_equals_reference_in_outputs_state_and_every_gradient(name: str, case: testing.Case) -> None:
    testing.chunked_equals_reference(small(name), case)


@pytest.mark.parametrize("name", NAMES)
@given(case=cases, share=st.floats(0, 1))
def test_splitting_a_stream_changes_nothing(name: str, case: testing.Case, share: float) -> None:
    testing.splitting_changes_nothing(small(name), case, share)


@pytest.mark.parametrize("contract", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, contract: Callable[[Memory], None]) -> None:
    contract(small(name))


@pytest.mark.parametrize("read", testing.READS)
@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_never_reaches_an_earlier_output_or_another_lane(name: str, read: str) -> None:
    testing.causal_and_apart(small(name), read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_are_computed_and_kept_in_float32(name: str, dtype: torch.dtype) -> None:
    testing.half_is_computed_in_float32(small(name), dtype)


def test_no_system_is_another_under_a_second_name() -> None:
    """Same inputs, same initial weights, gates away from their neutral values: every pair must differ somewhere."""
    outputs: dict[str, Tensor] = {}
    for name in NAMES:
        spec = nl.memory.named(name, key_dim=4, chunk=4)
        generator = torch.Generator().manual_seed(29)
        q, k, v, _ = spec.example(generator, heads=testing.HEADS, time=24, dtype=torch.float64)
        shape = (2, testing.HEADS, 24)
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
        w0 = [torch.randn(testing.HEADS, *s, generator=weights, dtype=torch.float64) for s in spec.shapes]
        outputs[name] = nl.memory.scan(spec, w0, q, k, v, gates)[0]
    for a, b in itertools.combinations(NAMES, 2):
        gap = float((outputs[a] - outputs[b]).abs().max())
        if (a, b) in COINCIDE:  # told apart by where their gates come from, which the notes must say
            assert gap == 0, f"{a} no longer equals {b}"
            assert f"Equal to {b} on equal gates" in nl.memory.describe(a)["notes"]
        else:
            assert gap > 1e-3, f"{a} equals {b}"
