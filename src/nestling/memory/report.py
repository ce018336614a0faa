"""A place for what a model notices about itself while it reads; collecting costs nothing unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Report:
    """Collects, per level and token, surprise, update norms, gates and faults: `model(tokens, state, report=report)`.

    `report["blocks.0.memory"]["surprise"]` is `[lane, head, time]` over all calls made with this report; an entry without a
    time dimension (a count per lane) is summed over calls.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, list[Tensor]]] = {}
        self._counts: dict[str, dict[str, Tensor]] = {}
        self._prefix = ""

    def scope(self, name: str) -> Report:
        """A view of the same report whose entries stand under `name`."""
        child = Report.__new__(Report)
        child._entries, child._counts = self._entries, self._counts
        child._prefix = f"{self._prefix}.{name}" if self._prefix else name
        return child

    def add(self, **series: Tensor) -> None:
        """Append series `[…, time]`."""
        entry = self._entries.setdefault(self._prefix, {})
        for name, value in series.items():
            entry.setdefault(name, []).append(value.detach())

    def count(self, **counts: Tensor) -> None:
        """Add counts `[lane]`."""
        entry = self._counts.setdefault(self._prefix, {})
        for name, value in counts.items():
            entry[name] = entry[name] + value.detach() if name in entry else value.detach()

    def hand_to(self, other: Report, change: Callable[[Tensor], Tensor]) -> None:
        """Add everything to another report, its series changed on the way, each level under the other's scope."""
        for level in self:
            scope = other.scope(level) if level else other
            for name, value in self[level].items():
                if name in self._counts.get(level, {}):
                    scope.count(**{name: value})
                else:
                    scope.add(**{name: change(value)})

    def merged(self, other: Report, choose: Callable[[Tensor, Tensor], Tensor]) -> Report:
        """A report of the same entries, each chosen of this one's and the other's."""
        made = Report()
        for level in other:
            scope = made.scope(level) if level else made
            for name, value in other[level].items():
                entry = {name: choose(self[level][name], value)}
                if name in other._counts.get(level, {}):
                    scope.count(**entry)
                else:
                    scope.add(**entry)
        return made

    def __getitem__(self, level: str) -> dict[str, Tensor]:
        series = {name: torch.cat(parts, -1) for name, parts in self._entries.get(level, {}).items()}
        return series | self._counts.get(level, {})

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._counts]))

    def __len__(self) -> int:
        return len(set(self._entries) | set(self._counts))


def check_report(report: object) -> None:
    """Refuse what notes cannot be added to."""
    if report is not None and not isinstance(report, Report):
        raise TypeError(
            f"report is a {type(report).__name__}; expected a nestling.Report, or None: make one with Report() and "
            "read it after the call"
        )
