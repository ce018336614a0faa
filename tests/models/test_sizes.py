"""C1–C8 in one scenario, of every named model at another size than in `test_contracts.py`, and of converted models.

Three lanes stand at different positions, one starts afresh inside the call, tokens are missing here and there.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.learn.learner import count_faults

VOCAB, TIME = 23, 20
SKIPPED = (0, 3, 7)
"""Tokens that a lane leaves out at first, so that the lanes stand at different positions."""
RESET = (1, 12)
"""Lane and place of the start afresh."""
OTHER = {"chunk": 3, "periods": (3, 9), "window": 5, "persistent": 2, "locals": (2, 3), "shard": 6, "global_chunk": 6}
"""Settings other than those of the size tiny."""
FAST = ("anchor", "weights", "momentum", "boundary", "delta", "pending", "base", "moving")
"""Fields of states that hold fast weights."""
CONVERTED = {
    "transformer": ("hope_attention", {}),
    "swa_transformer": ("hope_swa", {}),
    "ttt_e2e": ("ttt_e2e", {"periods": [3, 9]}),
    "hope": ("hope", {"periods": [3, 9, 18]}),
    "hope_attention": ("hope_attention", {"periods": [2, 6], "arrangement": "nested"}),
}


def built(name: str, **settings: Any) -> nl.models.LanguageModel:
    """Three blocks, wider and with fewer heads; float64, and every weight matters."""
    torch.manual_seed(2)
    own = {k: v for k, v in OTHER.items() if k in nl.models.settings(name)}
    if name == "ttt_e2e":
        own["periods"] = (3,)
    model = nl.models.build(name, dim=24, layers=3, heads=2, vocab_size=VOCAB, ffn=24, **own | settings).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(5)
    return model


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(1, VOCAB, (lanes, time), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def masks() -> dict[str, Tensor]:
    valid, reset = torch.ones(3, TIME, dtype=torch.bool), torch.zeros(3, TIME, dtype=torch.bool)
    for lane, skipped in enumerate(SKIPPED):
        valid[lane, :skipped] = False
    valid[0, 6] = valid[2, 15] = False
    reset[RESET] = True
    return {"reset": reset, "valid": valid}


def check(model: nl.models.LanguageModel, folder: Path) -> None:
    """All contracts that a model can be asked about from outside."""
    tokens, given = text(0, 3, TIME), masks()
    valid = given["valid"]
    with torch.no_grad():
        whole, end = model(tokens, **given)
        assert torch.isfinite(whole[valid]).all()
        splits_change_nothing(model, tokens, given, whole, end)
        lanes_are_alone(model, tokens, valid, whole)
        the_future_is_not_seen(model, tokens, given, whole)
        state_is_data(model, end, folder)
        a_bad_token_harms_its_own_lane_only(model, tokens, given, whole)
        size = [nl.state.nbytes(state) for state in (model.start(3), end)]
        assert (size[0] == size[1]) == (model.growth == "constant")  # C5
    close(model(tokens, **given)[0].detach()[valid], whole[valid])  # C1: the graph's windows are other products
    with torch.inference_mode():
        assert torch.equal(model.eval()(tokens, **given)[0], whole)
    model.train()
    fast_weights_stay_wide(model, tokens)


def splits_change_nothing(
    model: nl.models.LanguageModel, tokens: Tensor, given: dict[str, Tensor], whole: Tensor, end: Any
) -> None:
    """C2, inside chunks, windows and shards, and token by token."""
    state, parts = None, []
    for first, last in itertools.pairwise([0, 5, 10, *range(11, TIME + 1)]):
        now = {name: mask[:, first:last] for name, mask in given.items()}
        logits, state = model(tokens[:, first:last], state, **now)
        parts.append(logits)
    close(torch.cat(parts, 1)[given["valid"]], whole[given["valid"]])
    for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        close(a.double(), b.double())


def lanes_are_alone(model: nl.models.LanguageModel, tokens: Tensor, valid: Tensor, whole: Tensor) -> None:
    """C3: a lane of the batch is that lane read alone, without what was missing; and a start afresh is one."""
    for lane in range(3):
        begin = RESET[1] if lane == RESET[0] else 0
        kept = valid[lane, begin:]
        alone, _ = model(tokens[lane, begin:][kept][None])
        close(whole[lane, begin:][kept], alone[0])


def the_future_is_not_seen(
    model: nl.models.LanguageModel, tokens: Tensor, given: dict[str, Tensor], whole: Tensor
) -> None:
    """C3: one token changed, and what came before it and all other lanes are bit for bit the same."""
    for lane, place in ((0, 8), (2, 17)):
        changed = tokens.clone()
        changed[lane, place] = changed[lane, place] % (VOCAB - 1) + 1
        other, _ = model(changed, **given)
        before = given["valid"][lane, :place]
        assert torch.equal(other[lane, :place][before], whole[lane, :place][before])
        assert not torch.equal(other[lane, place:], whole[lane, place:])
        rest = [n for n in range(3) if n != lane]
        assert torch.equal(other[rest][given["valid"][rest]], whole[rest][given["valid"][rest]])


def state_is_data(model: nl.models.LanguageModel, end: Any, folder: Path) -> None:
    """C6: saved, taken apart and put together in another order, with a lane that has read nothing."""
    more = text(1, 3, 7)
    expected, _ = model(more, end)
    nl.state.save(folder / "state", end)
    loaded = nl.state.load(folder / "state")
    assert all(map(torch.equal, nl.state.leaves(loaded), nl.state.leaves(end)))
    close(model(more, loaded)[0], expected)  # products may round otherwise where a tensor begins elsewhere in memory
    lanes = nl.state.split(end)
    mixed = nl.state.stack([lanes[2], model.start(1), lanes[0]])
    found, _ = model(torch.stack([more[2], more[1], more[0]]), mixed)
    close(found[0], expected[2])
    close(found[2], expected[0])
    close(found[1], model(more[1:2])[0][0])


def a_bad_token_harms_its_own_lane_only(
    model: nl.models.LanguageModel, tokens: Tensor, given: dict[str, Tensor], whole: Tensor
) -> None:
    """C8: the embedding of token 0 is not finite. Memories leave it out and count it, and a start afresh heals the lane.
    Attention has no such guard: to it a weight of 0 times what is no number is none either.
    """
    bad = tokens.clone()
    bad[RESET[0], 8] = 0
    weight = model.embedding.weight
    kept = weight[0].clone()
    weight[0] = torch.inf
    try:
        logits, state = model(bad, **given)
    finally:
        weight[0] = kept
    rest = [n for n in range(3) if n != RESET[0]]
    close(logits[rest][given["valid"][rest]], whole[rest][given["valid"][rest]])
    counts = [int(count_faults(lane)) for lane in nl.state.split(state)]
    assert counts[0] == counts[2] == 0
    if any(isinstance(layer, nl.layers.Attention | nl.layers.SlidingAttention) for layer in model.modules()):
        return
    close(logits[RESET[0], RESET[1] :], whole[RESET[0], RESET[1] :])
    assert torch.isfinite(torch.cat([x.double().flatten() for x in nl.state.leaves(state)])).all()
    assert counts[1] > 0 or isinstance(model.mixers()[0], nl.layers.LSTM)


def fast_weights_stay_wide(model: nl.models.LanguageModel, tokens: Tensor) -> None:
    """C7: with slow weights in bfloat16, fast ones are float32."""

    def wide(node: object, fast: bool = False) -> None:
        if isinstance(node, Tensor):
            assert not (fast and node.is_floating_point()) or node.dtype == torch.float32
        elif node is not None:
            for name, child in zip(getattr(node, "_fields", [""] * len(node)), node, strict=True):
                wide(child, fast or name in FAST)

    with torch.no_grad():
        logits, state = model.to(torch.bfloat16)(tokens)
    assert torch.isfinite(logits).all()
    wide(state)


@pytest.mark.parametrize("name", nl.models.names())
def test_every_model_at_another_size(name: str, tmp_path: Path) -> None:
    check(built(name), tmp_path)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_models(name: str, tmp_path: Path) -> None:
    to, changes = CONVERTED[name]
    model = nl.models.convert(built(name), to, **changes)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("down.weight"):  # a new level begins at zero; here it has been trained
                weight.add_(torch.randn_like(weight) * 0.1)
    check(model, tmp_path)
