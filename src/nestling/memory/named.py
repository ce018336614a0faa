"""The registry of named systems. Each is one entry in a file of `systems`, which reads as its choices."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from nestling.memory.cost import Cost, cost
from nestling.memory.protocol import Memory
from nestling.memory.spec import MemorySpec


@dataclass(frozen=True)
class Entry:
    """One named system: what makes it, its choices, its equation in one line, its source, what is ours."""

    factory: type[Memory]
    choices: dict[str, Any]
    equation: str
    source: str
    notes: str


_SYSTEMS: dict[str, Entry] = {}


def register(
    name: str,
    *,
    equation: str,
    source: str,
    notes: str,
    factory: type[Memory] = MemorySpec,
    replace: bool = False,
    **choices: Any,
) -> None:
    """Add a named system. `choices` are fields of the dataclass `factory`; replace: in place of one of the same name."""
    if name in _SYSTEMS and not replace:
        raise ValueError(f"a memory named {name!r} is registered already: choose another name, or say replace=True")
    _SYSTEMS[name] = Entry(factory, choices, equation, source, notes)


def names() -> list[str]:
    """All named systems."""
    return sorted(_SYSTEMS)


def named(name: str, *, key_dim: int = 64, value_dim: int | None = None, **overrides: Any) -> Any:
    """A named system at a size, any choice overridable: `named("titans", key_dim=32, network=Matrix(), chunk=64)`.

    value_dim defaults to key_dim. Raises ValueError for an unknown name or choice.
    """
    factory, choices = entry(name).factory, {**entry(name).choices, **overrides}
    known = {field.name for field in fields(cast(Any, factory))} - {"name", "key_dim", "value_dim"}
    if unknown := sorted(set(choices) - known):
        raise ValueError(f"{name} has no choice {', '.join(unknown)}; expected some of: {', '.join(sorted(known))}")
    return cast(Any, factory)(
        key_dim=key_dim, value_dim=key_dim if value_dim is None else value_dim, name=name, **choices
    )


def describe(name: str, **choices: Any) -> dict[str, str]:
    """A named system in words: choices, equation, source, what is from the paper, derived or our default, and what it costs.

    choices: as in `named`; state and cost are those of this size, 64 a key unless said otherwise.
    """
    return describe_and_count(name, **choices)[0]


def describe_and_count(name: str, **choices: Any) -> tuple[dict[str, str], Cost]:
    """`describe`, and the cost in numbers."""
    spec = named(name, **choices)  # raises for an unknown name
    own, counted = entry(name), cost(spec)
    grows = " at that length, and more in a longer text" if spec.growth == "linear" else ""
    words = {
        **spec.describe(),
        "cost": f"{counted.flops:,.0f} FLOPs per token and head: matrix products, counted over {counted.time} tokens{grows}",
        "equation": own.equation,
        "source": own.source,
        "notes": own.notes,
    }
    return words, counted


def entry(name: str) -> Entry:
    """The registry's entry of a named system; raises ValueError for an unknown name."""
    if name not in _SYSTEMS:
        raise ValueError(f"memory {name!r} is not known; expected one of: {', '.join(names())}")
    return _SYSTEMS[name]
