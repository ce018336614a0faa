"""A trained run as the beginning of another: its model converted, everything else afresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestling import models, stream
from nestling.config import SettingError, did_you_mean, to_json
from nestling.learn import checkpoint, folder
from nestling.learn.assembly import assemble
from nestling.learn.budget import Budget
from nestling.learn.run import load_run, open_corpus
from nestling.models.convert import Origins, default_origins, overrides


@dataclass(frozen=True)
class Converted:
    """What came out. out: the new run's folder; source: the checkpoint it was made from; origins: of the levels of the last
    block, as in `models.convert`.
    """

    out: Path
    source: Path
    before: models.LanguageModel
    after: models.LanguageModel
    origins: Origins


def convert_run(
    source: Path | None,
    out: Path | None = None,
    to: str | None = None,
    changes: Mapping[str, Any] | None = None,
    origins: Origins | None = None,
    *,
    lr: float | None = None,
    rate: float | None = None,
) -> Converted:
    """Write the model of the run `source` (None: the newest), converted by `models.convert`, as a new run in `out`.

    rate: step size of the levels, as in `models.convert`.

    The new run has the old one's settings, but for the model and, where it is given, lr, the slow weights' learning rate, and its
    budget anew; it stands before its first step. So
    `train --resume` trains it on, `train --from` begins a run with other settings from it, `eval` and `generate` use it as it is.

    Raises `SettingError` for what cannot be converted, and `CheckpointError`.
    """
    loaded = load_run(source)
    if to is not None and to not in models.names():
        raise SettingError(f"to: there is no model named {to!r}.{did_you_mean(to, models.names())}")
    try:
        torch.manual_seed(loaded.config.seed)
        model = models.convert(loaded.model, to, origins=origins, rate=rate, **(changes or {}))
    except (ValueError, TypeError) as error:
        raise SettingError(str(error)) from error
    stored = loaded.config
    config = replace(
        stored,
        model=model.config.name,
        overrides=overrides(model.config),
        lr=stored.lr if lr is None else lr,
        out=out,
        source=None,
        resume=False,
    ).resolved()
    folder.check_free(config.folder)
    parts = stream.parts_of(config.data) if config.continual else ()
    corpus = stream.joined(parts) if parts else open_corpus(config.data)
    budget = Budget(tokens=config.tokens, minutes=config.minutes)
    learner = assemble(config, model, corpus, parts, budget)
    numbers: dict[str, Any] = {
        "budget": budget.state_dict(),
        "seconds": 0.0,
        "config": to_json(config),
        "converted": {"from": str(loaded.checkpoint), "model": stored.model, "settings": stored.overrides},
    }
    if parts:
        numbers["continual"] = []
    made = folder.create(config)
    with folder.owned(made):
        checkpoint.save(made / "checkpoints", learner.checkpoint(numbers))
    last = model.config.layers - 1
    before, after = (x.continuum(last).periods for x in (loaded.model, model))
    found = list(origins) if origins is not None else default_origins(before, after)
    return Converted(made, loaded.checkpoint, loaded.model, model, found)
