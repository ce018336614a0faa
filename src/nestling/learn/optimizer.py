"""The optimizer of the slow weights: AdamW [Loshchilov & Hutter 2019] with one group of parameters per level and kind.

m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
w ← w − lr · (m̂ / (√v̂ + ε) + λ w)          λ only for matrices
"""

from __future__ import annotations

import torch
from torch import nn

from nestling import models


def adamw(
    model: models.LanguageModel,
    lr: float = 2e-3,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the levels of `model` (see `models.levels`); every group carries its level's name as `level`.

    Decay (λ = `weight_decay`) is for the weights of linear maps alone. Gains, biases and embeddings have none, and neither
    have convolutions and initial memories, which start at something other than zero for a reason.

    Raises ValueError unless every parameter belongs to exactly one level.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    left = dict(model.named_parameters())
    groups = []
    for level in models.levels(model):
        named = [(name, left.pop(name)) for name in level.params if name in left]
        if len(named) != len(level.params):
            raise ValueError(
                f"adamw: level {level.name!r} claims a parameter that is not there, or that another level has."
            )
        for decays in (True, False):
            members = [(name, weight) for name, weight in named if (id(weight) in matrices) == decays]
            if members:
                groups.append({"params": members, "weight_decay": weight_decay * decays, "level": level.name})
    if left:
        raise ValueError(f"adamw: no level claims {', '.join(left)}.")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
