"""Checking, casting and guarding the inputs of a scan; the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nestling.memory.biases import reads_threshold
from nestling.memory.features import Features, Identity
from nestling.memory.gates import Factor, Gates, check_gates, factor
from nestling.memory.retentions import per_channel
from nestling.memory.rules import Implicit, Leader
from nestling.memory.rules.delta import proximal
from nestling.memory.settings import whole_numbers
from nestling.memory.state import MemoryState, Shapes, Tail, Weights

if TYPE_CHECKING:
    from nestling.memory.kernel import KernelState
    from nestling.memory.protocol import Call, Memory, TwoEngines
    from nestling.memory.spec import MemorySpec


X = TypeVar("X")


class Inputs(NamedTuple):
    """Inputs of a scan in the compute dtype, non-finite tokens made harmless.

    q, k     `[lane, head, time, key_dim]`, or where there is no map left to be applied their features, `[…, width]`
    features the map still to be applied, or None;  own: its parameters
    fine     bool `[lane, time]`: key, value and gates of the token are finite and legal (the token guard)
    v        the bias's targets: values, with the threshold as last coordinate where the bias reads one
    lr       the step size, rule's constant included;  erase: ε_t or None
    """

    start: MemoryState
    state: MemoryState
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    retention: Factor | None
    momentum: Factor | None
    erase: Tensor | None
    window: Tensor | None
    fine: Tensor
    reset: Tensor | None
    valid: Tensor | None
    features: Features | None = None
    own: Weights = ()

    def featured(self) -> Inputs:
        """The same with features in the places of keys and queries."""
        if self.features is None:
            return self
        return self._replace(q=self.mapped(self.q), k=self.mapped(self.k), features=None, own=())

    def mapped(self, rows: Tensor) -> Tensor:
        """Rows of keys or queries as the network reads them."""
        return rows if self.features is None else self.features.apply(rows, self.own)


def free(x: Tensor) -> bool:
    """Whether looking at a value is free: never waits for a GPU, never splits a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def surely(mask: Tensor) -> bool:
    """True if the mask is all true and looking is free."""
    return free(mask) and bool(mask.all())


def all_finite(*parts: Tensor) -> bool:
    """True if all of these are finite and looking is free. (False too where a sum alone leaves the range.)"""
    return free(parts[0]) and all(math.isfinite(float(x.detach().sum())) for x in parts)


def lanes_where(mask: Tensor, a: Weights, b: Weights) -> Weights:
    """Per lane, a where the mask `[lane]` is true, else b."""
    if surely(mask):
        return a
    if surely(~mask):
        return b
    return tuple(torch.where(mask.to(x.device).view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b, strict=True))


def widest(dtype: torch.dtype, *tensors: Tensor) -> torch.dtype:
    """The compute dtype: one that holds this one and the tensors'."""
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def prepare(spec: MemorySpec, call: Call) -> Inputs:
    """Check shapes, cast up to at least float32 (C7), find the tokens the guard must skip (C8)."""
    lanes, heads, time = check_call(spec, call)
    w0, q, k, v, gates, state, reset, valid = call
    start = spec.start(w0, lanes)
    state = start if state is None else state
    dtype = check_precision(state.weights[0].dtype, call)
    q = q.to(dtype)
    fine, (k, v), gates = token_guard(
        (k.to(dtype), v.to(dtype)), gates.map(lambda gate: gate.to(dtype)), forward=isinstance(spec.rule, Implicit)
    )
    own = tuple(w.to(dtype) for w in w0[spec.network.depth :])
    lr = q.new_ones(lanes, heads, time) if gates.lr is None else gates.lr
    if isinstance(spec.rule, Implicit):
        lr = spec.rule.damped(lr, spec.features.apply(k, own))
    retention = factor(gates.retention, gates.log_retention, dtype)
    momentum = factor(gates.momentum, gates.log_momentum, dtype)
    if reads_threshold(spec.bias):
        limit = q.new_ones(lanes, heads, time) if gates.threshold is None else gates.threshold
        v = torch.cat([v, limit.unsqueeze(-1)], -1)
    if spec.rule.momentum and momentum is None:
        momentum = factor((torch.ones_like if isinstance(spec.rule, Leader) else torch.zeros_like)(lr), None, dtype)
    erase = None
    if spec.rule.erase != "none":
        erase = lr if gates.delta is None else gates.delta
        if spec.rule.erase == "after_decay" and retention is not None and not per_channel(spec.retention):
            erase = erase * retention.plain()
    lr = lr * spec.rule.step(spec.key_dim)
    window, features = gates.window, None if spec.features == Identity() else spec.features
    return Inputs(start, state, q, k, v, lr, retention, momentum, erase, window, fine, reset, valid, features, own)


