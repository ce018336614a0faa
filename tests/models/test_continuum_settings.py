"""C1–C8 for models with every setting of the continuum: what `test_contracts` asks of every model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nestling as nl
from nestling.cli import run
from nestling.learn import planning
from nestling.optim import inner

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "outer full": ("hope_swa", {"outer": "full"}),
    "outer truncated, nested": ("hope_swa", {"outer": 2, "arrangement": "nested"}),
    "local": ("hope", {"error": "local"}),
    "local, nested, truncated": (
        "hope_swa",
        {"error": "local", "arrangement": "nested", "outer": 2, "periods": [2, 4, 8]},
    ),
    "low rank": ("hope_swa", {"rank": 2}),
    "low rank, nested, full": ("ttt_e2e", {"rank": 3, "arrangement": "nested", "periods": [2, 4], "outer": "full"}),
    "low rank, local": ("hope_swa", {"rank": 2, "error": "local", "arrangement": "independent"}),
    "local beside a static level": ("ttt_e2e", {"error": "local"}),
    "delta gradient descent, nested": ("hope_swa", {"rule": "dgd", "arrangement": "nested"}),
    "delta gradient descent, truncated": ("ttt_e2e", {"rule": "dgd", "outer": 2}),
    "delta gradient descent, local": ("hope_swa", {"rule": "dgd", "error": "local"}),
    "adam, full": ("hope_swa", {"rule": "adam", "outer": "full"}),
    "m3, independent": ("hope_swa", {"rule": "m3", "arrangement": "independent"}),
}
VOCAB = 31


def build(variant: str) -> nl.models.LanguageModel:
    """A tiny float64 model whose every weight matters."""
    name, chosen = VARIANTS[variant]
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=VOCAB, ffn=16, **chosen).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    return model


MODELS = {variant: build(variant) for variant in VARIANTS}
every = pytest.mark.parametrize("variant", VARIANTS)


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (lanes, time), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8)


def same_state(a: object, b: object) -> None:
    for x, y in zip(nl.state.leaves(a), nl.state.leaves(b), strict=True):
        close(x, y)


@every
@settings(max_examples=3)
@given(time=st.integers(1, 16), share=st.floats(0, 1), seed=st.integers(0, 999))
@torch.no_grad()
def test_splits_ragged_lanes_and_resets_inside_a_call(variant: str, time: int, share: float, seed: int) -> None:
    model, tokens, generator = MODELS[variant], text(seed, 3, time), torch.Generator().manual_seed(seed)
    reset, valid = (torch.rand(3, time, generator=generator) < p for p in (0.12, 0.8))
    whole, end = model(tokens, reset=reset, valid=valid)
    at = round(share * time)
    for bounds in ([0, at, time], list(range(time + 1))):
        state, parts = None, []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
            now = {"reset": reset[:, first:last], "valid": valid[:, first:last]}
            logits, state = model(tokens[:, first:last], state, **now)
            parts.append(logits)
        close(torch.cat(parts, 1)[valid], whole[valid])
        same_state(state, end)
    for lane in range(3):
        mine = valid[lane].nonzero()[:, 0]
        starts = [i for i, t in enumerate(mine.tolist()) if reset[lane, t]]
        mine = mine[starts[-1] :] if starts else mine
        if len(mine):
            alone, own = model(tokens[lane : lane + 1, mine])
            close(whole[lane, mine], alone[0])
            same_state(nl.state.take(end, [lane]), own)


@every
@torch.no_grad()
def test_causal_alike_in_every_mode_and_kept_in_files(variant: str, tmp_path: Path) -> None:
    model, tokens, more = MODELS[variant], text(5, 2, 15), text(6, 2, 9)
    logits, state = model(tokens)
    for place in (0, 4, 14):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCAB
        other, _ = model(changed)
        assert torch.equal(other[0, :place], logits[0, :place])
        assert torch.equal(other[1], logits[1])
        assert not torch.equal(other[0, place:], logits[0, place:])
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(tokens)[0].detach(), logits)
    same_state(model(tokens[:, :0])[1], model.start(2))
    nl.state.save(tmp_path / "state", state)
    expected, _ = model(more, state)
    assert torch.equal(model(more, nl.state.load(tmp_path / "state"))[0], expected)
    mixed = nl.state.stack([nl.state.take(state, [1]), model(tokens[:1, :3])[1]])
    both, _ = model(more, mixed)
    close(both[0], model(more[:1], nl.state.take(state, [1]))[0][0])
    close(both[1], model(more[1:], model(tokens[:1, :3])[1])[0][0])


@every
def test_gradients_reach_every_slow_parameter_also_on_a_carried_segment(variant: str) -> None:
    model, state = build(variant), None
    for seed in range(3):
        model.zero_grad()
        tokens = text(seed, 2, 16)
        reset = torch.zeros(2, 16, dtype=torch.bool)
        reset[0, 5] = True
        logits, state = model(tokens, state, reset=reset)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        state = nl.state.detach(state)
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
            assert weight.grad.abs().max() > 0, name


@every
@torch.no_grad()
def test_half_precision_changes_no_more_than_rounding_and_no_fast_weight(variant: str) -> None:
    name, chosen = VARIANTS[variant]
    torch.manual_seed(0)
    model, tokens = nl.models.build(name, dim=16, vocab_size=VOCAB, ffn=16, **chosen), text(10, 2, 13)
    expected, _ = model(tokens)
    for weights, casting in ((torch.float32, True), (torch.bfloat16, False)):
        model, state, parts = model.to(weights), None, []
        with torch.autocast("cpu", torch.bfloat16, enabled=casting):
            for first, last in ((0, 7), (7, 13)):
                logits, state = model(tokens[:, first:last], state)
                parts.append(logits.float())
        assert (torch.cat(parts, 1) - expected).abs().max() < 0.1 * expected.abs().max()
        learned = [b.ffn for b in state.blocks if hasattr(b, "ffn")] or state.continuum
        numbers = [leaf for leaf in nl.state.leaves(tuple(learned)) if leaf.is_floating_point()]
        assert numbers
        assert all(leaf.dtype == torch.float32 for leaf in numbers)


@every
def test_bytes_are_constant_and_what_the_levels_and_the_plan_say(variant: str) -> None:
    name, chosen = VARIANTS[variant]
    model = nl.models.build(name, dim=16, vocab_size=VOCAB, ffn=16, **chosen)
    with torch.no_grad():
        near, far = (model(text(9, 1, time))[1] for time in (3, 24))
    assert nl.state.nbytes(near) == nl.state.nbytes(far)
    if variant == "low rank":
        planned = planning.plan(name, "tiny", 6, vocab_size=VOCAB, dim=16, ffn=16, **chosen)
        assert planned.counts.state == nl.state.nbytes(near)
    levels = nl.models.levels(model)
    claimed = [path for level in levels for path in level.state_paths]

    def paths(node: object, prefix: str) -> list[str]:
        if isinstance(node, Tensor):
            return [prefix]
        if node is None:
            return []
        items = node._asdict().items() if hasattr(node, "_asdict") else enumerate(node)
        return [p for key, child in items for p in paths(child, f"{prefix}.{key}" if prefix else str(key))]

    for path in paths(near, ""):
        assert sum(path == c or path.startswith(c + ".") for c in claimed) == 1, path


@pytest.mark.parametrize(("name", "size"), [("hope", "tiny"), ("hope", "small"), ("hope_swa", "340M")])
def test_models_of_a_size_have_equally_many_parameters(name: str, size: str) -> None:
    with torch.device("meta"):
        model, target = nl.models.build(name, size, error="local"), nl.models.build("transformer", size)
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (model, target))
    assert abs(count / wanted - 1) < 0.02


@pytest.mark.parametrize("rule", inner.RULES)
def test_the_rule_of_the_levels_is_a_setting_and_shown(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = nl.models.build("hope", "small", rule=rule)
    assert model.config.rule == rule
    shown = [level.rule for level in model.levels() if ".ffn." in level.name]
    assert shown == [f"{inner.named(rule)} on the chunk's mean"] * 8
    assert run(["levels", "--model", "hope", "--set", f"rule={rule}"]) == 0
    assert str(inner.named(rule)) in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_rules_that_cannot_be_are_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="rule is 'muon'; expected one of: gradient, momentum, dgd, adam, m3"):
        nl.models.build("hope", rule="muon")
    with pytest.raises(ValueError, match="transformer has no setting rule"):
        nl.models.build("transformer", rule="m3")
    with pytest.raises(ValueError, match=r"rank is 2, and delta gradient descent.*rule without a memory"):
        nl.models.build("hope", rule="dgd", rank=2)
    for words in (["--model", "hope", "--set", "rule=muon"], ["--model", "deltanet", "--set", "rule=m3"]):
        assert run(["train", *words]) == 2
    assert "expected one of: gradient, momentum, dgd, adam, m3" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("arrangement", "nested"), ("outer", "full"), ("error", "local"), ("rank", 2), ("rule", "m3")],
)
def test_settings_of_levels_that_are_not_there_are_refused(
    setting: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{setting} is {value!r}, but periods is \\[\\], so that there are no levels"
    with pytest.raises(ValueError, match=words):
        nl.models.build("hope", periods=[], **{setting: value})
    assert run(["levels", "hope", "--set", "periods=[]", f"{setting}={value}"]) == 2
    assert "but periods is []" in " ".join(capsys.readouterr().err.split())
    with torch.device("meta"):
        bare = nl.models.convert(nl.models.build("hope_swa", periods=[4], **{setting: value}), periods=[])
    assert bare.config.periods == ()
    assert getattr(bare.config, setting) == getattr(nl.models.ModelConfig, setting)


def test_a_rank_that_makes_no_matrix_smaller_is_refused() -> None:
    """dim 16, ffn 16: matrices of 32 × 16 and 16 × 16, so 11 · 48 > 512 ≥ 10 · 48."""
    nl.models.build("hope_swa", dim=16, ffn=16, rank=10)
    with pytest.raises(
        ValueError, match=r"rank is 11, but .* no smaller than any of a level's matrices, 32 × 16 and 16 × 16"
    ):
        nl.models.build("hope_swa", dim=16, ffn=16, rank=11)
