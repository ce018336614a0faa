"""`nestling demo`: train a memory model and a transformer on real text, then show what the memory brings."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError
from nestling.learn.config import DEFAULT_MINUTES, Minutes, Tokens


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a model on the embedded corpus for about three minutes and a same-size transformer on equal tokens, then measure both
    on held-out documents: bits per byte by position, with the memory running, erased at every segment, and on a second reading.
    """

    model: str = "hope"
    """Which memory model."""
    size: str = "small"
    """How large."""
    minutes: Minutes = None
    """How long to train the memory model (default 3, if --tokens is not given); the transformer then gets as many tokens."""
    tokens: Tokens = None
    """How many tokens to train each on, instead of --minutes."""
    segment: int = 256
    """Tokens after which the comparison forgets, and the transformer's window."""
    documents: int = 16
    """Held-out documents to measure on."""
    seed: int = 0
    """Sets the initial weights and the order of the documents."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where everything goes (default runs/demo-DATE-TIME)."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.tokens is not None:
            raise SettingError(
                f"minutes ({self.minutes}) and tokens ({self.tokens}) exclude each other: give one of them."
            )
        for name, least in (("segment", 8), ("documents", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}: got {getattr(self, name)}, but expected at least {least}.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise SettingError(f"minutes: got {self.minutes}, but expected a number above 0.")
        if self.tokens is not None and self.tokens < 1:
            raise SettingError(f"tokens: got {self.tokens}, but expected at least 1.")
        if self.model == "transformer":
            raise SettingError("model: the demo compares a memory model with a transformer, so name a memory model.")


def run(config: DemoConfig) -> int:
    """Train both, measure, print the table, write the plot. Returns the exit code."""
    import torch
    from rich.console import Console

    from nestling.bench.adaptation import draw, measure, tell
    from nestling.learn import TrainConfig, generate, load_run, train
    from nestling.learn.folder import check_free
    from nestling.stream import ByteTokenizer, standard_library

    console = Console(highlight=False)
    out = config.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # What would fail after minutes of training fails now.
    check_free(out)
    length = 8 * config.segment
    long = [d for d in standard_library().heldout if len(d.text) >= length][: config.documents]
    if len(long) < 2:
        raise SettingError(
            f"segment: got {config.segment}, but no two held-out documents are {length:,} characters long."
        )
    # Three minutes are few tokens: few lanes make many steps of them. The memory is carried as far as it will be measured.
    common = TrainConfig(
        size=config.size, seed=config.seed, lanes=4, length=config.segment, carry=8, warmup=20, eval_documents=0
    )
    minutes = DEFAULT_MINUTES if config.minutes is None and config.tokens is None else config.minutes
    console.rule(f"1. {config.model} learns the embedded corpus")
    first = train(replace(common, model=config.model, out=out / config.model, minutes=minutes, tokens=config.tokens))
    if first.interrupted is not None:
        return 128 + first.interrupted
    console.rule("2. a transformer of the same size reads as many tokens")
    # carry=1: it forgets at every segment, as it will be measured.
    other = train(replace(common, model="transformer", tokens=first.tokens, out=out / "transformer", carry=1))
    if other.interrupted is not None:
        return 128 + other.interrupted

    console.rule("3. both read documents they have never seen")
    tokenizer = ByteTokenizer()
    model, baseline = load_run(first.out).model, load_run(other.out).model
    result = measure(model, baseline, long, tokenizer, segment=config.segment, length=length)
    tell(result, console)
    result.save(out / "adaptation.json")
    title = f"{config.model} {config.size}, {first.tokens:,} training tokens, seed {config.seed}"
    draw(result, out / "adaptation.png", title=title, segment=config.segment)

    console.rule(f"4. {config.model} reads the start of one of them and writes on")
    start = long[0].text[:length]
    prompt = [tokenizer.bos, *tokenizer.encode(start).tolist()]
    made = generate(
        model, prompt, count=300, banned=[tokenizer.bos], generator=torch.Generator().manual_seed(config.seed)
    )
    written = tokenizer.decode([token for token, _ in made])
    console.print(f"{long[0].name}: … {start[-120:]}", markup=False, end="")
    console.print(written, markup=False, style="bold")
    console.rule()
    console.print(
        f"Plot: {out / 'adaptation.png'} · numbers: {out / 'adaptation.json'}\n"
        f"Try next: nestling levels {out / config.model} · nestling generate {out / config.model} --prompt 'def ' · "
        "nestling train --minutes 30",
        markup=False,
        soft_wrap=True,
    )
    return 0
