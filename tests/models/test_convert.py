"""Converting a trained model: what it computes stays, what is new learns, and the contracts hold afterwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.optim import inner

PAIRS = {
    "transformer": ("hope_attention", {}),
    "swa_transformer": ("hope_swa", {}),
    "ttt_e2e": ("ttt_e2e", {"periods": [4, 8]}),
    "hope": ("hope", {"periods": [4, 8, 16]}),
    "hope_attention": ("hope_attention", {"periods": [2, 6]}),
}
"""From each of these to a model that computes the same until a token has moved a level."""


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(31, (lanes, time), generator=torch.Generator().manual_seed(seed))


def trained(name: str, **settings: object) -> nl.models.LanguageModel:
    """A float64 model in which every weight matters, also a gain or a step size."""
    torch.manual_seed(1)
    model = nl.models.build(name, dim=16, vocab_size=31, ffn=16, **settings).double()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.1 if "ffn" in key or "norm" in key else 0.02))
            weight.mul_(3 if weight.dim() == 2 and "mixer" not in key else 1)
    return model


def asleep(model: nl.models.LanguageModel) -> nl.models.LanguageModel:
    """No level of the continuum moves: η = softplus(rate) = 0."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(".rate"):
                weight.fill_(-1e4)
    return model


def converted(name: str) -> tuple[nl.models.LanguageModel, nl.models.LanguageModel]:
    model = trained(name)
    to, changes = PAIRS[name]
    return model, nl.models.convert(model, to, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_logits_are_bit_equal_while_nothing_moves(name: str, dtype: torch.dtype) -> None:
    old, new = (model.to(dtype) for model in converted(name))
    tokens = text(0, 2, 29)
    want, _ = old.read(tokens, old.start(2).blocks)
    got, _ = new.read(tokens, new.start(2).blocks)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_reading_with_inner_rates_of_zero_is_reading_as_before(name: str) -> None:
    """The new model reads in windows, which may change how a product is rounded, and nothing else."""
    old, new = (asleep(model) for model in converted(name))
    tokens = text(1, 2, 29)
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[1, 10] = True
    torch.testing.assert_close(new(tokens, reset=reset)[0], old(tokens, reset=reset)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_in_the_same_calls_the_whole_forward_is_bit_equal() -> None:
    old, new = converted("transformer")
    asleep(new)
    tokens, state, parts = text(2, 2, 20), None, []
    assert new.window == 4
    for first in range(0, 20, 4):
        logits, state = old(tokens[:, first : first + 4], state)
        parts.append(logits)
    assert torch.equal(new(tokens)[0], torch.cat(parts, 1))


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_awake_it_learns_from_what_it_reads_and_keeps_the_contracts(name: str) -> None:
    old, new = converted(name)
    tokens = text(3, 2, 27)
    whole, end = new(tokens)
    assert (whole - old(tokens)[0]).abs().max() > 1e-6, "the new levels do not move"
    for number in new.learning:
        moved = [
            max(float(w.abs().max()) for w in level)
            for level in end.continuum[new.learning.index(number)].delta
            if level
        ]
        assert min(moved) > 0, "a level, old or new, has learned nothing"
    for bounds in ([0, 11, 27], list(range(28))):  # C2
        state, parts = None, []
        for first, last in itertools.pairwise(bounds):
            logits, state = new(tokens[:, first:last], state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-8)
        for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    changed = tokens.clone()  # C3
    changed[0, 13] = (changed[0, 13] + 1) % 31
    other, _ = new(changed)
    assert torch.equal(other[0, :13], whole[0, :13])
    assert torch.equal(other[1], whole[1])
    assert not torch.equal(other[0, 13:], whole[0, 13:])
    with torch.inference_mode():  # C1
        assert torch.equal(new.train()(tokens)[0], whole)
        assert torch.equal(new.eval()(tokens)[0], whole)


def test_every_weight_of_the_new_model_can_be_trained() -> None:
    _, new = converted("transformer")
    tokens = text(4, 2, 33)
    optimizer = nl.optim.from_levels(new, "sgd", lr=0.1)
    for step in range(2):  # a new level's inner weights feel the loss as soon as its output projection is not zero
        logits, _ = new(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        dead = [key for key, p in new.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert all(".levels_.1." in key for key in dead) if step == 0 else not dead, dead
        optimizer.step()
        optimizer.zero_grad()


def test_the_old_model_is_left_alone() -> None:
    model = trained("transformer")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    new = nl.models.convert(model, "hope_attention")
    with torch.no_grad():
        for weight in new.parameters():
            weight.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_levels_are_added_removed_and_moved_by_their_periods() -> None:
    model = trained("hope", periods=[4, 8])

    def downs(model: nl.models.LanguageModel) -> list[Tensor]:
        return [level.mlp.down.weight for level in model.continuum(1).levels_]

    def rates(model: nl.models.LanguageModel) -> list[float]:
        return [float(level.rate) for level in model.continuum(1).levels_]

    first, second = downs(model)
    for changes, origins, expected in (
        ({"periods": [8]}, None, [second]),
        ({"periods": [2, 4, 8]}, None, [None, first, second]),
        ({"periods": [16, 32]}, None, [first, second]),
        ({"periods": [2, 8, 32]}, [0, None, 1], [first, None, second]),
        ({"periods": [4]}, [1], [second]),
        ({"chunk": 8}, None, [first, second]),
    ):
        new = nl.models.convert(model, origins=origins, **changes)
        assert new.config.periods == tuple(changes.get("periods", (4, 8)))
        for found, want in zip(downs(new), expected, strict=True):
            assert not found.any() if want is None else torch.equal(found, want)
        known = [want is not None for want in expected]
        kept = [rate for rate, old in zip(rates(new), known, strict=True) if old]
        assert kept == [
            rate for rate, d in zip(rates(model), downs(model), strict=True) if any(w is d for w in expected)
        ]
    new = nl.models.convert(model, chunk=8)
    assert new.config.chunk == 8
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_arrangements() -> None:
    tokens = text(5, 1, 12)
    single, chain = trained("hope_attention", periods=[4]), trained("hope_attention", periods=[4, 8])
    beside = nl.models.convert(single, periods=[4, 8], arrangement="independent")
    assert torch.equal(beside.read(tokens, beside.start(1).blocks)[0], single.read(tokens, single.start(1).blocks)[0])
    more = nl.models.convert(beside, periods=[4, 8, 16])
    assert torch.equal(more.read(tokens, more.start(1).blocks)[0], beside.read(tokens, beside.start(1).blocks)[0])
    nested = nl.models.convert(chain, arrangement="nested")
    assert torch.equal(nested.read(tokens, nested.start(1).blocks)[0], chain.read(tokens, chain.start(1).blocks)[0])
    for model, arrangement in ((chain, "independent"), (beside, "sequential")):
        with pytest.raises(ValueError, match=r"levels cannot become .* keep arrangement="):
            nl.models.convert(model, arrangement=arrangement)


def sizes(model: nl.models.LanguageModel) -> list[float]:
    """η of the last block's levels."""
    return [float(torch.nn.functional.softplus(level.rate)) for level in model.continuum(1).levels_]


@pytest.mark.parametrize("new", inner.RULES)
@pytest.mark.parametrize("old", inner.RULES)
@torch.no_grad()
def test_a_step_size_is_kept_by_rules_that_count_it_in_the_same_unit(old: str, new: str) -> None:
    model = trained("hope_swa", periods=[4, 8], rule=old)
    for level in model.continuum(1).levels_:
        level.step_by(0.07)
    alike = {"gradient", "momentum", "dgd"}
    kept = old == new or {old, new} <= alike
    want = 0.07 if kept else inner.named(new).rate
    assert sizes(nl.models.convert(model, rule=new)) == pytest.approx([want, want])
    assert sizes(nl.models.convert(model, rule=new, rate=0.2)) == pytest.approx([0.2, 0.2])


@torch.no_grad()
def test_a_step_is_as_large_as_the_gradient_where_rules_say_so() -> None:
    """What `unit` claims: of one gradient, and of one a thousand times as large."""
    g = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in inner.RULES:
        rule = inner.named(name)
        one, many = (rule.step(x, rule.start(x))[0] for x in (g, 1000 * g))
        grown = float(many.norm() / one.norm())
        assert grown == pytest.approx(1000 if rule.unit == inner.GRADIENT else 1, rel=1e-3), name


@pytest.mark.parametrize(("to", "changes"), [(None, {"periods": []}), ("swa_transformer", {})])
@pytest.mark.parametrize("arrangement", ["sequential", "nested", "independent"])
@torch.no_grad()
def test_one_network_takes_the_place_of_all_levels(
    to: str | None, changes: dict[str, object], arrangement: str
) -> None:
    model = trained("hope_swa", periods=[4, 8], arrangement=arrangement)
    tokens = text(6, 2, 12)
    for origin in (0, 1):
        new = nl.models.convert(model, to, origins=[origin], **changes)
        assert (new.config.periods, list(new.learning)) == ((), [])
        silent = nl.models.convert(model)  # whose other level says nothing
        for number in range(2):
            silent.continuum(number).levels_[1 - origin].mlp.down.weight.zero_()
        want, _ = silent.read(tokens, silent.start(2).blocks)
        torch.testing.assert_close(new(tokens)[0], want, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_where_one_level_can_be_meant_nothing_needs_to_be_said() -> None:
    one, two = trained("hope_swa", periods=[8]), trained("ttt_e2e")
    for model, origin in ((one, 0), (two, 1)):  # of the latter the network that no token moved
        new = nl.models.convert(model, "swa_transformer")
        down = model.continuum(1).levels_[origin].mlp.down.weight
        assert torch.equal(new.continuum(1).levels_[0].mlp.down.weight, down)
    new = nl.models.convert(two, "swa_transformer", origins=[0])
    for number, origin in ((0, 0), (1, 0)):
        down = two.continuum(number).levels_[origin].mlp.down.weight
        assert torch.equal(new.continuum(number).levels_[0].mlp.down.weight, down)


@pytest.mark.parametrize(
    ("name", "to", "settings", "words"),
    [
        (
            "transformer",
            "hope_swa",
            {},
            "block 0 of transformer reads by Attention .*, that of hope_swa by SlidingAttention",
        ),
        ("deltanet", "retnet", {}, "reads by Memory"),
        ("transformer", "hope_attention", {"ffn": 32}, r"ffn cannot change.*expected some of: periods, arrangement"),
        ("transformer", "hope_attention", {"chunk": 4}, "hope_attention has no setting chunk"),
        ("transformer", "hope_attention", {"periods": [4, 6]}, "must be multiples of the fastest"),
        ("transformer", "hope_atention", {}, "model 'hope_atention' is not known"),
        ("transformer", "transformer", {"origins": [0]}, "a single feed-forward network in every block"),
        ("hope_attention", None, {"periods": [2, 16, 32]}, r"\[4, 8\] are to become .* \[2, 16, 32\].*give origins"),
        (
            "hope_attention",
            "transformer",
            {},
            r"take the place of the levels with periods \[4, 8\], .* give one number as origins \(origins 0 for that of period 4",
        ),
        ("hope_attention", "transformer", {"origins": [0, 1]}, r"origins are \[0, 1\], but one .*: give one number"),
        (
            "hope_attention",
            None,
            {"periods": [], "origins": [2]},
            r"origins are \[2\], but one .* origins 1 for that of period 8",
        ),
        (
            "hope_attention",
            None,
            {"periods": [], "origins": [None]},
            r"origins are \[None\], but one .*: give one number",
        ),
        (
            "hope_attention",
            None,
            {"periods": [], "origins": [0], "rate": 0.1},
            "rate is 0.1, but .* no level that learns",
        ),
        ("hope_attention", None, {"rate": 0.0}, "rate is 0.0; expected a positive number"),
        ("hope_attention", None, {"origins": [1, 0]}, r"origins are \[1, 0\]; expected 2.* that rise"),
        ("hope_attention", None, {"origins": [None, None]}, "at least one number"),
        ("hope_attention", None, {"origins": [0, 2]}, "numbers from 0 to 1"),
        (
            "tnt",
            None,
            {"locals": [4, 8]},
            r"blocks\.0\.mixer\..* in the old model and .* in the new one; expected the same weights",
        ),
    ],
)
def test_what_cannot_be_converted_is_told_in_words(
    name: str, to: str | None, settings: dict[str, object], words: str
) -> None:
    model = nl.models.build(name, dim=16, vocab_size=31, ffn=16)
    with pytest.raises(ValueError, match=words):
        nl.models.convert(model, to, **settings)  # type: ignore[arg-type]
