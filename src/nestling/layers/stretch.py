"""Attention that goes on in short calls, one behind the other: keys and values lie in one place, written once.

A model whose levels learn reads its tokens window by window (`nestling.models.windows`). Attention by itself joins what it has
read and what is new in every call, keeps the joint for the way back, and adds up gradients as long as the joint there: work and
memory for copies that grow with the square of the length. Inside a `stretch` the keys and values of a layer stand in one `Room`
instead, a state is a view of its rows, and so is the gradient of a state: a window adds to the rows that it has seen, in place.

Where nobody waits for the gradient of earlier tokens, as in a window's own, that of the window's tokens alone is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nestling import state as fast
from nestling.layers.attention_back import attention_back
from nestling.layers.attention_in_c import Read, back_in_c, turn_in_c
from nestling.layers.rotary import angles, turn
from nestling.memory.wanted import wanted

T = TypeVar("T")


class Room:
    """Keys and values of a layer's tokens, `[2, lane, head, capacity, head_dim]`, of which `filled` are there. What has been
    written stays: whoever holds a view of it can rely on that."""

    def __init__(self, key: Tensor, value: Tensor, more: int) -> None:
        lanes, rows, heads, dim = key.shape
        with torch.inference_mode(False), torch.no_grad():
            self.pairs = torch.empty(2, lanes, heads, rows + more, dim, dtype=key.dtype, device=key.device)
            self.filled = 0
            self._sums: tuple[int, Tensor] | None = None
            for own, given in zip(self.extend(rows), (key, value), strict=True):
                own.copy_(given.transpose(1, 2))

    def extend(self, rows: int) -> Tensor:
        """Rows behind those that are filled, to be written."""
        self.filled += rows
        return self.pairs[..., self.filled - rows : self.filled, :]

    def holds(self, key: Tensor, value: Tensor, more: int) -> bool:
        """Whether these are its last rows, and there is room behind them."""
        first = self.filled - key.shape[1]
        if first < 0 or self.filled + more > self.pairs.shape[3]:
            return False
        return all(map(_same, (key, value), self.state(first)))

    def state(self, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values from a row on, as states have them."""
        # .data, as a view in autograd's sense would be out of date as soon as rows are written behind it.
        key, value = self.pairs[..., first : self.filled, :].transpose(2, 3).data
        return key, value

    def sums(self, rows: slice, given: tuple[Tensor | None, ...]) -> Tensor:
        """Where the backward pass that is going on adds up gradients, like `pairs`; given: those of the rows so far."""
        task = _task()
        if self._sums is not None and self._sums[0] == task:
            held = self._sums[1]
            views = held[..., rows, :].transpose(2, 3)
            if all(g is not None and _same(g, own) for g, own in zip(given, views, strict=True)):
                return held
        held = torch.zeros_like(self.pairs[..., : self.filled, :], memory_format=torch.contiguous_format)
        for own, g in zip(held[..., rows, :], given, strict=True):
            if g is not None:
                own.copy_(g.transpose(1, 2))
        self._sums = task, held
        return held

    def release(self) -> None:
        """No gradient of earlier rows is wanted."""
        self._sums = None


class Sight(NamedTuple):
    """What the tokens of a call see and leave.

    visible  earlier tokens that some of them see
    window   how many each sees, its own included; None: all
    kept     rows of the state after the call; None: all
    mask     `[1, 1, time, visible + time]`, 0 or −∞;  None: nothing is visible but the call's own
    cos, sin of the positions' angles, `[lane, 1, time, head_dim / 2]`
    """

    visible: int
    window: int | None
    kept: int | None
    mask: Tensor | None
    cos: Tensor
    sin: Tensor