def check_start(spec: Memory, w0: Sequence[Tensor], lanes: int) -> None:
    """Refuse what no state can be made of: initial weights that do not fit, or a number of lanes that is none."""
    if not isinstance(lanes, torch.SymInt):  # a number that `torch.export` leaves open
        whole_numbers(spec.name, least=0, lanes=lanes)
    check_weights(spec, w0)


def check_weights(spec: Memory, w0: Sequence[Tensor]) -> None:
    """Refuse initial weights of the wrong number, shape or kind."""
    name, shapes = spec.name, spec.shapes
    if w0 is None or len(w0) != len(shapes):
        came = "is None" if w0 is None else f"has {len(w0)} weights"
        raise ValueError(f"{name}: w0 {came}; expected {len(shapes)} weights, from spec.init")
    heads = w0[0].shape[:1]
    for number, (w, shape) in enumerate(zip(w0, shapes, strict=True)):
        if w.shape != (*heads, *shape):
            count = heads[0] if number and w.dim() == 3 else "heads"  # that of the first
            raise ValueError(
                f"{name}: w0[{number}] has shape {tuple(w.shape)}; expected ({count}, {shape[0]}, {shape[1]})"
            )
        if not w.is_floating_point():
            raise TypeError(
                f"{name}: w0[{number}] has dtype {w.dtype}; expected a floating point tensor, from spec.init"
            )


def token_guard(tokens: Weights, gates: Gates, *, forward: bool = False) -> tuple[Tensor, Weights, Gates]:
    """Which tokens (bool `[lane, time]`) have inputs `[lane, head, time, dim]` that are finite, as are their squares, and legal
    gates; others made harmless. Products of the input with itself, as in norms and erasing factors, would leave the range.

    forward   a step size below 0 is not legal: what divides by a sum with it would have a pole there
    """
    if not gates.items() and small(tokens):
        return torch.ones(len(tokens[0]), tokens[0].shape[2], dtype=torch.bool), tokens, gates
    total = sum(torch.linalg.vector_norm(x.detach(), dim=-1).square_().sum(1) for x in tokens)
    assert isinstance(total, Tensor)
    for _, gate in gates.items():
        total = total + gate.sum((1, 3) if gate.dim() > 3 else 1)
    fine = torch.isfinite(total)
    for ranged in (gates.retention, gates.momentum, gates.threshold, gates.lr if forward else None):
        if ranged is not None:
            legal = ranged >= 0
            fine = fine & (legal.all(-1) if legal.dim() > 3 else legal).all(1)
    if surely(fine):
        return fine, tokens, gates
    per_token = fine[:, None, :, None]
    tokens = tuple(torch.where(per_token, x, 0.0) for x in tokens)
    gates = Gates(
        **{n: torch.where(per_token if g.dim() > 3 else fine[:, None], g, _neutral(n)) for n, g in gates.items()}
    )
    return fine, tokens, gates


def small(tokens: Weights) -> bool:
    """True if the squares of all of them together are finite, and looking is free."""
    if not free(tokens[0]):
        return False
    norms = [float(torch.linalg.vector_norm(x.detach())) for x in tokens]
    return sum(norm * norm for norm in norms) < torch.finfo(tokens[0].dtype).max


def _neutral(gate: str) -> float:
    return 1.0 if gate in ("retention", "momentum") else 0.0


def check_kinds(call: Call) -> None:
    """Refuse what is no tensor, or no `Gates`, before anything is asked of it."""
    if not isinstance(call.gates, Gates):
        raise TypeError(f"gates is a {type(call.gates).__name__}; expected nestling.memory.Gates: Gates(lr=…), or None")
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        check_tensor(name, x)
    for name, mask in (("reset", call.reset), ("valid", call.valid)):
        if mask is not None:
            check_tensor(name, mask)
    for name, gate in call.gates.items():
        if not isinstance(gate, Tensor):
            check_tensor("gates." + name, gate)


