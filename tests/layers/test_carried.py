"""Step sizes learn from what a cut state has learned: as they do through the history that was cut off."""

import math

import pytest
import torch
import torch.nn.functional as F

from nestling import models
from nestling import state as fast

F64 = torch.float64
PERIODS = [4, 8, 16]


def model_of(**settings):
    torch.manual_seed(0)
    model = models.build("hope", "tiny", periods=PERIODS, **settings).double()
    with torch.no_grad():  # so that no two levels' are alike
        for name, p in model.named_parameters():
            if name.endswith(".rate"):
                p.add_(torch.randn(1, dtype=F64))
    return model


def text(time, seed=0):
    return torch.randint(0, 256, (2, time), generator=torch.Generator().manual_seed(seed))


def rates(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".rate")}


def gradients(model, tokens, state):
    """Of the loss on tokens, for every step size."""
    logits, _ = model(tokens, state)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return torch.stack(torch.autograd.grad(loss, list(rates(model).values()))).squeeze(1)


def cut(state, *, levels):
    """Without history; that of what the levels have learned stays unless they are cut, too."""
    return fast.detach(state) if levels else fast.detach(state)._replace(continuum=state.continuum)


@pytest.mark.parametrize("read", [4, 16, 23])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": "momentum"},
        {"rule": "adam"},
        {"rule": "dgd"},
        {"arrangement": "independent"},
        {"arrangement": "nested"},
        {"arrangement": "nested", "rule": "momentum"},
        {"rank": 2},
    ],
    ids=str,
)
def test_reattached_is_the_history_that_was_cut(settings, read):
    model = model_of(**settings)
    _, state = model(text(read))
    expected = gradients(model, text(24, 1), cut(state, levels=False))
    alone = gradients(model, text(24, 1), cut(state, levels=True))
    found = gradients(model, text(24, 1), model.reattached(cut(state, levels=True)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(found, alone, rtol=1e-2, atol=0)


def test_values_are_the_same_to_the_bit():
    model = model_of()
    _, state = model(text(21))
    state = fast.detach(state)
    again = model.reattached(state)
    for a, b in zip(fast.leaves(state), fast.leaves(again), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(fast.leaves(model(text(9, 1), state)), fast.leaves(model(text(9, 1), again)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert model.reattached(state) is not None
        assert not any(x.requires_grad for x in fast.leaves(model.reattached(state)))


def test_slow_weights_get_the_same_gradients():
    model = model_of()
    _, state = model(text(21))
    state = fast.detach(state)
    others = [p for name, p in model.named_parameters() if not name.endswith(".rate")]

    def found(state):
        logits, _ = model(text(24, 1), state)
        return torch.autograd.grad(logits.square().sum(), others, allow_unused=True)

    for a, b in zip(found(state), found(model.reattached(state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_levels_with_losses_of_their_own():
    model = model_of(error="local")
    _, state = model(text(21))
    state = fast.detach(state)
    alone = gradients(model, text(12, 1), state)
    found = gradients(model, text(12, 1), model.reattached(state))
    assert not torch.allclose(found, alone, rtol=1e-2, atol=0)


@pytest.mark.parametrize("settings", [{"outer": 2}, {"arrangement": "nested", "rank": 2}], ids=str)
def test_left_alone(settings):
    model = model_of(**settings)
    _, state = model(text(21))
    assert not any(x.requires_grad for x in fast.leaves(model.reattached(fast.detach(state))))


@pytest.mark.parametrize("rate", [-math.inf, -103.0, -95.0])
def test_steps_of_next_to_no_size(rate):
    """What was made by long ones before is still there."""
    model = model_of().float()
    _, state = model(text(16))
    with torch.no_grad():
        for p in rates(model).values():
            p.fill_(rate)
    assert gradients(model, text(16, 1), model.reattached(fast.detach(state))).isfinite().all()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"periods": PERIODS[:2]}, "weights .* expected"),
        ({"arrangement": "nested"}, "weights .* expected"),
        ({"rule": "adam"}, "another inner rule"),
        ({"error": "local"}, "learning blocks and a window"),
    ],
    ids=str,
)
def test_a_state_of_another_model_is_refused_in_words(other, words):
    model, settings = model_of(), {"periods": PERIODS, **other}
    torch.manual_seed(0)
    stranger = models.build("hope", "tiny", **settings).double()
    for one, another in ((model, stranger), (stranger, model)):
        _, state = one(text(5))
        for read in (another.reattached, lambda state, another=another: another(text(5), state)):
            with pytest.raises(ValueError, match=words):
                read(fast.detach(state))
