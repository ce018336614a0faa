"""The self-modifying Titans layer: the memories make their own keys, values and gates (Nested Learning, eq. 94–96)."""

from __future__ import annotations

from dataclasses import replace

from nestling.layers.level import Level, Period
from nestling.layers.memory import Memory
from nestling.memory import SelfModifying as Spec


class SelfModifying(Memory):
    """`y, state = layer(x, state)` with x `[lane, time, dim]`.

        q, u    = x W_q, x W_u                        the projections that no token moves
        q, a, b = SiLU(conv(q)), SiLU(conv(u)), SiLU(conv(u))       all of unit norm per head
        k, η, α = what M_k, M_η, M_α make of a;  v = what M_v makes of b
        y       = (RMSNorm(M_main(q)) ∘ SiLU(x W_g)) W_o

    The paper omits convolutions and norms from its equations and gives them a width of 4. Ours are: that they stand before the
    memories, so that a whole chunk can be read at once; that a and b have unit norm, as the keys that the memories are trained
    at; the input projection W_u and the output gate.

    Args:
        dim: width.  heads: number of memories of each kind, each of width dim / heads, the spec's key_dim.
        spec: `nl.memory.named("self_modifying", …)`.
        width: of the convolution.
    """

    sources = (0, 1, 1)
    unit_values = True

    def __init__(self, dim: int, heads: int, spec: Spec, *, width: int = 4) -> None:
        super().__init__(dim, heads, spec, width=width)

    def levels(self) -> list[Level]:
        (own,) = super().levels()
        assert isinstance(self.spec, Spec)
        found = []
        kinds = ("anchor", "weights", *(["momentum"] if self.spec.rule.momentum else []))
        (weights,) = self._initial()
        of_main = tuple(f"initial.{n}" for n, name in enumerate(self.spec.names) if name.startswith("main."))
        for bank in self.spec.banks:
            main = bank.names == ("main",)
            paths = [f"memory.{kind}.{n}" for kind in kinds for n in range(bank.layers.start, bank.layers.stop)]
            found.append(
                replace(
                    own,
                    name="memory" if main else "generators",
                    period=Period(bank.chunk, "token"),
                    network=str(bank.network) if main else f"{', '.join(bank.names)}: each {bank.network}",
                    flow="keys, and values that it makes itself"
                    if main
                    else "tokens, and values that they make themselves",
                    transfer="initialization" if main else "generation",
                    params=(*self.own("initial"), *of_main) if main else tuple(w for w in weights if w not in of_main),
                    state_paths=(*paths, *(("tail", "memory.position", "memory.faults") if main else ())),
                )
            )
        return found
