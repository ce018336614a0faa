"""Reading with levels that learn from the language-model loss (Nested Learning, eq. 71; the task loss as error).

A lane's stream is cut into windows, the fastest such period, counted from its position 0. When a window's last token has been
read, the losses of the targets inside the window are differentiated once, with respect to the weights of every level in every
block, the state at the window's start being a constant, and the levels do what they do with it (`Continuum.learn`).

So that a split inside a window changes nothing, the state holds `Open`: the window's tokens so far and the state of all
sequence layers at its start. A window read in one piece is differentiated on the forward's own graph; one that was split is read
again from `Open`, which is the definition of the other. This is the one place where autograd works inside a forward, so it does
so whatever mode the caller is in.

Blocks before the first that learns are moved by no window, and no window's gradient reaches them: where lanes stand alike, all
whole windows of a call go through them at once.

Where a level's `outer` wants the gradients to be differentiated in turn, they are taken with a graph of their own, in every mode,
as some backward formulas differ in rounding; `Open` keeps its history then, so that a split changes no gradient either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling import state as fast
from nestling.layers.descent import Used, dense, learn, note
from nestling.layers.low_rank import Whole
from nestling.layers.pieces import Piece, merge, pieces, place, write
from nestling.layers.stretch import stretch
from nestling.layers.stride import Gradients, Window
from nestling.memory import Report
from nestling.models.served import Served, enter, leave, used
from nestling.state import register

if TYPE_CHECKING:
    from nestling.models.lm import LanguageModel, ModelState


AHEAD = 2048
"""Tokens that the blocks before the first that learns read at once, at most, so that without a graph memory does not grow with
the call."""


@register
class Open(NamedTuple):
    """The window that a lane is in.

    tokens  `[lane, window]` int64, zeros behind those read so far (how many, the position says)
    blocks  the sequence layers' states at the window's start, without history where the outer gradient is of first order
    """

    tokens: Tensor
    blocks: tuple[Any, ...]


def read(
    model: LanguageModel,
    tokens: Tensor,
    state: ModelState,
    reset: Tensor | None,
    valid: Tensor | None,
    report: Report | None,
) -> tuple[Tensor, ModelState]:
    """`LanguageModel.forward` piece by piece."""
    time = tokens.shape[1]
    cut = list(pieces(state.position, time, reset, valid, model.window or time))
    outputs, notes, served = [], [], Served()
    with stretch(time if len(cut) > 1 and not model.twice else None) as kept:
        state = enter(model, state)
        alone = report is None and reset is None and valid is None and not model.twice
        ahead = _whole_windows(model, state, cut) if alone else range(0)
        hidden: dict[int, Tensor] = {}
        for number, piece in enumerate(cut):
            if number in ahead and number not in hidden:
                hidden, state = _read_ahead(model, tokens, state, cut, range(number, ahead.stop))
            note = None if report is None else Report()
            own = tokens.gather(1, piece.at.to(tokens.device))
            logits, state = _piece(model, own, state, piece, served, note, hidden.pop(number, None))
            outputs.append(logits)
            notes.append(note)
        state = leave(model, state)
        state = state if kept is None else kept.published(state)
    if not cut:  # no valid token at all
        return model.embedding.weight.new_zeros(*tokens.shape, model.config.vocab_size), state
    if state.open is not None and not model.twice:  # once: what the call itself needs of it may have a history
        state = state._replace(open=state.open._replace(blocks=fast.detach(state.open.blocks)))
    whole = all(piece.mask is None for piece in cut) and reset is None and valid is None
    if report is not None:
        merge(report, [note for note in notes if note is not None], cut, time)
    if whole:
        return torch.cat(outputs, 1), state
    return place(outputs, cut, (tokens.shape[0], time), 1), state


def _whole_windows(model: LanguageModel, state: ModelState, cut: Sequence[Piece]) -> range:
    """Pieces that are whole windows of all lanes, one behind the other; without masks, and nothing starts afresh."""
    if not model.still or not bool((state.position == state.position[0]).all()):
        return range(0)
    whole = [
        number for number, piece in enumerate(cut) if piece.at.shape[1] == model.window and bool(piece.closing.all())
    ]
    return range(whole[0], whole[-1] + 1) if whole else range(0)


def _read_ahead(
    model: LanguageModel, tokens: Tensor, state: ModelState, cut: Sequence[Piece], ahead: range
) -> tuple[dict[int, Tensor], ModelState]:
    """What the blocks before the first that learns hand to it in some of these windows, and the state with theirs after them.

    No level's move reaches these blocks, nor does any window's gradient: they read all windows at once, which is one long product
    where each window by itself would have a short one.
    """
    assert model.window is not None
    ahead = ahead[: max(1, AHEAD // model.window)]
    first = int(cut[ahead.start].at[0, 0])
    with stretch(None):  # this is no short call
        hidden, below = model.below(tokens[:, first : first + len(ahead) * model.window], state.blocks)
    parts = dict(zip(ahead, torch.split(hidden, model.window, 1), strict=True))
    return parts, state._replace(blocks=(*below, *state.blocks[model.still :]))


def _piece(
    model: LanguageModel,
    tokens: Tensor,
    state: ModelState,
    piece: Piece,
    served: Served,
    report: Report | None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, ModelState]:
    """Read one piece, and learn where a window ends with it. tokens `[lane, n]`; served: for all pieces of the call; hidden: of
    `_read_ahead`."""
    assert model.window is not None
    if piece.fresh is not None:
        state = fast.where(piece.fresh, model.start(len(tokens)), leave(model, state), keep=("faults",))
        state = enter(model, state)
    assert state.open is not None
    begins = state.position % model.window == 0
    whole, again = piece.closing & begins, piece.closing & ~begins
    valid = None if piece.mask is None else piece.mask.to(tokens.device)
    gradients: list[Gradients] | None = None
    outer = torch.is_grad_enabled() and _asks(model, state)
    if bool(whole.any()):
        with _differentiating() as copied:
            blocks, delta, own = copied(state.blocks), copied(_dense(state)), copied(tokens)
            below = None if hidden is None else copied(hidden)
            leaves = _leaves(served.at(model, delta), blocks if below is None else (*blocks, below))
            with _watching(model) as seen:
                logits, blocks = _logits(model, own, blocks, _whole(leaves), below, valid=copied(valid), report=report)
            gradients = _said(model, _gradients(model, logits, own, leaves, whole, keep=outer), seen, keep=outer)
        if not outer:
            logits, blocks = logits.detach(), fast.detach(blocks)
    else:
        logits, blocks = _logits(model, tokens, state.blocks, used(model, state, served), valid=valid, report=report)

    heard = write(state.open.tokens, tokens, state.position % model.window, piece)
    if bool(again.any()):
        gradients = _read_again(model, heard, state, again, gradients, keep=outer and model.twice)
    position = state.position + piece.length
    continuum = state.continuum
    if gradients is not None:
        owns = [model.continuum(number) for number in model.learning]
        continuum = tuple(learn(owns, continuum, gradients, Window(model.window - 1, piece.closing, position)))
    if report is not None:
        for number, old, new in zip(model.learning, state.continuum, continuum, strict=True):
            note(report.scope(f"blocks.{number}.continuum"), old, new, piece)
    heard = torch.where(piece.closing.to(heard.device)[:, None], 0, heard)
    opened = _choose(piece.closing, blocks, state.open.blocks)
    return logits, state._replace(blocks=blocks, position=position, continuum=continuum, open=Open(heard, opened))


def _read_again(
    model: LanguageModel,
    tokens: Tensor,
    state: ModelState,
    again: Tensor,
    gradients: list[Gradients] | None,
    *,
    keep: bool,
) -> list[Gradients]:
    """Gradients of the windows that were split: read them whole from where they started, in one batch. keep: with history."""
    assert state.open is not None
    lanes = again.nonzero()[:, 0]
    since, delta = (tree if keep else fast.detach(tree) for tree in (state.open.blocks, tuple(_dense(state))))
    with _differentiating() as copied:
        text = copied(tokens)[lanes.to(tokens.device)]
        blocks = fast.take(copied(since), lanes)
        leaves = _leaves(Served().at(model, [fast.take(copied(d), lanes) for d in delta]), blocks)
        with _watching(model) as seen, stretch(None):
            logits, _ = _logits(model, text, blocks, _whole(leaves))
        found = _gradients(model, logits, text, leaves, torch.ones(len(lanes), dtype=torch.bool), keep=keep)
        found = _said(model, found, seen, keep=keep)
    if bool(again.all()):
        return found
    if gradients is None:
        gradients = [fast.tree_map(lambda g: g.new_zeros(len(tokens), *g.shape[1:]), d) for d in found]
    at = lanes.to(tokens.device)
    return [
        fast.tree_map(lambda a, b: a.index_copy(0, at, b), mine, more)
        for mine, more in zip(gradients, found, strict=True)
    ]


def _logits(model: LanguageModel, *arguments: Any, **options: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """`LanguageModel.read`; what is to be differentiated twice, by attention's formula, which can be."""
    with sdpa_kernel(SDPBackend.MATH) if model.twice else nullcontext():
        return model.read(*arguments, **options)


