"""C1–C6 over every named model: a newly registered one is picked up by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl
from nestling import native

NAMES = nl.models.names()
FAST = ("anchor", "weights", "momentum", "boundary", "delta", "pending", "base", "moving")
"""Fields of states that hold fast weights."""


def build(name: str) -> nl.models.LanguageModel:
    """A tiny float64 model whose every weight matters."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=31, ffn=16).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    return model


MODELS: dict[str, nl.models.LanguageModel] = {name: build(name) for name in NAMES}


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(31, (lanes, time), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def same_state(a: object, b: object) -> None:
    for x, y in zip(nl.state.leaves(a), nl.state.leaves(b), strict=True):
        close(x.double(), y.double())


@pytest.mark.parametrize("name", NAMES)
@given(time=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0, 999), masked=st.booleans())
@torch.no_grad()
def test_any_split_and_one_token_at_a_time(name: str, time: int, share: float, seed: int, masked: bool) -> None:
    model, tokens = MODELS[name], text(seed, 2, time)
    masks = {}
    if masked:
        generator = torch.Generator().manual_seed(seed)
        masks = {
            "reset": torch.rand(2, time, generator=generator) < 0.15,
            "valid": torch.rand(2, time, generator=generator) < 0.8,
        }
    valid = masks.get("valid", torch.ones(2, time, dtype=torch.bool))
    whole, end = model(tokens, **masks)
    at = round(share * time)
    for bounds in ([0, at, time], list(range(time + 1))):
        state, parts = None, []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
            now = {n: m[:, first:last] for n, m in masks.items()}
            logits, state = model(tokens[:, first:last], state, **now)
            parts.append(logits)
        close(torch.cat(parts, 1)[valid], whole[valid])
        same_state(state, end)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dropping_the_state_at_a_split_is_noticed(name: str) -> None:
    model, tokens = MODELS[name], text(1, 2, 20)
    whole, _ = model(tokens)
    forgetful, _ = model(tokens[:, 11:])
    assert (whole[:, 15:] - forgetful[:, 4:]).abs().max() > 1e-3, "beyond the convolution's reach"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_lanes_at_other_positions_and_invalid_tokens_change_nothing(name: str) -> None:
    model, tokens = MODELS[name], text(2, 3, 17)
    valid = torch.ones(3, 17, dtype=torch.bool)
    for lane, skipped in enumerate((0, 3, 8)):
        valid[lane, :skipped] = False
    logits, state = model(tokens, valid=valid)
    more = text(3, 3, 9)
    next_logits, _ = model(more, state)
    for lane, skipped in enumerate((0, 3, 8)):
        alone, own = model(tokens[lane : lane + 1, skipped:])
        close(logits[lane, skipped:], alone[0])
        close(next_logits[lane], model(more[lane : lane + 1], own)[0][0])
    assert state.position.tolist() == [17, 14, 9]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_reset_inside_a_call_is_a_fresh_start(name: str) -> None:
    model, tokens = MODELS[name], text(4, 2, 19)
    reset = torch.zeros(2, 19, dtype=torch.bool)
    reset[0, 7] = reset[1, 12] = True
    logits, state = model(tokens, reset=reset)
    plain, _ = model(tokens)
    close(logits[0, :7], plain[0, :7])
    close(logits[0, 7:], model(tokens[:1, 7:])[0][0])
    close(logits[1, 12:], model(tokens[1:, 12:])[0][0])
    assert state.position.tolist() == [12, 7]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_causal_and_lanes_are_independent(name: str) -> None:
    model, tokens = MODELS[name], text(5, 2, 15)
    logits, _ = model(tokens)
    for place in (0, 4, 14):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 31
        other, _ = model(changed)
        assert torch.equal(other[0, :place], logits[0, :place])
        assert torch.equal(other[1], logits[1])
        assert not torch.equal(other[0, place:], logits[0, place:])


