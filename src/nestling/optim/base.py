"""What every optimizer here shares: W ← W − η_t (D_t + λW), with D the read of a memory of gradients.

An optimizer is an associative memory whose context flow is the gradients of one parameter (Nested Learning, §4). So each of
them is a class that says what it keeps (`_start`) and what it answers (`_directions`); groups, closures, precision, decay and
state dicts are here. The learning rate stands outside the memory, as in PyTorch, so that schedulers act at once; the paper
writes it inside (m ← αm − ηg, W ← W + m), which is the same for a constant one (derived).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""What is remembered for one parameter: tensors, and plain numbers."""
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_SHARES = ("momentum", "slow_momentum", "second_momentum", "coupling")


class GradientMemory(NamedTuple):
    """One memory of an optimizer in words, for the table of levels; fields as in `nestling.layers.Level`."""

    name: str
    network: str
    bias: str
    retention: str
    rule: str
    period: int = 1
    """Outer steps between two updates."""
    tensors: tuple[str, ...] = ()
    """Its names in the optimizer's state of a parameter."""


class Optimizer(torch.optim.Optimizer, ABC):
    """Base of all optimizers here: a `torch.optim.Optimizer` with decoupled weight decay.

    Parameters without a gradient are left alone, and so is what is remembered for them. A sparse gradient is taken as the dense
    one it stands for. Memories live in at least float32, whatever the parameter's dtype, and `load_state_dict` keeps them
    there. A gradient that is not finite spoils its own parameter and memory and no other, as in `torch.optim`: whoever trains
    skips such steps (`nestling.learn.Learner` does). One whose square is not finite (above 1e19 in float32) stops its entries for
    good where squares are remembered, as in `torch.optim.Adam`; clipping prevents it. Complex parameters raise TypeError.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self.places: dict[Tensor, int] = {}
        """The order in which parameters were given."""
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own. Raises ValueError for settings that cannot be."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            for p in group["params"]:
                if p.is_complex():
                    raise TypeError(f"{type(self).__name__}: a parameter is {p.dtype}; expected a real one")
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self.places.setdefault(p, len(self.places))

    def _check(self, group: Mapping[str, Any]) -> None:
        """Refuse settings that cannot be."""
        name = type(self).__name__
        for setting in ("lr", "weight_decay"):
            if setting in group and not float(group[setting]) >= 0:
                raise ValueError(f"{name}: {setting} is {group[setting]}; expected a number of at least 0")
        for setting in ("eps", "ridge"):
            if setting in group and not group[setting] >= 0:
                raise ValueError(f"{name}: {setting} is {group[setting]}; expected a number of at least 0")
        for setting in _SHARES:
            if setting in group and not 0 <= group[setting] <= 1:
                raise ValueError(f"{name}: {setting} is {group[setting]}; expected a share to keep in [0, 1]")
        for setting in ("betas", "adam_betas"):
            if setting in group and not (
                isinstance(group[setting], tuple | list)
                and len(group[setting]) == 2
                and all(0 <= share < 1 for share in group[setting])
            ):
                raise ValueError(f"{name}: {setting} are {group[setting]}; expected two shares to keep in [0, 1)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` evaluates the model anew and returns the loss, which is handed back."""
        loss = loss_of(closure)
        for group in self.param_groups:
            self._begin(group)
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                states = [self._state_of(group, p) for p in params]
                self._move(group, params, [raised(p.grad) for p in params], states)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what `state_dict` returned. Tensors keep the precision they were saved in; settings that it does not have, as
        that of an older version, stay as they are.
        """
        before = self.param_groups
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({name: own[name] for name in self.defaults if name in own and name not in group})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks: a copy has its leaf's own settings, too."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**super().__getstate__(), **own}

    def memories(self) -> list[GradientMemory]:
        """What it remembers, in words, fast to slow."""
        return []

    def wait(self, group: dict[str, Any]) -> None:
        """Called in place of a step for a group that `Periodic` lets wait, with the gradients of that step."""

    def _begin(self, group: dict[str, Any]) -> None:
        """Called once per step and group, whether or not any of its parameters has a gradient."""

    def _generator(self, p: Tensor, seed: int) -> torch.Generator:
        """A parameter's own: its memory begins alike whenever its first gradient comes, also in a run that was resumed before."""
        return torch.Generator().manual_seed(seed + self.places[p])

    def _state_of(self, group: dict[str, Any], p: Tensor) -> State:
        state: State = self.state[p]
        if not state or self._lacks(group, state):
            state.update({name: value for name, value in self._start(group, p).items() if name not in state})
        return state

    def _lacks(self, group: dict[str, Any], state: State) -> bool:
        """Whether a setting that has changed since asks for a memory that there is none of."""
        return False

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        directions = self._directions(group, params, grads, states)
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, directions, alpha=-lr)

    @abstractmethod
    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        """What is remembered before the first gradient."""

    @abstractmethod
    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        """Take in the gradients and answer D of every parameter, in its shape. May not change `grads` in place."""


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure returns, evaluated with gradients; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def raised(grad: Tensor | None) -> Tensor:
    """A gradient, dense and in at least float32."""
    assert grad is not None
    dense = grad.to_dense() if grad.is_sparse else grad
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def blank(p: Tensor) -> Tensor:
    """Zeros like a parameter, in at least float32."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), memory_format=torch.preserve_format)


def every(states: Sequence[State], name: str) -> list[Tensor]:
    """One tensor of every state."""
    return [state[name] for state in states]


def sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor. Where there is one its module has been imported, which takes a second that others save."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def refuse_shards(name: str, p: Tensor) -> None:
    """TypeError for a sharded parameter, for optimizers that need whole rows."""
    if sharded(p):
        raise TypeError(
            f"{name}: a parameter is sharded, but its memory reads whole rows of gradients or inputs: give such parameters to an "
            "element-wise optimizer, Muon or M3"
        )


def rows(x: Tensor) -> Tensor:
    """A parameter as the matrix `[out, in]` it acts as: a convolution flattened, a vector one row."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/‖x‖ and ‖x‖ (Frobenius); 0 and 0 for x = 0. The squares of large and small entries stay in range."""
    largest = x.abs().amax()
    scaled = x / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled)
    return scaled / torch.where(norm > 0, norm, 1.0), norm * largest
