"""The outer loop as a level: any optimizer by name, at any frequency, in a run, in its checkpoints and in the table of levels."""

import dataclasses

import pytest
import torch

import nestling as nl
from nestling import optim
from nestling.config import SettingError
from nestling.learn import Learner, TrainConfig
from nestling.learn.optimizer import adamw, from_config
from nestling.stream import ByteTokenizer, Document, Lanes

TEXTS = [Document(f"{n}", f"text {n}: " + "abcabd" * (20 + n)) for n in range(4)]


def learner_of(config, seed=0):
    torch.manual_seed(seed)
    model = nl.models.build(config.model, config.size)
    lanes = Lanes(TEXTS, ByteTokenizer(), config.lanes, config.length, seed=0)
    return Learner(model, from_config(config.resolved(), model), lanes, carry=3, schedule=lambda n: 1 / (1 + n / 500))


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.parameters])


@pytest.mark.parametrize("name", ["adamw", "m3", "muon", "dgd", "delta_momentum", "deep_momentum"])
def test_a_run_goes_on_bit_for_bit_inside_a_period(name, tmp_path):
    config = TrainConfig(
        model="deltanet", tokens=1, lanes=2, length=16, optimizer=name, every={"blocks.1.*": 3, "head.weight": 2}
    )
    one = learner_of(config)
    for _ in range(4):
        one.step()
    path = nl.learn.checkpoint.save(tmp_path, one.checkpoint({}))
    losses = [one.step().loss for _ in range(4)]

    other = learner_of(config, seed=1)
    other.restore(nl.learn.checkpoint.load(path))
    assert [g["waited"] for g in other.optimizer.param_groups] == [4 % g["every"] for g in one.optimizer.param_groups]
    assert [other.step().loss for _ in range(4)] == losses
    assert torch.equal(weights(one), weights(other))
    assert losses[-1] < 5.6  # it has learned something: an even guess costs log 257 = 5.55


def test_a_checkpoint_of_other_groups_is_refused_in_words():
    config = TrainConfig(model="deltanet", tokens=1, lanes=2, length=16, optimizer="muon")
    learner = learner_of(config)
    saved = learner.checkpoint({})
    groups = saved.optimizer["param_groups"]
    merged = [{**groups[0], "params": [n for group in groups for n in group["params"]]}]
    with pytest.raises(nl.learn.checkpoint.CheckpointError, match="step 0: its optimizer has other groups"):
        learner.restore(dataclasses.replace(saved, optimizer={**saved.optimizer, "param_groups": merged}))


def test_the_default_is_adamw_over_the_levels():
    torch.manual_seed(0)
    model = nl.models.build("hope")
    made = from_config(TrainConfig().resolved(), model)
    plain = adamw(model)
    assert type(made) is torch.optim.AdamW
    for a, b in zip(made.param_groups, plain.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
        assert all(p is q for p, q in zip(a["params"], b["params"], strict=True))


def test_a_learner_takes_an_optimizer_by_name():
    torch.manual_seed(0)
    model = nl.models.build("deltanet")
    learner = Learner(model, "m3", Lanes(TEXTS, ByteTokenizer(), 2, 8, seed=0))
    assert isinstance(learner.optimizer, optim.M3)
    assert learner.step().lr == optim.default_lr("m3")


def test_settings_of_the_optimizer_reach_it():
    model = nl.models.build("deltanet")
    config = TrainConfig(optimizer="m3", optimizer_set={"slow_weight": 0.3}, lr=0.5, weight_decay=0.2, horizon=10)
    made = from_config(config, model)
    assert {(g["slow_weight"], g["lr"], g["momentum"]) for g in made.param_groups} == {(0.3, 0.5, 0.9)}
    assert {g["weight_decay"] for g in made.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adan"}, r"optimizer: there is none named 'adan'.*adamw"),
        (
            {"optimizer_set": {"nesterov": True}},
            r"adamw has no setting 'nesterov'; expected some of amsgrad, betas, .*eps",
        ),
        (
            {"optimizer_set": {"lr": 1.0}},
            r"optimizer-set: adamw has no setting 'lr'; .*\(lr, .* are options of their own\)",
        ),
        ({"every": {"block*": 0}}, r"optimizer: every: 'block\*' has 0; expected a whole number"),
        ({"every": {"layers.*": 2}}, r"'layers\.\*' is no level and fits no parameter"),
    ],
)
def test_what_cannot_be_is_one_message(settings, words):
    with pytest.raises(SettingError, match=words):
        from_config(dataclasses.replace(TrainConfig(), **settings).resolved(), nl.models.build("deltanet"))


def test_an_optimizers_memories_are_levels_whose_flow_is_gradients():
    model = nl.models.build("hope")
    plain = nl.models.levels(model)
    for name, expected in (
        ("adamw", [("optimizer.moments", 1)]),
        ("sgd", [("optimizer.momentum", 1)]),
        ("m3", [("optimizer.fast momentum", 1), ("optimizer.moments of the rest", 1), ("optimizer.slow momentum", 20)]),
    ):
        optimizer = optim.from_levels(model, name)
        levels = nl.models.levels(model, optimizer)
        made = [x for x in levels if x.name.startswith("optimizer.")]
        assert [(x.name, x.period.n) for x in made] == expected
        assert {x.flow for x in made} == {"gradients"}
        names = [x.name for x in levels]
        assert names.index(made[0].name) < names.index("slow weights")  # which need it to move
        assert [x.name for x in levels if x not in made] == [x.name for x in plain]
        assert [x.period.key() for x in levels] == sorted(x.period.key() for x in levels)
        owned = {key for state in optimizer.state.values() for key in state}
        assert owned <= {path.removeprefix("optimizer.") for x in made for path in x.state_paths} | {"step"}
    periodic = optim.from_levels(model, "adamw", every={"blocks.0.*": 4})
    found = {x.name: x.period.n for x in nl.models.levels(model, periodic)}
    assert found["optimizer.moments"] == 1
    assert found["optimizer.moments, every 4 steps"] == 4


@pytest.mark.parametrize("name", optim.names())
def test_every_tensor_that_an_optimizer_keeps_belongs_to_a_memory_of_it(name):
    torch.manual_seed(0)
    model = nl.models.build("deltanet")
    optimizer = optim.from_levels(model, name)
    logits, _ = model(torch.randint(257, (1, 4)))
    logits.square().mean().backward()
    optimizer.step()
    kept = {k for state in optimizer.state.values() for k, v in state.items() if isinstance(v, torch.Tensor)}
    told = {tensor for memory in optim.memories(optimizer) for tensor in memory.tensors}
    assert kept - told <= {"step"}
    assert told
