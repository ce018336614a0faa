"""The data-dependent factors of an update, one per lane, head and token.

    lr         η  step size                       None: 1.  At least 0 in implicit steps and over a kernels' sum
    momentum   μ  share of the old momentum kept  None: 0
    retention  α  share of the memory kept        None: 1.  `[lane, head, time, key_dim]` where each channel has its own
    delta      β  strength of the erasing factor  None: the same as lr
    window     γ  weight of lag 0 … c−1 in a windowed bias, `[lane, head, time, c]`; None: 1
    threshold  δ  of the Huber and robust biases, at least 0                        None: 1

`log_retention` and `log_momentum` may be given in place of `retention` and `momentum`: a gate that is a sigmoid keeps its
precision near 1 only as a log-sigmoid. An exact 0 is given in the plain form; a log must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gates:
    """Gates of a memory, each `[lane, head, time]` (window: one more dimension of lags). See the module's table."""

    lr: Tensor | None = None
    momentum: Tensor | None = None
    retention: Tensor | None = None
    delta: Tensor | None = None
    window: Tensor | None = None
    threshold: Tensor | None = None
    log_retention: Tensor | None = None
    log_momentum: Tensor | None = None

    def __getitem__(self, time: slice) -> Gates:
        """The gates of some of the tokens: `gates[3:7]`."""
        return self.map(lambda gate: gate[:, :, time])

    def map(self, function: Callable[[Tensor], Tensor]) -> Gates:
        """Apply a function of one tensor to every gate that is there."""
        return Gates(**{name: function(gate) for name, gate in self.items()})

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of the gates that are there."""
        found = []
        for name in NAMES:
            gate = getattr(self, name)
            if gate is not None:
                found.append((name, gate))
        return found


NAMES = tuple(field.name for field in fields(Gates))


def check_gates(
    gates: Gates, *, used: frozenset[str], name: str, shape: tuple[int, int, int], channels: Mapping[str, int]
) -> None:
    """Refuse a gate that the system does not use, a gate given twice, or a wrong shape (channels: size of a last dimension)."""
    for pair in ("retention", "momentum"):
        if getattr(gates, pair) is not None and getattr(gates, "log_" + pair) is not None:
            raise ValueError(f"gates.{pair} and gates.log_{pair} are both given: give one of them")
    for gate, tensor in gates.items():
        kind = gate.removeprefix("log_")
        if kind not in used:
            raise ValueError(
                f"gates.{gate} was given, but {name} has no such gate (it uses: {', '.join(sorted(used)) or 'none'}). "
                "Leave it out, or choose a rule, retention or bias that reads it."
            )
        if tensor.is_complex():
            raise TypeError(f"gates.{gate} has dtype {tensor.dtype}; expected real numbers: take their .real or .abs()")
        last = channels.get(kind)
        expected = shape if last is None else (*shape, last)
        if tensor.shape != expected:
            raise ValueError(
                f"gates.{gate} has shape {tuple(tensor.shape)}; expected {expected} ([lane, head, time"
                + ("])" if last is None else ", lag])" if gate == "window" else ", channel])")
            )


@dataclass(frozen=True)
class Factor:
    """One gate whose products along time are needed: its log, and where it is exactly 0 (log there: 0).

    A product over (s, t] is exp(Σ log) unless a zero lies inside. `zero` marks those; `value` is the gate itself, so that
    a product with exactly one zero still has its right derivative with respect to that zero.
    """

    log: Tensor
    zero: Tensor | None = None
    value: Tensor | None = None

    def masked(self, ok: Tensor) -> Factor:
        """The same gate, 1 for tokens that are not ok."""
        log = torch.where(ok, self.log, 0.0)
        if self.zero is None or self.value is None:
            return Factor(log)
        return Factor(log, self.zero & ok, self.value)

    def plain(self) -> Tensor:
        """The gate itself, for one-token steps."""
        plain = self.log.exp()
        if self.zero is None or self.value is None:
            return plain
        return torch.where(self.zero, self.value, plain)

    def complement(self) -> Tensor:
        """1 less the gate, exact also where the gate is nearly 1."""
        rest = -torch.expm1(self.log)
        if self.zero is None or self.value is None:
            return rest
        return torch.where(self.zero, 1 - self.value, rest)

    def map(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Apply a function of one tensor (a gather, a slice) to all parts."""
        zero = None if self.zero is None else function(self.zero)
        value = None if self.value is None else function(self.value)
        return Factor(function(self.log), zero, value)


def factor(plain: Tensor | None, log: Tensor | None, dtype: torch.dtype) -> Factor | None:
    """The factor of a gate given either way, or None. A negative gate becomes NaN, which the token guard catches."""
    if log is not None:
        return Factor(log.to(dtype))
    if plain is None:
        return None
    value = plain.to(dtype)
    zero = value == 0
    return Factor(torch.where(zero, torch.ones_like(value), value).log(), zero, value)
