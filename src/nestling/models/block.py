"""A model's block: a sequence layer, then feed-forward levels. And the sizes it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from nestling import memory
from nestling.layers import Continuum, Layer, Level, local
from nestling.layers.carried import reattached
from nestling.layers.continuum import Arrangement
from nestling.layers.descent import Outer, Signal, Used
from nestling.layers.local import LocalState
from nestling.layers.norm import RMSNorm
from nestling.memory import Report
from nestling.optim import inner
from nestling.state import register


@dataclass(frozen=True)
class ModelConfig:
    """What a model was built as. Settings that a model does not have are None, or empty.

    ffn         hidden width of a feed-forward network, solved for so that all models of a size have equally many parameters
    chunk       anchoring period of chunk-wise memories in tokens
    periods     tokens between two updates of each level of the continuum; empty: feed-forward blocks that only the outer loop
                moves
    arrangement of those levels: "sequential", "nested" or "independent"; see `Continuum`
    outer       what the outer loop sees of their updates: "first_order", "full" or a number n, truncated; see `Continuum`
    error       what they learn from: "task", the model's loss, or "local", a loss of each level's own
    rank        of what a lane has learned of each of their matrices; None: kept in full
    rule        how they descend: "gradient", "momentum", "dgd", "adam" or "m3"; see `nestling.optim.inner`
    chunk_others, network, adaptive, dgd, momentum, decay: of the self-modifying memories; see `nestling.models.zoo.hope`
    window      tokens that sliding-window attention sees, the segment of memory as context
    persistent  number of persistent tokens
    locals      chunk of each local memory of TNT;  refined: what the second stage of training makes of them, empty: the same
    shard       tokens after which TNT's local memories start afresh;  global_chunk: period of its global memory
    """

    name: str
    size: str
    dim: int
    layers: int
    heads: int
    vocab_size: int
    ffn: int
    chunk: int | None = None
    periods: tuple[int, ...] = ()
    arrangement: Arrangement = "sequential"
    outer: Outer | None = None
    error: Signal = "task"
    rank: int | None = None
    rule: str = "gradient"
    chunk_others: int | None = None
    network: Literal["mlp", "matrix"] | None = None
    adaptive: tuple[str, ...] = ()
    dgd: bool | None = None
    momentum: bool | None = None
    decay: bool | None = None
    window: int | None = None
    persistent: int | None = None
    locals: tuple[int, ...] = ()
    refined: tuple[int, ...] = ()
    shard: int | None = None
    global_chunk: int | None = None

    def memory(self, system: str, **choices: Any) -> Any:
        """A named memory, one for each head: `nl.memory.named` at this size."""
        if self.dim % self.heads:
            raise ValueError(
                f"{self.name}: dim is {self.dim}, which cannot be split into heads {self.heads}; expected a dim that is a "
                "multiple of heads, as every head has a memory of its own"
            )
        chunk = {} if self.chunk is None else {"chunk": self.chunk}
        return memory.named(system, key_dim=self.dim // self.heads, **chunk, **choices)


@register
class BlockState(NamedTuple):
    """Of a block whose feed-forward levels learn by losses of their own. Other blocks' state is the mixer's."""

    mixer: Any
    ffn: LocalState


class Block(nn.Module):
    """x + mixer(RMSNorm(x)), then a chain of feed-forward levels; with one that no token moves, a transformer's block.

    Args:
        config: gives the widths, and the settings of the levels.
        mixer: the sequence layer.
        periods: of the feed-forward levels; see `Continuum`. None: one that no token moves.
    """

    def __init__(self, config: ModelConfig, mixer: Layer, periods: Sequence[int | None] = (None,)) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=1e-6)
        self.mixer = mixer
        self.ffn = Continuum(
            config.dim,
            config.ffn,
            periods or (None,),
            arrangement=config.arrangement,
            outer=config.outer,
            error=config.error,
            rank=config.rank,
            rule=inner.named(config.rule),
        )

    def start(self, lanes: int) -> Any:
        """State of lanes that have read nothing, without what the model's own loss moves."""
        mixer = self.mixer.start(lanes)
        return BlockState(mixer, local.start(self.ffn, lanes)) if self.ffn.alone else mixer

    def forward(
        self, x: Tensor, state: Any, delta: Used | None = None, *, report: Report | None = None, **masks: Any
    ) -> tuple[Tensor, Any]:
        """As a layer's; delta: what the lanes' own learning adds to the feed-forward weights."""
        mixer = state.mixer if self.ffn.alone else state
        y, mixer = self.mixer(
            self.mixer_norm(x), mixer, report=None if report is None else report.scope("mixer"), **masks
        )
        if not self.ffn.alone:
            return self.ffn(x + y, delta), mixer
        scope = None if report is None else report.scope("continuum")
        x, ffn = local.read(self.ffn, x + y, state.ffn, report=scope, **masks)
        return x, BlockState(mixer, ffn)

    def reattached(self, state: Any) -> Any:
        """The state of feed-forward levels that learn by losses of their own as a function of their step sizes again."""
        if not self.ffn.alone or not isinstance(state, BlockState):  # another's state the forward refuses
            return state
        local.check(self.ffn, state.ffn)
        learned = reattached(self.ffn, state.ffn.continuum)
        return state._replace(ffn=state.ffn._replace(continuum=learned))

    def levels(self) -> list[Level]:
        """Those whose state the block carries itself."""
        if not self.ffn.alone:
            return [level.under("mixer", "") for level in self.mixer.levels()]
        return [
            *(level.under("mixer") for level in self.mixer.levels()),
            *(level.under("ffn") for level in self.ffn.levels()),
        ]
