"""Deep momentum, DMGD: the momentum is a network that learns from gradients (Nested Learning, eq. 50 and 52).

    θ ← αθ − η_m ∇_θ ℓ(m_θ(u); −P u),      W ← W + σ(m_θ(u) − η₀ P u),      u = g

One step of a memory per optimizer step: its network, its attentional bias and its dense step are those of `nestling.memory`, so
that momentum is any memory that is trained on given keys and values (eq. 35–37, 60). The paper prints ℓ = ⟨m(u), 1⟩ with a
network that it does not name. Ours: keys are the gradient's rows, values the same rows (through P) with the other sign. A
linear m then recalls past gradients by their likeness with the present one; a network that has seen a direction often gives it
back, and noise it does not. As its last layer begins at 0, the first step is plain gradient descent, η₀u.

Keys may also be the rows' positions: then m has no keys but its places, and a linear one with the dot product is heavy-ball
momentum (eq. 33–34); read through Newton–Schulz, σ = NS, it is Muon (eq. 52).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.memory.biases import L2, Bias
from nestling.memory.networks import MLP, Network
from nestling.memory.networks.base import at
from nestling.memory.step import write
from nestling.memory.tile import gradients
from nestling.optim.base import GradientMemory, Optimizer, Params, State, refuse_shards, rows, unit
from nestling.optim.orthogonal import adjustment, orthogonalized
from nestling.optim.preconditioners import Identity, Preconditioner

KEYS, OUTPUTS = ("gradient", "position"), ("identity", "newton_schulz")


class DeepMomentum(Optimizer):
    """Deep momentum gradient descent. All defaults are ours.

    lr               η
    momentum         α, share of the network's weights that is kept, [0, 1]
    memory_lr        η_m, inner step size; of the mean over rows with keys "gradient", of their sum with "position"
    skip             η₀, weight of the (preconditioned) gradient itself beside what the memory says
    network          m: any network of `nestling.memory.networks` from rows to rows. Default: two layers, GELU, as wide as a row
    bias             ℓ: any attentional bias of `nestling.memory.biases`. Default L2
    keys             "gradient": the gradient's rows;  "position": one place for every row, values the gradient as it is
    output           σ: "identity" or "newton_schulz" (with the step sizes of Muon's "original")
    preconditioner   P
    seed             of the networks' initial weights
    weight_decay     λ, decoupled; of W, not of the memory

    With keys "gradient" the rows of keys and of values are scaled to a mean norm of 1 each before the memory, and its answers
    back to the values' size. A vector is a column of rows of one number, so that its memory acts on every entry alike. Every
    parameter `[out, in]` has a network of its own (default: 2·in² numbers); with keys "position" a step needs `[out, out]` for a
    while.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        memory_lr: float = 0.1,
        *,
        skip: float = 1.0,
        network: Network | None = None,
        bias: Bias | None = None,
        keys: str = "gradient",
        output: str = "identity",
        preconditioner: Preconditioner | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        if keys not in KEYS:
            raise ValueError(f"DeepMomentum: keys is {keys!r}; expected one of: {', '.join(KEYS)}")
        if output not in OUTPUTS:
            raise ValueError(f"DeepMomentum: output is {output!r}; expected one of: {', '.join(OUTPUTS)}")
        default = MLP(expansion=1.0, residual=False, norm=False, last_std=0.0)
        self.network: Network = default if network is None else network
        self.bias: Bias = L2() if bias is None else bias
        self.keys, self.output = keys, output
        self.preconditioner: Preconditioner = Identity() if preconditioner is None else preconditioner
        self.seed = seed
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "memory_lr": memory_lr, "skip": skip, "weight_decay": weight_decay},
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not group["memory_lr"] >= 0:
            raise ValueError(f"DeepMomentum: memory_lr is {group['memory_lr']}; expected a number of at least 0")
        for p in group["params"]:
            refuse_shards("DeepMomentum", p)
            self._shapes(p)

    def _shapes(self, p: Tensor) -> tuple[tuple[int, int], ...]:
        count, width = self._rows(p).shape
        return self.network.shapes(count if self.keys == "position" else width, width)

    def _rows(self, x: Tensor) -> Tensor:
        return rows(x) if x.dim() > 1 or self.keys == "position" else x.reshape(-1, 1)

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        kind = torch.promote_types(p.dtype, torch.float32)
        made = self.network.init(self._shapes(p), 1, self._generator(p, self.seed))
        weights = {f"weight{n}": w[0].to(p.device, kind) for n, w in enumerate(made)}
        return {**weights, **self.preconditioner.start(p)}

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        found = [self._read(group, g, state) for g, state in zip(grads, states, strict=True)]
        if self.output == "newton_schulz":
            found = orthogonalized(found, 5)
            torch._foreach_mul_(found, [adjustment("original", rows(p)) for p in params])
        return found

    def _read(self, group: dict[str, Any], g: Tensor, state: State) -> Tensor:
        """One step of the memory, then its answer; with the sign of a gradient."""
        target, u = self._rows(self.preconditioner.apply(g, state)), self._rows(g)
        if self.keys == "position":
            k, v, scale = torch.eye(len(u), dtype=g.dtype, device=g.device), -target, None
        else:
            root = len(u) ** 0.5
            key, (value, norm) = unit(u)[0], unit(target)
            k, v, scale = key * root, -value * root, norm / root
        weights = tuple(state[f"weight{n}"] for n in range(self.network.depth))
        factors = gradients(self.network, self.bias, weights, k, v)
        size = k.new_full((len(k), 1), group["memory_lr"] / (1 if scale is None else len(k)))
        keep = k.new_full((1,), group["momentum"])
        weights, _ = write(factors.inputs, factors.errors, weights, (), size, keep, None, None, None, 0)
        for n, w in enumerate(weights):
            state[f"weight{n}"] = w
        y = self.network.apply(at(weights), k)
        answer = y if scale is None else scale * y
        made: Tensor = group["skip"] * target - answer
        return made.view_as(g)

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        return [
            GradientMemory(
                "deep momentum",
                str(self.network),
                f"{self.bias} of the {'gradient' if self.keys == 'gradient' else 'rows'}",
                f"decay {group['momentum']}",
                "gradient descent" + ("" if self.output == "identity" else ", read through Newton–Schulz"),
                tensors=(
                    *(f"weight{n}" for n in range(self.network.depth)),
                    *self.preconditioner.start(torch.empty(0)),
                ),
            )
        ]
