"""The language model: embedding, blocks, norm, head. One forward for training, evaluation, generation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nestling import state as fast
from nestling.layers import Continuum, ContinuumState, Layer, Level, Period
from nestling.layers.carried import reattached
from nestling.layers.descent import Used
from nestling.layers.norm import RMSNorm
from nestling.layers.stream import Kept, kept_around
from nestling.memory import Report
from nestling.memory.report import check_report
from nestling.models import windows
from nestling.models.block import Block, ModelConfig
from nestling.models.windows import Open
from nestling.state import register


@register
class ModelState(NamedTuple):
    """What a model carries from call to call, per lane.

    blocks     the state of each block's sequence layer
    position   tokens since the lane's start or last reset, int64 `[lane]`, on the CPU
    continuum  fast weights of the feed-forward levels that learn from tokens, one entry per block that has such
    open       the window whose losses are not yet differentiated; None where nothing learns from the model's loss
    refused    tokens left out by the model as a whole, see `LanguageModel.forward`, int64 `[lane]`; None: from a file that was
               written before they were counted
    """

    blocks: tuple[Any, ...]
    position: Tensor
    continuum: tuple[ContinuumState, ...] = ()
    open: Open | None = None
    refused: Tensor | None = None


class LanguageModel(nn.Module):
    """`logits, state = model(tokens, state)`; contract C1.

    Args:
        config: sizes.
        blocks: what the hidden states pass through, in order.

    Weights start at a standard deviation of 0.02, those that write to the residual stream at 0.02/√(2 · layers).
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(blocks)
        self.learning = [n for n, block in enumerate(blocks) if block.ffn.window is not None and not block.ffn.alone]
        """Blocks with levels that learn from the model's loss."""
        self.window = min((w for n in self.learning if (w := self.continuum(n).window)), default=None)
        """Tokens between two gradients of the model's loss; None where no level learns from it."""
        self.twice = any(self.continuum(n).outer != "first_order" for n in self.learning)
        """Whether the outer loop differentiates the gradients of a window in turn."""
        self.norm = RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(weight, std=0.02 * (2 * config.layers) ** -0.5)
            elif name.endswith(("qkv.weight", "gate.weight", "up.weight", "embedding.weight", "head.weight")):
                nn.init.normal_(weight, std=0.02)

    @property
    def growth(self) -> Literal["constant", "linear"]:
        """Whether the state grows with the tokens read (C5)."""
        return "linear" if any(layer.growth == "linear" for layer in self.mixers()) else "constant"

    def mixers(self) -> list[Layer]:
        """The blocks' sequence layers."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def each(self) -> list[Block]:
        """The blocks, in order."""
        return list(self.blocks)  # type: ignore[arg-type]

    def continuum(self, number: int) -> Continuum:
        """The feed-forward levels of a block."""
        return self.blocks[number].ffn  # type: ignore[return-value]

    def start(self, lanes: int) -> ModelState:
        """State of lanes that have read nothing; gradients reach initial memory states through it."""
        blocks = tuple(block.start(lanes) for block in self.each())
        none = torch.zeros(lanes, dtype=torch.int64)
        device = self.embedding.weight.device
        state = ModelState(blocks, none, refused=none.to(device))
        if self.window is None:
            return state
        tokens = torch.zeros(lanes, self.window, dtype=torch.int64, device=device)
        return state._replace(
            continuum=tuple(c for n in self.learning if (c := self.continuum(n).start(lanes)) is not None),
            open=Open(tokens, blocks if self.twice else fast.detach(blocks)),
        )

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Read tokens with every memory running.

        tokens   int64 `[lane, time]`
        state    what an earlier call returned; None: fresh lanes
        reset    bool `[lane, time]`: the lane starts afresh before this token (ignored at an invalid one)
        valid    bool `[lane, time]`: a token that is not valid changes nothing; its logits mean nothing
        report   collects what the memories notice, under "blocks.N.mixer" and "blocks.N.continuum", and under "embedding" tokens
                 that are refused

        Returns logits `[lane, time, vocab]` and the new state.

        A token whose embedding is not finite, or not its square, is refused: all is as if it were not valid, gradients too, and
        its logits are NaN; `state.refused` counts it. One that stops being finite further in cannot be missing: the layers below
        have read it by then, and it has its place in its window. The layers behind leave it out; levels that learn from the
        model's loss refuse the gradient of that window, which is one write of theirs, where it is not finite, and count a fault.
        """
        self._check(tokens, state, reset, valid)
        check_report(report)
        state = self.start(tokens.shape[0]) if state is None else state
        if torch.is_grad_enabled() and any(leaf.is_inference() for leaf in fast.leaves(state)):
            state = fast.tree_map(lambda x: x.clone() if x.is_inference() else x, state)
        if tokens.shape[1] == 0:
            return self.head(self.norm(self.embedding(tokens))), state
        if state.refused is None:
            state = state._replace(refused=torch.zeros_like(state.position).to(tokens.device))
        refused = state.refused
        own = kept_around(self.embedding(tokens), reset, valid)
        reset, valid = own.reset, own.valid
        if self.window is None:
            logits, blocks = self._through(own.rows[0], state.blocks, reset=reset, valid=valid, report=report)
            state = ModelState(blocks, _advance(state.position, reset, valid, tokens.shape[1]))
        else:
            logits, state = windows.read(self, _filled(tokens, own), state, reset, valid, report)
        if report is not None and own.lost is not None:
            report.scope("embedding").count(faults=own.lost.sum(1))
        return own.answered(logits), own.ended(state._replace(refused=refused), self.start, "refused")

    def reattached(self, state: ModelState) -> ModelState:
        """A state that was cut from its history, equal to the bit, through which gradients reach the step sizes of the levels
        that made it: see `nestling.layers.carried`. For the call that reads on, after the step sizes themselves have moved;
        `Learner` carries its states so from step to step."""
        self._check_state(state, len(state.position))
        learned = zip(self.learning, state.continuum, strict=True)
        continuum = tuple(reattached(self.continuum(number), own) for number, own in learned)
        blocks = tuple(block.reattached(own) for block, own in zip(self.each(), state.blocks, strict=True))
        return state._replace(blocks=blocks, continuum=continuum)

    @property
    def still(self) -> int:
        """How many of the first blocks do not read what the model's own loss moves: all before the first that learns from it."""
        return min(self.learning, default=len(self.blocks))

    def below(self, tokens: Tensor, blocks: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """What `read` hands to the first block that learns, and the states of those before it."""
        x, after = self.embedding(tokens), []
        for block, inner in zip(self.each()[: self.still], blocks, strict=False):
            x, inner = block(x, inner)
            after.append(inner)
        return x, tuple(after)

    def read(
        self,
        tokens: Tensor,
        blocks: Sequence[Any],
        deltas: Sequence[Used] | None = None,
        hidden: Tensor | None = None,
        **masks: Any,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Logits and the sequence layers' new states, the feed-forward weights standing still.

        deltas: what the lanes' own learning adds to the weights, or these with it, one entry per block in `learning`; None:
        nothing. hidden: what `below` has made of the tokens; the states of these blocks are handed on.
        """
        if hidden is None:
            return self._through(self.embedding(tokens), blocks, deltas, **masks)
        return self._through(hidden, blocks, deltas, first=self.still, **masks)

    def _through(
        self,
        x: Tensor,
        blocks: Sequence[Any],
        deltas: Sequence[Used] | None = None,
        *,
        first: int = 0,
        report: Report | None = None,
        **masks: Any,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """`read`, of embeddings x `[lane, time, dim]`, or what the block `first` is given."""
        moved = {} if deltas is None else dict(zip(self.learning, deltas, strict=True))
        after = list(blocks[:first])
        for number, (block, inner) in enumerate(zip(self.blocks, blocks, strict=True)):
            if number < first:
                continue
            scope = None if report is None else report.scope(f"blocks.{number}")
            x, inner = block(x, inner, moved.get(number), report=scope, **masks)
            after.append(inner)
        return self.head(self.norm(x)), tuple(after)

    def levels(self) -> list[Level]:
        """Every level, fast to slow. The slow weights of all layers are moved together, and are one; its own are those that make
        no other level."""
        found = [
            level.under(f"blocks.{number}") for number, block in enumerate(self.each()) for level in block.levels()
        ]
        learned = [
            level.under(f"blocks.{number}.ffn", f"continuum.{place}")
            for place, number in enumerate(self.learning)
            for level in self.continuum(number).levels()
        ]
        if learned:  # what the losses of a window need belongs to the level that learns with every window
            first = min(range(len(learned)), key=lambda n: learned[n].period.n)
            learned[first] = replace(learned[first], state_paths=(*learned[first].state_paths, "open"))
        names = [name for name, _ in self.named_parameters()]
        taken = {name for level in (*found, *learned) for name in level.params}
        slow = Level(
            "slow weights",
            Period(1, "step"),
            "all projections, norms and initial states",
            "next-token cross entropy",
            "weight decay",
            "the outer optimizer",
            "training text",
            "none",
            params=tuple(name for name in names if name not in taken),
            moves=tuple(names),
            state_paths=("position", "refused"),
        )
        return sorted([*found, *learned, slow], key=lambda level: level.period.key())

    def _check(self, tokens: Tensor, state: ModelState | None, reset: Tensor | None, valid: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected int64 [lane, time]")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens lie between {low} and {high}; expected 0 to {self.config.vocab_size - 1}: "
                    "the text was encoded with another tokenizer"
                )
        for name, mask in (("reset", reset), ("valid", valid)):
            if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
                raise ValueError(
                    f"{name} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(tokens.shape)}"
                )
        if state is not None:
            self._check_state(state, tokens.shape[0])

    def _check_state(self, state: ModelState, lanes: int) -> None:
        if len(state.blocks) != len(self.blocks) or len(state.position) != lanes:
            raise ValueError(
                f"the state has {len(state.blocks)} blocks and {len(state.position)} lanes; expected {len(self.blocks)} "
                f"blocks and {lanes} lanes: it was made by another model or for another batch"
            )
        if state.open is not None or self.learning:
            self._check_learned(state)

    def _check_learned(self, state: ModelState) -> None:
        window = None if state.open is None else state.open.tokens.shape[1]
        if window != self.window or len(state.continuum) != len(self.learning):
            raise ValueError(
                f"the state is of a model with {len(state.continuum)} learning blocks and a window of {window} tokens; expected "
                f"{len(self.learning)} and {self.window}: it was made by a model with other periods"
            )
        for number, found in zip(self.learning, state.continuum, strict=True):
            own = self.continuum(number)
            came, fits = own.shapes(found), own.shapes()
            if came != fits:
                raise ValueError(
                    f"the state of block {number}'s continuum has weights {came}; expected {fits}: it was made by a model with "
                    "other periods, widths or another inner rule"
                )


def _filled(tokens: Tensor, own: Kept) -> Tensor:
    """The tokens, another that is read in the places of those that are left out: what stands there is multiplied by 0."""
    if own.lost is None or own.valid is None or not bool(own.valid.any()):
        return tokens
    return torch.where(own.valid, tokens, tokens[own.valid][0])


def _advance(position: Tensor, reset: Tensor | None, valid: Tensor | None, time: int) -> Tensor:
    if reset is None and valid is None:
        return position + time
    from nestling.layers.stream import advance_position, places

    mask = reset if reset is not None else valid
    assert mask is not None
    return advance_position(position, places(reset, valid, mask.shape[0], time, mask.device))
