"""What every optimizer keeps, over all of them: optimum, dtypes, resuming, and gradients of every kind."""

import copy
import json

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.learn import checkpoint
from nestling.learn.checkpoint import Checkpoint

from .problems import ERASES, MAKERS, RESTLESS, WATCHES, loss_of, net, quadratic

EVERY = pytest.mark.parametrize("name", MAKERS)


def train(model, optimizer, tokens, targets, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tensors_of(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in RESTLESS])
def test_reaches_the_optimum_of_a_quadratic_under_a_schedule_of_torch(name):
    layer, x, best = quadratic()
    optimizer = MAKERS[name](layer)
    # As printed, neurips erases a fixed share whatever the rate: its fixed point moves with the rate.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 if name == "dgd_neurips" else 0.0, 250)
    goal = best / (1 + ERASES.get(name, 0.0))
    far = (layer.weight - goal).norm().item()
    for _ in range(250):
        optimizer.zero_grad()
        (0.5 * (layer(x) - x @ best.mT).square().sum(1).mean()).backward()
        optimizer.step()
        schedule.step()
    assert (layer.weight - goal).norm() < 0.05 * far


@EVERY
def test_trains_a_small_net(name):
    model, tokens, targets = net()
    losses = train(model, MAKERS[name](model), tokens, targets, 40)
    assert losses[-1] < 0.8 * losses[0]
    assert min(losses[-10:]) < losses[0] - 0.3


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtype_and_shape_and_remembers_in_at_least_float32(name, dtype):
    model, tokens, targets = net(dtype)
    shapes = [(p.dtype, p.shape) for p in model.parameters()]
    optimizer = MAKERS[name](model)
    train(model, optimizer, tokens, targets, 2)
    assert [(p.dtype, p.shape) for p in model.parameters()] == shapes
    assert all(p.isfinite().all() for p in model.parameters())
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in tensors_of(optimizer)} <= {expected}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_through_a_checkpoint_on_disk(name, dtype, tmp_path):
    model, tokens, targets = net(dtype)
    optimizer = MAKERS[name](model)
    train(model, optimizer, tokens, targets, 6)  # inside a period of those that have one
    saved = Checkpoint(6, checkpoint.model_tensors(model), optimizer.state_dict(), None, {})
    found = checkpoint.load(checkpoint.save(tmp_path, saved))
    expected = train(model, optimizer, tokens, targets, 5)

    other, _, _ = net(dtype)
    checkpoint.load_model(other, found.model, tmp_path)
    fresh = MAKERS[name](other)
    fresh.load_state_dict(found.optimizer)
    assert train(other, fresh, tokens, targets, 5) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@EVERY
@pytest.mark.parametrize("every", [1, 2])
def test_a_first_gradient_after_resuming_finds_the_memory_it_would_have_found(name, every):
    """`unused` and what comes before it in the net: a memory that begins at random begins alike, whatever began before it."""

    def step(model, optimizer, n):
        optimizer.zero_grad()
        (loss_of(model, tokens, targets) + (model.unused.square().sum() if n > 5 else 0)).backward()
        optimizer.step()

    model, tokens, targets = net()
    optimizer = optim.Periodic(MAKERS[name](model))
    optimizer.param_groups[0]["every"] = every
    for n in range(4):
        step(model, optimizer, n)
    other = copy.deepcopy(net()[0])
    other.load_state_dict(model.state_dict())
    fresh = optim.Periodic(MAKERS[name](other))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in range(4, 10):
        step(model, optimizer, n)
        step(other, fresh, n)
    assert not torch.equal(model.unused, torch.ones(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("m3", {"slow_weight": 0.0}),
        ("m3", {"second_moment": "none"}),
        ("adagrad", {"momentum": 0.0}),
        ("adagrad_rows", {"momentum": 0.0}),
        ("dgd_momentum", {"momentum": 0.0}),
    ],
)
def test_a_memory_that_is_asked_for_later_begins_then(name, settings):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    (group,) = optimizer.param_groups
    later = {key: group[key] for key in settings} if name != "adagrad" else {"momentum": 0.5}
    group.update(settings)
    train(model, optimizer, tokens, targets, 6)
    kept = {p: set(state) for p, state in optimizer.state.items()}
    group.update(later)
    losses = train(model, optimizer, tokens, targets, 6)
    assert any(set(state) > kept.get(p, set()) for p, state in optimizer.state.items())
    assert losses[-1] < losses[0]


