"""Optimizers that need more of a layer than its gradient: what its weights have seen of tokens since the last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nestling.optim.base import Optimizer, State, refuse_shards
from nestling.optim.capture import Capture, Seen, Sum

PREFIX = "seen_"


class Watching(Optimizer):
    """Base of optimizers over the parameters of a module whose layers it watches.

    A leaf sets `module` and `strict` before its base is made, and calls `_watch` after it. With `module` None nothing is watched.
    """

    module: nn.Module | None = None
    strict: bool = True
    capture: Capture | None = None

    def _watch(self, sums: Sum, normalize: bool) -> None:
        """Put hooks on the module's layers. Raises ValueError where there would be nothing to see."""
        assert self.module is not None
        self.capture = Capture(self.module, sums, normalize)
        name = type(self).__name__
        problem = ""
        if self.strict and self.capture.made:
            problem = (
                f"{self.capture.made[0]} is made from other parameters in every pass (a parametrization), and what it sees is "
                "nothing that they see"
            )
        elif self.strict and not any(p in self.capture.names for group in self.param_groups for p in group["params"]):
            problem = "none of the parameters is the weight of a linear, embedding or convolution layer"
        if problem:
            self.remove()
            raise ValueError(f"{name}: {problem}: give strict=False for {self._instead} there, or another optimizer")

    _instead = "SGD"
    """What moves weights whose tokens are not known."""

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if self.module is None:
            return
        own = set(self.module.parameters())
        for p in group["params"]:
            refuse_shards(type(self).__name__, p)
            if p not in own:
                raise ValueError(
                    f"{type(self).__name__}: a parameter {tuple(p.shape)} is none of the module's, "
                    f"{type(self.module).__name__}, whose layers are watched: give the module that has all of them"
                )
        if self.capture is not None:  # layers that have come since
            self.capture.watch(self.module)

    def remove(self) -> None:
        """Take the hooks off the module; the optimizer cannot be used any more."""
        if self.capture is not None:
            self.capture.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the tokens that belong to them."""
        super().zero_grad(set_to_none)
        if self.capture is not None:
            self.capture.clear()

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.capture is not None:
            self.capture.clear()
        return loss

    def wait(self, group: dict[str, Any]) -> None:
        """Keep what the layers have seen for the step that takes all gradients of the period."""
        if self.capture is None:
            return
        for p in group["params"]:
            seen = self.capture.seen.pop(p, None)
            if seen is not None:
                state = self._state_of(group, p)
                both = _kept(state) or Seen()
                both.add(seen)
                state.update({f"{PREFIX}{name}": value for name, value in vars(both).items() if value is not None})

    def _seen(self, p: Tensor, state: State) -> Seen | None:
        """What the weight has seen, also while it waited; None for what is no layer's weight. Raises RuntimeError where its layer
        was not called.
        """
        assert self.capture is not None
        kept, now = _kept(state), self.capture.seen.get(p)
        if kept is not None and now is not None:
            kept.add(now)
        elif kept is None:
            kept = now
        if kept is None and p in self.capture.names and self.strict:
            raise RuntimeError(
                f"{type(self).__name__}: {self.capture.names[p]} has a gradient, but its layer was not called in the passes "
                "since the last step, so its inputs are not known: call the layer, or give strict=False for "
                f"{self._instead} there"
            )
        return kept

    def __getstate__(self) -> dict[str, Any]:
        if self.capture is not None:
            raise TypeError(
                f"{type(self).__name__} cannot be copied, as it watches the layers of a module: make one for the copied "
                "module, and let it load_state_dict"
            )
        return super().__getstate__()


def _kept(state: State) -> Seen | None:
    """Take what was kept of a weight while it waited out of its state."""
    names = [name for name in state if name.startswith(PREFIX)]
    return Seen(**{name.removeprefix(PREFIX): state.pop(name) for name in names}) if names else None
