"""An associative memory as a sequence layer: projections, short convolution, gates, norm, output gate (Titans, §4.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.layers.base import Layer
from nestling.layers.convolution import ShortConvolution
from nestling.layers.fused import gated_norm, unit_heads
from nestling.layers.level import Level, Period
from nestling.layers.norm import EPS
from nestling.layers.stream import kept
from nestling.memory import Gates, MemorySpec, Report
from nestling.memory import Memory as AnyMemory
from nestling.optim.joined import Joined
from nestling.state import leaves, register

FIRST = {"lr": 0.0, "momentum": 0.0, "retention": 4.0, "delta": 0.0, "threshold": 1.0, "window": -3.0}
"""Where the biases of the gates begin."""
DEEP_RETENTION = 8.0
"""Where that of α begins in deep memories. Behind a norm the scale of weights makes no difference to the output, but the gradient
grows as decay makes them small: at α ≈ 0.98 the outer gradient grew tenfold within 2,000 tokens, and training all but stopped."""
DIRECTED = {"momentum": 2.0, "retention": 11.0}
"""Where they begin under a rule that maps the momentum (Muon). Its steps are of one size, so that decay leaves weights of which
every step is a share that no η makes smaller, √(2c(1 − α)) in chunks of c tokens, and S turns as weights do: the outer gradient
grew in a carried lane until nothing was learned. Longer momentum lets S turn less, and slower decay makes the share small."""


def _first(kind: str, memory: AnyMemory) -> float:
    """Where the bias of a memory's gate begins."""
    if kind == "lr" and memory.anchored:
        return -1.0
    if kind in DIRECTED and getattr(memory, "directed", None) is not None:
        return DIRECTED[kind]
    return DEEP_RETENTION if kind == "retention" and memory.deep else FIRST[kind]


def _carried(memory: Any) -> int:
    """Numbers of a lane's state, of memories side by side those of the largest."""
    parts = memory.parts if "parts" in memory._fields else (memory,)
    return max(sum(w.shape[1:].numel() for w in leaves(part)) for part in parts)


@register
class MemoryLayerState(NamedTuple):
    """Tail of the convolution `[lane, width − 1, 3 · dim]`, and the memory's own state."""

    tail: Tensor
    memory: Any


