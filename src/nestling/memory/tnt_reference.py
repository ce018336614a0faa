"""The definition of TNT: token after token, every memory by its own reference.

before the first token of a shard    W = W_init, S = 0, P = 0
P ← P + kᵀk/‖k‖²                     the current token included
o = f(V at the global chunk's start, q) + Σ_i f(W⁽ⁱ⁾ after the token's write, q P⁽ⁱ⁾)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling import state as fast
from nestling.memory import projection
from nestling.memory.norm import l2_norm
from nestling.memory.tnt import Streams, Tnt, TntState

if TYPE_CHECKING:
    from nestling.memory.gates import Gates


def scan(spec: Tnt, x: Streams) -> tuple[Tensor, TntState]:
    """Slow on purpose. Works under `no_grad`; refuses `inference_mode`, as the memories' references do."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("engine='reference' differentiates by autograd: call it outside torch.inference_mode()")
    outer = torch.is_grad_enabled()
    state, outputs = x.state, []
    for t in range(x.q.shape[2]):
        y, state = _token(spec, x, state, t)
        outputs.append(y)
    y = torch.cat(outputs, 2) if outputs else x.v.new_zeros(x.v.shape)
    return (y, state) if outer else (y.detach(), fast.detach(state))


def _token(spec: Tnt, x: Streams, state: TntState, t: int) -> tuple[Tensor, TntState]:
    here = slice(t, t + 1)
    alive = torch.ones(x.q.shape[0], dtype=torch.bool) if x.valid is None else x.valid[:, t].cpu()
    anew = torch.zeros_like(alive) if x.reset is None else x.reset[:, t].cpu() & alive
    position = torch.where(anew, 0, state.position)
    begins: dict[int | None, Tensor] = {s: alive & (position % s == 0) for s in spec.shards if s is not None}
    begins[None] = anew

    q, k, v = x.q[:, :, here], x.k[:, :, here], x.v[:, :, here]
    counts = x.fine[:, t] & alive.to(x.fine.device)
    asked: dict[int | None, Tensor] = dict.fromkeys(spec.shards, q)
    projections = []
    whole, fine = projection.finite(q)
    for shard, old in zip(spec.lengths, state.projection, strict=True):
        p = projection.step(old, x.k[:, :, t], begins[shard], counts)
        projections.append(p)
        read = l2_norm(whole @ p) if spec.projection == "normalized" else whole @ p
        asked[shard] = projection.answered(read, fine)

    total = torch.zeros_like(v)
    parts: list[Any] = []
    skipped = (~x.fine[:, t] & alive.to(x.fine.device)).long()
    faults = state.faults + skipped
    for n, (memory, own) in enumerate(zip(spec.memories, spec.shards, strict=True)):
        gates: Gates = x.gates[n][here]
        y, new = memory.scan(
            x.w0[n],
            asked[own],
            k,
            v,
            gates,
            state.parts[n],
            engine="reference",
            reset=begins[own][:, None],
            valid=alive[:, None],
        )
        total = total + y
        parts.append(new)
        faults = faults + new.faults - state.parts[n].faults - skipped
    position = torch.where(alive, position + 1, position)
    return total, TntState(tuple(parts), tuple(projections), position, faults)
