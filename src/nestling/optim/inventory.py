"""What an optimizer remembers, in words: ours say so themselves, those of PyTorch are known here."""

from __future__ import annotations

import torch

from nestling.optim.base import GradientMemory, Optimizer

_MOMENTUM = GradientMemory(
    "momentum",
    "a matrix without keys",
    "dot product with the gradient",
    "",
    "gradient descent",
    tensors=("momentum_buffer",),
)
_MOMENTS = GradientMemory(
    "moments",
    "one number per weight",
    "L2 to the gradients' own root mean square",
    "",
    "the optimum, in closed form",
    tensors=("exp_avg", "exp_avg_sq"),
)


def memories(optimizer: torch.optim.Optimizer) -> list[GradientMemory]:
    """The memories of an optimizer, fast to slow; none for one that remembers nothing, or that is not known."""
    from nestling.optim.wrapper import Wrapper

    if isinstance(optimizer, Optimizer | Wrapper):
        return optimizer.memories()
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return [_MOMENTS._replace(retention=f"decay {group['betas'][0]} and {group['betas'][1]}")]
    if isinstance(optimizer, torch.optim.SGD | torch.optim.Muon) and group["momentum"]:
        newton = isinstance(optimizer, torch.optim.Muon)
        rule = f"gradient descent, read through {group['ns_steps']} Newton–Schulz steps" if newton else _MOMENTUM.rule
        return [_MOMENTUM._replace(retention=f"decay {group['momentum']}", rule=rule)]
    if isinstance(optimizer, torch.optim.Adagrad):
        return [_MOMENTS._replace(retention="everything", tensors=("sum",))]
    return []
