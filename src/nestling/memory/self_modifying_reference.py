"""The definition of the self-modifying memory: token after token, the inner gradient by autograd on the written loss
(Nested Learning, eq. 86–91). Slow on purpose; the equations stand in `self_modifying`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nestling.memory.inputs import erase_strength, lanes_where, unharmed
from nestling.memory.networks import Network
from nestling.memory.networks.base import at
from nestling.memory.norm import l2_norm
from nestling.memory.reference import detach, layer_inputs
from nestling.memory.retentions import toward_initial
from nestling.memory.self_modifying import SelfModifying, Streams, close, refused
from nestling.memory.state import MemoryState, Weights


def scan(spec: SelfModifying, x: Streams) -> tuple[Tensor, MemoryState]:
    """Token by token. Works under `no_grad`; refuses `inference_mode`, where autograd cannot run."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("engine='reference' differentiates by autograd: call it outside torch.inference_mode()")
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        state, outputs = x.state, []
        for t in range(x.q.shape[2]):
            y, state = unharmed(partial(_token, spec, state, t), x, partial(refused, t=t))
            outputs.append(y)
        y = torch.stack(outputs, 2) if outputs else x.q.new_zeros(x.q.shape)
    return (y, state) if outer else (y.detach(), detach(state))


def _token(
    spec: SelfModifying, state: MemoryState, t: int, x: Streams, gone: Tensor | None
) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    alive = torch.ones(x.q.shape[0], dtype=torch.bool) if x.valid is None else x.valid[:, t].cpu()
    if x.reset is not None:
        fresh = x.reset[:, t].cpu() & alive
        state = state._replace(
            anchor=lanes_where(fresh, x.start.weights, state.anchor),
            weights=lanes_where(fresh, x.start.weights, state.weights),
            momentum=lanes_where(fresh, x.start.momentum, state.momentum),
            position=torch.where(fresh, 0, state.position),
        )
    anchor, running, momentum = spec.split(state.anchor), spec.split(state.weights), {}
    networks = {name: bank.network for bank in spec.banks for name in bank.names}

    def m(name: str, u: Tensor) -> Tensor:
        return networks[name].apply(at(anchor[name]), u)

    # What the token's own input generates, at the anchors.
    q, xk, xv = (u[:, :, t, None] for u in (x.q, x.k, x.v))
    k, v = m("k", xk), m("v", xv)
    logits = {gate: m(gate, xk) @ w + b for gate, (w, b) in x.readout.items()}
    made = [k.square().sum(-1), v.square() if spec.unit_values else v, *logits.values()]
    v = l2_norm(v) if spec.unit_values else v
    if spec.adaptive_q:
        q = m("q", q)
        made.append(q.square().sum(-1))
        q = l2_norm(q)
    sound = torch.isfinite(torch.stack([u.flatten(1).sum(1) for u in made]).sum(0))
    keep = sound.view(-1, 1, 1, 1)
    q, k, v = (torch.where(keep, u, 0.0) for u in (q, l2_norm(k), v))
    gate = {name: torch.sigmoid(torch.where(keep, u, 0.0)) for name, u in logits.items()}
    lr = spec.largest_steps[0] * gate["lr"]
    retention = gate.get("retention", torch.ones_like(lr))

    gradients = {name: _gradients(spec, networks[name], anchor[name], k, m(name, v)) for name in anchor}
    total = sum(g.sum((1, 2, 3)) for found in gradients.values() for g in found)
    assert isinstance(total, Tensor)
    fine = x.fine[:, t] & sound & torch.isfinite(total)
    lost = x.fine[:, t] & ~fine
    if bool(lost.any()):  # made again without it, whose derivatives are no numbers, and 0 times these neither
        unasked = torch.zeros_like(x.fine)
        unasked[:, t] = lost & ~sound
        silent = x._replace(q=torch.where(unasked[:, None, :, None], 0.0, x.q))
        return _token(spec, state, t, refused(silent, lost, t), gone)
    live = (fine & alive.to(fine.device)).view(-1, 1, 1, 1)

    after: dict[str, Weights] = {}
    moved = spec.split(state.momentum) if spec.rule.momentum else {}
    first = spec.split(x.start.weights)
    for name, found in gradients.items():
        new, kept = [], []
        inputs = layer_inputs(networks[name], anchor[name], k)
        for layer, (w, g) in enumerate(zip(running[name], found, strict=True)):
            step = -lr * spec.rule.step(spec.key_dim) * g
            if spec.rule.momentum:
                assert x.momentum is not None
                if spec.average:
                    step = x.momentum.complement()[:, :, t, None, None] * step
                step = x.momentum.plain()[:, :, t, None, None] * moved[name][layer] + step
                kept.append(torch.where(live, step, moved[name][layer]))
            changed = retention * w + step
            if toward_initial(spec.retention):
                changed = changed + (1 - retention) * first[name][layer]
            if spec.rule.erase != "none":
                erase = lr * retention if spec.rule.erase == "after_decay" else lr
                h = inputs[layer]
                strength = erase_strength(erase[..., 0, 0], layer, h.square().sum(-1))[..., None, None]
                changed = changed - strength * h[..., :, None] * (h[..., None, :] @ w)
            new.append(torch.where(live, changed, w))
        after[name], momentum[name] = tuple(new), tuple(kept)

    position = torch.where(alive, state.position + 1, state.position)
    weights = spec.join(after)
    moves = spec.join(momentum) if spec.rule.momentum else ()
    closing = [alive & (position % bank.chunk == 0) for bank in spec.banks]
    anchors, ends, moves, broken = close(spec, closing, state.anchor, weights, moves, gone)
    after = spec.split(lanes_where(broken, state.anchor, weights))
    faults = state.faults + broken.long() + (~(fine | broken) & alive.to(fine.device)).long()

    served = {"after": after, "before": running, "boundary": anchor}[spec.read]["main"]
    y = spec.network.apply(at(served), q)[:, :, 0]
    y = torch.where(alive.to(y.device).view(-1, 1, 1), y, 0.0)
    return y, MemoryState(anchors, ends, moves, None, position, faults), broken


def _gradients(spec: SelfModifying, network: Network, anchor: Weights, k: Tensor, target: Tensor) -> Weights:
    """∂ℓ/∂W with k and v̂ held constant: autograd sees the weights through leaves of their own, so that only the prediction
    depends on them, while the outer gradient still passes through k, through v̂ and through the anchor."""
    leaves = tuple(w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in anchor)
    loss = spec.bias.loss(network.apply(at(leaves), k), target).sum()
    return torch.autograd.grad(loss, leaves, create_graph=True)
