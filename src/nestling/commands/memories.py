"""`nestling memories`: every named memory as its choices, with its equation, its source, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from nestling.config import SettingError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from nestling.memory import Cost

Name = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")]

CHOICES = {
    "features": "features",
    "network": "network",
    "bias": "objective",
    "retention": "retention",
    "rule": "rule",
    "period": "period",
}
"""The choices of a memory, and what they are called here as in `nestling levels`."""
MORE = {"read": "reads", "gates": "gates", "state": "state", "cost": "cost", "source": "source", "notes": "notes"}


@dataclass(frozen=True)
class MemoriesConfig:
    """Show every named memory: its equation, its choices, its source, its cost and its state."""

    name: Name = None
    """One memory, in full, instead of the table of all."""
    key_dim: int = 64
    """Size of keys and values, per head, at which cost and state are counted."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.key_dim < 1:
            raise SettingError(f"key_dim is {self.key_dim}, but expected at least 1.")


def run(config: MemoriesConfig) -> int:
    """Print the table, or one memory in full; 0."""
    from rich.console import Console

    from nestling import memory

    names = memory.names()
    if config.name is not None and config.name not in names:
        raise SettingError(f"memory: there is none named {config.name!r}.{did_you_mean(config.name, names)}")
    found = {
        name: memory.describe_and_count(name, key_dim=config.key_dim) for name in names if config.name in (None, name)
    }
    if config.json:
        rows = [
            words | {"flops_per_token": cost.flops, "state_numbers": cost.state, "counted_over": cost.time}
            for words, cost in found.values()
        ]
        print(json.dumps({"key_dim": config.key_dim, "memories": rows}, indent=1, ensure_ascii=False))
        return 0
    console = Console()
    if config.name is not None:
        console.print(one(config.name, found[config.name][0], config.key_dim))
        console.print(f"In Python: {memory.named(config.name, key_dim=config.key_dim)!r}", highlight=False)
        return 0
    console.print(table(found, config.key_dim))
    console.print(
        "FLOPs: of matrix products, per token and head, reading at length. State: numbers per lane and head.\n"
        "nestling memories NAME shows one in full: what is from the paper, what is derived, what is our default.",
        highlight=False,
    )
    return 0


def table(found: dict[str, tuple[dict[str, str], Cost]], key_dim: int) -> Table:
    """All memories, a few lines each."""
    from rich.table import Table

    made = Table(title=f"{len(found)} memories, at {key_dim} a key", title_justify="left", show_lines=True)
    made.add_column("memory", overflow="fold")
    made.add_column("what it is", overflow="fold")
    for column in ("FLOPs", "state"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, (words, cost) in found.items():
        lines = grid({"equation": "equation", **CHOICES, "source": "source"}, words)
        made.add_row(name, lines, f"{cost.flops:,.0f}", f"{cost.state:,}")
    return made


def one(name: str, words: dict[str, str], key_dim: int) -> Table:
    """One memory in full."""
    from rich.table import Table

    made = Table(title=f"{name}, at {key_dim} a key", title_justify="left", show_header=False)
    made.add_row(grid({"equation": "equation", **CHOICES, **MORE}, words))
    return made


def grid(parts: dict[str, str], words: dict[str, str]) -> Table:
    """A line for each part: what it is called, and what it is."""
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 1))
    for part, heading in parts.items():
        lines.add_row(Text(heading, "dim"), Text(words[part]))
    return lines
