"""A memory as its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nestling.memory.biases import L2, Bias, DotProduct, reads_threshold
from nestling.memory.draw import Draw
from nestling.memory.features import Features, Identity
from nestling.memory.gates import Gates
from nestling.memory.inputs import Inputs, check_call, check_start, check_state, prepare, widest
from nestling.memory.networks import Matrix, Network, Vector
from nestling.memory.networks.base import at
from nestling.memory.pieces import Size
from nestling.memory.protocol import Call, Engines, Example, Read, TwoEngines
from nestling.memory.retentions import Full, Lagged, Retention, Settled, per_channel, toward_initial
from nestling.memory.rules import Directed, Gradient, Implicit, Leader, Nesterov, Rule
from nestling.memory.settings import choice, read_timing, whole_numbers
from nestling.memory.state import MemoryState, Shapes, Tail, Weights, raised

GUARD_PERIOD = 64  # border guard's period where `chunk` plays no part


@dataclass(frozen=True)
class MemorySpec(TwoEngines[Inputs, MemoryState]):
    """The five choices of an associative memory.

    key_dim, value_dim   sizes per head
    features             the map φ: the network reads φ(k) and φ(q)
    network              the map M(k; W)
    bias                 the loss on (k, v)
    retention            what is kept
    rule                 how it descends
    chunk                period of the anchor in tokens: gradients of a chunk are taken at the weights of its start.
                         Without effect where the gradient does not read the weights, unless these are read at the boundary
    read                 token t is answered "after" its own write, "before" it, or from the chunk's start ("boundary")
    name                 name of the system, for messages

    Raises ValueError for dimensions or combinations that cannot work.
    """

    key_dim: int
    value_dim: int
    network: Network = Matrix()
    bias: Bias = L2()
    retention: Retention = Full()
    rule: Rule = Gradient()
    chunk: int = 16
    read: Read = "after"
    name: str = "custom"
    features: Features = Identity()
    _state = MemoryState

    def __post_init__(self) -> None:
        whole_numbers(self.name, key_dim=self.key_dim, value_dim=self.value_dim, chunk=self.chunk)
        read_timing(self.name, self.read)
        self._check_choices()
        if self.rule.erase != "none" and not self.retention.linear:
            raise ValueError(
                f"{self.name}: {self.rule!r} erases along the running weights, but {self.retention!r} keeps a dual variable "
                "whose weights are not linear in it: choose Gradient() or Momentum(), or a linear retention"
            )
        if per_channel(self.retention) and (self.network.depth > 1 or self.directed is not None):
            raise ValueError(
                f"{self.name}: {self.retention!r} keeps channels of the key, which {self.network!r} with {self.rule!r} cannot: "
                "choose a network of one layer and a rule that adds what it writes, or Decay()"
            )
        if toward_initial(self.retention) and (self.rule.erase != "none" or self.directed is not None):
            raise ValueError(
                f"{self.name}: {self.retention!r} goes back to the initial weights, which {self.rule!r} does not: choose "
                "Gradient() or Momentum(), or Decay()"
            )
        if self.directed is not None and (not self.retention.linear or isinstance(self.retention, Settled)):
            raise ValueError(
                f"{self.name}: {self.rule!r} maps the momentum of the weights, but {self.retention!r} keeps a dual variable or "
                "maps the weights: choose Gradient() or Momentum(), or a linear retention"
            )
        if self.directed is not None and self.directed.stride and self.chunk % self.directed.stride:
            raise ValueError(
                f"{self.name}: {self.rule!r} acts every {self.directed.stride} tokens, which do not divide chunk {self.chunk}: "
                "choose a chunk that is a multiple"
            )
        if isinstance(self.rule, Leader) and self.retention != Full():
            raise ValueError(
                f"{self.name}: {self.rule!r} goes back to the initial weights at every token, and {self.retention!r} would "
                "forget or map them: choose Full(), or Gradient(), which is the same for a constant step size"
            )
        if isinstance(self.rule, Nesterov) and per_channel(self.retention):
            raise ValueError(
                f"{self.name}: {self.rule!r} and {self.retention!r} do not fit: choose Momentum() or Decay()"
            )
        if getattr(self.network, "leading", False) and self.value_dim > self.key_dim:
            raise ValueError(
                f"{self.name}: {self.network!r} adds the key to its output, but key_dim is {self.key_dim} and value_dim "
                f"{self.value_dim}: make value_dim no larger, or set residual=False, leading=False"
            )
        # Read here already: to refuse dimensions that do not fit, and as a compiled step cannot take a cache's lock.
        _ = self.shapes, self.tail_shape
        self._check_inputs()
        served = isinstance(self.bias, DotProduct) and isinstance(self.network, Matrix)
        if isinstance(self.rule, Implicit) and not served:
            raise ValueError(
                f"{self.name}: {self.rule!r} is the implicit step of a matrix's squared error, which it makes itself of what "
                f"DotProduct() writes, but here are {self.bias!r} and {self.network!r}: choose DotProduct() and Matrix(), or "
                "another rule, such as Gradient()"
            )

    def _check_choices(self) -> None:
        """Refuse what is no choice yet, or one that cannot be told from others of its class."""
        kinds = {
            "features": (Features, "Identity(), or Exponential() in a KernelMemory"),
            "network": (Network, "MLP()"),
            "bias": (Bias, "L2()"),
            "retention": (Retention, "Full()"),
            "rule": (Rule, "Gradient()"),
        }
        for field, (kind, example) in kinds.items():
            choice(self.name, field, given := getattr(self, field), kind, example)
            try:
                hash(given)
            except TypeError:
                raise ValueError(
                    f"{self.name}: {field} is {given!r}, which has no hash: make its class a @dataclass(frozen=True)"
                ) from None

    def _check_inputs(self) -> None:
        """Refuse what acts along the key where the network's first weights are not read by it."""
        if isinstance(self.network, Vector):
            along = {
                repr(self.retention): per_channel(self.retention),
                repr(self.rule): isinstance(self.rule, Implicit) or (self.rule.erase != "none" and self.network.keyed),
            }
            for given in (given for given, acts in along.items() if acts):
                raise ValueError(
                    f"{self.name}: {given} acts along the key, but the weights of {self.network!r} have one number for each "
                    "channel of the value: choose Decay(), and Gradient() or Momentum(), or Matrix()"
                )

    @cached_property
    def width(self) -> int:
        """Features of a key: the network's input dimension."""
        return self.features.width(self.key_dim)

    @cached_property
    def fast_shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of the network's weights."""
        return self.network.shapes(self.width, self.value_dim)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of w0: the network's weights, then the feature map's own parameters, which stay slow."""
        return (*self.fast_shapes, *self.features.shapes(self.key_dim))

    def state_shapes(self, heads: int) -> Shapes:
        return Shapes(tuple([(heads, *shape) for shape in self.fast_shapes]), self.rule.momentum, self.tail_shape)

    @cached_property
    def tail_shape(self) -> tuple[int, int, int]:
        """Tokens of the window tail, and how many numbers each of their keys and values has."""
        return self.bias.window - 1, self.width, self.target_dim

    @property
    def reads_weights(self) -> bool:
        """Whether the inner gradient depends on the weights, so that the anchor matters."""
        return self.bias.reads_prediction or self.network.depth > 1

    @cached_property
    def directed(self) -> Directed | None:
        """The rule, if its steps go along a map of the momentum."""
        return self.rule if isinstance(self.rule, Directed) else None

    @property
    def reads_chunk(self) -> bool:
        """Whether `chunk` has an effect: the anchor matters or is what is read, or rule or retention act at borders."""
        directed = self.directed
        acts = directed is not None and not directed.per_token and directed.stride is None
        return self.reads_weights or self.read == "boundary" or acts or isinstance(self.retention, Settled)

    @property
    def period(self) -> int:
        """Tokens between two anchors."""
        return self.chunk if self.reads_chunk else GUARD_PERIOD

    @property
    def periods(self) -> tuple[int, ...]:
        """Tokens after which a tile must end: between two anchors, and between two steps of a strided rule.

        Those of a retention with a lag token have the second anchor of every chunk as well, `shifts` later than the first.
        """
        stride = None if self.directed is None else self.directed.stride
        if self.lagged:
            return self.period, self.period
        return (self.period,) if stride is None else (self.period, stride)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Tokens by which each period's chunks close later than at its multiples;  (): none does."""
        return (0, 1) if self.lagged else ()

    @property
    def lagged(self) -> bool:
        """Whether the first token of every chunk has a map of its own, and a new anchor behind it."""
        return isinstance(self.retention, Lagged)

    @property
    def update_period(self) -> int:
        return self.chunk if self.reads_chunk else 1

    @property
    def largest_steps(self) -> tuple[float, ...]:
        if self.directed is not None:
            return (self.directed.largest_step,)
        share = getattr(self.retention, "largest_step", 1.0)
        return tuple(share * step for step in super().largest_steps)

    @property
    def anchored(self) -> bool:
        return self.reads_weights and self.rule.step(self.key_dim) == 1

    @property
    def deep(self) -> bool:
        return self.network.depth > 1

    @property
    def gate_channels(self) -> dict[str, int]:
        found = {"retention": self.width} if per_channel(self.retention) else {}
        return found | ({"window": self.bias.window} if self.bias.window > 1 else {})

    @property
    def target_dim(self) -> int:
        """Size of what the bias compares a prediction with: the value, and the threshold of biases that read one."""
        return self.value_dim + reads_threshold(self.bias)

    @property
    def gates_used(self) -> frozenset[str]:
        """Names of the gates that have an effect."""
        used = {"lr"}
        if self.rule.momentum:
            used.add("momentum")
        if self.rule.erase != "none" and not isinstance(self.rule, Implicit):
            used.add("delta")
        if self.retention.decays:
            used.add("retention")
        if self.bias.window > 1:
            used.add("window")
        if reads_threshold(self.bias):
            used.add("threshold")
        return frozenset(used)

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Initial (dual) weights, float32, each `[head, in, out]`, first applied first; then the features' parameters."""
        whole_numbers(self.name, heads=heads)
        weights = self.network.init(self.fast_shapes, heads, generator)
        own = self.features.init(self.key_dim, heads, generator)
        return (*(self.retention.dual(w) for w in weights), *own)

    def start(self, w0: Sequence[Tensor], lanes: int) -> MemoryState:
        """State of lanes that have read nothing; weights in at least float32."""
        check_start(self, w0, lanes)
        weights = tuple(w.expand(lanes, *w.shape) for w in raised(w0[: self.network.depth]))
        tail = None
        if self.bias.window > 1:
            tail = Tail.empty(weights[0], *self.tail_shape)
        return MemoryState.fresh(weights, momentum=self.rule.momentum, tail=tail)

    def _check_state(self, state: MemoryState, lanes: int, heads: int) -> None:
        check_state(self.name, state, state.momentum, lanes, heads, self.state_shapes(heads))

    def _prepare(self, call: Call) -> Inputs:
        return prepare(self, call)

    def _engines(self) -> Engines[MemoryState]:
        from nestling.memory import chunked, reference

        return reference.scan, chunked.scan

    def _piece(self, call: Call, tile: int | None) -> Size | None:
        from nestling.memory import chunked

        shape, like = check_call(self, call), call.q.new_empty(0, dtype=widest(torch.float32, *call[1:4], *call.w0))
        return chunked.piece(self, shape, tile, like)

    def recall(self, w0: Sequence[Tensor], weights: Sequence[Tensor], q: Tensor) -> Tensor:
        """M*(q), a read without a write (Titans, §2), at the weights of a state, which stand still for all of q."""
        with torch.autocast(q.device.type, enabled=False):
            wide = q.to(torch.promote_types(q.dtype, weights[0].dtype))
            own = tuple(w.to(wide.dtype) for w in w0[self.network.depth :])
            y = self.network.apply(at([self.retention.link(w) for w in weights]), self.features.apply(wide, own))
        return y.to(q.dtype)

    def describe(self) -> dict[str, str]:
        """The choices in words, with gates used and state size per lane and head."""
        per_head = sum(i * o for i, o in self.fast_shapes)
        copies = 3 if self.rule.momentum else 2
        tail = (self.bias.window - 1) * (self.width + self.target_dim)
        return {
            "name": self.name,
            "features": str(self.features),
            "network": str(self.network),
            "bias": str(self.bias),
            "retention": str(self.retention),
            "rule": str(self.rule),
            "period": f"{self.chunk} tokens" if self.reads_chunk else "every token (chunk has no effect)",
            "read": self.read,
            "gates": ", ".join(sorted(self.gates_used)),
            "state": f"{copies * per_head + tail} numbers per lane and head",
        }

    def _example(self, draw: Draw) -> Example:
        """Random q, k of unit norm, normal v and gates of every kind the system reads."""
        q, k, v = draw.unit(self.key_dim), draw.unit(self.key_dim), draw.normal(self.value_dim)
        used = self.gates_used
        made = {"lr": draw.share() / (self.bias.window * self.chunk**0.5)}
        if self.bias.reads_prediction:  # biases steeper than L2 take smaller steps
            target = torch.cat([v, torch.ones_like(v[..., :1])], -1) if "threshold" in used else v
            steep = self.bias.error(torch.zeros_like(v), target).norm(dim=-1).mean() / v.norm(dim=-1).mean()
            made["lr"] = made["lr"] / steep.clamp_min(1.0)
        if "threshold" in used:  # near the typical error, so that both parts of the loss are met
            made["threshold"] = self.value_dim**0.5 * (0.5 + draw.share())
        if "momentum" in used:
            made["momentum"] = draw.share()
        if "retention" in used:
            made["retention"] = draw.share(*self._last("retention"), shift=4)
        if "delta" in used and (self.reads_weights or self.rule.erase == "with_decay"):
            made["delta"] = 0.5 * draw.share()
        if "window" in used:
            made["window"] = draw.share(*self._last("window"))
        return q, k, v, Gates(**made)

    def _last(self, gate: str) -> tuple[int, ...]:
        return (self.gate_channels[gate],) if gate in self.gate_channels else ()
