"""Adding levels to a trained model: what it learned becomes the initial state of levels that learn as they read.

Ad-hoc level stacking (Nested Learning, §7.3):   MLP_0^(f_i) := MLP_pretrained,i,   then every level moves by eq. 71.

A block's feed-forward network becomes a level of the continuum, its weights that level's θ₀, and levels that are new stand beside
it with an output projection of zero: u + 0. As long as no level has moved, or while their step sizes are 0, the new model
computes what the old one did. Where the new levels stand, and that they begin at zero, is ours.

The same function changes the periods of a model that has levels, and adds or removes some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nestling.layers import Continuum, Layer
from nestling.models.block import ModelConfig
from nestling.models.lm import LanguageModel
from nestling.models.registry import CONTINUUM, build, settings

WIDTHS = ("dim", "layers", "heads", "ffn", "vocab_size")
Origins = Sequence[int | None]
"""For each level of a new continuum, or the single feed-forward network in its place, the number of the old level whose weights
it takes; None: it is new."""


@torch.no_grad()
def convert(
    model: LanguageModel,
    to: str | None = None,
    *,
    origins: Origins | None = None,
    rate: float | None = None,
    **changes: Any,
) -> LanguageModel:
    """`model` as the named model `to`, with its weights: `convert(transformer, "hope_attention", periods=[64, 256])`.

    Args:
        model: is left as it is.
        to: which model; None: the same, with other settings.
        origins: which old level each new level takes its weights from, counted from 0; None for one that is new. The default:
            as many levels as before take over in order; otherwise a level keeps the weights of the one with its period; a single
            feed-forward network goes to the first. Where a single feed-forward network takes the place of several levels
            (`periods=[]`, or a model without levels), one number: whose weights it has, `origins=[0]`; the default is the level
            that no token moved, where there is one.
        rate: η of all levels that learn. The default: a level that took over keeps the step size it has learned, as long as the
            new rule counts it in the same unit, which gradient descent, momentum and dgd do: their steps are as large as the
            gradient. Those of adam and m3 have a length of their own each, so that a change to or from one of them begins at the
            new rule's own step size.
        changes: settings of the new model (see `models.settings`), for example periods, chunk, window, arrangement. Others are
            the old model's, or where it has none, the size's.

    Embedding, head, norms, sequence layers and feed-forward weights are copied bit for bit. A new level has fresh weights but an
    output projection of zero; a level that did not learn before has its rule's own step size. Other periods and added levels
    leave the logits as they are as long as nothing has been learned from tokens; a removed level, another chunk or another
    window does not. A state cannot be taken along: lanes start afresh. The new model has as many parameters more as the added
    levels have, so it is larger than others of its `size`.

    Raises ValueError where the sequence layers are not the same, where widths are to change, where it is not clear which level
    takes over from which, and for settings that the new model does not have.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"convert: rate is {rate}; expected a positive number, or None")
    old = model.config
    to = old.name if to is None else to
    if unfit := [width for width in WIDTHS if width in changes]:
        raise ValueError(
            f"convert: {', '.join(unfit)} cannot change, the trained weights have their shapes; expected some of: "
            f"{', '.join(settings(to)) or 'no settings'}"
        )
    kept = set(settings(old.name)) | set(CONTINUUM)
    if not changes.get("periods", True):  # without levels there is nothing that their settings could concern
        kept -= set(CONTINUUM)
    own = {setting: getattr(old, setting) for setting in settings(to) if setting in kept}
    widths = {"dim": old.dim, "layers": old.layers, "heads": old.heads, "ffn": old.ffn}
    new = build(to, old.size, vocab_size=old.vocab_size, **widths, **own | changes)
    new.to(device=model.embedding.weight.device, dtype=model.embedding.weight.dtype)
    _check_reading(old, new.config)
    _check_origins(model, new, origins)
    if rate is not None and not any(new.continuum(number).window for number in range(old.layers)):
        raise ValueError(
            f"convert: rate is {rate}, but {to} then has no level that learns: leave it out, or give periods"
        )
    _copy(model.embedding, new.embedding, "embedding")
    _copy(model.norm, new.norm, "norm")
    _copy(model.head, new.head, "head")
    for number, (before, after) in enumerate(zip(model.blocks, new.blocks, strict=True)):
        _copy(before.mixer_norm, after.mixer_norm, f"blocks.{number}.mixer_norm")  # type: ignore[arg-type]
        _copy(before.mixer, after.mixer, f"blocks.{number}.mixer")  # type: ignore[arg-type]
        one, two = model.continuum(number), new.continuum(number)
        _stack(one, two, origins if _concerned(one, two) else None)
        for period, level in two.each():
            if rate is not None and period is not None:
                level.step_by(rate)
    return new


def overrides(config: ModelConfig) -> dict[str, Any]:
    """What `build` needs beside name, size and vocab_size to make this very model: all its settings, written out."""
    wanted = ("dim", "layers", "heads", "ffn", *settings(config.name))
    values = {setting: getattr(config, setting) for setting in wanted}
    return {setting: list(value) if isinstance(value, tuple) else value for setting, value in values.items()}


