"""Every model trains: 200 steps on the embedded corpus, and the loss must fall well below what knowing the bytes' shares gives.

    python benchmarks/model_training.py                            every model, to runs/model_training
    python benchmarks/model_training.py --models hope titans_mac --steps 50

Each model reads contiguous text in lanes that carry their state, all memories running, and AdamW moves its slow weights, with
equal settings for all and nothing tuned for any. *Unigram* is the entropy of the very bytes that the last steps ask for: no fixed
table of shares does better on them. A model fails (and the exit code is 1) if a loss, a gradient, a weight or a state is not
finite, if a slow parameter never had a gradient, or if its last losses are not below `share` of that entropy.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

import nestling as nl
from common import machine, write
from nestling import processor, stream
from nestling.learn.learner import count_faults


@dataclass
class Settings:
    """Train every model for a few steps.

    models: names from `nl.models.names()`; default all.  steps, lanes, length, lr: of every run; the rate rises over 20 steps.
    Documents are cut at 512 tokens, so that what grows with them stays small.
    last: steps whose mean loss counts.  share: of the unigram entropy that it must stay below.
    chunk, window, shard, periods: of every model that has them.
    """

    models: tuple[str, ...] = ()
    size: str = "tiny"
    steps: int = 200
    lanes: int = 16
    length: int = 32
    lr: float = 1e-2
    last: int = 20
    share: float = 0.9
    chunk: int = 16
    window: int = 16
    shard: int = 32
    periods: tuple[int, ...] = (16, 32)
    seed: int = 0
    out: Path = field(default_factory=lambda: Path("runs/model_training"))


def build(name: str, settings: Settings) -> nl.models.LanguageModel:
    """A model of the size with the run's periods; a model with fewer levels takes the first."""
    torch.manual_seed(settings.seed)
    own: dict[str, Any] = {
        key: getattr(settings, key)
        for key in ("chunk", "window", "shard", "periods")
        if key in nl.models.settings(name)
    }
    if name == "ttt_e2e":
        own["periods"] = settings.periods[:1]
    if "global_chunk" in nl.models.settings(name):
        own |= {"global_chunk": settings.shard, "locals": (settings.chunk // 2,)}
    return nl.models.build(name, settings.size, vocab_size=stream.ByteTokenizer.vocab_size, **own)


def entropy(tokens: torch.Tensor) -> float:
    """Of the shares of these tokens, in nats."""
    shares = tokens.bincount().double() / tokens.numel()
    return float(-torch.special.xlogy(shares, shares).sum())


def train(name: str, corpus: stream.Corpus, settings: Settings) -> dict[str, Any]:
    """One row of the table."""
    model = build(name, settings)
    reading = stream.Lanes(
        corpus.train, stream.ByteTokenizer(), settings.lanes, settings.length, seed=settings.seed, max_document=512
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    without = {key for key, _ in model.named_parameters()}
    finite, state, losses, asked = True, None, [], []
    began = time.process_time()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 20)
        batch = next(reading)
        logits, state = model(batch.tokens, state, reset=batch.reset)
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        without -= {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        finite &= math.isfinite(float(loss.detach())) and math.isfinite(float(norm))
        optimizer.step()
        state = nl.state.detach(state)
        losses.append(float(loss.detach()))
        asked.append(targets[batch.loss_mask])
    took = time.process_time() - began
    for tensor in (*model.parameters(), *nl.state.leaves(state)):
        finite &= bool(torch.isfinite(tensor).all())
    unigram, final = entropy(torch.cat(asked[-settings.last :])), mean(losses[-settings.last :])
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first": losses[0] / math.log(2),
        "last": final / math.log(2),
        "unigram": unigram / math.log(2),
        "share": final / unigram,
        "finite": finite,
        "faults": int(count_faults(state)),
        "without_gradient": sorted(without),
        "seconds": took,
        "passed": finite and not without and final < settings.share * unigram,
        "losses": losses,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The lowest loss first."""
    table = Table(title="bits per byte", title_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "first step", "last steps", "unigram", "share", "faults", "seconds", ""):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: row["last"]):
        table.add_row(
            row["model"],
            f"{row['parameters']:,}",
            f"{row['first']:.2f}",
            f"{row['last']:.2f}",
            f"{row['unigram']:.2f}",
            f"{row['share']:.2f}",
            str(row["faults"]),
            f"{row['seconds']:.0f}",
            "" if row["passed"] else "FAILED",
        )
    console.print(table)
    for row in rows:
        if row["without_gradient"]:
            console.print(f"{row['model']}: no gradient ever for {', '.join(row['without_gradient'])}", highlight=False)


def main(settings: Settings) -> int:
    processor.settle(threads=1)
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 110))
    words = machine(settings.seed) | {"threads": 1, "timed by": "processor time"}
    console.print(" · ".join(f"{name} {value}" for name, value in words.items()), highlight=False)
    corpus, rows = stream.standard_library(), list[dict[str, Any]]()
    for name in settings.models or tuple(nl.models.names()):
        row = train(name, corpus, settings)
        rows.append(row)
        console.print(
            f"  {name}: {row['first']:.2f} → {row['last']:.2f} bits per byte, {row['seconds']:.0f} s", highlight=False
        )
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
        write(settings.out / "model_training.json", {"machine": words, "settings": plain, "rows": rows})
    show(rows, console)
    console.print(f"Written: {settings.out}/model_training.json", highlight=False)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