def check_tensor(name: str, x: object) -> None:
    """Refuse what is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor: make it one with torch.as_tensor")


def check_call(spec: TwoEngines[Any, Any], call: Call) -> tuple[int, int, int]:
    """Refuse what does not fit, in words. Returns lanes, heads, time."""
    w0, q, k, v, gates, state, reset, valid = call
    check_weights(spec, w0)
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [lane, head, time, key_dim]")
    lanes, heads, time, _ = q.shape
    for name, x, dim in (("q", q, spec.key_dim), ("k", k, spec.key_dim), ("v", v, spec.value_dim)):
        if x.shape != (lanes, heads, time, dim):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {(lanes, heads, time, dim)} ([lane, head, time, dim]) "
                f"as in q and in {spec.name}'s key_dim={spec.key_dim}, value_dim={spec.value_dim}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; expected a floating point tensor")
    if w0[0].shape[0] != heads:
        raise ValueError(f"w0 is for {w0[0].shape[0]} heads, q has {heads}: make it with spec.init(heads={heads})")
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is not None and (tuple(mask.shape) != (lanes, time) or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {(lanes, time)} ([lane, time])"
            )
    if state is not None:
        check_owner(spec, state, lanes, heads)
    check_gates(gates, used=spec.gates_used, name=spec.name, shape=(lanes, heads, time), channels=spec.gate_channels)
    return lanes, heads, time


def check_owner(spec: TwoEngines[Any, Any], state: Any, lanes: int, heads: int) -> None:
    """Refuse a state that is not this memory's, or of other lanes."""
    if not issubclass(type(state), spec._state):
        raise ValueError(
            f"{spec.name}: state is a {type(state).__name__}; expected the {spec._state.__name__} that its scan or start "
            "returns, or None for lanes that have read nothing: this one was made by another memory"
        )
    if state.position.shape[0] != lanes:
        raise ValueError(
            f"state holds {state.position.shape[0]} lanes, q has {lanes}: take or repeat lanes with nl.state first"
        )
    spec._check_state(state, lanes, heads)


def check_precision(kept: torch.dtype, call: Call) -> torch.dtype:
    """Refuse inputs that are more precise than what the state is kept in, which is the compute dtype and comes back."""
    if kept == torch.float64:
        return kept
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.dtype == torch.float64:
            raise TypeError(
                f"{name} has dtype {x.dtype}, but w0 or the state is {kept}; expected inputs that are no more "
                f"precise: make w0 torch.float64 as well, and start from its state, or give {name}.float()"
            )
    return kept


def check_state(
    name: str, state: MemoryState | KernelState, momentum: Weights, lanes: int, heads: int, expected: Shapes
) -> None:
    """Refuse weights, momentum and window tail of other shapes, or not all of one precision."""
    shapes, has, (tokens, key, value) = expected
    if len(state.weights) != len(shapes):
        raise ValueError(
            f"state has {len(state.weights)} weights; expected {len(shapes)}: it was made by another memory than {name}"
        )
    for layer, (w, shape) in enumerate(zip(state.weights, shapes, strict=True)):
        if w.shape != (lanes, *shape):
            raise ValueError(
                f"state.weights[{layer}] has shape {tuple(w.shape)}; expected {(lanes, *shape)}: the state was made by "
                f"another memory than {name}"
            )
    if bool(momentum) != has:
        raise ValueError(
            f"the state has {'a' if momentum else 'no'} momentum; expected {'one' if has else 'none'}: it was made by "
            f"another memory than {name}"
        )
    tail = state.tail
    found = None if tail is None else (tuple(tail.key.shape), tuple(tail.value.shape))
    fitting = ((lanes, heads, tokens, key), (lanes, heads, tokens, value)) if tokens else None
    if found != fitting:
        raise ValueError(
            f"state.tail, the keys and values of a window, has shapes {found}; expected {fitting}: the state was made by another "
            f"memory than {name}, or with another length of its window"
        )
    check_dtypes([*state.weights, *momentum, *(() if tail is None else tail[:2])])


def check_dtypes(kept: Sequence[Tensor]) -> None:
    """Refuse a state whose numbers are not all of one precision, at least float32 (C7)."""
    dtype = kept[0].dtype
    for x in kept:
        if x.dtype != dtype or dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the state holds {dtype} and {x.dtype}; expected all of it in float32, or all in float64, as it was returned"
            )


