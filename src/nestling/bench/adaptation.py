"""What does it bring to keep learning while reading? Bits per byte by position in held-out documents, rows paired by document.

running       the model with its memory running
erased        the same weights, the memory erased at every segment
transformer   a same-size transformer trained on equal tokens, whose window is the segment
second        the memory model reading the same document again, with the state it had at the end of the first reading
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nestling.learn.evaluation import by_position, evaluate, finite, mean_and_error, passages
from nestling.models import LanguageModel
from nestling.stream import Document, Tokenizer


@dataclass(frozen=True)
class Adaptation:
    """Bits per byte, `[document, bin]` a row, of the documents at least as long as the last edge.

    edges: of the bins, in tokens of the document.
    """

    edges: tuple[int, ...]
    names: tuple[str, ...]
    rows: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Every number, as JSON."""
        rows = {name: table.tolist() for name, table in self.rows.items()}
        content = {"edges": self.edges, "documents": self.names, "bits_per_byte": rows}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Adaptation:
        """What `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: torch.tensor(table, dtype=torch.float64) for name, table in content["bits_per_byte"].items()}
        return cls(tuple(content["edges"]), tuple(content["documents"]), rows)

    def gain(self, better: str, worse: str) -> tuple[Tensor, Tensor]:
        """Mean over documents of worse − better per bin, and its standard error: what `better` saves, paired by document."""
        mean, error, _ = mean_and_error(self.rows[worse] - self.rows[better])
        return mean, error

    def total(self, better: str, worse: str) -> tuple[Tensor, Tensor]:
        """The same over all positions, each bin with the weight of its width: scalars."""
        width = torch.tensor([float(last - first) for first, last in pairwise(self.edges)])
        apart = (self.rows[worse] - self.rows[better]) @ width.to(self.rows[worse].dtype) / width.sum()
        mean, error, _ = mean_and_error(apart[:, None])
        return mean[0], error[0]


def measure(
    model: LanguageModel,
    baseline: LanguageModel | None,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    segment: int,
    length: int,
    lanes: int = 8,
) -> Adaptation:
    """Read the first `length` bytes of every document that has so many (tokens, with another tokenizer than bytes).

    Raises ValueError where no document is long enough.
    """
    ready = [p for p in passages(documents, tokenizer, limit=length + 4) if len(p.tokens) > length]
    if not ready:
        raise ValueError(f"no held-out document has {length} tokens: choose a shorter length or give longer documents")
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(segment // 4, 2 * edges[-1])))

    def table(reader: LanguageModel, readings: int = 1, erase: int | None = None) -> list[Tensor]:
        scores = sorted(
            evaluate(reader, ready, lanes=lanes, segment=segment, readings=readings, erase_every=erase),
            key=lambda s: s.index,
        )
        return [by_position(finite(scores), edges, reading) for reading in range(readings)]

    first, second = table(model, readings=2)
    rows = {"running": first, "erased": table(model, erase=segment)[0], "second": second}
    if baseline is not None:
        rows["transformer"] = table(baseline, erase=segment)[0]
    return Adaptation(tuple(edges), tuple(p.name for p in ready), rows)


def pool(results: Sequence[Adaptation]) -> Adaptation:
    """Runs with different seeds as one: every document's bits per byte averaged over the runs.

    Raises ValueError where they measured different documents or bins.
    """
    first = results[0]
    if any((r.edges, r.names, set(r.rows)) != (first.edges, first.names, set(first.rows)) for r in results):
        raise ValueError("the runs measured different documents, bins or rows: repeat them with equal settings")
    return Adaptation(
        first.edges, first.names, {name: torch.stack([r.rows[name] for r in results]).mean(0) for name in first.rows}
    )


def tell(result: Adaptation, console: Console) -> None:
    """Print the table and the differences that matter, paired by document."""
    words = {
        "running": "memory running",
        "erased": "memory erased",
        "transformer": "transformer",
        "second": "second reading",
    }
    words = {name: word for name, word in words.items() if name in result.rows}
    table = Table(
        title=f"Bits per byte by position, {len(result.names)} held-out documents (± standard error)",
        title_justify="left",
    )
    table.add_column("tokens", justify="right")
    for word in words.values():
        table.add_column(word, justify="right")
    stats = {name: mean_and_error(result.rows[name]) for name in words}
    for b, (first, last) in enumerate(pairwise(result.edges)):
        table.add_row(f"{first}–{last}", *(f"{stats[name][0][b]:.3f} ± {stats[name][1][b]:.3f}" for name in words))
    console.print(table)
    for worse, says in (("erased", "erasing it at every segment"), ("transformer", "the transformer")):
        if worse in words:
            gain, error = result.gain("running", worse)
            console.print(f"At the last position the running memory {_against(gain[-1], error[-1])} than {says}.")
    console.print(
        f"A second reading of the same document {_against(*result.total('second', 'running'))} than the first."
    )


def _against(gain: Tensor, error: Tensor) -> str:
    return f"costs {abs(gain):.3f} ± {error:.3f} bits per byte {'less' if gain > 0 else 'more'} (paired by document)"


def draw(result: Adaptation, path: Path, *, title: str, segment: int) -> None:
    """Bits per byte over the position in the document, with standard errors, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    words = {
        "running": ("memory running", "#1b6ca8", "-"),
        "erased": (f"memory erased every {segment} tokens", "#d1495b", "-"),
        "transformer": (f"transformer, window {segment} tokens", "#777777", "--"),
        "second": ("second reading, memory running", "#2e933c", ":"),
    }
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    middle = [(a + b) / 2 for a, b in pairwise(result.edges)]
    for name, (label, color, style) in words.items():
        if name in result.rows:
            mean, error, _ = mean_and_error(result.rows[name])
            axes.errorbar(
                middle,
                mean,
                torch.nan_to_num(error),
                label=label,
                color=color,
                linestyle=style,
                marker="o",
                ms=4,
                capsize=2,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(middle, [f"{a}–{b}" for a, b in pairwise(result.edges)])
    axes.minorticks_off()
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
