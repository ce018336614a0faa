"""Learning that does not stop: what a model still knows of the parts of a changing stream that it has left behind.

R[i, j]      bits per byte on held-out text of part j after learning part i
forgetting   mean over j < K of  R[K, j] − min_{j ≤ i ≤ K} R[i, j]        0: nothing was lost          [Chaudhry et al. 2018]
learned      mean over j of R[j, j]: how well each part was known when it had just been learned
kept         mean over j of R[K, j]: how well all are known at the end
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nestling.learn.checkpoint import replace_file


@dataclass
class Retained:
    """R so far: a row of bits per byte for every part that has been learned, a column for every part."""

    names: tuple[str, ...]
    rows: list[list[float]] = field(default_factory=list)

    def add(self, row: Sequence[float]) -> None:
        """What was measured after one more part."""
        if len(row) != len(self.names) or len(self.rows) == len(self.names):
            raise ValueError(f"a row of {len(row)} numbers after {len(self.rows)} does not fit {len(self.names)} parts")
        self.rows.append(list(row))

    @property
    def forgetting(self) -> float:
        """Bits per byte lost, on average over parts, since each was known best; nan before a second part."""
        last = len(self.rows) - 1
        lost = [self.rows[-1][j] - min(row[j] for row in self.rows[j:]) for j in range(last)]
        return sum(lost) / len(lost) if lost else float("nan")

    @property
    def learned(self) -> float:
        """Bits per byte of every part right after it, on average."""
        return sum(row[j] for j, row in enumerate(self.rows)) / len(self.rows)

    @property
    def kept(self) -> float:
        """Bits per byte at the end, on average over the parts that have been learned."""
        return sum(self.rows[-1][: len(self.rows)]) / len(self.rows)

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "parts": list(self.names),
            "bits_per_byte": self.rows,
            "forgetting": self.forgetting if len(self.rows) > 1 else None,
            "learned": self.learned,
            "kept": self.kept,
        }

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(self.summary(), indent=1) + "\n")

    def tell(self, console: Console) -> None:
        """The table, and what it comes to."""
        table = Table(title="Bits per byte on held-out text of each part, after learning each", title_justify="left")
        table.add_column("after")
        for name in self.names:
            table.add_column(name, justify="right", overflow="fold")
        for name, row in zip(self.names, self.rows, strict=False):
            table.add_row(name, *(f"{value:.3f}" for value in row))
        console.print(table)
        console.print(
            f"Right after it, a part costs {self.learned:.3f} bits per byte on average, at the end {self.kept:.3f}; "
            f"forgetting (the end beside each part's best, the last part left out) is {self.forgetting:+.3f}.",
            highlight=False,
        )