def _gradients(
    model: LanguageModel, logits: Tensor, tokens: Tensor, leaves: Sequence[Gradients], lanes: Tensor, *, keep: bool
) -> list[Gradients]:
    """∂(Σ_t L_t)/∂θ = ∂(Σ_t L_t)/∂Δ per lane, over the targets inside the window; zeros in lanes that are not asked for.

    keep: the forward's graph is needed later; with it stays that of the gradients, where they are to be differentiated.
    """
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = tokens[:, 1:].long()
    if not bool(lanes.all()):
        targets = targets.masked_fill(~lanes.to(targets.device)[:, None], -100)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    flat = fast.leaves(tuple(leaves))
    with torch.autocast(logits.device.type, enabled=False):  # the backward's products are of the forward's own dtypes
        found = torch.autograd.grad(loss, flat, retain_graph=keep, create_graph=model.twice)
    live = keep and model.twice
    given = (g if live or not g.requires_grad else g.detach() for g in found)
    return [tuple(tuple(next(given) for _ in level) for level in own) for own in leaves]


Seen = dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]]
"""Inputs and moved weights of levels, by block and level."""


@contextmanager
def _watching(model: LanguageModel) -> Iterator[Seen]:
    """Note what the levels are given whose rule needs it."""
    seen: Seen = {}
    handles = []
    for number in model.learning:
        own = model.continuum(number)
        for which, (period, level) in enumerate(own.each()):
            if own.rule.erases and period is not None:

                def keep(_: Any, given: Any, __: Any, at: tuple[int, int] = (number, which)) -> None:
                    seen[at] = given

                handles.append(level.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _said(model: LanguageModel, gradients: list[Gradients], seen: Seen, *, keep: bool) -> list[Gradients]:
    """The gradients, and behind those of a level whose rule erases what its weights said to its inputs. keep: with history, where
    any is wanted."""
    if not seen:
        return gradients
    found: list[Gradients] = []
    with torch.set_grad_enabled(keep and model.twice):
        for number, own in zip(model.learning, gradients, strict=True):
            levels = [level for _, level in model.continuum(number).each()]
            found.append(
                tuple(
                    (*g, *level.said(*seen[number, which])) if (number, which) in seen else g
                    for which, (g, level) in enumerate(zip(own, levels, strict=True))
                )
            )
    return found


def _whole(weights: Sequence[Gradients]) -> list[Used]:
    return [tuple(tuple(Whole(w) for w in level) for level in own) for own in weights]


class _Aliases(torch.autograd.Function):
    """Identities; what comes out can be differentiated by, also where nothing behind it asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, asking: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for one in x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(g if asked else None for g, asked in zip(grads, ctx.needs_input_grad[1:], strict=True))


class _Behind(torch.autograd.Function):
    """Nothing, made of everything: what is made of it in turn stands behind all of that in the graph."""

    @staticmethod
    def forward(ctx: Any, *x: Tensor) -> Tensor:
        ctx.count = len(x)
        ctx.set_materialize_grads(False)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, ...]:
        count: int = ctx.count
        return (None,) * count


def _leaves(weights: Sequence[Gradients], since: Sequence[Any]) -> list[Gradients]:
    """Fresh aliases, so that the gradient stops at the window's start: earlier windows used others.

    since: the sequence layers' states at the window's start, and what was read ahead. The aliases stand behind them, as autograd
    looks for tensors that it is asked for through all of the graph that is not before them: through every window read so far,
    otherwise.
    """
    history = [x for x in fast.leaves(tuple(since)) if x.requires_grad]
    asking = _Behind.apply(torch.zeros((), requires_grad=True), *history)  # type: ignore[no-untyped-call]
    aliases = iter(_Aliases.apply(asking, *fast.leaves(tuple(weights))))  # type: ignore[no-untyped-call]
    return [tuple(tuple(next(aliases) for _ in level) for level in own) for own in weights]


@contextmanager
def _differentiating() -> Iterator[Any]:
    """Autograd, whatever the caller's mode. Yields a function that makes tensors usable: those of inference mode are copied."""
    inference = torch.is_inference_mode_enabled()

    def usable(tree: Any) -> Any:
        if not any(x.is_inference() for x in fast.leaves(tree)):
            return tree
        return fast.tree_map(lambda x: x.clone() if x.is_inference() else x, tree)

    if not inference:
        with torch.enable_grad():
            yield usable
    else:
        with torch.inference_mode(False), torch.enable_grad():
            yield usable


def _asks(model: LanguageModel, state: ModelState) -> bool:
    """Whether anybody outside wants a gradient."""
    return any(p.requires_grad for p in model.parameters()) or any(x.requires_grad for x in fast.leaves(state))


def _dense(state: ModelState) -> list[Gradients]:
    return [dense(c.delta) for c in state.continuum]


def _choose(lanes: Tensor, a: Any, b: Any) -> Any:
    """Per lane a or b; no copy where all lanes agree."""
    if bool(lanes.all()):
        return a
    return fast.where(lanes, a, b) if bool(lanes.any()) else b
