"""A memory is what answers the protocol: by name or not, with the engines shared or its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import Gates, Memory
from nestling.memory.protocol import TwoEngines
from nestling.native import without
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


class Plain:
    """A choice by a class that inherits nothing and answers as another does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize(
    "choice",
    [
        {"network": nl.memory.MLP()},
        {"bias": nl.memory.Huber()},
        {"bias": nl.memory.Omega(nl.memory.DotProduct(), 3)},
        {"retention": nl.memory.Bregman()},
        {"retention": nl.memory.Decay(per_channel=True)},
        {"rule": nl.memory.Momentum()},
        {"rule": nl.memory.DeltaGradient()},
        {"features": nl.memory.Polynomial()},
    ],
    ids=lambda choice: str(*choice.values()),
)
def test_a_choice_of_the_right_shape_serves_as_one(choice: dict[str, Any], engine: str) -> None:
    """Without inheriting its protocol, whose defaults it then answers itself."""
    ((kind, inner),) = choice.items()
    runs = []
    for given in (inner, Plain(inner)):
        spec = nl.memory.MemorySpec(4, 4, chunk=4, **{kind: given})
        w0 = spec.init(2, torch.Generator().manual_seed(1))
        with without():  # the C code knows but our own choices, and rounds in its own way
            y, state = nl.memory.scan(spec, w0, *spec.example(torch.Generator().manual_seed(2), time=11), engine=engine)
        runs.append((y, *state.weights))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_choice_that_says_nothing_is_the_plain_one() -> None:
    class Keeps(nl.memory.Retention):
        pass

    class Descends(nl.memory.Rule):
        pass

    plain, said = Keeps(), nl.memory.Decay()
    x = torch.randn(2, 3)
    assert (plain.decays, plain.linear) == (said.decays, said.linear) == (True, True)
    assert plain.link(x) is x
    assert plain.dual(x) is x
    rule, gradient = Descends(), nl.memory.Gradient()
    assert (rule.momentum, rule.erase, rule.step(4)) == (gradient.momentum, gradient.erase, gradient.step(4))


def test_a_retention_with_a_link_is_not_linear() -> None:
    class Squared(nl.memory.Retention):
        def link(self, dual: Tensor) -> Tensor:
            return dual.square()

    assert not Squared().linear
    assert [r.linear for r in (nl.memory.Full(), nl.memory.ElasticStep(), nl.memory.Divergence())] == [True] * 3
    assert not any(r.linear for r in (nl.memory.Lq(), nl.memory.LqDual(), nl.memory.Softmax(), nl.memory.ElasticNet()))


def test_a_choice_that_is_none_yet_is_refused_in_words() -> None:
    @dataclass
    class Loose(nl.memory.Rule):
        pass

    with pytest.raises(ValueError, match=r"rule is the class Momentum; expected one made of it: Momentum\(\)"):
        nl.memory.MemorySpec(4, 4, rule=nl.memory.Momentum)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"which has no hash: make its class a @dataclass\(frozen=True\)"):
        nl.memory.MemorySpec(4, 4, rule=Loose())


def test_a_loss_without_its_slope_is_refused_at_once() -> None:
    class Half(nl.memory.Bias):
        def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
            return (prediction - value).sum(-1)

    with pytest.raises(TypeError, match="error"):
        Half()


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


def test_a_name_is_taken_once_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("nestling.memory.named")
    monkeypatch.setattr(registry, "_SYSTEMS", dict(registry._SYSTEMS))
    words = {"equation": "W", "source": "here", "notes": "Ours."}
    with pytest.raises(ValueError, match="'titans' is registered already: choose another name, or say replace=True"):
        nl.memory.register("titans", **words)
    nl.memory.register("titans", replace=True, rule=nl.memory.Gradient(), **words)
    assert nl.memory.named("titans").rule == nl.memory.Gradient()
