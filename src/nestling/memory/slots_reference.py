"""The definition of slot memories: token after token, gradients by autograd on the written loss.

W_t = α_t W_{t−1} − η_t ∇ℓ_t(A)        A: the anchor, the weights at the start of token t's chunk
A   = settle(W)                        at a chunk's end, where W is settled too

What a memory makes of ∇ℓ_t at the running weights stands in its `written`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nestling.memory.inputs import border_guard, lanes_where, unharmed
from nestling.memory.reference import detach
from nestling.memory.slots import SlotMemory, Streams, refused
from nestling.memory.state import MemoryState


def scan(spec: SlotMemory, x: Streams) -> tuple[Tensor, MemoryState]:
    """Slow on purpose. Works under `no_grad`; refuses `inference_mode`, where autograd cannot run."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("engine='reference' differentiates by autograd: call it outside torch.inference_mode()")
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        state, outputs = x.state, []
        for t in range(x.lr.shape[2]):
            y, state = unharmed(partial(_token, spec, state, t), x, partial(refused, t=t))
            outputs.append(y)
        y = torch.cat(outputs, 2) if outputs else x.lr.new_zeros(*x.lr.shape[:3], spec.value_dim)
    return (y, state) if outer else (y.detach(), detach(state))


def _token(
    spec: SlotMemory, state: MemoryState, t: int, x: Streams, gone: Tensor | None
) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    alive = torch.ones(x.lr.shape[0], dtype=torch.bool) if x.valid is None else x.valid[:, t].cpu()
    if x.reset is not None:
        fresh = x.reset[:, t].cpu() & alive
        state = state._replace(
            anchor=lanes_where(fresh, x.start.weights, state.anchor),
            weights=lanes_where(fresh, x.start.weights, state.weights),
            position=torch.where(fresh, 0, state.position),
        )
    tokens = tuple(u[:, :, t, None] for u in x.tokens)
    leaves = tuple(w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in state.anchor)
    gradients = torch.autograd.grad(spec.loss(tokens, leaves), leaves, create_graph=True)
    total = sum(g.sum((1, 2, 3)) for g in gradients)
    assert isinstance(total, Tensor)
    fine = x.fine[:, t] & torch.isfinite(total)
    gradients = spec.written(tokens, leaves, state.weights, gradients)
    live = fine & alive.to(fine.device)
    shape = (*x.lr.shape[:2], spec.states, 1, 1)
    lr = x.lr[:, :, t, :, None, None].expand(shape)
    kept = torch.ones_like(lr)
    if x.retention is not None:
        kept = x.retention.plain()[:, :, t]
        kept = kept[:, :, None, None] if spec.per_slot else kept[..., None, None].expand(shape)
        kept = kept.expand(*shape[:-1], -1)
    after = tuple(
        kept[:, :, n] * w - lr[:, :, n] * g for n, (w, g) in enumerate(zip(state.weights, gradients, strict=True))
    )
    after = lanes_where(live, after, state.weights)
    position = torch.where(alive, state.position + 1, state.position)
    closing = alive & (position % spec.chunk == 0)
    ends = lanes_where(closing, spec.settle(after), after)
    anchor, ends, _, broken = border_guard(closing, state.anchor, ends, (), gone)
    after = lanes_where(broken, state.anchor, after)
    served = {"after": after, "before": state.weights, "boundary": state.anchor}[spec.read]
    y = spec.answer(tokens, state.anchor, served)
    y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    faults = state.faults + broken.long() + (~(fine | broken) & alive.to(fine.device)).long()
    return y, MemoryState(anchor, ends, (), None, position, faults), broken
