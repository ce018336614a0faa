"""A memory is what answers the protocol: by name or not, with the engines shared or its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import Gates, Memory
from nestling.memory.protocol import TwoEngines
from nestling.state import register


@register
class SumState(NamedTuple):
    """Of `Sums`."""

    total: Tensor
    position: Tensor


@dataclass(frozen=True)
class Sums:
    """y_t = Σ_{i≤t} q_t kᵢᵀ vᵢ, by a class that inherits nothing."""

    key_dim: int
    value_dim: int
    name: str = "sums"
    chunk: int = 1
    read: str = "after"
    growth: str = "constant"
    shapes: tuple[tuple[int, int], ...] = ()
    gates_used: frozenset[str] = frozenset()
    update_period: int = 1
    anchored: bool = False
    deep: bool = False
    largest_steps: tuple[float, ...] = (1.0,)

    @property
    def gate_channels(self) -> dict[str, int]:
        return {}

    @property
    def parts(self) -> tuple[nl.memory.Part, ...]:
        return (nl.memory.Part("memory", self, self.describe()),)

    def init(self, heads: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return ()

    def start(self, w0: Any, lanes: int) -> SumState:
        return SumState(torch.zeros(lanes, 2, self.key_dim, self.value_dim), torch.zeros(lanes, dtype=torch.int64))

    def scan(
        self,
        w0: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None = None,
        state: SumState | None = None,
        *,
        engine: str = "chunked",
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Any = None,
        tile: int | None = None,
    ) -> tuple[Tensor, SumState]:
        state = self.start(w0, len(q)) if state is None else state
        running = state.total[:, :, None] + (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        y = (q.unsqueeze(-2) @ running).squeeze(-2)
        return y, SumState(running[:, :, -1], state.position + q.shape[2])

    def step(self, *given: Any, **options: Any) -> Any:
        return Memory.step(self, *given, **options)

    def describe(self) -> dict[str, str]:
        return dict.fromkeys(nl.memory.protocol.PARTS, "a sum")

    def example(
        self, generator: torch.Generator, *, lanes: int = 2, heads: int = 2, time: int = 40, dtype: Any = torch.float32
    ) -> testing.Example:
        shape = (3, lanes, heads, time, self.key_dim)
        q, k, v = torch.randn(*shape, generator=generator).to(dtype)
        return q, k, v, Gates()


def test_a_class_of_the_right_shape_is_a_memory_and_serves_as_one() -> None:
    spec = Sums(4, 4)
    assert isinstance(spec, Memory)
    example = spec.example(torch.Generator().manual_seed(0))
    y, state = nl.memory.scan(spec, (), *example)
    same = nl.memory.named("linear_attention", key_dim=4)
    expected, _ = same.scan(same.init(2), *example)
    testing.assert_close(y, expected, "outputs", 1e-4)
    q, k, v, _ = (x if isinstance(x, Gates) else x[:, :, 0] for x in example)
    one, after = spec.step((), q, k, v, None, state)
    assert one.shape == (2, 2, 4)
    assert after.position.tolist() == [41, 41]
    layer = nl.layers.Memory(dim=8, heads=2, spec=spec)
    z, _ = layer(torch.randn(2, 5, 8))
    assert z.shape == (2, 5, 8)
    testing.all_modes_are_equal(spec)


def test_what_lacks_a_part_of_the_protocol_is_no_memory() -> None:
    assert not isinstance(object(), Memory)
    assert not isinstance(nl.memory.Matrix(), Memory)


@pytest.mark.parametrize("name", nl.memory.names())
def test_every_registered_memory_has_its_two_engines(name: str) -> None:
    spec = nl.memory.named(name, key_dim=4)
    assert isinstance(spec, TwoEngines)
    w0, example = spec.init(2), spec.example(torch.Generator(), time=2)
    with pytest.raises(ValueError, match="engine is 'fast'; expected 'chunked' or 'reference'"):
        nl.memory.scan(spec, w0, *example, engine="fast")


def test_a_memory_without_engines_cannot_be_made() -> None:
    class Half(TwoEngines):
        def _prepare(self, call: Any) -> Any:
            return call

    with pytest.raises(TypeError, match="_engines"):
        Half()