class Memory(Layer):
    """`y, state = layer(x, state)` with x `[lane, time, dim]`.

        q, k, v = SiLU(conv(x W))      q, k of unit norm per head
        gates   = per head and token, from x: η = η_max σ(·), μ = σ(·), α = σ(·), γ = σ(·) / Σ_lags σ(·)
        y       = (RMSNorm(memory(q, k, v)) ∘ SiLU(x W_g)) W_o

    Args:
        dim: width.  heads: number of memories, each of width dim / heads, which must be the spec's key_dim and value_dim.
        spec: any named or made memory.
        width: of the convolution.
        lr_max: largest inner step. Default: 1, or 1/√chunk where gradients stand at an anchor, as those of a chunk add up, or
            0.05 for Muon, whose steps have a size of their own; for each of the memories of a composite.
        delta: the erasing strength has a gate of its own, β = σ(·); otherwise it is the step size.
        tied: one number per head and token is both the step and how much is forgotten: η = softplus(·), α = exp(−a η), a > 0
            learned per head (Mamba-2).
        output: False leaves out the last line: y are the heads side by side as the memory answers, for layers that go on
            with them in their own way.

    A token that is not finite is left out of convolution and memory (`layers.stream.kept`).

    Initially α ≈ 0.98, in deep memories 0.9997, and μ ≈ 0.5 (Titans gives the ranges, not the values); under Muon 0.99998 and
    0.88. The initial weights are slow parameters.

    The γ of a window (Atlas, eq. 8–9, which leaves their form open) are shares of 1 here, over all its lags, so that its step
    is at most η_max. Their plain sum may be c: a matrix under Omega(L2()) overflows then, as keys behind SiLU are alike.
    η_max/c bounds it as well, but takes the first steps, near the online rule's, to 1/c of these, and Muon's, which know no
    scale of γ, to 1/c always.
    """

    sources = (0, 1, 2)  # the projections that q, k and v are made of
    unit_values = False

    def __init__(
        self,
        dim: int,
        heads: int,
        spec: AnyMemory,
        *,
        width: int = 4,
        lr_max: float | None = None,
        delta: bool = False,
        tied: bool = False,
        output: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads or spec.key_dim != dim // heads or spec.value_dim != dim // heads:
            raise ValueError(
                f"Memory: dim {dim} in {heads} heads gives width {dim / heads:g} a head, but {spec.name} has "
                f"key_dim={spec.key_dim}, value_dim={spec.value_dim}: make them equal"
            )
        if (delta and "delta" not in spec.gates_used) or (tied and not {"lr", "retention"} <= spec.gates_used):
            raise ValueError(
                f"Memory: delta={delta} and tied={tied}, but {spec.name} reads the gates {', '.join(sorted(spec.gates_used))}: "
                "delta needs a rule that erases, tied needs lr and retention"
            )
        self.spec, self.heads = spec, heads
        self.growth = spec.growth
        self.lr_max = spec.largest_steps if lr_max is None else (lr_max,) * len(spec.largest_steps)
        projections = max(self.sources) + 1
        self.qkv = Joined(dim, projections * dim, parts=projections, bias=False)
        self.convolution = ShortConvolution(3 * dim, width)
        self.kinds = {
            kind: spec.gate_channels.get(kind, 1)
            for kind in ("lr", "momentum", "retention", "delta", "threshold", "window")
            if kind in spec.gates_used and not (kind == "delta" and not delta) and not (kind == "retention" and tied)
        }
        self.lags = [part.memory.gate_channels["window"] for part in spec.parts if "window" in part.memory.gates_used]
        columns = sum(self.kinds.values())
        self.gates = nn.Linear(dim, heads * columns) if columns else None
        self.output = output
        if output:
            self.gate = nn.Linear(dim, dim, bias=False)
            self.norm = nn.RMSNorm(spec.value_dim, eps=EPS)
            self.out = nn.Linear(dim, dim, bias=False)
        self.initial = nn.ParameterList(nn.Parameter(w) for w in spec.init(heads))
        # From 1/4 to 1/256: with a step near 1, heads that remember a few tokens to some hundred.
        self.rate = nn.Parameter(torch.linspace(-2, -8, heads).mul(math.log(2))) if tied else None
        if self.gates is None:
            return
        with torch.no_grad():
            self.gates.weight.mul_(0.1)
            view = self.gates.bias.view(heads, -1)
            for kind, bias in zip(self.kinds, torch.split(view, list(self.kinds.values()), -1), strict=True):
                users = [part.memory for part in spec.parts if kind in part.memory.gates_used]
                sizes = [memory.gate_channels.get(kind, 1) for memory in users]
                for memory, own in zip(users, torch.split(bias, sizes, -1), strict=True):
                    own[:] = _first(kind, memory)
                    if kind == "window":  # near the online rule at first
                        own[:, 0] = 3.0

    def start(self, lanes: int) -> MemoryLayerState:
        return MemoryLayerState(self.convolution.start(lanes), self._begin(lanes))

    def forward(
        self,
        x: Tensor,
        state: MemoryLayerState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, MemoryLayerState]:
        state = self.start(x.shape[0]) if state is None else state
        own = kept((x,), reset, valid)
        (x,), reset, valid = own.rows, own.reset, own.valid
        if torch.is_grad_enabled() and self.spec.deep and x.shape[1:].numel() > _carried(state.memory):
            # Beside a deep memory one product more is cheap, and keeping what the convolution reads of many tokens is not.
            *mixed, tail = checkpoint(
                self._mix,
                x,
                state.tail,
                reset,
                valid,
                use_reentrant=False,
                preserve_rng_state=False,
                determinism_check="none",
            )
        else:
            *mixed, tail = self._mix(x, state.tail, reset, valid)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed)
        if own.lost is not None and torch.compiler.is_compiling():
            # The memory's own guard leaves it out then, and counts.
            k = torch.where(own.lost[..., None, None], torch.nan, k)
        y, memory = self.spec.scan(
            self._first(),
            unit_heads(q),
            unit_heads(k),
            unit_heads(v) if self.unit_values else v.transpose(1, 2).contiguous(),
            self._gates(x),
            state.memory,
            reset=reset,
            valid=valid,
            report=report,
        )
        if not torch.compiler.is_compiling():
            memory = own.ended(memory, self._begin)
            tail = tail if own.emptied is None else torch.where(own.emptied[:, None, None], 0.0, tail)
            if report is not None and own.lost is not None:
                report.count(faults=own.lost.sum(1))
        y = self.out(gated_norm(y, self.norm.weight, self.gate(x))) if self.output else y.transpose(1, 2).flatten(2)
        return own.answered(y), MemoryLayerState(tail, memory)

    def query(self, x: Tensor) -> Tensor:
        """What `recall` is asked for x: q before unit norm and without the convolution, `[lane, time, dim]`."""
        return F.silu(F.linear(x, self.qkv.weight[: x.shape[-1]]))

    def recall(self, query: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The heads' answers side by side, `[lane, time, dim]`, at weights of a state that stand still; nothing is written.

        Only for layers of a `MemorySpec`.
        """
        assert isinstance(self.spec, MemorySpec)
        q = unit_heads(query.view(*query.shape[:2], self.heads, -1))
        return self.spec.recall(self._first(), weights, q).transpose(1, 2).flatten(2)

    def _first(self) -> tuple[Tensor, ...]:
        """The initial weights; the list by itself looks each of them up by its name, which takes longer than a small memory."""
        return tuple(w for w in self.initial._parameters.values() if w is not None)

    def _begin(self, lanes: int) -> Any:
        """The memory's state of lanes that have read nothing."""
        return self.spec.start(self._first(), lanes)

    def levels(self) -> list[Level]:
        state = self.spec.start(self._first(), 0)
        carried = [field for field, value in zip(state._fields, state, strict=True) if list(leaves(value))]
        shared = ("tail", *(f"memory.{field}" for field in carried if field != "parts"))
        parts = self.spec.parts
        fastest = min(range(len(parts)), key=lambda n: parts[n].memory.update_period)  # what all need belongs to it
        weights = self._initial()
        return [
            Level(
                part.name,
                Period(part.memory.update_period, "token"),
                part.words["network"],
                part.words["bias"],
                part.words["retention"],
                part.words["rule"],
                "tokens",
                "initialization",
                params=(*(self.own("initial") if n == fastest else ()), *weights[n]),
                state_paths=(
                    *(shared if n == fastest else ()),
                    *((f"memory.parts.{n}",) if "parts" in carried else ()),
                ),
            )
            for n, part in enumerate(parts)
        ]

    def _initial(self) -> list[tuple[str, ...]]:
        """Names of the initial weights, by part of the spec."""
        names = (f"initial.{n}" for n in range(len(self.initial)))
        parts = self.spec.parts
        if len(parts) == 1:
            return [tuple(names)]
        return [tuple(next(names) for _ in part.memory.shapes) for part in parts]

    def _steps(self, share: Tensor) -> Tensor:
        """Shares of the largest steps."""
        if len(self.lr_max) == 1:
            return self.lr_max[0] * share
        return torch.stack([most * part for most, part in zip(self.lr_max, share.unbind(-1), strict=True)], -1)

    def _mix(self, x: Tensor, tail: Tensor, reset: Tensor | None, valid: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, and the convolution's new tail."""
        found, new = self.convolution.parts(self.qkv(x), tail, self.sources, reset=reset, valid=valid)
        return *found, new

    def _gates(self, x: Tensor) -> Gates:
        if self.gates is None:
            return Gates()
        raw = self.gates(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [lane, head, time, gate]
        raw = raw.float() if raw.dtype.itemsize < 4 else raw
        made: dict[str, Tensor] = {}
        for kind, part in zip(self.kinds, torch.split(raw, list(self.kinds.values()), -1), strict=True):
            part = part if kind in self.spec.gate_channels else part.squeeze(-1)
            if kind == "lr" and self.rate is not None:
                made["lr"] = F.softplus(part)
                made["log_retention"] = -self.rate.to(part.dtype).exp()[:, None] * made["lr"]
            elif kind == "lr":
                made["lr"] = self._steps(part.sigmoid())
            elif kind == "threshold":  # in units of the norm of values whose coordinates have unit scale
                made["threshold"] = self.spec.value_dim**0.5 * F.softplus(part)
            elif kind == "window":  # F.normalize: gates that are all 0 leave the step out
                windows = [F.normalize(own.sigmoid(), p=1, dim=-1) for own in torch.split(part, self.lags, -1)]
                made[kind] = windows[0] if len(windows) == 1 else torch.cat(windows, -1)
            elif kind == "delta":
                made[kind] = part.sigmoid()
            else:
                made[f"log_{kind}"] = F.logsigmoid(part)
        return Gates(**made)
