"""The optimizer of the slow weights: the outer loop's memories, with one group of parameters per level and kind.

The default is AdamW [Loshchilov & Hutter 2019]: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − lr(m̂/(√v̂ + ε) + λw), λ for
matrices alone. All of `nestling.optim` can stand in its place, at any frequency.
"""

from __future__ import annotations

import torch

from nestling import models, optim
from nestling.config import SettingError
from nestling.learn.config import TrainConfig, check_optimizer

CONTINUAL_PERIOD = 4
"""Steps between two updates of the slow weights on a stream that does not end (ours)."""


def adamw(
    model: models.LanguageModel,
    lr: float = 2e-3,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the levels of `model` (see `models.levels`); every group carries its level's name as `level`.

    Which weights decay (λ = `weight_decay`): see `nestling.optim.groups`. Raises ValueError unless every parameter belongs to
    exactly one level.
    """
    found = optim.from_levels(model, "adamw", lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
    assert isinstance(found, torch.optim.AdamW)
    return found


def from_config(config: TrainConfig, model: models.LanguageModel) -> torch.optim.Optimizer:
    """The optimizer that a run's settings name, over the levels of its model; raises `SettingError`."""
    check_optimizer(config.optimizer)
    settings = dict(config.optimizer_set)
    known = optim.settings_of(config.optimizer)
    for name in settings:
        if name not in known:
            raise SettingError(
                f"optimizer-set: {config.optimizer} has no setting {name!r}; expected some of {', '.join(known)} "
                "(lr, weight-decay and horizon are options of their own)."
            )
    if config.lr is not None:
        settings["lr"] = config.lr
    try:
        return optim.from_levels(
            model,
            config.optimizer,
            every=config.every or ({"*": CONTINUAL_PERIOD} if config.continual else {}),
            horizon=config.horizon,
            weight_decay=config.weight_decay,
            **settings,
        )
    except (ValueError, TypeError) as error:
        raise SettingError(f"optimizer: {error}") from error
    except IndexError as error:
        raise SettingError(
            f"optimizer: {config.optimizer} expected more numbers in a list of its settings: {settings}."
        ) from error
