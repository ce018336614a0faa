"""Every check can fail: a memory that breaks one contract is found out by that check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import nestling as nl
from nestling import testing
from nestling.memory import MemorySpec


class Careless(torch.autograd.Function):
    """x, whose backward pass adds what was never written."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad + 0 * torch.empty_like(grad)


@dataclass(frozen=True)
class Broken(MemorySpec):
    """A memory with one defect, named by `defect`."""

    defect: str = "none"

    def scan(self, w0: Any, q: Any, k: Any, v: Any, gates: Any = None, state: Any = None, **options: Any) -> Any:
        if self.defect == "forgets the state":
            state = None
        if self.defect == "cuts gradients" and state is not None:
            state = nl.state.detach(state)
        if self.defect == "works more and more" and state is not None:
            q = q + 0 * sum(q @ torch.eye(q.shape[-1]).to(q.dtype) for _ in range(int(state.position[0]) // 10_000))
        if self.defect == "state of its own" and state is not None and not hasattr(state.position, "own"):
            v = 2 * v
        if self.defect == "writes what is no number":
            k = torch.where(k.isnan(), 3.0, k)
        if self.defect == "mixes lanes":
            v = v + v.mean(0, keepdim=True)
        if self.defect == "looks ahead":
            v = v + v.mean(2, keepdim=True)
        if self.defect == "half weights" and q.dtype in (torch.bfloat16, torch.float16):
            v = (v * 1.01).to(v.dtype)
        y, new = super().scan(w0, q, k, v, gates, state, **options)
        if self.defect == "fast path drifts" and options.get("engine", "chunked") == "chunked":
            y = y + 1e-3 * q.sum()
        if self.defect == "unwritten cell":
            y = y + 0 * torch.empty_like(y)
        if self.defect == "unwritten cell in a step" and y.shape[2] == 1:
            y = y + 0 * torch.empty_like(y)
        if self.defect == "unwritten cell behind" and options.get("engine", "chunked") == "chunked":
            y = Careless.apply(y)
        if self.defect == "half gradients" and q.dtype in (torch.bfloat16, torch.float16):
            y = (y.detach() + 1.1 * (y - y.detach())).to(y.dtype)
        if self.defect == "half under autocast" and torch.is_autocast_enabled("cpu"):
            y = (y @ torch.eye(y.shape[-1], dtype=y.dtype)).to(y.dtype)
        if self.defect == "wrong gradient" and options.get("engine", "chunked") == "chunked":
            y = y.detach()
        if self.defect == "wrong without gradients" and not torch.is_grad_enabled():
            y = y + 1e-9
        if self.defect == "remembers nothing":
            y = v
        if self.defect == "counts nothing":
            new = new._replace(position=torch.zeros_like(new.position))
        if self.defect == "counts no faults":
            new = new._replace(faults=torch.zeros_like(new.faults))
        new.position.own = True
        return y, new


def case(**choices: Any) -> testing.Case:
    return testing.Case(time=9, chunk=4, **choices)


@pytest.mark.parametrize(
    ("defect", "check", "words"),
    [
        ("fast path drifts", lambda m: testing.chunked_equals_reference(m, case()), "outputs: off by"),
        ("unwritten cell", lambda m: testing.chunked_equals_reference(m, case()), "outputs: off by nan"),
        (
            "unwritten cell behind",
            lambda m: testing.chunked_equals_reference(m, case()),
            "gradient of initial weight 0: off by nan",
        ),
        (
            "unwritten cell in a step",
            lambda m: testing.splitting_changes_nothing(m, case(), 0.5),
            "split at 1: off by nan",
        ),
        (
            "wrong gradient",
            lambda m: testing.chunked_equals_reference(m, case()),
            "gradient of initial weight 0: off by",
        ),
        ("forgets the state", lambda m: testing.splitting_changes_nothing(m, case(), 0.5), "outputs of the split at 4"),
        ("remembers nothing", testing.dropping_the_state_is_noticed, "no effect"),
        ("mixes lanes", testing.lanes_are_read_as_if_alone, "lane 0: off by"),
        ("mixes lanes", lambda m: testing.causal_and_apart(m, "after"), "another lane"),
        ("looks ahead", lambda m: testing.causal_and_apart(m, "after"), "an earlier output"),
        ("wrong without gradients", testing.all_modes_are_equal, "no_grad"),
        ("fast path drifts", testing.float32_is_within_its_tolerance, "float32, 40 tokens, outputs: off by"),
        ("half weights", lambda m: testing.half_is_computed_in_float32(m, torch.bfloat16), "otherwise than in float32"),
        ("half gradients", lambda m: testing.half_is_computed_in_float32(m, torch.bfloat16), "gradient 0 with"),
        (
            "half under autocast",
            lambda m: testing.half_is_computed_in_float32(m, torch.float16),
            "otherwise than in float32",
        ),
        ("counts nothing", testing.lanes_are_read_as_if_alone, "position"),
        ("cuts gradients", testing.gradients_pass_through_a_state, "gradient 0 through a state"),
        ("works more and more", testing.a_token_costs_the_same_everywhere, "at position 1,000 are"),
        ("state of its own", testing.the_state_is_data, "saved and loaded"),
        ("writes what is no number", testing.a_token_that_is_no_number_is_left_out, "faults are|not finite"),
        ("counts no faults", testing.a_token_that_is_no_number_is_left_out, "faults are"),
    ],
)
def test_a_defect_is_found(defect: str, check: Any, words: str) -> None:
    check(Broken(4, 4))
    with pytest.raises(AssertionError, match=words):
        check(Broken(4, 4, defect=defect))


def test_one_call_checks_all() -> None:
    nl.testing.check(Broken(4, 4), cases=3)
    with pytest.raises(AssertionError, match="off by"):
        nl.testing.check(Broken(4, 4, defect="fast path drifts"), cases=1)


def test_cases_have_every_read_both_masks_and_the_shortest_text() -> None:
    found = list(testing.random_cases(6, 0))
    assert {c.read for c in found} == set(testing.READS)
    assert {c.masks for c in found} == {True, False}
    assert found[0].time == 1
    assert found[1].chunk > found[1].time
    assert list(testing.random_cases(6, 0)) == found
