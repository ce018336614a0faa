"""When the C code serves, and its place in autograd."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from nestling.memory.biases import L2, Bias, DotProduct
from nestling.memory.native.fields import DEPTH, STREAMS, Scan
from nestling.memory.networks import MLP, Matrix
from nestling.memory.networks.base import Network
from nestling.memory.networks.layer_norm import EPS
from nestling.memory.retentions import Decay, Full, Retention
from nestling.memory.rules import DeltaGradient, Gradient, Implicit, Momentum, Rule
from nestling.native import DEFINES, SCAN, library, threads

if TYPE_CHECKING:
    from nestling.memory.coefficients import Coefficients

Weights = tuple[Tensor, ...]

LONGEST = 256  # tokens of a tile; beyond, what it makes leaves the cache
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}


class Choices(Protocol):
    """What is asked of a memory's spec."""

    @property
    def name(self) -> str: ...
    @property
    def bias(self) -> Bias: ...
    @property
    def retention(self) -> Retention: ...
    @property
    def rule(self) -> Rule: ...
    @property
    def read(self) -> Literal["after", "before", "boundary"]: ...


@dataclass(frozen=True)
class Cell:
    """The choices that the C code depends on. reads: whether anything is asked of the memory."""

    name: str
    network: Network
    bias: Bias
    retention: Retention
    rule: Rule
    read: Literal["after", "before", "boundary"]
    reads: bool = True

    @staticmethod
    def of(spec: Choices, network: Network, *, reads: bool = True) -> Cell:
        return Cell(spec.name, network, spec.bias, spec.retention, spec.rule, spec.read, reads)


def serves(cell: Cell, x: Tensor) -> bool:
    """Whether there is C code for these choices and for such tensors, on this machine."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in DEFINES
        and _known(cell)
        and library(SCAN, x.dtype) is not None
    )


@lru_cache
def _known(cell: Cell) -> bool:
    network, retention, rule = cell.network, cell.retention, cell.rule
    return (
        type(network) in (MLP, Matrix)
        and network.depth <= DEPTH
        and not getattr(network, "leading", False)
        and type(cell.bias) in (L2, DotProduct)
        and (type(retention) is Full or retention == Decay())
        and type(rule) in (Gradient, Momentum, DeltaGradient, Implicit)
        and not (rule.momentum and rule.erase != "none")
        and cell.read != "boundary"
    )


def anchored(anchor: Weights, weights: Weights) -> bool:
    """Whether the weights are the anchor, as at a chunk's start, also for a gradient."""
    return all(
        w is a or (not (w.requires_grad or a.requires_grad) and torch.equal(w, a))
        for w, a in zip(weights, anchor, strict=True)
    )


