"""Which gradients somebody waits for in the backward pass that is going on.

`ctx.needs_input_grad` says what the forward pass knew. A pass that asks for the gradients of some tensors alone, as that of a
window does with respect to what its levels have learned, goes no further than to these: the weights' own gradients are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_RUNS: Callable[[Any], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)


def wanted(ctx: Any) -> tuple[bool, ...]:
    """Of every input of a function, in its `backward`."""
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(needs and _awaited(next(nodes)) for needs in ctx.needs_input_grad)


def _awaited(node: Any) -> bool:
    if _RUNS is None:
        return True
    try:
        return _RUNS(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for
        return True
