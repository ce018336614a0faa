"""`nestling levels`: the nested system of a model, from the fastest to the slowest thing that learns."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestling.config import SettingError, did_you_mean
from nestling.learn.config import Overrides, TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

    from nestling.layers import Level

Subject = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME|RUN]", help_behavior_hint="")]
Choice = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Drawing = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class LevelsConfig:
    """Show every level of a model: what learns, how often, from what, and what its memory is made of."""

    run: Subject = None
    """A model's name (as --model) or an optimizer's, which is then shown alone; or a run's folder or one of its checkpoints
    (./hope for a folder that is named as a model is)."""
    model: Choice = None
    """Which model (default: hope)."""
    size: Choice = None
    """How large (default: tiny)."""
    optimizer: Choice = None
    """What moves its slow weights, whose memories are levels too (default: adamw)."""
    overrides: Overrides = field(default_factory=dict)
    """Settings of the model that differ from its size's, for example --set dim=128 layers=4."""
    draw: Drawing = None
    """Draw the nest into this .svg, .png or .pdf file as well."""
    length: int | None = None
    """Tokens over which FLOPs and the state's size are counted (default: the slowest level's period in tokens, from 8 to 128)."""
    json: bool = False
    """Print JSON instead of a table. A level's frequency is in updates per token or step, null where it is ∞."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise SettingError(f"length: got {self.length}, but expected a number from 1 on.")


def run(config: LevelsConfig) -> int:
    """Print the table, 0."""
    from nestling import optim

    if config.run in optim.names():
        _show_optimizer(config, config.run)
    else:
        _show_model(config, _asked(config))
    return 0


def _show_model(config: LevelsConfig, settings: TrainConfig) -> None:
    import torch
    from rich.console import Console

    from nestling import models
    from nestling.learn import planning
    from nestling.learn.optimizer import from_config
    from nestling.learn.run import build_model, parameters

    with torch.device("meta"):  # names and sizes are all that is asked for
        model = build_model(settings)
    levels = models.levels(model, from_config(settings, model))
    _draw(config, levels, f"{settings.model} {settings.size}")
    slowest = max((level.period.n for level in levels if level.period.unit == "token"), default=0)
    length = config.length or min(max(slowest, 8), 128)
    vocabulary = model.config.vocab_size
    found = planning.plan(
        settings.model, settings.size, length, vocab_size=vocabulary, training=False, **settings.overrides
    )
    cost = {
        "parameters": found.slow,
        "initial_state_parameters": found.initial,
        "length": length,
        "state_bytes_per_lane": round(found.counts.state),
        "forward_flops_per_token": found.counts.forward / length,
        "decode_flops_per_token": found.counts.decode,
    }
    if config.json:
        print(json.dumps({"model": settings.model, "size": settings.size} | cost | _rows(levels), indent=1))
        return
    title = (
        f"{settings.model} {settings.size}: {parameters(model):,} slow weights, "
        f"state {'grows with the text' if model.growth == 'linear' else 'of constant size'}"
    )
    console = Console()
    console.print(_table(levels, title, of_model=True))
    console.print(
        f"{found.slow:,} slow parameters, {found.initial:,} of them initial states. After {length} tokens a lane's state has "
        f"{cost['state_bytes_per_lane']:,} bytes; a token costs {cost['forward_flops_per_token']:,.0f} FLOPs in reading them, "
        f"{cost['decode_flops_per_token']:,.0f} in decoding one more (matrix products; nestling plan says more).",
        highlight=False,
    )
    console.print(f"Models: {', '.join(models.names())}.\nSizes: {', '.join(models.SIZES)}.", highlight=False)


def _show_optimizer(config: LevelsConfig, name: str) -> None:
    """An optimizer alone, with a linear layer whose weights it moves."""
    from rich.console import Console
    from torch import nn

    from nestling import optim
    from nestling.models import nest

    default = LevelsConfig()
    for field_, option in (
        ("model", "model"), ("size", "size"), ("optimizer", "optimizer"), ("overrides", "set"), ("length", "length"),
    ):  # fmt: skip
        if getattr(config, field_) != getattr(default, field_):
            raise SettingError(
                f"{option}: {name} is an optimizer, which is shown alone: leave it out, or name a model."
            )
    layer = nn.Linear(8, 8, bias=False)
    group = {"params": list(layer.parameters())}
    levels = nest.of_optimizer(optim.make(name, layer, [group], lr=optim.default_lr(name)))
    _draw(config, levels, name)
    if config.json:
        print(json.dumps({"optimizer": name} | _rows(levels), indent=1))
        return
    console = Console()
    console.print(_table(levels, f"{name}: {optim.describe(name)}", of_model=False))
    console.print(f"Optimizers: {', '.join(optim.names())}.", highlight=False)


def _draw(config: LevelsConfig, levels: list[Level], title: str) -> None:
    from nestling.models import drawing

    if config.draw is not None:
        try:
            drawing.draw(levels, config.draw, title)
        except ValueError as error:
            raise SettingError(str(error)) from error


def _rows(levels: list[Level]) -> dict[str, Any]:
    """frequency: updates per token or step, as the period says; null: ∞, which JSON has not."""

    def row(level: Level) -> dict[str, Any]:
        often = level.period.frequency
        when = {
            "period": str(level.period),
            "frequency": often if math.isfinite(often) else None,
            "per": level.period.unit,
        }
        return {"name": level.name} | when | {k: v for k, v in dataclasses.asdict(level).items() if k not in when}

    return {"levels": [row(level) for level in levels]}


def _table(levels: list[Level], title: str, *, of_model: bool) -> Table:
    """What rich prints; of_model: with the slow weights that make each level."""
    from rich.table import Table
    from rich.text import Text

    from nestling.models.nest import merge

    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("level", "what it is", *(["slow weights"] if of_model else [])):
        table.add_column(column, overflow="fold")
    for level, members in merge(levels):
        name = level.name if len(members) == 1 else f"{level.name} ({len(members)} times)"
        count = sum(member.slow for member in members)
        states = ("grows with the text" if m.weights is None else f"{m.weights:,} numbers" for m in members)
        what = {
            "network": level.network,
            "objective": level.bias,
            "retention": level.retention,
            "rule": level.rule,
            "learns from": level.flow,
            "hands on by": level.transfer,
            "per lane": "; ".join(dict.fromkeys(states)),
            "moves": f"{sum(m.moved for m in members):,} slow weights, those of all levels",
        }
        if not level.moves:
            del what["moves"]
        if level.period.unit == "step":
            del what["per lane"]
        lines = Table.grid(padding=(0, 1))
        for word, text in what.items():
            lines.add_row(Text(word, "dim"), Text(text))
        when = f"{level.period.every}\nfrequency {level.period.often}"
        table.add_row(f"{name}\n{when}", lines, *([f"{count:,}" if count else "–"] if of_model else []))
    return table


def _asked(config: LevelsConfig) -> TrainConfig:
    """The settings of the run that is named, or of the model."""
    from nestling import models, optim
    from nestling.learn.folder import settings_of

    word = config.run
    if word is None or word in models.names():
        if word is not None and config.model not in (None, word):
            raise SettingError(f"model: got {config.model!r}, but {word!r} is named already: leave out one of them.")
        return TrainConfig(
            model=word or config.model or "hope",
            size=config.size or "tiny",
            overrides=config.overrides,
            optimizer=config.optimizer or "adamw",
        )
    for name, option in (("model", "model"), ("size", "size"), ("optimizer", "optimizer"), ("overrides", "set")):
        if getattr(config, name):
            raise SettingError(f"{option}: a run has settings of its own, which are those of {word}: leave it out.")
    path = Path(word)
    if path.name == word and not path.exists():
        known = [*models.names(), *optim.names()]
        raise SettingError(f"there is no model, optimizer or run named {word!r}.{did_you_mean(word, known)}")
    return settings_of(path)