def scan(
    cell: Cell,
    tiles: int,
    given: tuple[Tensor | None, Tensor, Tensor],
    c: Coefficients,
    erase: Tensor | None,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
) -> tuple[Tensor, Weights, Weights] | None:
    """Outputs, weights and momentum after tiles that are all full chunks; None where something was not finite.

    given    q, k, v `[…, time, dim]`; q None where nothing is asked: the outputs then mean nothing
    c        coefficients `[…, tile, …]` or, of a single tile, `[…]`; leading dimensions may be broadcast, as those of erase
    weights  `[…, in, out]`
    """
    everything = [x for x in (*given, *c, erase, *weights, *momentum) if x is not None]
    if given[1].numel() == 0 or any(x.dtype != given[1].dtype or x.device.type != "cpu" for x in everything):
        return None
    lead = given[1].shape[:-2]
    write = c.running if c.write is None else c.write
    places = (None if x is None else x.reshape(*lead, -1, x.shape[-1]) for x in given)
    gates = (c.keep, c.carry, write, c.keep_s, c.write_s, c.step, erase)
    spread = (None if x is None else x.expand(*lead, *x.shape[len(lead) :]) for x in gates)
    plan = _Plan(cell, tiles, given[1].shape[-2] // tiles, lead.numel())
    found = _Scan.apply(plan, *places, *spread, *weights, *momentum)  # type: ignore[no-untyped-call]
    if bool(plan.broken.any()):
        return None
    depth = len(weights)
    return found[0], tuple(found[1 : 1 + depth]), tuple(found[1 + depth :])


class _Plan:
    """What a scan is, beside its tensors."""

    def __init__(self, cell: Cell, tiles: int, length: int, memories: int) -> None:
        self.cell, self.tiles, self.length, self.memories = cell, tiles, length, memories
        self.group = max(1, isqrt(2 * tiles))
        """Tiles between two that weights are kept of: those kept and those made again then grow with the root of the length.
        Those kept are of all memories, those made again of one at a time: rather few are kept."""
        self.broken = torch.zeros(memories, dtype=torch.int32)
        self.code: Any = None

    def call(self, weights: Weights, backward: bool, tensors: dict[str, Any]) -> None:
        """Run it. tensors: by the names of `Scan`, tuples for the layers; weights: or what is like them."""
        shapes = [w.shape for w in weights]
        cell, network = self.cell, self.cell.network
        c = Scan(memories=self.memories, tiles=self.tiles, length=self.length, depth=network.depth, group=self.group)
        c.threads = threads(self.memories)
        c.width[: len(shapes) + 1] = [*(shape[-2] for shape in shapes), shapes[-1][-1]]
        if isinstance(network, MLP):
            c.activation, c.residual, c.norm = ACTIVATIONS[network.activation], network.residual, network.norm
        c.reads_prediction = cell.bias.reads_prediction
        c.before, c.momentum, c.epsilon = cell.read == "before", cell.rule.momentum, EPS
        for name, x in tensors.items():
            if isinstance(x, tuple):
                getattr(c, name)[: len(x)] = [w.data_ptr() for w in x]
            elif x is not None:
                setattr(c, name, x.data_ptr())
        self.code = self.code or library(SCAN, weights[0].dtype)  # a backward pass goes the way the forward pass went
        if self.code.nestling_scan(ctypes.byref(c), int(backward)):
            raise MemoryError(f"{cell.name}: no memory for the scratch space of {c.threads} threads")


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *given: Tensor | None) -> tuple[Tensor, ...]:
        whole = _whole(given)
        streams, rest = dict(zip(STREAMS, whole, strict=False)), whole[len(STREAMS) :]
        weights = tuple(w for w in rest if w is not None)
        v, depth = streams["v"], plan.cell.network.depth
        assert v is not None
        y, ends = torch.empty_like(v), tuple(torch.empty_like(w) for w in weights)
        kept = None
        if any(ctx.needs_input_grad):
            kept = v.new_empty(-(-plan.tiles // plan.group) * sum(w.numel() for w in weights))
        tensors = {
            **streams,
            "w": weights[:depth],
            "s": weights[depth:],
            "y": y,
            "w_end": ends[:depth],
            "s_end": ends[depth:],
            "kept": kept,
            "broken": plan.broken,
        }
        plan.call(weights[:depth], False, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*given, kept)  # as given: a second derivative goes through them
        return y, *ends

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, *of_ends: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        *given, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Their own names: where one of them was made from another, the way through it is not to be counted here.
            given = [x.view_as(x) if x is not None and x.requires_grad else x for x in given]
            pairs = [p for p in zip(_again(plan, *given), (of_y, *of_ends), strict=True) if p[0].requires_grad]
            outputs, grads_of = zip(*pairs, strict=True)
            wanted = [x for x in given if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, grads_of, create_graph=True, allow_unused=True))
            return None, *(next(found) if x is not None and x.requires_grad else None for x in given)
        whole = _whole(given)
        depth = plan.cell.network.depth
        streams = dict(zip(STREAMS, whole, strict=False))
        grads = {f"of_{name}": None if x is None else torch.zeros_like(x) for name, x in streams.items()}
        ends = tuple(g.clone(memory_format=torch.contiguous_format) for g in of_ends)
        tensors = {
            **streams,
            "kept": kept,
            **grads,
            "of_y": of_y.contiguous(),
            "of_w": ends[:depth],
            "of_s": ends[depth:],
        }
        plan.call(ends[:depth], True, tensors)
        return None, *grads.values(), *ends


def _whole(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As the C code reads them."""
    return [None if x is None else x.resolve_neg().contiguous() for x in given]


def _again(plan: _Plan, *whole: Tensor | None) -> tuple[Tensor, ...]:
    """The same from the same inputs by the framework's operations, to be differentiated more than once."""
    from nestling.memory import chunked
    from nestling.memory.coefficients import Coefficients

    cell, count, depth = plan.cell, plan.tiles, plan.cell.network.depth
    q, k, v, keep, carry, write, keep_s, write_s, step, erase = whole[: len(STREAMS)]
    given = tuple(w for w in whole[len(STREAMS) :] if w is not None)
    weights, momentum = given[:depth], given[depth:]
    lead = weights[0].dim() - 2

    def tiles(x: Tensor | None, own: int) -> Sequence[Any]:
        """Tile by tile: x with its tiles behind the leading dimensions."""
        return (
            (None,) * count if x is None else x.reshape(*x.shape[:lead], count, *x.shape[x.dim() - own :]).unbind(lead)
        )

    def stretch(x: Tensor | None) -> Sequence[Any]:
        return (None,) * count if x is None else x.view(*x.shape[:lead], count, -1, x.shape[-1]).unbind(lead)

    erases = tiles(erase, 1)
    gates = [tiles(x, own) for x, own in ((keep, 1), (carry, 1), (write, 2), (keep_s, 0), (write_s, 1), (step, 1))]
    outputs = []
    for n, (q_n, k_n, v_n) in enumerate(zip(stretch(q), stretch(k), stretch(v), strict=True)):
        keep_n, carry_n, write_n, keep_s_n, write_s_n, step_n = (gate[n] for gate in gates)
        erasing = erases[n] is not None
        c = Coefficients(
            keep_n, carry_n, None if erasing else write_n, write_n if erasing else None, keep_s_n, write_s_n, step_n
        )
        found = chunked.gradients(cell.network, cell.bias, weights, k_n, v_n)
        writes = chunked.solve(found, c, weights, momentum, erases[n], 0, True)
        outputs.append(
            torch.zeros_like(v_n) if q_n is None else chunked.read(cell, c, weights, weights, momentum, writes, q_n)
        )
        weights, momentum = chunked.advance(c, weights, momentum, writes)
    return torch.cat(outputs, -2), *weights, *momentum