def test_settings_that_an_older_state_dict_does_not_have_stay_as_they_are():
    w = nn.Parameter(torch.ones(6, 2))
    state = optim.Muon([w], 0.5).state_dict()
    for group in state["param_groups"]:
        del group["parts"]
    optimizer = optim.Muon([w], 0.1, parts=3)
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["parts"]) == (0.5, 3)


@EVERY
def test_a_state_dict_shares_nothing_with_the_optimizer_that_loads_it(name):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, tokens, targets, 2)
    state = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(net()[0])
    fresh = MAKERS[name](other)
    fresh.load_state_dict(state)
    kept = copy.deepcopy(state)
    train(other, fresh, tokens, targets, 2)
    for number, entry in kept["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][number][key]))
    json.dumps(state["param_groups"])  # settings are plain numbers and words


@EVERY
def test_parameters_without_a_gradient_are_left_alone(name):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, tokens, targets, 3)
    assert torch.equal(model.unused, torch.ones(2, 3))
    assert not optimizer.state[model.unused]


@EVERY
def test_a_parameter_that_is_used_now_and_then_goes_on_from_where_it_stood(name):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    for step in range(6):
        optimizer.zero_grad()
        (loss_of(model, tokens, targets) + (model.unused.square().sum() if step % 2 else 0)).backward()
        before = model.unused.clone()
        optimizer.step()
        assert torch.equal(model.unused, before) == (step % 2 == 0)
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY
def test_zero_gradients_from_the_start_move_nothing_but_by_erasing(name):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(model, tokens, targets) * 0 + model.unused.sum() * 0).backward()
        optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    erased = {id(w) for w in getattr(optimizer, "capture", None).names} if name in ERASES else set()
    assert moved == [id(p) in erased for p in model.parameters()]


@EVERY
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30])
def test_huge_gradients_leave_finite_weights(name, size):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    if name in WATCHES:  # its tokens go with the gradients, and a second pass would overflow in the net
        (loss_of(model, tokens, targets) * size).backward()
        optimizer.step()
    for _ in range(0 if name in WATCHES else 2):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_with_its_parameter(name, bad):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, tokens, targets, 1)
    optimizer.zero_grad()
    loss_of(model, tokens, targets).backward()
    model.head.weight.grad[0, 0] = bad
    optimizer.step()
    assert not model.head.weight.isfinite().all()
    assert all(p.isfinite().all() for n, p in model.named_parameters() if n != "head.weight")


@EVERY
def test_a_closure_is_evaluated_with_gradients_and_its_loss_handed_back(name):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    other = copy.deepcopy(model)
    plain = MAKERS[name](other)
    expected = train(other, plain, tokens, targets, 1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, tokens, targets)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@EVERY
def test_a_sparse_gradient_is_the_dense_one_it_stands_for(name):
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=sparse)
        optimizer = MAKERS[name](table)
        for rows in ([0, 1, 1], [2], [0]):
            optimizer.zero_grad()
            table(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
        weights.append(table.weight.detach())
    assert torch.equal(*weights)


@EVERY
def test_groups_have_settings_of_their_own(name):
    model, tokens, targets = net()
    other = copy.deepcopy(model)
    optimizer = MAKERS[name](model)
    before = model.head.weight.detach().clone()
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not model.head.weight]
    optimizer.add_param_group({"params": [model.head.weight], "lr": 0.0})
    train(model, optimizer, tokens, targets, 2)
    assert torch.equal(model.head.weight, before)
    assert not torch.equal(model.hidden.weight, other.hidden.weight)


