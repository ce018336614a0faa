"""The settings of a training run; `nestling train` and configuration files are made from this class."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from nestling.config import SettingError, check_threads
from nestling.schedule import Shape


def parse_overrides(pairs: list[str], option: str = "--set", example: str = "dim=128") -> dict[str, Any]:
    """`["dim=128", "norm=layer"]` as a mapping; a value is JSON where it can be read as JSON, text otherwise."""
    overrides = {}
    for pair in pairs:
        name, equals, text = pair.rpartition("=") if option == "--every" else pair.partition("=")
        if not equals or not name:
            raise SettingError(f"{option}: got {pair!r}, but expected NAME=VALUE, for example {example}.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        overrides[name.replace("-", "_")] = value
    return overrides


def _pairs(option: str, example: str, metavar: str = "NAME=VALUE") -> tuple[Any, Any]:
    """How an option that takes a mapping is read and shown."""
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: parse_overrides(words, f"--{option}", example),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={json.dumps(item)}" for name, item in value.items()],
    )
    return spec, tyro.conf.arg(name=option, help_behavior_hint="")


Overrides = Annotated[dict[str, Any], *_pairs("set", "dim=128")]
Settings = Annotated[dict[str, Any], *_pairs("optimizer-set", "momentum=0.95")]
Every = Annotated[dict[str, int], *_pairs("every", "blocks.0.*=4", "PATTERN=STEPS")]
Minutes = Annotated[float | None, tyro.conf.arg(metavar="MINUTES", help_behavior_hint="")]
Tokens = Annotated[int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="")]
Steps = Annotated[int | None, tyro.conf.arg(metavar="STEPS")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Rate = Annotated[float | None, tyro.conf.arg(metavar="RATE", help_behavior_hint="")]
Horizon = Annotated[float | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="")]
Source = Annotated[Path | None, tyro.conf.arg(name="from", metavar="RUN", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]

DEFAULT_MINUTES = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on text: read it in order, learn from it, write checkpoints and a loss curve.

    Without --data it reads the embedded corpus, the source text of Python's own standard library.
    Ctrl-C stops after the current step, writes a checkpoint and prints the command that goes on.
    """

    model: str = "hope"
    """Which model; `nestling levels` lists the names."""
    size: str = "tiny"
    """How large: tiny for trying things, up to the sizes of the papers."""
    overrides: Overrides = field(default_factory=dict)
    """Settings of the model that differ from its size's, for example --set dim=128 layers=4."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ()
    """Files and folders to read: UTF-8 text, .gz of it, .jsonl with a text field. Default: the embedded corpus."""
    minutes: Minutes = None
    """How long to train (default 3, if --tokens is not given); the first steps' speed says how many tokens that is."""
    tokens: Tokens = None
    """How many tokens to train on, instead of --minutes; such a run is deterministic."""

    seed: int = 0
    """Sets the initial weights and the order of the documents."""
    out: Folder = None
    """The run's folder (default runs/MODEL-SIZE-SEED): checkpoints, metrics.jsonl, loss.png, summary.json."""
    resume: bool = False
    """Go on with the run in --out, with its own settings; `--resume FOLDER` is short for `--out FOLDER --resume`."""

    continual: bool = False
    """Read a changing stream: every path of --data in turn (default: packages of the embedded corpus), the slow weights moving
    every 4 steps unless --every says otherwise. What was forgotten is measured after every part."""

    source: Source = None
    """Begin with the slow weights of another run, or of one of its checkpoints. Its settings are the defaults of the new run,
    but for the budget and the folder; --set adds to its own, and may change what leaves the weights' shapes as they are, for
    example the chunks of a memory. The optimizer and the lanes begin anew, at the other run's learning rate unless --lr says
    otherwise (--lr None: the optimizer's own, as it is with another --optimizer)."""

    lanes: int = 8
    """Texts read side by side, each with a memory of its own."""
    length: int = 256
    """Tokens per lane and step."""
    carry: Steps = 64
    """A lane's memory starts afresh at a new document, and at the latest after so many steps (None: only there)."""

    optimizer: str = "adamw"
    """What moves the slow weights: adamw, sgd, muon, m3, dgd and others; a wrong name lists them all."""
    optimizer_set: Settings = field(default_factory=dict)
    """Settings of the optimizer, for example --optimizer-set momentum=0.9 slow_weight=0.3."""
    every: Every = field(default_factory=dict)
    """Slow weights that move every so many steps, by their accumulated gradient, for example --every blocks.0.*=4."""
    horizon: Horizon = None
    """Steps that momentum reaches back, the same for weights of every period (default: the optimizer's own)."""
    lr: Rate = None
    """Full learning rate of the slow weights (default: the optimizer's own, 2e-3 for adamw)."""
    schedule: Shape = "cosine"
    """How the learning rate goes down after the warm-up."""
    warmup: int = 50
    """Steps until the full learning rate (at most a tenth of the run)."""
    weight_decay: float = 0.1
    """Decay of weight matrices; gains, biases, embeddings and initial memories have none."""
    clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""

    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    eval_documents: int = 16
    """Held-out documents measured at the end, the first 8192 bytes of each (0: none)."""

    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products of slow weights; fast weights are always at least float32."""
    threads: Count = None
    """CPU threads for PyTorch (default: PyTorch's own choice)."""

    def __post_init__(self) -> None:
        # Absolute, so that a run can be resumed from another working directory.
        object.__setattr__(self, "data", tuple(str(Path(path).expanduser().absolute()) for path in self.data))
        if self.source is not None:
            object.__setattr__(self, "source", self.source.expanduser().absolute())
        if self.minutes is not None and self.tokens is not None:
            raise SettingError(
                f"minutes ({self.minutes}) and tokens ({self.tokens}) exclude each other: give one of them."
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise SettingError(f"{name}: got {value}, but expected a number from {least} on.")
        check_threads(self.threads)
        if self.lanes > MOST_LANES:
            raise SettingError(f"lanes: got {self.lanes}, but expected a number from 1 to {MOST_LANES:,}: give fewer.")
        if self.lanes * self.length > MOST_TOKENS:
            raise SettingError(
                f"lanes × length: got {self.lanes} × {self.length} = {self.lanes * self.length:,} tokens a step, but expected "
                f"up to {MOST_TOKENS:,}: give fewer lanes or a shorter length."
            )
        for name in ("minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingError(f"{name}: got {value}, but expected a number above 0.")
        for name in ("schedule", "dtype"):
            choices = get_args(get_type_hints(type(self))[name])
            if getattr(self, name) not in choices:
                raise SettingError(f"{name}: got {getattr(self, name)!r}, but expected one of {', '.join(choices)}.")

    def resolved(self) -> TrainConfig:
        """The same settings with the default budget and learning rate written out; raises `SettingError`."""
        from nestling import optim

        check_optimizer(self.optimizer)
        minutes = DEFAULT_MINUTES if self.minutes is None and self.tokens is None else self.minutes
        return replace(self, minutes=minutes, lr=optim.default_lr(self.optimizer) if self.lr is None else self.lr)

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.out or Path("runs") / f"{self.model}-{self.size}-{self.seed}"


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that is not known; raises `SettingError`."""
    from nestling import optim

    if name not in optim.names():
        raise SettingError(f"optimizer: there is none named {name!r}; expected one of {', '.join(optim.names())}.")


_LEAST = {
    "tokens": 1,
    "seed": 0,
    "lanes": 1,
    "length": 1,
    "carry": 1,
    "warmup": 0,
    "weight_decay": 0,
    "horizon": 1,
    "checkpoint_every": 1,
    "eval_documents": 0,
}

MOST_LANES = 2**16
MOST_TOKENS = 2**28
"""Of one step: its numbers alone take 4 GiB."""
