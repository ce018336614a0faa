"""A schedule as a wrapper: its rates are those of PyTorch's schedulers, and its place in the run is part of the state."""

import copy

import pytest
import torch
from torch import nn

import nestling as nl
from nestling import optim
from nestling.config import SettingError
from nestling.learn import Learner, checkpoint
from nestling.learn.checkpoint import Checkpoint
from nestling.optim import Periodic, Schedule, Scheduled

from .problems import MAKERS, loss_of, net

TORCH = {
    "torch_sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "torch_adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
}
ALL = {**MAKERS, **TORCH}
EVERY = pytest.mark.parametrize("name", ALL)
TRAPEZOID = Schedule(shape="trapezoid", warmup=1, decay=0.5)


def train(model, optimizer, first, last, schedule=None):
    for n in range(first, last):
        tokens = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(n))
        optimizer.zero_grad()
        loss_of(model, tokens, (3 * tokens + 1) % 7).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def assert_equal(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@EVERY
def test_its_rates_are_those_of_torch(name):
    one, _, _ = net()
    other = copy.deepcopy(one)
    plain = ALL[name](one)
    curve = torch.optim.lr_scheduler.LambdaLR(plain, lambda n: TRAPEZOID(n, n / 12, 12))
    train(one, plain, 0, 12, curve)
    train(other, Scheduled(ALL[name](other), TRAPEZOID, total=12), 0, 12)
    assert_equal(one, other)


@EVERY
@pytest.mark.parametrize("every", [1, 3])
def test_resumes_bit_for_bit_in_the_middle_of_a_run(name, every, tmp_path):
    def start():
        model = net()[0]
        inner = ALL[name](model)
        if every > 1:
            inner = Periodic(inner)
            inner.param_groups[0]["every"] = every
        return model, Scheduled(inner, TRAPEZOID, total=12)

    model, optimizer = start()
    train(model, optimizer, 0, 7)
    saved = Checkpoint(7, checkpoint.model_tensors(model), optimizer.state_dict(), None, {})
    found = checkpoint.load(checkpoint.save(tmp_path, saved))
    train(model, optimizer, 7, 12)

    other, fresh = start()
    checkpoint.load_model(other, found.model, tmp_path)
    fresh.load_state_dict(found.optimizer)
    assert fresh.taken == 7
    train(other, fresh, 7, 12)
    assert_equal(model, other)


def descending(schedule, total=None, **settings):
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return w, Scheduled(torch.optim.SGD([w], 1.0), schedule, total=total, **settings)


def step(w, optimizer):
    before = w.item()
    w.grad = torch.ones_like(w)
    optimizer.step()
    return before - w.item()


def test_warm_up_plateau_and_fall():
    w, optimizer = descending(Schedule(shape="trapezoid", warmup=4, decay=0.25), 40)
    moved = [step(w, optimizer) for _ in range(40)]
    assert moved[:5] == pytest.approx([0.1, 0.25, 0.5, 0.75, 1.0])
    assert moved[5:31] == pytest.approx([1.0] * 26)
    assert moved[31:] == pytest.approx([(40 - n) / 10 for n in range(31, 40)])
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.multiplier == 0


def test_any_function_of_the_step_is_a_schedule_and_schedules_of_torch_multiply_with_it():
    w, optimizer = descending(lambda n: 0.5**n)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    moved = []
    for _ in range(3):
        moved.append(step(w, optimizer))
        other.step()
    assert moved == pytest.approx([1.0, 0.05, 0.0025])


def test_the_full_rate_is_there_again_where_a_step_fails():
    _, optimizer = descending(lambda n: 0.5)

    def closure():
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(closure)
    assert (optimizer.param_groups[0]["lr"], optimizer.taken) == (1.0, 0)


def test_a_group_that_is_added_stands_where_the_others_do():
    w, optimizer = descending(lambda n: float(n))
    step(w, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert [group["taken"] for group in optimizer.param_groups] == [1, 1]


def test_the_state_of_the_wrapped_optimizer_loads_and_begins_the_run():
    w, optimizer = descending(lambda n: 1.0)
    step(w, optimizer)
    plain = torch.optim.SGD([w], 0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.taken == 0
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_what_cannot_be_is_refused():
    _, optimizer = descending(lambda n: 1.0)
    with pytest.raises(TypeError, match="Scheduled already"):
        Scheduled(optimizer, TRAPEZOID, total=3)
    with pytest.raises(TypeError, match=r"Periodic: the optimizer is Scheduled already.*goes round it"):
        Periodic(optimizer)
    for total in (None, 0):
        with pytest.raises(ValueError, match=f"total is {total}"):
            descending(TRAPEZOID, total)
    with pytest.raises(SettingError, match="cosin"):
        Schedule(shape="cosin")


def test_levels_see_through_it_and_a_learner_runs_it():
    torch.manual_seed(0)
    model = nl.models.build("deltanet", "tiny", vocab_size=257)
    inside = optim.from_levels(model, "m3", every={"blocks.0.*": 2})
    optimizer = Scheduled(inside, Schedule(warmup=2), total=20)
    assert optim.core(optimizer) is inside.optimizer
    levels = nl.models.levels(model, optimizer)
    assert {level.name for level in levels} == {level.name for level in nl.models.levels(model, inside)}
    assert any(level.rule == "M3" for level in levels)
    text = nl.stream.Document("a", "abc " * 400)
    learner = Learner(model, optimizer, nl.stream.Lanes([text], nl.stream.ByteTokenizer(), 2, 16, seed=0))
    first = learner.step().loss
    for _ in range(9):
        last = learner.step().loss
    assert last < first
    assert optimizer.taken == 10
    assert learner.checkpoint({}).optimizer["param_groups"][0]["taken"] == 10
