"""Memories over exponential features: DeepTransformer, SWDT and Dot (Atlas, §4).

The first layer's weights live where φ* does, and are kept as a sum over pairs of a key and what it wrote:

    W_t = γ_t W_0 + Σ_j a_j φ*(k_j)ᵀ u_j            z(x) = φ*(x) W_t = γ_t x W_0 + Σ_j a_j κ(k_j, x) u_j
    u_j = −∂ℓ/∂z(k_j) at the anchor                 a_j = what the gates made of the step: Π α · η γ, summed over its window

    normalized:  z(x) = γ_t x W_0 + Σ_j a_j κ(k_j, x) u_j / Σ_j a_j κ(k_j, x)

Later layers are ordinary fast weights, W ← αW − ηΣγ∇ℓ. With a matrix memory and the dot-product bias u = v: linear attention over
φ*, which is unnormalized softmax attention (eq. 26), and softmax attention once it is normalized. With the squared error a write
corrects what the pairs before predict (Dot, eq. 30–31). How a deep memory takes an infinite input the paper does not say: here
φ* enters the first layer alone, and its learned part W_0 reads the key itself (derived).

With `span`, only the last tokens count, whose gradients are those at the initial weights:

    W_t = W_0 − Σ_{i>t−span} η_i ∇ℓ(W_0; k_i, v_i)        sliding-window attention for a matrix memory (eq. 18)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nestling.memory.biases import Bias, DotProduct, reads_threshold
from nestling.memory.draw import Draw
from nestling.memory.features.exponential import Exponential
from nestling.memory.gates import Factor, Gates, factor
from nestling.memory.inputs import (
    check_call,
    check_dtypes,
    check_precision,
    check_start,
    check_state,
    token_guard,
    widest,
)
from nestling.memory.kernel_sum import Kind, Sum, summed
from nestling.memory.networks import MLP, Matrix
from nestling.memory.pieces import INSIDE, Grown, Size, fitting
from nestling.memory.protocol import Call, Engines, Example, Read, TwoEngines
from nestling.memory.retentions import Decay, Full
from nestling.memory.rules import Gradient
from nestling.memory.settings import choice, read_timing, switches, whole_numbers
from nestling.memory.state import Shapes, Tail, Weights, raised
from nestling.state import register

TILE = 64  # tokens per product


class Pairs(NamedTuple):
    """What a growing memory keeps of the tokens since a lane's start, `[lane, capacity, head, …]`, zeros behind a lane's last.

    A chunk's pairs stand together; in front of them, c − 1 for the tokens before it that a window of c reaches.

    key     `[…, key_dim]`
    write   u `[…, out]`, the first layer's width
    weight  a;  anchor: the same at the start of the lane's current chunk
    """

    key: Tensor
    write: Tensor
    weight: Tensor
    anchor: Tensor


register(Pairs, grows=dict.fromkeys(Pairs._fields, 1))


@register
class KernelState(NamedTuple):
    """State of a `KernelMemory`.

    anchor, weights  of the first layer's learned part and of the later layers, `[lane, head, in, out]`; empty with a span
    pairs            None with a span
    tail             the last tokens: those a window of the bias needs, or a span; its values have η as last coordinate
    position, faults as in `MemoryState`
    """

    anchor: Weights
    weights: Weights
    pairs: Pairs | None
    tail: Tail | None
    position: Tensor
    faults: Tensor


class Streams(NamedTuple):
    """Inputs of a scan in the compute dtype; tokens that are not `fine` (bool `[lane, time]`) made harmless."""

    start: KernelState
    state: KernelState
    initial: Weights
    theta: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    retention: Factor | None
    window: Tensor | None
    fine: Tensor
    reset: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class KernelMemory(TwoEngines[Streams, KernelState]):
    """A memory whose first layer reads exponential features.

    key_dim, value_dim   sizes per head
    kernel               κ
    network              MLP, or Matrix() for the linear memory
    bias                 the loss on (k, v), `Omega` for a window; without threshold
    retention            Full(), or Decay(): α multiplies weights and pairs
    normalized           divide by the kernels' sum
    span                 None: every token counts, and the state grows;  a number: the last so many alone, nothing is retained
    chunk                period of the anchor. Without effect on a matrix memory with the dot product, or with a span, unless
                         these are read at the boundary
    read                 "after" the token's own write, "before" it, or from the chunk's start ("boundary")

    Raises ValueError for combinations that cannot work.
    """

    key_dim: int
    value_dim: int
    kernel: Exponential = Exponential()
    network: MLP | Matrix = MLP()
    bias: Bias = DotProduct()
    retention: Full | Decay = Full()
    normalized: bool = True
    span: int | None = None
    chunk: int = 16
    read: Read = "after"
    name: str = "kernel"
    _state = KernelState

    def __post_init__(self) -> None:
        whole_numbers(self.name, key_dim=self.key_dim, value_dim=self.value_dim, chunk=self.chunk)
        read_timing(self.name, self.read)
        switches(self.name, normalized=self.normalized)
        choice(self.name, "kernel", self.kernel, Exponential, "Exponential()")
        choice(self.name, "bias", self.bias, Bias, "DotProduct()")
        if not isinstance(self.network, MLP | Matrix):
            raise ValueError(
                f"{self.name}: network is {self.network!r}; expected one whose first layer is one: MLP or Matrix"
            )
        if self.retention not in (Full(), Decay()):
            raise ValueError(
                f"{self.name}: retention is {self.retention!r}; expected Full() or Decay(), which scale pairs"
            )
        if reads_threshold(self.bias):
            raise ValueError(f"{self.name}: bias is {self.bias!r}; expected one without a threshold")
        if self.span is not None:
            whole_numbers(self.name, span=self.span)
            if self.bias.window > 1 or self.retention != Full():
                raise ValueError(
                    f"{self.name}: with a span nothing before it is kept, and it is the window itself; expected Full() and a "
                    f"bias of one token, not {self.retention!r} and {self.bias!r}"
                )
        self.network.shapes(self.key_dim, self.value_dim)

    @property
    def growth(self) -> Literal["constant", "linear"]:  # type: ignore[override]
        return "linear" if self.span is None else "constant"

    @property
    def fast_shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the first layer's learned part and of the later layers."""
        return self.network.shapes(self.key_dim, self.value_dim)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of w0: the network's weights, then the kernel's θ."""
        return (*self.fast_shapes, (1, 1))

    @property
    def rule(self) -> Gradient:
        return Gradient()

    @property
    def reads_weights(self) -> bool:
        """Whether the inner gradient depends on the weights of the chunk's start."""
        return self.span is None and (self.bias.reads_prediction or self.network.depth > 1)

    @property
    def reads_chunk(self) -> bool:
        """Whether `chunk` has an effect: the anchor matters, or is what is read."""
        return self.reads_weights or self.read == "boundary"

    @property
    def update_period(self) -> int:
        return self.chunk if self.reads_chunk else 1

    @property
    def anchored(self) -> bool:
        return self.reads_weights

    @property
    def largest_steps(self) -> tuple[float, ...]:
        """A deep memory's steps of a span add up at its initial weights, as those of a chunk at its anchor."""
        return super().largest_steps if self.span is None or not self.deep else (self.span**-0.5,)

    @property
    def deep(self) -> bool:
        return self.network.depth > 1

    @property
    def gates_used(self) -> frozenset[str]:
        used = {"lr"} | ({"retention"} if self.retention.decays else set())
        return frozenset(used | ({"window"} if self.bias.window > 1 else set()))

    @property
    def gate_channels(self) -> dict[str, int]:
        return {"window": self.bias.window} if self.bias.window > 1 else {}

    @property
    def halo(self) -> int:
        """Tokens before a tile that it needs: those of a window, or of a span before the weights that are read."""
        if self.span is None:
            return self.bias.window - 1
        return self.span + (self.chunk if self.read == "boundary" else 0)

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        whole_numbers(self.name, heads=heads)
        return (*self.network.init(self.fast_shapes, heads, generator), self.kernel.init(self.key_dim, heads))

    def start(self, w0: Sequence[Tensor], lanes: int) -> KernelState:
        check_start(self, w0, lanes)
        made = tuple(w.expand(lanes, *w.shape) for w in raised(w0[: self.network.depth]))
        heads, like = w0[0].shape[0], made[0]
        pairs, tail = None, None
        if self.span is None:
            one = like.new_zeros(lanes, 0, heads)
            pairs = Pairs(
                like.new_zeros(lanes, 0, heads, self.key_dim), like.new_zeros(lanes, 0, heads, like.shape[-1]), one, one
            )
        if self.halo:
            tail = Tail.empty(like, self.halo, self.key_dim, self.value_dim + (self.span is not None))
        weights = made if self.span is None else ()
        zeros = torch.zeros(lanes, dtype=torch.int64)
        return KernelState(weights, weights, pairs, tail, zeros, zeros.to(like.device))

    def count(self, position: int) -> int:
        """Pairs of a lane at this position."""
        chunks, place = divmod(position, self.chunk)
        halo = self.bias.window - 1
        return chunks * (self.chunk + halo) + (place + halo if place else 0)

    def sum(self, x: Tensor, theta: Tensor, share: Tensor | None, old: Sequence[Sum], own: Sequence[Sum]) -> Tensor:
        """Σ_j a_j κ(k_j, x) u_j, over its kernels' sum if normalized: x `[…, time, key_dim]`.

        old    pairs with weights of their own, of which a `share [..., time, 1]` is left (None: all)
        own    pairs with weights for each of x's tokens
        """
        kind = Kind(self.normalized, self.kernel.unit_peak, len(old))
        return summed(kind, x, theta, share, [*old, *own])

    def _engines(self) -> Engines[KernelState]:
        from nestling.memory import kernel_chunked, kernel_reference

        return kernel_reference.scan, kernel_chunked.scan

    @property
    def _grown(self) -> Grown | None:
        return None if self.span is not None else lambda state: state.pairs[:2]

    def _piece(self, call: Call, tile: int | None) -> Size | None:
        from nestling.memory.native import kernel as native
        from nestling.memory.native.lanes import in_step

        shape, like = check_call(self, call), call.q.new_empty(0, dtype=widest(torch.float32, *call[1:4], *call.w0))
        if native.serves(self, like) and (self.span is not None or in_step(call)):
            return None  # the C code makes again by itself what it needs
        unit = min(tile or TILE, self.chunk) if self.span is None else tile or TILE
        rows, width = sum(i + o for i, o in self.fast_shapes), self.halo + unit
        inside: float = INSIDE * width * (rows + width)
        if self.span is not None:
            numbers = self.halo * (self.key_dim + self.value_dim + 1)
            return fitting(shape, call.q, unit=unit, state=numbers, inside=inside, memories=shape[1])
        numbers = (
            sum(i * o for i, o in self.fast_shapes) + 2 * shape[2]
        )  # of pairs their weights; the rest is kept once
        return fitting(shape, call.q, unit=unit, state=numbers, inside=inside + numbers, memories=1)

    def _prepare(self, call: Call) -> Streams:
        lanes, heads, time = check_call(self, call)
        w0, q, k, v, gates, state, reset, valid = call
        start = self.start(w0, lanes)
        state = start if state is None else state
        dtype = widest(torch.float32, q, k, v, *w0, *state.weights, *([] if state.tail is None else state.tail[:1]))
        if state.weights:
            check_precision(state.weights[0].dtype, call)
        fine, (k, v), gates = token_guard(
            (k.to(dtype), v.to(dtype)), gates.map(lambda gate: gate.to(dtype)), forward=self.normalized
        )
        lr = q.new_ones(lanes, heads, time, dtype=dtype) if gates.lr is None else gates.lr
        retention = factor(gates.retention, gates.log_retention, dtype)
        if self.span is not None:  # a token's η stays with it
            v = torch.cat([v, lr.unsqueeze(-1)], -1)
        initial = tuple(w.to(dtype) for w in w0[:-1])
        return Streams(
            start, state, initial, w0[-1].to(dtype), q.to(dtype), k, v, lr, retention, gates.window, fine, reset, valid
        )

    def state_shapes(self, heads: int) -> Shapes:
        weights = tuple((heads, *shape) for shape in self.fast_shapes) if self.span is None else ()
        return Shapes(weights, tail=(self.halo, self.key_dim, self.value_dim + (self.span is not None)))

    def _check_state(self, state: KernelState, lanes: int, heads: int) -> None:
        check_state(self.name, state, (), lanes, heads, self.state_shapes(heads))
        if state.pairs is not None:
            check_dtypes([state.weights[0], *state.pairs])

    def describe(self) -> dict[str, str]:
        fast, width = sum(i * o for i, o in self.fast_shapes), self.fast_shapes[0][1]
        if self.span is None:
            tail = (self.bias.window - 1) * (self.key_dim + self.value_dim)
            more = f" + {tail}" if tail else ""
            again = f" and {self.bias.window - 1} more a chunk" if tail else ""
            pair = self.key_dim + width + 2
            state = f"{2 * fast}{more} numbers per lane and head, and {pair} for every token read{again}"
            keeps = f"every key; {self.retention}"
        else:
            state = f"{self.halo * (self.key_dim + self.value_dim + 1)} numbers per lane and head"
            keeps = f"the last {self.span} tokens"
        return {
            "name": self.name,
            "features": f"{self.kernel}{', over the kernels’ sum' if self.normalized else ''}",
            "network": str(self.network),
            "bias": str(self.bias),
            "retention": keeps,
            "rule": "gradient descent" + ("" if self.span is None else " from the initial weights"),
            "period": f"{self.chunk} tokens" if self.reads_chunk else "every token (chunk has no effect)",
            "read": self.read,
            "gates": ", ".join(sorted(self.gates_used)),
            "state": state,
        }

    def _example(self, draw: Draw) -> Example:
        """Random q, k of unit norm, normal v and gates of every kind the memory reads."""
        q, k, v = draw.unit(self.key_dim), draw.unit(self.key_dim), draw.normal(self.value_dim)
        made = {"lr": draw.share() / (self.bias.window * self.chunk**0.5)}
        if "retention" in self.gates_used:
            made["retention"] = draw.share(shift=4)
        if "window" in self.gates_used:
            made["window"] = draw.share(self.bias.window)
        return q, k, v, Gates(**made)
