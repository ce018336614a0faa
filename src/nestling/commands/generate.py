"""`nestling generate`: a trained model reads, learns from it, and writes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nestling.config import SettingError

if TYPE_CHECKING:
    from nestling.stream import Tokenizer

Run = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class GenerateConfig:
    """Let a trained model write, printing as it goes; its memory learns from what it reads and from what it writes."""

    run: Run = None
    """The run's folder, or one checkpoint of it. Default: the newest run in runs/."""
    prompt: str = ""
    """The text to go on from; - takes it from standard input."""
    prompt_file: File = None
    """A file with the text to go on from."""
    read: File = None
    """A document (or a folder of them) to read and learn from first."""
    count: int = 400
    """Tokens to write."""
    temperature: float = 0.8
    """Below 1: safer; above 1: wilder; 0: always the likeliest token."""
    top_p: float = 0.95
    """Choose among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """The same seed writes the same text."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompt_file:
            raise SettingError("prompt and prompt-file exclude each other: give one of them.")
        if self.count < 1:
            raise SettingError(f"count: got {self.count}, but expected at least 1.")
        if self.seed < 0:
            raise SettingError(f"seed: got {self.seed}, but expected a number from 0 on.")
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature: got {self.temperature}, but expected a number from 0 on.")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top-p: got {self.top_p}, but expected a share above 0 and up to 1.")


def run(config: GenerateConfig) -> int:
    """Read, write, 0."""
    import torch

    from nestling.learn import generate, load_run, read
    from nestling.stream import read_documents

    prompt = _prompt(config)
    documents = () if config.read is None else read_documents([config.read])
    loaded = load_run(config.run, config.device)
    bos = loaded.tokenizer.bos
    state = None
    for document in documents:
        state = read(loaded.model, [bos, *loaded.tokenizer.encode(document.text).tolist()], state)
    tokens = generate(
        loaded.model,
        [bos, *loaded.tokenizer.encode(prompt).tolist()],
        state,
        count=config.count,
        temperature=config.temperature,
        top_p=config.top_p,
        banned=[bos],  # opens documents, and is never predicted
        generator=torch.Generator().manual_seed(config.seed),
    )
    print(prompt, end="", flush=True)
    for piece in _pieces((token for token, _ in tokens), loaded.tokenizer):
        print(piece, end="", flush=True)
    print()
    return 0


def _prompt(config: GenerateConfig) -> str:
    try:
        if config.prompt_file is not None:
            return config.prompt_file.read_text(encoding="utf-8")
        text = sys.stdin.read() if config.prompt == "-" else config.prompt
    except UnicodeDecodeError as error:
        raise SettingError(f"prompt: {config.prompt_file or 'standard input'} is not UTF-8 text ({error}).") from error
    return text.encode("utf-8", "replace").decode()  # a shell can hand over what is no text


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as soon as whole characters are there; what is no UTF-8 becomes U+FFFD."""
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) >= 4:  # no character has more than four bytes
            yield text
            waiting.clear()
    yield tokenizer.decode(waiting)