def default_origins(before: Sequence[int | None], after: Sequence[int | None]) -> list[int | None]:
    """Which level takes over from which, by their periods; raises ValueError where that is not clear."""
    if len(before) == len(after):
        return list(range(len(before)))
    found: list[int | None] = []
    rest = list(range(len(before)))
    for period in after:
        place = next((n for n in rest if before[n] == period), None)
        found.append(place)
        rest = rest if place is None else [n for n in rest if n > place]
    if sum(place is not None for place in found) == min(len(before), len(after)):
        return found
    if len(before) == 1:
        return [0, *[None] * (len(after) - 1)]
    if list(after) == [None]:
        raise ValueError(
            f"convert: one feed-forward network is to take the place of the levels with periods {list(before)}, and it is not "
            f"clear whose weights it has: {_one_of(before)}"
        )
    raise ValueError(
        f"convert: levels with periods {list(before)} are to become levels with periods {list(after)}, and it is not clear "
        f"which takes over from which; give origins, one for each new level: a number from 0 to {len(before) - 1}, or new"
    )


def _one_of(periods: Sequence[int | None]) -> str:
    """What to give where one network is to have the weights of one of several levels."""
    words = "; ".join(
        f"origins {n} for that of " + ("the level moved by no token" if period is None else f"period {period}")
        for n, period in enumerate(periods)
    )
    return f"give one number as origins ({words})"


def _concerned(before: Continuum, after: Continuum) -> bool:
    """Whether a block has levels, or had some, so that `origins` speak of it."""
    return before.window is not None or after.window is not None


def _check_origins(old: LanguageModel, new: LanguageModel, origins: Origins | None) -> None:
    """Refuse origins where there are no levels, before and after."""
    pairs = ((old.continuum(number), new.continuum(number)) for number in range(new.config.layers))
    if origins is not None and not any(_concerned(before, after) for before, after in pairs):
        raise ValueError(
            f"convert: origins are {list(origins)}, but {old.config.name} and {new.config.name} have a single feed-forward "
            "network in every block, which keeps its weights: leave them out"
        )


def _stack(before: Continuum, after: Continuum, given: Origins | None) -> None:
    """Fill the levels of a block from those of the old one."""
    origins = default_origins(before.periods, after.periods) if given is None else list(given)
    taken = [n for n in origins if n is not None]
    if after.periods == (None,) and (len(origins) != 1 or origins[0] not in range(len(before.periods))):
        raise ValueError(
            f"convert: origins are {origins}, but one feed-forward network takes the place of the levels "
            f"{list(before.periods)}: {_one_of(before.periods)}"
        )
    fits = len(origins) == len(after.periods) and all(n in range(len(before.periods)) for n in taken)
    if not fits or not taken or any(a >= b for a, b in pairwise(taken)):
        raise ValueError(
            f"convert: origins are {origins}; expected {len(after.periods)}, one for each of the levels {list(after.periods)}: "
            f"numbers from 0 to {len(before.periods) - 1} that rise (levels keep their order), None for a new level, and at "
            "least one number"
        )
    alone = len(before.periods if before.share is None else after.periods) == 1
    if (before.share is None) != (after.share is None) and not alone:
        raise ValueError(
            f"convert: {before.arrangement} levels cannot become {after.arrangement} ones: a chain of several levels and levels "
            f"side by side compute different things; keep arrangement={before.arrangement}"
        )
    for number, ((period, level), origin) in enumerate(zip(after.each(), origins, strict=True)):
        if origin is None:
            level.mlp.down.weight.zero_()
            continue
        old_period, old = before.each()[origin]
        for part in ("norm", "mlp"):
            _copy(getattr(old, part), getattr(level, part), f"ffn.levels_.{number}.{part}")
        if old.value is not None and level.value is not None:
            level.value.copy_(old.value)
        learned = old_period is not None and period is not None
        if learned and before.rule.unit == after.rule.unit:
            level.rate.copy_(old.rate)
        share = 1.0 if before.share is None else before.share[origin]
        if after.share is not None:
            after.share[number] = share
        else:  # one network alone has no share, so its answers are made as large as they were
            level.mlp.down.weight.mul_(share)


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    """All tensors of `source` into `target`, which has the same."""
    came, own = dict(source.state_dict()), dict(target.state_dict())

    def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    if shapes(came) != shapes(own):
        odd = sorted(key for key in came.keys() | own.keys() if shapes(came).get(key) != shapes(own).get(key))
        key = odd[0]
        raise ValueError(
            f"convert: {name}.{key} is {shapes(came).get(key, 'not there')} in the old model and "
            f"{shapes(own).get(key, 'not there')} in the new one; expected the same weights: choose a model with the same "
            "sequence layer, and settings that leave its shapes as they are"
        )
    for key, tensor in own.items():
        tensor.copy_(came[key])


def _check_reading(old: ModelConfig, new: ModelConfig) -> None:
    """Refuse another kind of sequence layer, also one whose weights happen to have the same shapes."""
    if old.name == new.name:
        return
    shared = {setting: value for setting, value in overrides(new).items() if setting in (*WIDTHS, *settings(old.name))}
    with torch.device("meta"):
        one, two = (
            build(config.name, config.size, vocab_size=config.vocab_size, **chosen)
            for config, chosen in ((old, overrides(old) | shared), (new, overrides(new)))
        )

    def kind(layer: Layer) -> Any:
        return type(layer), layer.levels()

    for number, (before, after) in enumerate(zip(one.mixers(), two.mixers(), strict=True)):
        if kind(before) != kind(after):
            raise ValueError(
                f"convert: block {number} of {old.name} reads by {type(before).__name__} ({before.levels()[0].network}), that of "
                f"{new.name} by {type(after).__name__} ({after.levels()[0].network}); expected the same sequence layer. Only the "
                "feed-forward networks become levels: choose a model that reads as this one does, as hope_attention for a "
                "transformer, and hope_swa or ttt_e2e for a swa_transformer"
            )
