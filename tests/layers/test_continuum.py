"""How a level of the continuum descends: each rule is the optimizer of its name, lane by lane, and keeps the contracts."""

import copy
import math

import pytest
import torch

import nestling as nl
from nestling import optim
from nestling.layers import Continuum
from nestling.optim import inner

F64 = torch.float64
RULES = [inner.Gradient(), inner.Momentum(), inner.Adam(), inner.M3(period=2)]
REMEMBERING = [*RULES[1:], inner.DGD(0.5)]
OPTIMIZERS = {
    "Gradient": lambda p, lr: torch.optim.SGD(p, lr),
    "Momentum": lambda p, lr: optim.AdamMemory(p, lr, (0.9, 0.9), target="square", bias_correction=False),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr, (0.9, 0.99), 1e-8),
    "M3": lambda p, lr: optim.M3(p, lr, momentum=0.9, period=2, second_moment="none", adjust_lr_fn="match_rms_adamw"),
}


def name_of(rule):
    return type(rule).__name__


def learned(layer, chunks, lanes=2):
    """The state after windows with these gradients, `[chunk]` of the state's shapes."""
    state = layer.start(lanes)
    with torch.no_grad():
        for n, found in enumerate(chunks, 1):
            position = torch.full((lanes,), n * layer.window)
            state = layer.learn(state, found, 1, torch.ones(lanes, dtype=torch.bool), position)
    return state


def random_gradients(layer, count, lanes=2):
    generator = torch.Generator().manual_seed(0)
    like = layer.start(lanes).delta
    return [
        nl.state.tree_map(lambda d: 0.1 * torch.randn(d.shape, generator=generator, dtype=d.dtype), like)
        for _ in range(count)
    ]


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_level_descends_as_the_optimizer_does(rule):
    """Of period 1 window and 2 windows: then by the mean of both gradients."""
    layer = Continuum(4, 3, (2, 4), rule=rule, rate=0.01, clip=math.inf).double()
    chunks = random_gradients(layer, 8)
    state = learned(layer, chunks)
    for level, windows in ((0, 1), (1, 2)):
        for matrix in range(2):
            for lane in range(2):
                w = torch.nn.Parameter(torch.zeros_like(state.delta[level][matrix][lane]))
                optimizer = OPTIMIZERS[name_of(rule)]([w], 0.01)
                grads = [c[level][matrix][lane] for c in chunks]
                for first in range(0, 8, windows):
                    w.grad = sum(grads[first : first + windows]) / windows
                    optimizer.step()
                torch.testing.assert_close(state.delta[level][matrix][lane], w.detach(), rtol=1e-6, atol=1e-9)


def model_with(rule, periods=(4, 8)):
    torch.manual_seed(0)
    model = nl.models.build("hope", vocab_size=31, dim=16, heads=2, layers=1, ffn=8, chunk=4, periods=periods).double()
    for block in model.blocks:
        block.ffn = Continuum(16, 8, periods, rule=rule, rate=0.05).double()
    return model


@pytest.mark.parametrize("coupling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mean", [True, False])
def test_levels_that_erase_are_delta_gradient_descent_on_their_layers(coupling, mean):
    """`optim.DGD` on the same layers, their inputs seen by its own hooks: a level of one window, and one of two."""
    model = model_with(inner.DGD(coupling))
    (own,) = (block.ffn for block in model.blocks)
    own.clip, own.mean = math.inf, mean
    tokens, plain = text(1, 16), copy.deepcopy(model)
    with torch.no_grad():
        _, state = model(tokens)

    blocks, optimizers = plain.start(1).blocks, []
    for level, every in zip(plain.blocks[0].ffn.levels_, (1, 2), strict=True):
        rate = torch.nn.functional.softplus(level.rate).item()
        group = {"params": list(level.weights()), "every": every}
        step = optim.DGD(plain, rate, coupling=coupling, params=[group], reduction="mean" if mean else "sum")
        optimizers.append(optim.Periodic(step, accumulate="mean" if mean else "sum"))
    for window in tokens.split(4, 1):
        logits, blocks = plain.read(window, nl.state.detach(blocks))
        found = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="mean" if mean else "sum")
        found.backward()
        for optimizer in optimizers:
            optimizer.step()
        plain.zero_grad()
    for number, level in enumerate(plain.blocks[0].ffn.levels_):
        for delta, new, old in zip(
            state.continuum[0].delta[number], level.weights(), own.levels_[number].weights(), strict=True
        ):
            assert delta.abs().max() > 1e-5
            torch.testing.assert_close(delta[0], new - old, rtol=1e-7, atol=1e-9)