@pytest.mark.parametrize("name", NAMES)
def test_all_modes_are_equal(name: str) -> None:
    model, tokens = MODELS[name], text(6, 2, 13)
    expected, _ = model.train()(tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model.eval()(tokens)[0], expected.detach())
    model.train()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_changes_no_more_than_rounding_and_no_fast_weight(name: str) -> None:
    torch.manual_seed(0)  # heads of four channels would lie too near a layer norm's pole
    model, tokens = nl.models.build(name, dim=32, vocab_size=31, ffn=32), text(10, 2, 13)
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[1, 5] = True
    expected, _ = model(tokens, reset=reset)

    def wide(node: object, fast: bool = False) -> None:
        if isinstance(node, Tensor):
            assert not (fast and node.is_floating_point()) or node.dtype == torch.float32
        elif node is not None:
            for name, child in zip(getattr(node, "_fields", [""] * len(node)), node, strict=True):
                wide(child, fast or name in FAST)

    for weights, casting in ((torch.float32, True), (torch.bfloat16, False)):
        model, state, parts = model.to(weights), None, []
        with torch.autocast("cpu", torch.bfloat16, enabled=casting):
            for first, last in ((0, 7), (7, 13)):
                logits, state = model(tokens[:, first:last], state, reset=reset[:, first:last])
                parts.append(logits.float())
        assert (torch.cat(parts, 1) - expected).abs().max() < 0.1 * expected.abs().max()
        wide(state)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_state_is_data(name: str, tmp_path: Path) -> None:
    model, tokens, more = MODELS[name], text(7, 3, 10), text(8, 3, 6)
    start = model(tokens[:, :0])[1]
    same_state(start, model.start(3))
    _, state = model(tokens)
    short = model(tokens[:1, :4])[1]
    nl.state.save(tmp_path / "state", state)
    expected = model(more, state)[0]
    assert torch.equal(model(more, nl.state.load(tmp_path / "state"))[0], expected)
    close(model(more, nl.state.stack(nl.state.split(state)))[0], expected)
    mixed = nl.state.stack([nl.state.take(state, [2]), short])
    both = model(torch.cat([more[2:], more[:1]]), mixed)[0]
    close(both[0], expected[2])
    close(both[1], model(more[:1], short)[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_slow_parameter_also_on_a_carried_segment(name: str) -> None:
    model = build(name)
    state = None
    for seed in range(3):
        model.zero_grad()
        tokens = text(seed, 2, 12)
        reset = torch.zeros(2, 12, dtype=torch.bool)
        reset[0, 5] = True  # decaying memories see their initial state anew where a lane starts afresh
        logits, state = model(tokens, state, reset=reset)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        state = nl.state.detach(state)
        for parameter, weight in model.named_parameters():
            assert weight.grad is not None, parameter
            assert torch.isfinite(weight.grad).all(), parameter
            assert weight.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_growth_is_what_is_declared(name: str) -> None:
    model = MODELS[name]

    def cost(state: nl.models.ModelState) -> tuple[int, int]:
        """FLOPs of a whole slowest period, one token at a time, and bytes after it."""
        with native.without(), FlopCounterMode(display=False) as counter:
            for token in text(0, 1, 8).unbind(1):
                _, state = model(token[:, None], state)
        return counter.get_total_flops(), nl.state.nbytes(state)

    def moved(node: object, by: int, name: str = "") -> object:
        """The same state further on in its stream."""
        if isinstance(node, Tensor) or node is None:
            return node + by if name == "position" else node
        names = getattr(node, "_fields", [""] * len(node))
        parts = [moved(child, by, n) for n, child in zip(names, node, strict=True)]
        return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)

    near, far = (model(text(9, 1, time))[1] for time in (8, 40))
    if model.growth == "constant":
        assert cost(moved(far, 1_000 - 40)) == cost(moved(far, 100_000 - 40)) == cost(near)
    else:
        pinned = ("transformer", "hope_attention", "deep_transformer", "dot")
        assert name in pinned, "the set of growing models is pinned"
        assert cost(near)[1] < cost(far)[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_state_tensor_belongs_to_one_level(name: str) -> None:
    model = MODELS[name]
    levels = nl.models.levels(model)
    assert [x.period.key() for x in levels] == sorted(x.period.key() for x in levels)
    for owned in ([p for x in levels for p in x.params], [p for x in levels for p in x.moves]):
        assert sorted(owned) == sorted(n for n, _ in model.named_parameters())
    _, state = model(text(0, 2, 3))

    def paths(node: object, prefix: str) -> list[str]:
        if isinstance(node, Tensor):
            return [prefix]
        if node is None:
            return []
        items = node._asdict().items() if hasattr(node, "_asdict") else enumerate(node)
        return [p for key, child in items for p in paths(child, f"{prefix}.{key}" if prefix else str(key))]

    claimed = [p for x in levels for p in x.state_paths]
    for path in paths(state, ""):
        assert sum(path == c or path.startswith(c + ".") for c in claimed) == 1, path


@cache
def transformer(size: str) -> int:
    """Parameters of the model that the others of a size are to equal."""
    with torch.device("meta"):
        return sum(p.numel() for p in nl.models.build("transformer", size).parameters())


@pytest.mark.parametrize("size", nl.models.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_models_of_a_size_have_equally_many_parameters(name: str, size: str) -> None:
    with torch.device("meta"):
        model = nl.models.build(name, size)
    assert abs(sum(p.numel() for p in model.parameters()) / transformer(size) - 1) < 0.02
    assert model.config.ffn >= model.config.dim, "a feed-forward network is narrower than the model"
    assert model.config.dim % model.config.heads == 0


@pytest.mark.parametrize("name", ["titans_lmm", "titans_mac", "titans_mag", "titans_mal"])
@torch.no_grad()
def test_persistent_tokens_can_be_left_out(name: str) -> None:
    with_them, without = (nl.models.build(name, persistent=number, ffn=32).double() for number in (4, 0))
    without.load_state_dict({k: v for k, v in with_them.state_dict().items() if not k.endswith(".tokens")})
    tokens = text(11, 2, 9)
    logits, state = without(tokens[:, :4])
    more, _ = without(tokens[:, 4:], state)
    whole, _ = without(tokens)
    close(torch.cat([logits, more], 1), whole)
    assert not torch.allclose(whole, with_them(tokens)[0])


def test_impossible_models_are_refused_in_words() -> None:
    for call, words in (
        (lambda: nl.models.build("transformr"), "transformer"),
        (lambda: nl.models.build("transformer", "huge"), "tiny"),
        (lambda: nl.models.build("transformer", depth=3), "layers"),
        (lambda: nl.models.build("transformer", heads=5), "heads"),
        (lambda: nl.models.build("deltanet", heads=5), "^deltanet: dim is 32, which cannot be split into heads 5"),
        (lambda: nl.models.build("hope", heads=5), "^hope: dim is 32, which cannot be split into heads 5"),
        (lambda: nl.models.build("hope_swa", heads=5), "^SlidingAttention: dim 32 and heads 5"),
        (lambda: nl.models.build("hope", dim=33, heads=3), "^hope: dim is 33; expected an even number.* give ffn"),
        (lambda: nl.models.build("transformer", dim=0), "dim is 0"),
        (lambda: nl.models.build("transformer", chunk=4), "has no setting chunk"),
        (lambda: nl.models.build("titans_mag", window=0), "window is 0"),
        (
            lambda: nl.models.build("titans_lmm", persistent=-1),
            "persistent is -1; expected a whole number of at least 0",
        ),
        (lambda: nl.models.build("atlas", heads=1), "expected at least the width of the model, 32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    model = MODELS["transformer"]
    for arguments, words in (
        ({"tokens": torch.full((1, 2), 31)}, "another tokenizer"),
        ({"tokens": torch.zeros(1, 2)}, "int64"),
        ({"tokens": text(0, 2, 3), "reset": torch.zeros(2, 3)}, "reset is torch.float32"),
        ({"tokens": text(0, 2, 3), "report": {}}, "report is a dict; expected a nestling.Report"),
        ({"tokens": text(0, 2, 3), "state": model.start(3)}, "3 lanes"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            model(**arguments)