def shift_tail(tail: Tail, key: Tensor, value: Tensor, ok: Tensor, keep: Tensor) -> Tail:
    """The tail after one more token (key, value `[lane, head, 1, dim]`, ok `[lane, 1]`); lanes not in `keep` stay.

    In the place of a token that is not ok stand zeros, whatever is made of a key of 0.
    """
    if not surely(ok):
        there = ok[:, None, :, None]
        key, value = torch.where(there, key, 0.0), torch.where(there, value, 0.0)
    moved = Tail(
        torch.cat([tail.key, key], 2)[:, :, 1:],
        torch.cat([tail.value, value], 2)[:, :, 1:],
        torch.cat([tail.ok, ok], 1)[:, 1:],
    )
    if surely(keep):
        return moved
    keep = keep.to(tail.ok.device)
    return Tail(
        torch.where(keep.view(-1, 1, 1, 1), moved.key, tail.key),
        torch.where(keep.view(-1, 1, 1, 1), moved.value, tail.value),
        torch.where(keep.view(-1, 1), moved.ok, tail.ok),
    )


def border_guard(
    at: Tensor, anchor: Weights, weights: Weights, momentum: Weights, gone: Tensor | None = None
) -> tuple[Weights, Weights, Weights, Tensor]:
    """Close the chunk of the lanes in `at` (bool `[lane]`, CPU): move the anchor to the weights, unless a guard steps in.

    Returns anchor, weights, momentum and the lanes (bool) whose weights or momentum were not finite: these go back to the
    old anchor, with momentum 0, at a border or not.

    gone  lanes of which it is known already, see `unharmed`
    """
    broken = overflowed(weights, momentum) if gone is None else gone
    if free(broken) and not bool(broken.any()):
        return (lanes_where(at, weights, anchor) if bool(at.any()) else anchor), weights, momentum, broken
    weights = lanes_where(broken, anchor, weights)
    momentum = lanes_where(broken, tuple(torch.zeros_like(s) for s in momentum), momentum)
    return lanes_where(at, weights, anchor), weights, momentum, broken


def overflowed(weights: Weights, momentum: Weights) -> Tensor:
    """Lanes, bool `[lane]`, whose weights or momentum are not finite."""
    if all_finite(*weights, *momentum):
        return torch.zeros(len(weights[0]), dtype=torch.bool)
    return ~torch.stack([torch.isfinite(x.detach()).flatten(1).all(1) for x in (*weights, *momentum)]).all(0)


def unharmed(
    token: Callable[[X, Tensor | None], tuple[Tensor, MemoryState, Tensor]], x: X, without: Callable[[X, Tensor], X]
) -> tuple[Tensor, MemoryState]:
    """A token's answer and the state after it; made again, where it is to be differentiated, without what overflowed in it:
    derivatives of that are no numbers, and 0 times these neither.

    token    answer, state and lanes that went back to their anchor, bool `[…, lane]`; given those, they go back in any case
    without  the inputs with the token refused in some lanes
    """
    y, state, gone = token(x, None)
    if torch.is_grad_enabled() and free(gone) and bool(gone.any()):
        tail = state.tail  # the token stays where windows find it
        y, state, _ = token(without(x, gone.reshape(-1, gone.shape[-1]).any(0)), gone)
        state = state._replace(tail=tail)
    return y, state


def refused(x: Inputs, lanes: Tensor, t: int) -> Inputs:
    """The inputs with token t of some lanes (bool `[lane]`) refused."""
    at = torch.zeros_like(x.fine)
    at[:, t] = lanes
    acts = ~at[:, None]

    def none(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else torch.where(acts, gate, 0.0)

    def kept(gate: Factor | None) -> Factor | None:
        return None if gate is None else gate.masked(acts[..., None] if gate.log.dim() > 3 else acts)

    lr = torch.where(acts, x.lr, 0.0)
    k, v = (torch.where(acts[..., None], u, 0.0) for u in (x.k, x.v))
    return x._replace(
        k=k, v=v, lr=lr, erase=none(x.erase), retention=kept(x.retention), momentum=kept(x.momentum), fine=x.fine & ~at
    )


def erase_strength(erase: Tensor, layer: int, square: Tensor) -> Tensor:
    """ε of one layer: as given for the unit-norm key layer, ε/(1 + ε‖x‖²) for hidden inputs x of the given ‖x‖²."""
    return erase if layer == 0 else proximal(erase, square)