class Stretch:
    """The calls of all layers between a model's two returns; tokens: how many each layer reads in them."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._rooms: dict[int, Room] = {}
        self._known: dict[str, tuple[Any, Any]] = {}

    def room(self, key: Tensor, value: Tensor, time: int) -> Room:
        """That of a state, or a new one with its rows."""
        found = self._rooms.get(_storage(key))
        if found is None or not found.holds(key, value, time):
            found = Room(key, value, max(time, self.tokens))
            self._rooms[_storage(found.pairs)] = found
        return found

    def sight(self, q: Tensor, visible: int, window: int | None, kept: int | None, at: Tensor, base: float) -> Sight:
        """q `[lane, time, head, head_dim]`, at: position of every lane's first token. What layers have in common is made once."""
        _, time, _, dim = q.shape
        starts = tuple(at.tolist())
        mask = self._once("mask", (visible, time, window, q.dtype), lambda: _mask(visible, time, window, q))
        turned = self._once("angles", (starts, time, dim, base, q.dtype), lambda: _turned(at, time, dim, base, q))
        return Sight(visible, window, kept, mask, *turned)

    def published(self, state: T) -> T:
        """A state without views of a room: what is left when the stretch is over."""

        def own(x: Tensor) -> Tensor:
            viewed = _storage(x) in self._rooms
            return x.clone(memory_format=torch.contiguous_format) if viewed else x

        found: T = fast.tree_map(own, state)
        return found

    def _once(self, name: str, key: Any, make: Any) -> Any:
        if name not in self._known or self._known[name][0] != key:
            self._known[name] = key, make()
        return self._known[name][1]


_current: ContextVar[Stretch | None] = ContextVar("stretch", default=None)


@contextmanager
def stretch(tokens: int | None) -> Iterator[Stretch | None]:
    """Calls inside belong together; tokens: of all of them, per lane; None: they do not.

    What leaves it has to be `published`. The gradient of a state between two of the calls is theirs: it is added to in place.
    """
    own = None if tokens is None else Stretch(tokens)
    token = _current.set(own)
    try:
        yield own
    finally:
        _current.reset(token)


def ongoing() -> bool:
    """Whether this is inside of a stretch."""
    return not torch.compiler.is_compiling() and _current.get() is not None


