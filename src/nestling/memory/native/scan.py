"""A memory's scan by the C code: when it serves, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from nestling.memory.biases import L2, Bias, DotProduct, Huber, Lp, Omega, huber, smooth
from nestling.memory.features import Features, Identity, Polynomial
from nestling.memory.gates import Factor
from nestling.memory.inputs import Inputs
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Ends, Lanes, Stand, stand, states
from nestling.memory.native.runs import Runs, runs
from nestling.memory.networks import MLP, GatedMLP, Matrix
from nestling.memory.networks.base import Network
from nestling.memory.networks.layer_norm import EPS
from nestling.memory.newton_schulz import EPS as NO_DIRECTION
from nestling.memory.newton_schulz import coefficients_of
from nestling.memory.retentions import Decay, Full, Lq, Retention, Softmax
from nestling.memory.rules import DeltaGradient, Gradient, Implicit, Momentum, Muon, Rule
from nestling.memory.state import MemoryState, Tail
from nestling.native import DEFINES, HEADERS, SCAN, library, threads, without

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

LINKED, DIRECTED = HEADERS / "linked.c", HEADERS / "directed.c"
STEPS = (Gradient, Momentum, DeltaGradient, Implicit, Muon)
MADE = 6  # numbers that are made of a tile for each of its tokens and each of the first layer's outputs
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
    """The choices that the C code depends on."""

    name: str
    network: Network
    bias: Bias
    retention: Retention
    rule: Rule
    read: Literal["after", "before", "boundary"]

    @staticmethod
    def of(spec: Choices, network: Network) -> Cell:
        return Cell(spec.name, network, spec.bias, spec.retention, spec.rule, spec.read)

    def fields(self, shapes: Sequence[tuple[int, int]]) -> fields.Cell:
        """As the C code reads it; shapes: (in, out) of each layer."""
        network = fields.Network(depth=len(shapes), epsilon=EPS)
        network.width[: len(shapes) + 1] = [*(shape[0] for shape in shapes), shapes[-1][1]]
        if isinstance(self.network, GatedMLP):
            network.gated, network.width[1] = True, shapes[0][1]
        if isinstance(self.network, MLP | GatedMLP):
            network.activation = ACTIVATIONS[self.network.activation]
            network.residual, network.norm = self.network.residual, self.network.norm
        return fields.Cell(
            network=network,
            bias=_bias(self.bias),
            before=self.read == "before",
            boundary=self.read == "boundary",
            momentum=self.rule.momentum,
            erases=self.rule.erase != "none",
            window=self.bias.window,
        )


def serves(cell: Cell, x: Tensor) -> bool:
    """Whether there is C code for these choices and for such tensors, on this machine."""
    return _known(cell) and runs_here(_source(cell), x)


def makes(cell: Cell, features: Features) -> bool:
    """Whether the C code for these choices makes such features by itself, from keys and queries."""
    return type(features) is Identity or (type(features) is Polynomial and _known(cell) and _source(cell) != LINKED)


def runs_here(source: Path, x: Tensor) -> bool:
    """Whether this C code can be had for such tensors, on this machine."""
    plain = not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype in DEFINES
    return plain and library(source, x.dtype) is not None


def _source(cell: Cell) -> Path:
    if type(cell.rule) is Muon:
        return DIRECTED
    return LINKED if type(cell.retention) is Softmax else SCAN


@lru_cache
def _known(cell: Cell) -> bool:
    network, retention, rule = cell.network, cell.retention, cell.rule
    return (
        type(network) in ((MLP, Matrix, GatedMLP) if type(rule) is Muon else (MLP, Matrix))
        and network.depth <= fields.DEPTH
        and _bias(cell.bias) is not None
        and (link := _link(retention)) is not None
        and type(rule) in (STEPS if link.kind == 0 else (Gradient,))
        and not (isinstance(rule, Muon) and rule.per_token)
        and not (rule.erase != "none" and (rule.momentum or cell.bias.window > 1))
        and not (link.kind and cell.bias.window > 1)
        and (cell.read != "boundary" or (link.kind == 0 and type(rule) is not Muon))
    )


def _bias(bias: Bias) -> fields.Bias | None:
    """As the C code reads it; None: it has no code for it."""
    bias = bias.inner if isinstance(bias, Omega) else bias
    if type(bias) in (L2, DotProduct):
        return fields.Bias(fields.BIASES.index("l2" if type(bias) is L2 else "dot"))
    if type(bias) is Lp and bias.slope is not None:
        cap = inf if bias.cap is None else bias.cap
        return fields.Bias(fields.BIASES.index("lp"), bias.p, bias.slope, smooth.EPS, cap)
    if type(bias) is Huber:
        return fields.Bias(fields.BIASES.index(f"huber_{bias.form}"), epsilon=huber.EPS)
    return None


def _link(retention: Retention) -> fields.Link | None:
    """As the C code reads it; None: it has no code for it."""
    if type(retention) is Full or retention == Decay():
        return fields.Link(fields.LINKS.index("identity"))
    if type(retention) is Softmax:
        return fields.Link(fields.LINKS.index("softmax"))
    if type(retention) is Lq:
        return fields.Link(fields.LINKS.index("lq"), retention.q, retention.floor)
    return None


def orderly(*gates: Factor | None) -> bool:
    """Whether these gates have a logarithm everywhere."""
    return not any(gate is not None and gate.zero is not None and bool(gate.zero.any()) for gate in gates)


class Scan(Lanes):
    """One scan of a memory. Streams: q, k, v, η, log α, log μ, ε and the window's weights, `[lane, head, time, …]` or None; k and
    v with the tokens of the window before them.

    features   to be made of q and k. k then comes without those tokens, and the streams go on with their features, or None, and
               the map's own parameters, `[head, …]`
    """

    names = fields.STREAMS

    def __init__(self, cell: Cell, features: Features | None, cut: Runs, fine: Tensor | None, again: Again) -> None:
        super().__init__(cell.name, cut, fine, again)
        self.cell, self.source, self.features = cell, _source(cell), features
        self.entry = f"nestling_{self.source.stem}"

    def structure(self, streams: Given, stand: Stand) -> fields.Scan:
        q, _, v = streams[:3]
        assert q is not None
        assert v is not None
        c = fields.Scan()
        if isinstance(rule := self.cell.rule, Muon):
            iteration = fields.Iteration(rule.steps, *coefficients_of(rule.iteration), NO_DIRECTION)
            c = fields.Directed(iteration=iteration, acts=fields.CLOSES << (rule.stride is not None))
        c.cell = self.cell.fields([(w.shape[-2], w.shape[-1]) for w in stand.weights])
        c.link = _link(self.cell.retention)
        c.time, c.tail = q.shape[2], v.shape[2] - q.shape[2]
        if isinstance(self.features, Polynomial):
            projection = streams[-1]
            base = q.shape[3] if projection is None else projection.shape[-1]
            c.features = fields.Features(q.shape[3], base, self.features.degree)
        return c

    def group(self, stand: Stand) -> int:
        """Where Newton–Schulz acts, memories are large: what is kept of all of them, and what is made again of the one that a
        thread has in hand, take least room together where groups are longer by the root of the memories. Tiles that only write
        are quick in groups of any length, so that both may take equal room."""
        tiles, memories = self.cut.table.shape[1], stand.weights[0][..., 0, 0].numel()
        if self.cell.read == "boundary":
            kept = self.keeps(stand)
            made = MADE * self.cut.longest * stand.weights[0].shape[-1] + kept // memories  # and what stands before it
            return max(1, min(tiles, isqrt(tiles * kept // made)))
        if self.source != DIRECTED:
            return super().group(stand)
        return -(-tiles // max(1, isqrt(tiles * threads(memories) // memories)))

    def stores(self, structure: fields.Scan) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        shared = name in ("logs", "projection")  # by the lanes: one of each, to be summed
        return torch.zeros(lanes, *x.shape, dtype=x.dtype) if shared else torch.zeros_like(x)


def scan(
    spec: MemorySpec, x: Inputs, cut: Layout, slow: Callable[[MemorySpec, Inputs], tuple[Tensor, MemoryState]]
) -> Ends | None:
    """A call by the C code; None where that does not serve, or a guard would have to step in.

    slow   the same call by the framework's operations
    """
    cell, tail = Cell.of(spec, spec.network), x.state.tail
    if not (serves(cell, x.q) and orderly(x.retention, x.momentum)):
        return None
    # From the first that is there on; a token behind it that was refused has its place, and is told by `fine`.
    there = None if tail is None else tail.ok.cumsum(1) > 0
    found = runs(cut, x.q.shape[2], there)
    if found is None:
        return None
    if not makes(cell, spec.features):
        x = x.featured()
    keys, values, past = x.k, x.v, None
    if tail is not None:
        values = torch.cat([tail.value, values], 2)
        if x.features is None:
            keys = torch.cat([tail.key, keys], 2)
        else:
            past = tail.key

    def again(streams: Given, at: Stand) -> Ends:
        q, k, v, lr, retention, mu, erase, window, features, *own = streams
        assert q is not None
        assert k is not None
        assert v is not None
        assert lr is not None
        before = v.shape[2] - q.shape[2]
        start, state = states(x.state, x.start, at)
        if x.features is None:
            features, k = k[:, :, :before], k[:, :, before:]
        past = None if tail is None or features is None else Tail(features, v[:, :, :before], tail.ok)
        given = x._replace(
            start=start,
            state=state._replace(tail=past),
            q=q,
            k=k,
            v=v[:, :, before:],
            own=tuple(w for w in own if w is not None),
            lr=lr,
            retention=None if retention is None else Factor(retention),
            momentum=None if mu is None else Factor(mu),
            erase=erase,
            window=window,
        )
        with without():
            return Ends.of(slow(spec, given))

    fine, lr, erase = None, x.lr, x.erase
    whole = tail is None or there is None or torch.equal(there, tail.ok)
    if not (whole and bool(x.fine.all())):
        fine, acts = x.fine.contiguous() if tail is None else torch.cat([tail.ok, x.fine], 1), x.fine[:, None]
        lr = torch.where(acts, lr, 0.0)
        erase = None if erase is None else torch.where(acts, erase, 0.0)
    retention, momentum = (None if gate is None else gate.log for gate in (x.retention, x.momentum))
    own: Sequence[Tensor | None] = (*x.own, None, None)[:2]
    streams = x.q, keys, values, lr, retention, momentum, erase, x.window, past, *own
    return Scan(cell, x.features, found, fine, again).scan(streams, stand(x.state, x.start, found))