def text(lanes, time):
    return torch.randint(31, (lanes, time), generator=torch.Generator().manual_seed(1))


def assert_equal(a, b):
    for x, y in zip(nl.state.leaves(a), nl.state.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", REMEMBERING, ids=name_of)
def test_splits_lanes_resets_and_files_change_nothing(rule, tmp_path):
    model, tokens = model_with(rule), text(2, 26)
    with torch.no_grad():
        logits, whole = model(tokens)
        plain, _ = model_with(inner.Gradient())(tokens)
        assert not torch.allclose(logits[:, -1], plain[:, -1]), "the rule has an effect"
        assert rule.erases or any(x.abs().max() > 0 for c in whole.continuum for x in nl.state.leaves(c.memory))

        for cut in (3, 13):
            first, state = model(tokens[:, :cut])
            nl.state.save(tmp_path / "state.safetensors", state)
            second, state = model(tokens[:, cut:], nl.state.load(tmp_path / "state.safetensors"))
            torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=1e-8, atol=1e-8)
            assert_equal(state, whole)
        alone, state = model(tokens[1:])
        torch.testing.assert_close(alone, logits[1:], rtol=1e-8, atol=1e-8)
        assert_equal(state, nl.state.take(whole, [1]))

        reset = torch.zeros(2, 26, dtype=torch.bool)
        reset[0, 11] = True
        again, _ = model(tokens, reset=reset)
        fresh, _ = model(tokens[:1, 11:])
        torch.testing.assert_close(again[:1, 11:], fresh, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(again[1], logits[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", REMEMBERING, ids=name_of)
def test_rates_are_learned_and_memories_have_no_history(rule):
    model = model_with(rule)
    logits, state = model(text(2, 20))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text(2, 20)[:, 1:].flatten()).backward()
    assert all(level.rate.grad.abs() > 0 for block in model.blocks for level in block.ffn.levels_)
    assert not any(x.requires_grad for c in state.continuum for x in nl.state.leaves(c.memory))


@pytest.mark.parametrize("rule", [*RULES, inner.DGD()], ids=name_of)
def test_every_memory_belongs_to_its_level(rule):
    layer = Continuum(4, 3, (2, 4), rule=rule)
    levels = layer.levels()
    assert all(str(rule) in level.rule for level in levels)
    state = layer.start(1)
    assert bool(nl.state.leaves(state.memory)) == (rule is not RULES[0])
    assert [level.state_paths[2] for level in levels] == ["memory.0", "memory.1"]


@pytest.mark.parametrize("rule", RULES[1:], ids=name_of)
def test_an_update_that_would_not_be_finite_leaves_the_memory_as_it_was(rule):
    layer = Continuum(4, 3, (2, 4), rule=rule, clip=math.inf)
    chunks = random_gradients(layer, 2)
    state = learned(layer, chunks)
    for w in state.delta[0]:
        w[1] = -torch.finfo(torch.float32).max
    state.delta[0][0][1, 0, 0] = math.inf
    with torch.no_grad():
        after = layer.learn(state, chunks[0], 1, torch.tensor([True, True]), torch.tensor([6, 6]))
    assert after.faults.tolist() == [0, 1]
    for old, new in zip(nl.state.leaves(state.memory[0]), nl.state.leaves(after.memory[0]), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: inner.Momentum(1.0), "share is 1.0"),
        (lambda: inner.Adam((0.9, 1.5)), "shares is"),
        (lambda: inner.M3(period=0), "period is 0"),
        (lambda: inner.DGD(1.5), "coupling is 1.5"),
        (lambda: inner.named("muon"), "rule is 'muon'; expected one of: gradient, momentum, dgd, adam, m3"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
