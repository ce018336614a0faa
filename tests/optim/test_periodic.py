"""Frequency as a wrapper: what a period is to an optimizer, its clock, its groups from levels, and resuming inside a period."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import nestling as nl
from nestling import optim
from nestling.learn import checkpoint
from nestling.learn.checkpoint import Checkpoint
from nestling.optim import Periodic

from .problems import MAKERS, loss_of, net

TORCH = {
    "torch_sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "torch_adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
}
ALL = {**MAKERS, **TORCH}
EVERY = pytest.mark.parametrize("name", ALL)


def batches(steps):
    return [torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(n)) for n in range(steps)]


def train(model, optimizer, tokens):
    for x in tokens:
        optimizer.zero_grad()
        loss_of(model, x, (3 * x + 1) % 7).backward()
        optimizer.step()


def assert_same(one, other, **tolerance):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@EVERY
def test_a_period_of_one_step_is_the_wrapped_optimizer_to_the_bit(name):
    one, _, _ = net()
    other = copy.deepcopy(one)
    train(one, ALL[name](one), batches(5))
    train(other, Periodic(ALL[name](other)), batches(5))
    assert_same(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "accumulate"), [*((name, "mean") for name in ALL), ("torch_sgd", "sum"), ("dgd_normalized", "sum")]
)
def test_a_period_with_all_else_still_is_gradient_accumulation(name, accumulate):
    one, _, _ = net(torch.float64)
    other = copy.deepcopy(one)
    plain, wrapped = ALL[name](one), Periodic(ALL[name](other), accumulate=accumulate)
    for group in wrapped.param_groups:
        group["every"] = 3
    tokens = batches(9)
    train(other, wrapped, tokens)
    for start in range(0, 9, 3):
        plain.zero_grad()
        for x in tokens[start : start + 3]:
            (loss_of(one, x, (3 * x + 1) % 7) / (3 if accumulate == "mean" else 1)).backward()
        plain.step()
    assert_same(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ALL), ("m3", torch.bfloat16), ("dgd_exact", torch.bfloat16)]
)
def test_resumes_bit_for_bit_inside_a_period(name, dtype, tmp_path):
    def start():
        model = net(dtype)[0]
        optimizer = Periodic(ALL[name](model))
        optimizer.param_groups[0]["every"] = 4
        return model, optimizer

    model, optimizer = start()
    train(model, optimizer, batches(6))
    saved = Checkpoint(6, checkpoint.model_tensors(model), optimizer.state_dict(), None, {})
    found = checkpoint.load(checkpoint.save(tmp_path, saved))
    train(model, optimizer, batches(7))

    other, fresh = start()
    checkpoint.load_model(other, found.model, tmp_path)
    fresh.load_state_dict(found.optimizer)
    assert fresh.param_groups[0]["waited"] == 2
    train(other, fresh, batches(7))
    assert_same(model, other, rtol=0, atol=0)


def two_groups(kind=torch.optim.SGD, every=3, **settings):
    fast, slow = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    settings = {"lr": 1.0, "momentum": 0.5} | settings
    return fast, slow, Periodic(kind([{"params": [fast]}, {"params": [slow], "every": every}], **settings))


def test_while_a_group_waits_the_others_move_and_its_momentum_stays_as_it_is():
    fast, slow, optimizer = two_groups()
    moved = []
    for step in range(1, 7):
        fast.grad, slow.grad = torch.ones(2, dtype=torch.float64), torch.full((2,), float(step), dtype=torch.float64)
        optimizer.step()
        moved.append((-fast[0].item(), -slow[0].item()))
    assert [f for f, _ in moved] == [1, 2.5, 4.25, 6.125, 8.0625, 10.03125]
    # Means of 1, 2, 3 and of 4, 5, 6; of the first one half is kept in the second update.
    assert [s for _, s in moved] == [0, 0, 2, 2, 2, 2 + 5 + 0.5 * 2]
    assert torch.equal(optimizer.state[slow]["momentum_buffer"], torch.full((2,), 6.0, dtype=torch.float64))


def test_a_gradient_that_is_not_there_counts_as_zero():
    fast, slow, optimizer = two_groups(momentum=0.0)
    for step in range(6):
        fast.grad = None
        slow.grad = torch.full((2,), 3.0, dtype=torch.float64) if step == 1 else None
        optimizer.step()
    assert slow.tolist() == [-1, -1]
    assert slow.grad is None
    assert not optimizer.pending


def test_gradients_are_handed_back_as_they_were():
    _, slow, optimizer = two_groups(every=2)
    for value in (1.0, 5.0):
        slow.grad = torch.full((2,), value, dtype=torch.float64)
        optimizer.step()
        assert slow.grad.tolist() == [value, value]


def test_schedulers_of_torch_act_on_it():
    fast, slow, optimizer = two_groups(every=2, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        fast.grad = slow.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        schedule.step()
    assert fast[0].item() == -1.5
    assert slow[0].item() == -0.5  # the mean, with the rate of the period's last step
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_the_slow_memory_of_a_slow_group_counts_the_groups_own_updates():
    weights = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = Periodic(optim.M3([{"params": weights[:1]}, {"params": weights[1:], "every": 4}], period=2))
    for _ in range(8):
        for w in weights:
            w.grad = torch.eye(3)
        optimizer.step()
    assert [g["clock"] for g in optimizer.param_groups] == [8, 2]


def test_what_cannot_be_is_refused():
    _, _, optimizer = two_groups()
    with pytest.raises(TypeError, match="Periodic already"):
        Periodic(optimizer)
    with pytest.raises(ValueError, match="every is 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "every": 0})
    with pytest.raises(ValueError, match="accumulate is 'both'"):
        Periodic(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), accumulate="both")


def test_a_state_without_periods_leaves_them_as_they_are():
    fast, slow, optimizer = two_groups(every=3)
    plain = torch.optim.SGD([{"params": [fast]}, {"params": [slow]}], 0.25)
    optimizer.load_state_dict(plain.state_dict())
    assert [(g["every"], g["waited"], g["lr"]) for g in optimizer.param_groups] == [(1, 0, 0.25), (3, 0, 0.25)]


def test_a_closure_is_evaluated_once():
    fast, _, optimizer = two_groups()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = fast.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0
    assert calls == [True]
    assert fast.tolist() == [-1, -1]


# Groups from the levels of a model


@pytest.mark.parametrize("name", optim.names())
def test_every_named_optimizer_trains_the_levels_of_a_model(name):
    torch.manual_seed(0)
    model = nl.models.build("titans_lmm", "tiny", vocab_size=17)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optim.from_levels(model, name, lr=1e-2, every={"blocks.0.*": 2})
    assert isinstance(optimizer, Periodic)
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    assert optim.describe(name)
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(0))
    for step in range(2):
        optimizer.zero_grad()
        logits, _ = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        waits = [torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("blocks.0.")]
        others = [torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("blocks.1.")]
        assert all(waits) == (step == 0)
        assert not all(others)
    assert not any(waits)


def test_a_frozen_part_of_a_model_has_its_groups_and_stays():
    """Also of DGD, whose hooks it has, too: what is trained again later is no other case."""
    for name in ("adamw", "m3", "dgd", "delta_momentum"):
        torch.manual_seed(0)
        model = nl.models.build("transformer", "tiny", vocab_size=17)
        frozen = {n: p for n, p in model.named_parameters() if n.startswith(("embedding", "blocks.0"))}
        for p in frozen.values():
            p.requires_grad_(False)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = optim.from_levels(model, name, lr=1e-2, every={"blocks.*": 2}, weight_decay=0.5)
        tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            optimizer.zero_grad()
            logits, _ = model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert still == set(frozen), name
        assert not any(optimizer.state.get(p) for p in frozen.values())


@pytest.mark.parametrize("form", ["tokens", "proximal"])
def test_delta_momentum_by_name_sees_the_tokens_of_the_model(form):
    model = nl.models.build("titans_lmm", "tiny", vocab_size=17)
    optimizer = optim.from_levels(model, "delta_momentum", form=form)
    logits, _ = model(torch.zeros(1, 5, dtype=torch.int64))
    logits.square().mean().backward()
    assert (optimizer.capture is not None and model.head.weight in optimizer.capture.seen) == (form == "tokens")
    optimizer.step()


def test_groups_say_level_decay_and_which_are_hidden_matrices():
    model = nl.models.build("transformer", "tiny", vocab_size=17)
    names = {id(p): n for n, p in model.named_parameters()}
    rows = optim.groups(model, model.levels(), weight_decay=0.3)
    kinds = {n: (g["weight_decay"], g["matrix"], g["level"]) for g in rows for n, _ in g["params"]}
    assert set(kinds) == set(names.values())
    assert kinds["blocks.0.mixer.qkv.weight"] == (0.3, None, "slow weights")
    assert kinds["head.weight"] == (0.3, False, "slow weights")  # a linear map, but of words
    assert kinds["embedding.weight"] == (0.0, False, "slow weights")
    assert kinds["norm.weight"] == (0.0, False, "slow weights")
    plain = optim.from_levels(model)
    assert type(plain) is torch.optim.AdamW
    assert {g["weight_decay"] for g in plain.param_groups} == {0.0, 0.1}


def test_a_levels_own_period_in_steps_is_its_groups():
    model = nl.models.build("transformer", "tiny", vocab_size=17)
    (slow,) = (level for level in model.levels() if level.moves)
    slower = dataclasses.replace(slow, period=dataclasses.replace(slow.period, n=7))
    assert {g["every"] for g in optim.groups(model, [slower])} == {7}
    assert {g["every"] for g in optim.groups(model, [slower], every={"head.*": 2})} == {2, 7}


def test_a_horizon_is_in_outer_steps_whatever_the_period():
    model = nl.models.build("transformer", "tiny", vocab_size=17)
    optimizer = optim.from_levels(model, "adamw", every={"blocks.1.*": 5, "blocks.1.*norm*": 40}, horizon=20)
    shares = {g["every"]: g["betas"][0] for g in optimizer.param_groups}
    assert shares == {1: 0.95, 5: 0.75, 40: 0.0}
    momentum = optim.from_levels(model, "m3", horizon=10)
    assert {(g["momentum"], g["adam_betas"][0]) for g in momentum.param_groups} == {(0.9, 0.9)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adan"}, "'adan' is not known.*adamw"),
        ({"every": {"block.0.*": 2}}, "'block.0.*' is no level and fits no parameter"),
        ({"horizon": 0.5}, "horizon is 0.5"),
        ({"optimizer": "delta_momentum", "horizon": 1.5}, "horizon of 1.5 steps, at 1 a step.*erase is 0.5"),
        ({"optimizer": "delta_momentum", "every": {"*": 4}, "horizon": 5}, "at 4 a step.*erase is 0.5"),
        ({"optimizer": "adagrad_memory", "nesterov": True}, "optimizer adagrad_memory.*nesterov"),
    ],
)
def test_names_and_patterns_that_are_not_known_are_refused(settings, words):
    model = nl.models.build("transformer", "tiny", vocab_size=17)
    with pytest.raises(ValueError, match=words):
        optim.from_levels(model, **settings)


def test_a_model_without_levels_is_split_by_kind():
    model = net()[0]
    with pytest.raises(TypeError, match=r"no levels.*split"):
        optim.from_levels(model)
    names = {id(p): n for n, p in model.named_parameters()}
    inside, outside = ([names[id(p)] for p in g["params"]] for g in optim.split(model))
    assert inside == ["convolution.weight", "hidden.weight"]
    assert "embedding.weight" in outside
    assert "head.weight" in outside


def test_projections_in_one_weight_are_matrices_of_their_own():
    model = nl.models.build("titans_lmm", "tiny", vocab_size=17)
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = optim.from_levels(model, "muon")
    parts = {names[id(p)]: g["parts"] for g in optimizer.param_groups if g["matrix"] is None for p in g["params"]}
    kinds = {name.split(".")[-2]: many for name, many in parts.items()}
    assert kinds == {"qkv": 3, "up": 2, "down": 1, "gates": 1, "gate": 1, "out": 1}
    attention = nn.MultiheadAttention(6, 2)
    groups = [(g["matrix"], g.get("parts", 1), [tuple(p.shape) for p in g["params"]]) for g in optim.split(attention)]
    assert groups == [(None, 1, [(6, 6)]), (None, 3, [(18, 6)]), (False, 1, [(18,), (6,)])]


def test_a_joined_layer_is_a_linear_layer():
    layer = optim.Joined(4, 6, parts=3, bias=False)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    assert "parts=3" in repr(layer)
    with pytest.raises(ValueError, match="6 outputs in 4 parts"):
        optim.Joined(4, 6, parts=4)
