"""Levels that learn from the model's loss: the window machinery against a plain loop over tokens and lanes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import nestling as nl
from nestling.layers import Continuum
from nestling.learn.learner import count_faults
from nestling.models import Block, LanguageModel, ModelConfig, ModelState, windows
from nestling.optim.inner import Momentum

VOCAB = 19


def build(periods: tuple[int, ...], arrangement: str = "sequential", **settings: Any) -> LanguageModel:
    """A tiny float64 model: one block of a fast memory, one of attention-free momentum, learning levels in both."""
    torch.manual_seed(1)
    config = ModelConfig(
        "made", "tiny", 8, 2, 2, VOCAB, 6, 3, periods, arrangement, settings.pop("outer", "first_order")
    )
    mixers = [
        nl.layers.Memory(8, 2, nl.memory.named("gated_deltanet", key_dim=4)),
        nl.layers.Memory(8, 2, nl.memory.named("titans", key_dim=4, chunk=3)),
    ]
    model = LanguageModel(config, [Block(config, mixer, periods or (None,)) for mixer in mixers]).double()
    for block in model.blocks:
        for name, value in settings.items():
            setattr(block.ffn, name, value)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("rate"):
                weight.fill_(0.5)
            elif weight.dim() == 2:
                weight.mul_(8)
    return model


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (lanes, time), generator=torch.Generator().manual_seed(seed))


class Reader(nn.Module):
    """A model whose levels do not learn."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, blocks: Any) -> tuple[Tensor, Any]:
        return self.model.read(tokens, blocks)


