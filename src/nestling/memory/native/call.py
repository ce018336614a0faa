"""A pass of the C code's place in autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nestling.memory.wanted import wanted

Given = tuple[Tensor | None, ...]


class Pass(Protocol):
    """Something that the C code computes from some tensors, whole ones in the order that the pass knows."""

    name: str

    def forward(self, given: Given, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs, and what `backward` needs besides what was given, if it is to `keep` that; outputs may be among it."""
        ...

    def backward(self, given: Given, kept: Sequence[Tensor], grads: Given, wanted: Sequence[bool]) -> Given:
        """Gradients of what was given, at least of what is `wanted`, from whole ones of the outputs; None: all 0."""
        ...

    def again(self, given: Given) -> tuple[Tensor, ...]:
        """The same outputs by the framework's operations, to be differentiated more than once."""
        ...


def run(work: Pass, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of a pass, to be differentiated as often as one likes."""
    found: tuple[Tensor, ...] = _Call.apply(work, *given)  # type: ignore[no-untyped-call]
    return found


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Pass, *given: Tensor | None) -> tuple[Tensor, ...]:
        outputs, kept = work.forward(_whole(given), any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.work, ctx.count, ctx.kinds = work, len(given), _kinds((*given, *kept))
        ctx.save_for_backward(*given, *kept)  # as given: a second derivative goes through them
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        work: Pass = ctx.work
        saved = ctx.saved_tensors  # to be looked at once: a checkpoint makes them for it
        given, kept = saved[: ctx.count], saved[ctx.count :]
        if _kinds((*given, *kept)) != ctx.kinds:  # C code would read beyond their ends
            raise RuntimeError(
                f"{work.name}: the backward pass found other tensors than the forward pass kept. What was made again for it "
                "went another way: leave inputs and weights as they are, and the C code on or off, until it is done"
            )
        if torch.is_grad_enabled():
            return None, *_by_autograd(work.again, given, grads)
        return None, *work.backward(_whole(given), kept, _whole(grads), wanted(ctx)[1:])


def _by_autograd(
    again: Callable[[Given], tuple[Tensor, ...]], given: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> Given:
    # Their own names: where one of them was made from another, the way through it is not to be counted here.
    given = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in given)
    pairs = [(y, g) for y, g in zip(again(given), grads, strict=True) if y.requires_grad and g is not None]
    if not pairs:
        return (None,) * len(given)
    outputs, of_outputs = zip(*pairs, strict=True)
    wanted = [x for x in given if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)


def _whole(given: Sequence[Tensor | None]) -> Given:
    """As the C code reads them."""
    return tuple(None if x is None else x.resolve_neg().contiguous() for x in given)


def _kinds(given: Sequence[Tensor | None]) -> list[tuple[torch.Size, torch.dtype] | None]:
    return [None if x is None else (x.shape, x.dtype) for x in given]
