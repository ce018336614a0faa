"""The registry of named systems. Each is one entry in a file of `systems`, which reads as its choices."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from nestling.memory.spec import Memory, MemorySpec


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
    **choices: Any,
) -> None:
    """Add a named system. `choices` are fields of the dataclass `factory`."""
    if name in _SYSTEMS:
        raise ValueError(f"a memory named {name!r} is registered already")
    _SYSTEMS[name] = Entry(factory, choices, equation, source, notes)


def names() -> list[str]:
    """All named systems."""
    return sorted(_SYSTEMS)


def named(name: str, *, key_dim: int = 64, value_dim: int | None = None, **overrides: Any) -> Any:
    """A named system at a size, any choice overridable: `named("titans", key_dim=32, network=Matrix(), chunk=64)`.

    value_dim defaults to key_dim. Raises ValueError for an unknown name or choice.
    """
    if name not in _SYSTEMS:
        raise ValueError(f"memory {name!r} is not known; expected one of: {', '.join(names())}")
    factory, choices = _SYSTEMS[name].factory, {**_SYSTEMS[name].choices, **overrides}
    known = {field.name for field in fields(cast(Any, factory))} - {"name", "key_dim", "value_dim"}
    if unknown := sorted(set(choices) - known):
        raise ValueError(f"{name} has no choice {', '.join(unknown)}; expected some of: {', '.join(sorted(known))}")
    return cast(Any, factory)(
        key_dim=key_dim, value_dim=key_dim if value_dim is None else value_dim, name=name, **choices
    )


def describe(name: str) -> dict[str, str]:
    """A named system in words: choices, equation, source, and what is from the paper, derived or our default."""
    entry = _SYSTEMS.get(name)
    size = named(name)  # raises for an unknown name
    assert entry is not None
    return {**size.describe(), "equation": entry.equation, "source": entry.source, "notes": entry.notes}