def by_definition(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One lane from its start, from eq. 71 as written: weights of every level by name, moved when they are due.

    Each window is read whole, from the state that stood at its start, with the levels' weights standing still.
    """
    outer = model.config.outer

    def cut(theta: Tensor, theta_0: Tensor, read: int, period: int) -> Tensor:
        """What has been learned, without its history where a truncated stretch of updates ends."""
        ends = isinstance(outer, int) and read % (outer * period) == 0
        return theta_0 + (theta - theta_0).detach() if ends else theta

    frozen = Reader(model)
    names = {
        f"model.blocks.{b}.ffn.levels_.{level}.mlp.{m}.weight": (b, level)
        for b in range(2)
        for level in range(len(model.config.periods))
        for m in ("up", "down")
    }
    theta = {name: weight.clone() for name, weight in frozen.named_parameters() if name in names}
    theta_0 = {name: weight.clone() for name, weight in theta.items()}
    by_period = sorted(range(len(model.config.periods)), key=lambda n: model.config.periods[n])
    slower = dict(itertools.pairwise(by_period)) if model.blocks[0].ffn.arrangement == "nested" else {}
    pending = {name: torch.zeros_like(weight) for name, weight in theta.items()}
    base, moving = dict(theta_0), dict(pending)  # nested: what a level is put back to, and what will move that
    state, outputs, history = model.start(1).blocks, [], []
    size = model.window
    assert size is not None
    for first in range(0, tokens.shape[1], size):
        window = tokens[:, first : first + size]
        used = {name: weight.view_as(weight) for name, weight in theta.items()}
        logits, state = functional_call(frozen, used, (window, state))
        outputs.append(logits)
        if window.shape[1] < size:
            break
        loss = F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum")
        found = dict(zip(used, torch.autograd.grad(loss, list(used.values()), create_graph=True), strict=True))
        if outer == "first_order":
            found = {n: g.detach() for n, g in found.items()}
        for name, (b, level) in names.items():
            ffn, period = model.blocks[b].ffn, model.config.periods[level]
            mine = [found[n] for n, place in names.items() if place == (b, level)]
            norm = torch.stack([g.square().sum() for g in mine]).sum().sqrt()
            share = 1.0
            if ffn.mean:
                norm, share = norm / (size - 1), (size - 1) * period / size
            step = found[name] * (ffn.clip / norm).clamp_max(1)
            pending[name] = pending[name] + F.softplus(ffn.levels_[level].rate) * step / share
            if level in slower:
                slow = share * model.config.periods[slower[level]] / period if ffn.mean else 1.0
                moving[name] = moving[name] + F.softplus(ffn.levels_[slower[level]].rate) * step / slow
        for name, (_, level) in names.items():
            if (first + size) % model.config.periods[level] == 0:
                theta[name] = theta[name] - pending[name]
                pending[name] = torch.zeros_like(pending[name])
                theta[name] = cut(theta[name], theta_0[name], first + size, model.config.periods[level])
            if level in slower and (first + size) % model.config.periods[slower[level]] == 0:
                moved = base[name] - moving[name]
                theta[name] = base[name] = cut(moved, theta_0[name], first + size, model.config.periods[slower[level]])
                moving[name] = torch.zeros_like(moving[name])
        history.append({name: theta[name] - theta_0[name] for name in theta})
    return torch.cat(outputs, 1), history


NESTED, INDEPENDENT = {"arrangement": "nested"}, {"arrangement": "independent"}


@pytest.mark.parametrize(
    ("periods", "settings"),
    [
        *itertools.product([(4, 8), (2, 6, 4), (5,)], [{}, {"clip": math.inf}, {"mean": False, "clip": 0.7}]),
        ((2, 4, 12), NESTED),
        ((4, 8), {**NESTED, "mean": False, "clip": 0.7}),
        ((2, 6, 4), INDEPENDENT),
    ],
)
@pytest.mark.parametrize("time", [3, 17, 24])
def test_equal_to_the_definition_with_every_gradient(
    periods: tuple[int, ...], time: int, settings: dict[str, Any]
) -> None:
    equals_the_definition(periods, time, settings)


@pytest.mark.parametrize(
    ("periods", "settings"),
    [
        ((2, 6, 4), {"outer": "full"}),
        ((4, 8), {"outer": 2, "mean": False}),
        ((2, 4, 8), {**NESTED, "outer": 2}),
        ((2, 2, 4, 8, 16), {}),
        ((2, 4, 4, 8, 16), NESTED),
        ((12, 4, 2), {**NESTED, "outer": "full"}),
        ((16, 8, 4, 4, 2, 2), {**INDEPENDENT, "outer": 3}),
    ],
)
def test_any_number_of_levels_in_either_order_and_every_outer_gradient(
    periods: tuple[int, ...], settings: dict[str, Any]
) -> None:
    equals_the_definition(periods, 18, settings)


def equals_the_definition(periods: tuple[int, ...], time: int, settings: dict[str, Any]) -> None:
    model = build(periods, **settings)
    tokens = text(time, 2, time)
    logits, state = model(tokens)
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (logits * weight).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for lane in range(2):
        expected, history = by_definition(model, tokens[lane : lane + 1])
        torch.testing.assert_close(logits[lane], expected[0], rtol=1e-9, atol=1e-9)
        total = total + (expected[0] * weight[lane]).sum()
        if history:
            for b in range(2):
                for level in range(len(periods)):
                    for place, m in enumerate(("up", "down")):
                        torch.testing.assert_close(
                            state.continuum[b].delta[level][place][lane],
                            history[-1][f"model.blocks.{b}.ffn.levels_.{level}.mlp.{m}.weight"],
                            rtol=1e-9,
                            atol=1e-10,
                        )
    assert any(float(d.detach().abs().max()) > 1e-4 for d in nl.state.leaves(state.continuum[0].delta)) == (
        time > min(periods)
    )
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is None or got[name] is None:
            assert p.grad is None or not p.grad.any()
            assert got[name] is None or not got[name].any()
        else:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)


MODEL = build((4, 8))
MODELS = {"sequential": MODEL, "nested": build((2, 4, 8), "nested"), "independent": build((4, 8), "independent")}


@pytest.mark.parametrize("arrangement", MODELS)
@given(time=st.integers(1, 21), seed=st.integers(0, 999), data=st.data())
def test_any_split_ragged_lanes_resets_and_masks(arrangement: str, time: int, seed: int, data: st.DataObject) -> None:
    model = MODELS[arrangement]
    generator = torch.Generator().manual_seed(seed)
    tokens = text(seed, 3, time)
    masks = {
        "reset": torch.rand(3, time, generator=generator) < 0.1,
        "valid": torch.rand(3, time, generator=generator) < 0.8,
    }
    with torch.no_grad():
        whole, end = model(tokens, **masks)
        state, parts, at = None, [], 0
        while at < time:
            size = data.draw(st.integers(1, time - at))
            now = {n: m[:, at : at + size] for n, m in masks.items()}
            logits, state = model(tokens[:, at : at + size], state, **now)
            parts.append(logits)
            at += size
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
        for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for lane in range(3):  # what the lane alone makes of its valid tokens since the last reset
            mine = masks["valid"][lane].nonzero()[:, 0]
            starts = [i for i, t in enumerate(mine.tolist()) if masks["reset"][lane, t]]
            mine = mine[starts[-1] :] if starts else mine
            if len(mine):
                alone, own = model(tokens[lane : lane + 1, mine])
                torch.testing.assert_close(whole[lane, mine], alone[0], rtol=1e-9, atol=1e-9)
                for a, b in zip(nl.state.leaves(nl.state.take(end, [lane])), nl.state.leaves(own), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_update_serves_from_the_next_token_on() -> None:
    model, tokens = build((4, 8)), text(5, 1, 9)
    with torch.no_grad():
        learned, _ = model(tokens)
        for block in model.blocks:
            for level in block.ffn.levels_:
                level.rate.fill_(-1e9)  # softplus: exactly 0
        frozen, _ = model(tokens)
    assert torch.equal(learned[:, :4], frozen[:, :4])
    assert not torch.allclose(learned[:, 4:], frozen[:, 4:])


@torch.no_grad()
def test_without_step_size_the_chain_is_frozen() -> None:
    model, tokens = build((4, 8)), text(6, 2, 20)
    for block in model.blocks:
        for level in block.ffn.levels_:
            level.rate.fill_(-1e9)
    logits, state = model(tokens)
    assert not any(d.any() for c in state.continuum for d in nl.state.leaves(c.delta))
    plain, _ = model.read(tokens, model.start(2).blocks, [c.delta for c in model.start(2).continuum])
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_level_that_no_token_moves_is_the_feed_forward_block() -> None:
    torch.manual_seed(0)
    layer = Continuum(8, 12).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    level = layer.levels_[0]
    normed = F.rms_norm(x, (8,), level.norm.weight, 1e-6)
    gate, value = (normed @ level.mlp.up.weight.T).chunk(2, -1)
    torch.testing.assert_close(layer(x), x + (F.silu(gate) * value) @ level.mlp.down.weight.T)
    assert layer.start(2) is None


def test_a_period_as_long_as_the_text_is_one_step_of_gradient_descent_on_its_loss() -> None:
    model, tokens = build((12, 12), mean=False, clip=math.inf), text(7, 1, 12)
    _, state = model(tokens)
    names = [
        (b, level, place, f"blocks.{b}.ffn.levels_.{level}.mlp.{m}.weight")
        for b in range(2)
        for level in range(2)
        for place, m in enumerate(("up", "down"))
    ]
    fresh = model.start(1)
    logits, _ = model.read(tokens, fresh.blocks, [c.delta for c in fresh.continuum])
    loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [parameters[name] for *_, name in names])
    for (b, level, place, _), g in zip(names, found, strict=True):
        rate = F.softplus(model.blocks[b].ffn.levels_[level].rate)
        torch.testing.assert_close(state.continuum[b].delta[level][place][0], -rate * g, rtol=1e-9, atol=1e-12)


def test_slow_weights_learn_on_every_carried_segment() -> None:
    model, state = build((4, 8)), None
    for seed in range(3):
        model.zero_grad()
        logits, state = model(text(seed, 2, 12), state)
        logits.square().sum().backward()
        state = nl.state.detach(state)
    for block in model.blocks:
        for level in block.ffn.levels_:
            for weight in (*level.weights(), level.rate):
                assert weight.grad is not None
                assert weight.grad.abs().max() > 0


@torch.no_grad()
def test_levels_side_by_side_add_their_shares() -> None:
    """Nested Learning, eq. 74; one level alone is the sequential one."""
    torch.manual_seed(0)
    layer = Continuum(8, 12, (4, 8), arrangement="independent").double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer.share.copy_(torch.tensor([0.3, -1.2]))
    expected = x + 0.3 * layer.levels_[0](x) - 1.2 * layer.levels_[1](x)
    torch.testing.assert_close(layer(x), expected)
    alone, chain = Continuum(8, 12, (4,), arrangement="independent"), Continuum(8, 12, (4,))
    chain.load_state_dict(alone.state_dict(), strict=False)
    torch.testing.assert_close(alone(x.float()), chain(x.float()))


@torch.no_grad()
def test_a_nested_level_is_put_back_to_initial_weights_that_the_slower_level_moves() -> None:
    model = build((4, 4, 8), "nested")
    _, state = model(text(20, 2, 12))
    for continuum in state.continuum:
        for now, base in zip(continuum.delta[0], continuum.base[0], strict=True):
            assert base.any()
            assert torch.equal(now, base), "its own period is that of the slower one: it always serves from its base"
        assert not any(d.any() for d in continuum.moving[0])
        assert continuum.base[2] == continuum.moving[2] == ()
        assert any(not torch.equal(a, b) for a, b in zip(continuum.delta[1], continuum.base[1], strict=True))
    paths = [path for level in model.levels() for path in level.state_paths]
    assert len(paths) == len(set(paths))
    owner = next(level for level in model.levels() if level.name == "blocks.0.ffn.level1")
    assert {"continuum.0.base.0", "continuum.0.moving.0"} <= set(owner.state_paths)


def test_long_windows_are_differentiated_through_recomputed_tiles() -> None:
    model, tokens = build((16,)), text(8, 2, 37)  # six chunks of 3: more than are kept for the backward pass
    logits, _ = model(tokens)
    logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = sum(by_definition(model, tokens[lane : lane + 1])[0].square().sum() for lane in range(2))
    assert isinstance(total, Tensor)
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_mode_learns_alike_also_in_pieces(mode: Any) -> None:
    model, tokens = build((4, 8)), text(9, 2, 19)
    expected, end = model(tokens)
    with mode():
        whole, same = model(tokens)
        assert torch.equal(whole, expected.detach())
        state, parts = None, []
        for first in range(0, 19, 3):
            logits, state = model(tokens[:, first : first + 3], state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected.detach(), rtol=1e-9, atol=1e-9)
    for a, b, c in zip(*map(nl.state.leaves, (end, same, state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def poisoned(model: LanguageModel, state: ModelState, value: float) -> ModelState:
    """Lane 1's first matrix of block 0's first level, its first entry set."""
    delta = [list(map(list, c.delta)) for c in state.continuum]
    delta[0][0][0] = delta[0][0][0].clone()
    delta[0][0][0][1, 0, 0] = value
    return state._replace(
        continuum=tuple(c._replace(delta=tuple(map(tuple, d))) for c, d in zip(state.continuum, delta, strict=True))
    )


def test_a_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    model, tokens = build((4, 8)), text(10, 2, 7)
    logits, after = model(tokens, poisoned(model, model.start(2), math.nan))
    assert after.continuum[1].faults.tolist() == [0, 2], "a gradient for each of two levels"
    assert after.continuum[0].faults.tolist() == [0, 3], "and the update of what was no number before"
    _, alone = model(tokens[:1])
    for x, y in zip(nl.state.leaves(nl.state.take(after, [0])), nl.state.leaves(alone), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits[0], model(tokens[:1])[0][0], rtol=1e-9, atol=1e-12)


def test_an_update_that_would_not_be_finite_is_forgotten_and_counted() -> None:
    layer = Continuum(4, 3, (2, 4), clip=math.inf)
    state = layer.start(3)
    assert state is not None
    big = torch.finfo(torch.float32).max
    for w, p in zip(state.delta[1], state.pending[1], strict=True):
        w[1], p[1:] = -big, big
    found = nl.state.tree_map(lambda d: torch.full_like(d, 0.5), state.delta)
    closing, position = torch.tensor([True, True, False]), torch.tensor([4, 4, 4])
    with torch.no_grad():
        after = layer.learn(state, found, 1, closing, position)
    assert after.faults.tolist() == [0, 1, 0]
    for w, p in zip(after.delta[1], after.pending[1], strict=True):
        assert torch.equal(w[1], torch.full_like(w[1], -big)), "as it was"
        assert not p[:2].any(), "forgotten, not kept for the next border"
        assert (p[2] == big).all()
        assert (w[0] < 0).all()
        assert not w[2].any()
    assert all((w[:2] < 0).all() and not w[2].any() for w in after.delta[0])


def test_faults_are_counted_once_and_outlive_a_reset() -> None:
    model, tokens = build((4, 8)), text(10, 2, 4)
    _, state = model(tokens, poisoned(model, model.start(2), math.nan))
    counted = int(count_faults(state))
    assert counted == sum(int(c.faults.sum()) for c in state.continuum) + sum(
        int(b.memory.faults.sum()) for b in state.blocks
    )
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[:, 0] = True
    _, after = model(tokens, state, reset=reset)
    assert int(count_faults(after)) == counted > 0
    assert after.position.tolist() == [4, 4]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autocast_changes_no_more_than_rounding(mode: Any) -> None:
    model, tokens = build((4, 8)).float(), text(12, 2, 17)
    expected, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16), mode():
        logits, state = model(tokens)
        pieces, other = [], None
        for first in range(0, 17, 5):
            part, other = model(tokens[:, first : first + 5], other)
            pieces.append(part)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert (torch.cat(pieces, 1) - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(d.dtype == torch.float32 and d.any() for c in state.continuum for d in nl.state.leaves(c.delta))


@torch.no_grad()
def test_small_moves_act_on_coarse_weights() -> None:
    torch.manual_seed(0)
    layer = nl.layers.SwiGLU(8, 6).bfloat16()
    x = torch.randn(1, 3, 8).bfloat16()
    still = tuple(torch.zeros(1, *w.shape) for w in (layer.up.weight, layer.down.weight))
    moved = (torch.full((1, 12, 8), 1e-4), still[1])
    exact = nl.layers.SwiGLU(8, 6)
    exact.load_state_dict(layer.state_dict())
    difference = exact(x.float(), moved) - exact(x.float(), still)
    assert difference.any()
    torch.testing.assert_close(layer(x, moved), exact(x.float(), moved).bfloat16())


def test_a_model_that_does_not_learn_slowly_keeps_no_graph() -> None:
    model, tokens = build((4, 8)).requires_grad_(False), text(13, 2, 8)
    logits, state = model(tokens)
    assert not logits.requires_grad
    assert not any(leaf.requires_grad for leaf in nl.state.leaves(state))
    assert any(d.any() for d in nl.state.leaves(state.continuum[0].delta))


def test_nothing_of_a_graph_is_left_where_no_gradient_is_asked_for() -> None:
    model, tokens = build((4, 8)), text(17, 2, 10)
    with torch.no_grad():
        logits, state = model(tokens)
    assert not logits.requires_grad
    assert not any(leaf.requires_grad for leaf in nl.state.leaves(state))
    _, state = model(tokens)
    assert state.open is not None
    assert not any(leaf.requires_grad for leaf in nl.state.leaves(state.open)), "the window's start is a constant"
    assert any(leaf.requires_grad for leaf in nl.state.leaves(state.blocks))


def test_gradients_of_lanes_whose_window_goes_on_are_not_looked_at() -> None:
    layer = Continuum(4, 3, (2, 4))
    state = layer.start(2)
    assert state is not None
    found = nl.state.tree_map(lambda d: torch.full_like(d, math.nan), state.delta)
    after = layer.learn(state, found, 1, torch.tensor([True, False]), torch.tensor([2, 1]))
    assert after.faults.tolist() == [2, 0]
    total = sum(leaf.sum() for leaf in nl.state.leaves((after.delta, after.pending)))
    assert isinstance(total, Tensor)
    total.backward()
    assert all(level.rate.grad.isfinite().all() for level in layer.levels_), "NaN stays out of the rates too"


def test_a_report_counts_the_faults_of_its_own_calls() -> None:
    model, tokens = build((4, 8)), text(18, 2, 4)
    _, state = model(tokens, poisoned(model, model.start(2), math.nan))
    healed = nl.state.tree_map(lambda x: torch.nan_to_num(x) if x.is_floating_point() else x, state)
    report = nl.memory.Report()
    model(tokens, healed, report=report)
    assert healed.continuum[0].faults.any()
    assert not report["blocks.0.continuum"]["faults"].any()


def test_states_of_inference_mode_go_on_in_training() -> None:
    model, tokens = build((4, 8)), text(14, 2, 27)
    with torch.inference_mode():
        _, state = model(tokens[:, :6])
        model(tokens)  # leaves nothing behind that training could stumble on
    logits, _ = model(tokens[:, 6:], state)
    logits.sum().backward()
    torch.testing.assert_close(logits, model(tokens)[0][:, 6:], rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_masks_in_inference_mode() -> None:
    generator = torch.Generator().manual_seed(15)
    tokens = text(15, 2, 19)
    masks = {
        "reset": torch.rand(2, 19, generator=generator) < 0.1,
        "valid": torch.rand(2, 19, generator=generator) < 0.8,
    }
    got, _ = MODEL(tokens, **masks)
    with torch.inference_mode(False), torch.no_grad():
        expected, _ = MODEL(tokens.clone(), **{n: m.clone() for n, m in masks.items()})
    assert torch.equal(got, expected)


def test_states_of_other_models_are_refused_in_words() -> None:
    tokens = text(16, 2, 6)
    states = {periods: build(periods)(tokens)[1] for periods in ((4, 8), (8, 16), (4, 8, 16), ())}
    for mine in states:
        for other, state in states.items():
            if mine == other:
                build(mine)(tokens, state)
            else:
                with pytest.raises(ValueError, match="other periods"):
                    build(mine)(tokens, state)


@torch.no_grad()
def test_the_report_tells_every_update_where_it_happened() -> None:
    model, tokens = build((4, 8)), text(11, 2, 10)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[1, 3] = True
    report = nl.memory.Report()
    model(tokens, reset=reset, report=report)
    update = report["blocks.0.continuum"]["update"]
    assert update.shape == (2, 2, 10)
    moved = [[update[lane, level].nonzero()[:, 0].tolist() for level in range(2)] for lane in range(2)]
    assert moved == [[[3, 7], [7]], [[6], []]]
    assert report["blocks.0.mixer"]["surprise"].shape == (2, 2, 10)


def test_impossible_periods_are_refused_in_words() -> None:
    for periods, words in (
        ((1,), "at least 2"),
        ((), "at least one level"),
        ((4, 6), "multiples of the fastest, 4"),
    ):
        with pytest.raises(ValueError, match=words):
            Continuum(8, 4, periods)
    for periods in (4, "48", (4, "8"), (4.0, 8), (True,), None):
        with pytest.raises(ValueError, match="list of whole numbers"):
            nl.models.build("hope", periods=periods)
    with pytest.raises(ValueError, match="from fast to slow or from slow to fast"):
        Continuum(8, 4, (8, 4, 16), arrangement="nested")
    with pytest.raises(ValueError, match="expected sequential, nested, independent"):
        nl.models.build("hope", arrangement="parallel")
    for settings in ({"rate": math.nan}, {"rate": math.inf}, {"rate": 0.0}, {"clip": math.nan}):
        with pytest.raises(ValueError, match="expected positive numbers"):
            Continuum(8, 4, (4,), **settings)
    for outer in (1, True, 2.0, "second_order"):
        with pytest.raises(ValueError, match="expected first_order, full, or a whole number n of at least 2"):
            nl.models.build("hope", outer=outer)
    assert F.softplus(Continuum(8, 4, (4,), rate=1000.0).levels_[0].rate.detach()) == 1000
    assert isinstance(Continuum(8, 4, (4, None)).levels_, nn.ModuleList)


@torch.no_grad()
def test_a_level_that_is_put_back_remembers_nothing_of_its_descent() -> None:
    layer = Continuum(4, 3, (2, 4), arrangement="nested", rule=Momentum(0.5))
    state = layer.start(2)
    assert state is not None
    for position in ((2, 6), (4, 10)):  # of lanes 0 and 1
        found = nl.state.tree_map(lambda d: torch.full_like(d, 0.5), state.delta)
        state = layer.learn(state, found, 1, torch.tensor([True, True]), torch.tensor(position))
        assert all(m.any() for m in state.memory[0][0][0][1:]), "lane 1 goes on"
    assert not any(m[0].any() for matrix in state.memory[0] for m in matrix), "lane 0 has been put back"
    assert all(m.any() for matrix in state.memory[1] for m in matrix)


def test_a_window_is_differentiated_without_a_walk_through_those_before_it() -> None:
    """Its weights stand behind the states that it starts from, so that autograd need not look for them further back."""
    model = nl.models.build("hope", "tiny", dim=16, layers=2, heads=2, ffn=8, chunk=4, periods=(4, 8))
    _, state = model(torch.randint(257, (2, 12)))
    history = {x.grad_fn for x in nl.state.leaves(state.blocks) if x.requires_grad}
    ((leaf,),) = windows._leaves([((torch.ones(2, 3, 3),),)], state.blocks)[0]
    (behind, _), (_, _) = leaf.grad_fn.next_functions
    assert len(history) > 1
    assert history <= {node for node, _ in behind.next_functions}
    (gradient,) = torch.autograd.grad(leaf.square().sum(), [leaf])
    assert torch.equal(gradient, 2 * leaf)
