"""Levels that learn by losses of their own: against a loop over tokens with autograd, and against `nl.memory.scan`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling.layers import Continuum, local
from nestling.memory import L2, DotProduct, Gates
from nestling.optim.inner import Momentum

DIM, HIDDEN = 5, 4
F64 = torch.float64


def build(periods: tuple[int | None, ...] = (3, 6), **settings: Any) -> Continuum:
    """Float64 levels whose steps show."""
    torch.manual_seed(0)
    layer = Continuum(DIM, HIDDEN, periods, error="local", rate=0.8, **settings).double()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                weight.copy_(0.7 * torch.randn_like(weight))
            elif name.endswith(("norm.weight", "value")):
                weight.uniform_(0.5, 1.5)
    return layer


def inputs(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randn(lanes, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by_definition(layer: Continuum, x: Tensor) -> Tensor:
    """One lane, token after token, from eq. 71 with each level's own loss; x `[time, dim]`."""
    window, outer, before = min(p for p in layer.periods if p), layer.outer, list[Tensor]()
    levels = list(zip(layer.periods, layer.levels_, strict=True))
    start = [(level.mlp.up.weight, level.mlp.down.weight) for level in layer.levels_]
    theta = [list(weights) for weights in start]
    zero = [[torch.zeros_like(w) for w in weights] for weights in start]
    pending, moving = [list(z) for z in zero], [list(z) for z in zero]
    base, within, outputs = [list(t) for t in theta], [list(z) for z in zero], []

    def mlp(weights: list[Tensor], k: Tensor) -> Tensor:
        gate, value = (weights[0] @ k).chunk(2)
        return weights[1] @ (F.silu(gate) * value)

    for t, u in enumerate(x, 1):
        first, given = u, []
        for n, (_, level) in enumerate(levels):
            own = first if layer.arrangement == "independent" else u
            k = F.rms_norm(own, (DIM,), level.norm.weight, 1e-6)
            given.append(k)
            share = 1.0 if layer.share is None else layer.share[n]
            u = u + share * mlp(theta[n], k)
        outputs.append(u)
        for n, (period, level) in enumerate(levels):
            if period is not None and t % window != 1:
                loss = layer.bias.loss(mlp(theta[n], before[n]), level.value * given[n])
                found = torch.autograd.grad(loss, theta[n], create_graph=True)
                within[n] = [a + g for a, g in zip(within[n], found, strict=True)]
        before = given
        if t % window:
            continue
        for n, (period, level) in enumerate(levels):
            if period is None:
                continue
            mean = window - 1 if layer.mean else 1.0
            norm = torch.stack([g.square().sum() for g in within[n]]).sum().sqrt() / mean
            clipped = [g * (layer.clip / norm).clamp_max(1) for g in within[n]]
            within[n] = list(zero[n])

            def scaled(rate: Tensor, period: int, gradients: list[Tensor], mean: float = mean) -> list[Tensor]:
                share = mean * period / window if layer.mean else 1.0
                return [F.softplus(rate) * g / share for g in gradients]

            pending[n] = [a + b for a, b in zip(pending[n], scaled(level.rate, period, clipped), strict=True)]
            if t % period == 0:
                theta[n] = [w - s for w, s in zip(theta[n], pending[n], strict=True)]
                pending[n] = list(zero[n])
                if isinstance(outer, int) and t % (outer * period) == 0:
                    theta[n] = [w0 + (w - w0).detach() for w, w0 in zip(theta[n], start[n], strict=True)]
            if layer.arrangement == "nested" and n + 1 < len(levels):
                slow, mover = levels[n + 1]
                moving[n] = [a + b for a, b in zip(moving[n], scaled(mover.rate, slow, clipped), strict=True)]
                if t % slow == 0:
                    base[n] = [w - s for w, s in zip(base[n], moving[n], strict=True)]
                    if isinstance(outer, int) and t % (outer * slow) == 0:
                        base[n] = [w0 + (w - w0).detach() for w, w0 in zip(base[n], start[n], strict=True)]
                    theta[n], moving[n] = list(base[n]), list(zero[n])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("periods", "settings"),
    [
        ((3, 6), {}),
        ((2, 6, 4), {"mean": False, "clip": 0.7}),
        ((2, 4, None), {"outer": 2, "bias": DotProduct()}),
        ((2, 4, 8), {"arrangement": "nested"}),
        ((2, 4), {"arrangement": "nested", "outer": 2}),
        ((4, 4), {"arrangement": "independent"}),
    ],
)
def test_equal_to_the_definition_with_every_gradient(periods: tuple[int, ...], settings: dict[str, Any]) -> None:
    layer, x = build(periods, **settings), inputs(1, 2, 17).requires_grad_()
    y, _ = local.read(layer, x, local.start(layer, 2))
    weight = inputs(2, 2, 17)
    given = [x, *layer.parameters()]
    got = torch.autograd.grad((y * weight).sum(), given)
    expected = torch.stack([by_definition(layer, lane) for lane in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    want = torch.autograd.grad((expected * weight).sum(), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        assert a.any()
    still, _ = layer.chain(x)
    assert (y - still)[:, min(p for p in periods if p) :].abs().max() > 1e-2, "the levels learn"


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("chunk", [2, 5])
def test_without_clipping_a_level_is_a_memory(engine: str, chunk: int) -> None:
    layer = build((chunk,), clip=math.inf, mean=False)
    with torch.no_grad():
        layer.levels_[0].rate.fill_(-5.0)
    level, x = layer.levels_[0], inputs(3, 2, 15)
    y, state = local.read(layer, x, local.start(layer, 2))
    network = nl.memory.GatedMLP(activation="silu", residual=False, norm=False, expansion=HIDDEN / DIM)
    spec = nl.memory.MemorySpec(
        DIM, DIM, network=network, bias=L2(), rule=nl.memory.Gradient(), chunk=chunk, read="boundary"
    )
    gate, value = level.mlp.up.weight.chunk(2)
    w0 = [w.T[None].contiguous() for w in (gate, value, level.mlp.down.weight)]
    k = level.norm(x)
    following = torch.cat([k[:, 1:], k[:, :1]], 1) * level.value
    lr = F.softplus(level.rate) * (torch.arange(1, 16) % chunk != 0)  # the last of a window has no loss
    gates = Gates(lr=lr.expand(2, 1, 15))
    z, memory = nl.memory.scan(spec, w0, *(u[:, None] for u in (k, k, following)), gates, engine=engine)
    torch.testing.assert_close(y, x + z[:, 0], rtol=1e-9, atol=1e-9)
    up, down = (w + d for w, d in zip(level.weights(), state.continuum.delta[0], strict=True))
    for mine, theirs in zip((*up.chunk(2, 1), down), memory.anchor, strict=True):
        torch.testing.assert_close(mine, theirs[:, 0].mT, rtol=1e-9, atol=1e-9)
        assert state.continuum.delta[0][1].abs().max() > 1e-2


LAYERS = {
    "chain": build(),
    "nested": build((2, 4, 8), arrangement="nested", outer=2),
    "every other token": build((2, 6)),
    "momentum": build((2, 6), rule=Momentum(0.5), arrangement="independent"),
}


@pytest.mark.parametrize("name", LAYERS)
@given(time=st.integers(1, 19), seed=st.integers(0, 999), data=st.data())
@torch.no_grad()
def test_any_split_ragged_lanes_resets_and_masks(name: str, time: int, seed: int, data: st.DataObject) -> None:
    layer, x = LAYERS[name], inputs(seed, 3, time)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        "reset": torch.rand(3, time, generator=generator) < 0.1,
        "valid": torch.rand(3, time, generator=generator) < 0.8,
    }
    fresh = local.start(layer, 3)
    whole, end = local.read(layer, x, fresh, **masks)
    state, parts, at = fresh, [], 0
    while at < time:
        size = data.draw(st.integers(1, time - at))
        now = {n: m[:, at : at + size] for n, m in masks.items()}
        y, state = local.read(layer, x[:, at : at + size], state, **now)
        parts.append(y)
        at += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for lane in range(3):
        mine = masks["valid"][lane].nonzero()[:, 0]
        starts = [i for i, t in enumerate(mine.tolist()) if masks["reset"][lane, t]]
        mine = mine[starts[-1] :] if starts else mine
        if len(mine):
            alone, own = local.read(layer, x[lane : lane + 1, mine], local.start(layer, 1))
            torch.testing.assert_close(whole[lane, mine], alone[0], rtol=1e-9, atol=1e-9)
            for a, b in zip(nl.state.leaves(nl.state.take(end, [lane])), nl.state.leaves(own), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_splits_change_no_gradient() -> None:
    x, found = inputs(6, 2, 14), []
    for bounds in ([0, 14], [0, 2, 7, 8, 14]):
        layer = build()
        state, total = local.start(layer, 2), torch.zeros((), dtype=F64)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
            y, state = local.read(layer, x[:, first:last], state)
            total = total + y.square().sum()
        total.backward()
        found.append([p.grad for p in layer.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_a_window_with_a_number_that_is_none_is_left_out_and_counted() -> None:
    layer, x = build((3, 6)), inputs(7, 2, 9)
    x[1, 4] = math.nan
    y, state = local.read(layer, x, local.start(layer, 2))
    assert state.continuum.faults.tolist() == [0, 2], "one window's gradient in each of two levels"
    alone, _ = local.read(layer, x[:1], local.start(layer, 1))
    torch.testing.assert_close(y[:1], alone, rtol=1e-12, atol=1e-12)
    assert y[1, 5:].isfinite().all()
    reset = torch.zeros(2, 3, dtype=torch.bool)
    reset[:, 0] = True
    _, after = local.read(layer, x[:, :3], state, reset=reset)
    assert after.continuum.faults.tolist() == [0, 2], "a reset forgets none"


@torch.no_grad()
def test_the_report_tells_every_update_where_it_happened() -> None:
    layer, report = build((2, 4)), nl.Report()
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 3] = True
    local.read(layer, inputs(8, 2, 7), local.start(layer, 2), reset=reset, report=report)
    update = report[""]["update"]
    moved = [[update[lane, level].nonzero()[:, 0].tolist() for level in range(2)] for lane in range(2)]
    assert moved == [[[1, 3, 5], [3]], [[1, 4, 6], [6]]]


def test_models_grow_levels_that_learn_locally() -> None:
    with torch.no_grad():
        trained = nl.models.build("transformer", dim=16, ffn=16)
        grown = nl.models.convert(trained, "hope_attention", periods=[4, 8], error="local")
        tokens = torch.randint(257, (2, 4), generator=torch.Generator().manual_seed(0))
        assert torch.equal(grown(tokens)[0], trained(tokens)[0]), "before a token has moved a level"
        slower = nl.models.convert(grown, periods=[4, 16])
        assert torch.equal(slower.continuum(0).levels_[1].value, grown.continuum(0).levels_[1].value)
    assert grown.window is None


def test_impossible_settings_are_refused_in_words() -> None:
    for settings, words in (
        ({"error": "global"}, "error is 'global'; expected task, local"),
        ({"error": "local", "outer": "first_order"}, "expected full, or a number of updates"),
        ({"error": "local", "periods": [1]}, "at least 2 tokens each"),
    ):
        with pytest.raises(ValueError, match=words):
            nl.models.build("hope", **settings)
    with pytest.raises(ValueError, match="a loss of one token"):
        Continuum(8, 4, (4,), error="local", bias=nl.memory.Omega(L2(), 3))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    state = nl.models.build("hope_swa", error="local", periods=[4])(tokens)[1]
    for periods in ([8], [4, 8]):
        with pytest.raises(ValueError, match="other periods"):
            nl.models.build("hope_swa", error="local", periods=periods, ffn=86)(tokens, state)