@EVERY
def test_weight_decay_is_decoupled(name):
    model, tokens, targets = net()
    other = copy.deepcopy(model)
    for network, decay in ((model, 0.0), (other, 0.1)):
        optimizer = MAKERS[name](network)
        optimizer.param_groups[0]["weight_decay"] = decay
        train(network, optimizer, tokens, targets, 1)
    lr = optimizer.param_groups[0]["lr"]
    start = net()[0]
    for a, b, w in zip(model.parameters(), other.parameters(), start.parameters(), strict=True):
        if a is not model.unused:
            torch.testing.assert_close(b, a - lr * 0.1 * w)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: optim.PreconditionedMomentum(p, lr=-1.0), "lr is -1.0"),
        (lambda p: optim.PreconditionedMomentum(p, momentum=1.5), "momentum is 1.5"),
        (lambda p: optim.DeltaMomentum(p, momentum=0.5, erase=0.6), "erase is 0.6.*momentum"),
        (
            lambda p: optim.DeltaMomentum(p, form="left"),
            "form is 'left'.*matrix, elementwise, tokens, proximal, printed",
        ),
        (lambda p: optim.DeltaMomentum(p, erase=-0.1, form="proximal"), "erase is -0.1"),
        (lambda p: optim.DeepMomentum(p, keys="rows"), "keys is 'rows'"),
        (lambda p: optim.Muon(p, adjust_lr_fn="rms"), "adjust_lr_fn is 'rms'"),
        (lambda p: optim.Muon(p, ns_steps=100), "ns_steps is 100"),
        (lambda p: optim.Muon(p, matrix=True), "fewer than 2 dimensions"),
        (lambda p: optim.Muon(p, ns_dtype="float16"), "ns_dtype is 'float16'.*bfloat16"),
        (lambda p: optim.M3(p, parts=4), "parts is 4.*divides the rows"),
        (lambda p: optim.M3(p, parts=0), "parts is 0"),
        (lambda p: optim.M3(p, period=0), "period is 0"),
        (lambda p: optim.M3(p, accumulate="mean"), "accumulate is 'mean'"),
        (lambda p: optim.AdamMemory(p, betas=(0.9, 1.0)), "betas are"),
        (lambda p: optim.AdamMemory(p, betas=(0.9,)), "betas are.*two shares"),
        (lambda p: optim.AdamMemory(p, betas=0.9), "betas are 0.9"),
        (lambda p: optim.AdamMemory(p, ridge=-1.0), "ridge is -1.0"),
        (lambda p: optim.AdamMemory(p, target="sign"), "target is 'sign'"),
        (lambda p: optim.AdaGradMemory(p, form="full"), "form is 'full'"),
        (lambda p: optim.AdaGradMemory(p, weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda p: optim.Diagonal(1.5), "beta is 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in WATCHES])
def test_parameters_know_nothing_of_each_other(name):
    """All at once, of different precisions in one group, move as every one of them alone."""
    generator = torch.Generator().manual_seed(0)
    f32 = torch.float32
    shapes = [((6, 4), f32), ((6, 4), f32), ((4, 6), torch.bfloat16), ((5,), torch.float64), ((), f32)]
    start = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes]
    grads = [[torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes] for _ in range(5)]

    def moved(chosen):
        bag = nn.ParameterList([nn.Parameter(start[n].clone()) for n in chosen])
        optimizer = MAKERS[name](bag)
        if hasattr(optimizer, "seed"):  # that memories which begin at random begin alike
            optimizer.places = dict(zip(bag, chosen, strict=True))
        for step in grads:
            for p, n in zip(bag, chosen, strict=True):
                p.grad = step[n].clone()
            optimizer.step()
        return [p.detach() for p in bag]

    for n, whole in enumerate(moved(range(len(shapes)))):
        (alone,) = moved([n])
        torch.testing.assert_close(whole, alone)


@EVERY
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_goes_on_as_the_original_does(name, wrapped):
    model, tokens, targets = net()
    optimizer = MAKERS[name](model)
    if wrapped:
        optimizer = optim.Scheduled(optim.Periodic(optimizer), lambda n: 1 / (n + 1))
        optimizer.param_groups[0]["every"] = 2
    train(model, optimizer, tokens, targets, 3)
    if name in WATCHES:
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy((model, optimizer))
        return
    other, copied = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, tokens, targets, 3) == train(other, copied, tokens, targets, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        optim.AdamMemory([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_names_of_parameters_are_kept():
    model, _, _ = net()
    optimizer = optim.M3(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "scale"