def attend(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    base: float,
    *,
    visible: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Causal attention of the tokens of a call, lanes side by side, and keys and values as the state has them after it.

    qkv         `[lane, time, 3, head, head_dim]`, not yet turned
    key, value  the state's, `[lane, rows, head, head_dim]`, of which the last `visible` are seen
    position    of every lane's first token, `[lane]`, CPU
    window      tokens that each sees, its own included, at least as many as the call has; the state keeps as many rows as it
                has. None: all; the state keeps all

    Returns y `[lane, time, head, head_dim]`, key, value; None outside of a stretch, and where this cannot be done.
    """
    own, time = _current.get() if ongoing() else None, qkv.shape[1]
    if own is None or not _served(qkv, key, value) or (window is not None and time > window):
        return None
    sight = own.sight(qkv[:, :, 0], visible, window, None if window is None else key.shape[1], position, base)
    room = own.room(key, value, time)
    y, key, value = _Window.apply(qkv, key, value, room, sight)  # type: ignore[no-untyped-call]
    return y.transpose(1, 2), key, value


class _Window(torch.autograd.Function):
    """What a call's tokens answer, and the state after them: rows of the room."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, key: Tensor, value: Tensor, room: Room, sight: Sight) -> tuple[Tensor, ...]:
        time = qkv.shape[1]
        first = room.filled - key.shape[1] if sight.kept is None else room.filled + time - sight.kept
        ctx.came, ctx.own = slice(room.filled - key.shape[1], room.filled), slice(room.filled, room.filled + time)
        ctx.left = slice(first, room.filled + time)
        room.extend(time)
        pairs = room.pairs[..., room.filled - time - sight.visible : room.filled, :]
        q = turn_in_c(qkv, sight.cos, sight.sin, pairs)
        if q is None:
            q = _turn_plainly(qkv, pairs, sight)
        mask = sight.mask
        y, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, *pairs, is_causal=mask is None, attn_mask=mask
        )
        ctx.save_for_backward(q, y, log)
        ctx.room, ctx.visible, ctx.window, ctx.turned = room, sight.visible, sight.window, (sight.cos, sight.sin)
        ctx.set_materialize_grads(False)
        return (y, *room.state(first))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        q, y, log = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            found = _Window._found(ctx, q, y, log, grad, given)
        if not torch.is_grad_enabled():
            return found
        # y stands behind all that this was made of, so that a gradient of the gradient cannot pass by.
        asked = iter(_Once.apply(y, grad, *given, *(g for g in found if g is not None)))  # type: ignore[no-untyped-call]
        return tuple(None if g is None else next(asked) for g in found)

    @staticmethod
    def _found(
        ctx: Any, q: Tensor, y: Tensor, log: Tensor, grad: Tensor | None, given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        room, turned = ctx.room, ctx.turned
        of_qkv, *of_past = wanted(ctx)[:3]
        lanes, heads, time, dim = q.shape
        if any(of_past):
            sums = room.sums(ctx.left, given)
            own = sums[..., ctx.own, :]
            if ctx.came.start == 0:  # nobody adds to them behind its first call
                room.release()
        else:
            room.release()
            sums, own = None, q.new_zeros(2, lanes, heads, time, dim)
            for mine, g in zip(own, given, strict=True):
                if g is not None:
                    both = min(time, g.shape[1])
                    mine[:, :, time - both :] = g[:, g.shape[1] - both :].transpose(1, 2)
        of_input = q.new_empty(lanes, time, 3, heads, dim) if of_qkv else None
        rows = slice(ctx.own.start - ctx.visible, ctx.own.stop)
        seen, wide = Read(q, room.pairs[..., rows, :], y, log, ctx.window), own if sums is None else sums[..., rows, :]
        if grad is None or not back_in_c(seen, grad, wide, None, of_input, *turned):
            of_q = torch.zeros_like(q) if grad is None else attention_back(seen, grad, wide)
            if of_input is not None:
                asked, new_key, new_value = of_input.permute(2, 0, 3, 1, 4)
                cos, sin = turned
                turn(of_q, cos, -sin, asked)
                turn(own[0], cos, -sin, new_key)
                new_value.copy_(own[1])
        past = (None, None) if sums is None else sums[..., ctx.came, :].transpose(2, 3).unbind(0)
        return of_input, *past, None, None


def _turn_plainly(qkv: Tensor, pairs: Tensor, sight: Sight) -> Tensor:
    """`turn_in_c` by the framework's operations."""
    lanes, time, _, heads, dim = qkv.shape
    asked, new_key, new_value = qkv.permute(2, 0, 3, 1, 4)
    keys, values = pairs[..., sight.visible :, :]
    turn(new_key, sight.cos, sight.sin, keys)
    values.copy_(new_value)
    return turn(asked, sight.cos, sight.sin, asked.new_empty(lanes, heads, time, dim))


class _Once(torch.autograd.Function):
    """Gradients as they are, which are not to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, grad: Tensor | None, of_key: Tensor | None, of_value: Tensor | None, *found: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(u.view_as(u) for u in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "attention's gradient cannot be differentiated; run the model inside of "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), whose can be"
        )


def _mask(visible: int, time: int, window: int | None, like: Tensor) -> Tensor | None:
    if visible == 0:
        return None
    hidden = like.new_full((time, visible + time), -torch.inf)
    hidden.triu_(visible + 1)
    if window is not None and visible + time > window:
        far = torch.ones_like(hidden, dtype=torch.bool).tril_(visible - window)
        hidden.masked_fill_(far, -torch.inf)
    return hidden[None, None]


def _turned(at: Tensor, time: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    position = at[:, None] + torch.arange(time)
    cos, sin = angles(position.to(like.device), dim, base, like.dtype)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _served(qkv: Tensor, key: Tensor, value: Tensor) -> bool:
    """The plain way can be differentiated twice where the caller has chosen attention's formula, and under transforms."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.float64)
        and key.dtype == value.dtype == qkv.dtype
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_flash_sdp_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not _checkpointed()
    )


def _checkpointed() -> bool:
    """Whether this is inside of a checkpoint, which will be read again outside of the stretch."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _storage(x: Tensor) -> int:
    """Names the memory of a tensor, also of one that has shapes alone, for as long as that lives."""
    name: int = x.untyped_storage()._cdata
    return name


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same part of the same memory."""
    return _storage(a) == _storage(b) and _part(a) == _part(b)


def _part(x: Tensor) -> tuple[Any, ...]:
    return x.storage_offset(), x.shape, x.stride()


def _task() -> int:
    """The backward pass that is going on."""
    task: int = torch._C._current_graph_task_id()
    return task
