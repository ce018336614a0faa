"""`nestling levels`: the nested system of a model, from the fastest to the slowest thing that learns."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError, did_you_mean
from nestling.learn.config import Overrides, TrainConfig

Subject = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL|RUN]", help_behavior_hint="")]
Choice = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Drawing = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class LevelsConfig:
    """Show every level of a model: what learns, how often, from what, and what its memory is made of."""

    run: Subject = None
    """A model's name (as --model), or a run's folder or one of its checkpoints (./hope for a folder named as a model is)."""
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
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise SettingError(f"length: got {self.length}, but expected a number from 1 on.")


def run(config: LevelsConfig) -> int:
    """Print the table, 0."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nestling import models
    from nestling.learn import planning
    from nestling.learn.optimizer import from_config
    from nestling.learn.run import build_model, parameters
    from nestling.models import drawing
    from nestling.models.nest import merge

    settings = _asked(config)
    with torch.device("meta"):  # names and sizes are all that is asked for
        model = build_model(settings)
    levels = models.levels(model, from_config(settings, model))
    if config.draw is not None:
        try:
            drawing.draw(levels, config.draw, f"{settings.model} {settings.size}")
        except ValueError as error:
            raise SettingError(str(error)) from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
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
        rows = [dataclasses.asdict(level) | {"period": str(level.period)} for level in levels]
        print(json.dumps({"model": settings.model, "size": settings.size} | cost | {"levels": rows}, indent=1))
        return 0
    table = Table(
        title=f"{settings.model} {settings.size}: {parameters(model):,} slow weights, "
        f"state {'grows with the text' if model.growth == 'linear' else 'of constant size'}",
        title_justify="left",
        show_lines=True,
    )
    for column in ("level", "what it is", "slow weights"):
        table.add_column(column, overflow="fold")
    for level, members in merge(levels):
        name = level.name if len(members) == 1 else f"{level.name} ({len(members)} times)"
        count = sum(sizes[parameter] for member in members for parameter in member.params)
        states = ("grows with the text" if m.weights is None else f"{m.weights:,} numbers" for m in members)
        what = {
            "network": level.network,
            "objective": level.bias,
            "retention": level.retention,
            "rule": level.rule,
            "learns from": level.flow,
            "hands on by": level.transfer,
            "per lane": "; ".join(dict.fromkeys(states)),
        }
        if level.period.unit == "step":
            del what["per lane"]
        lines = Table.grid(padding=(0, 1))
        for word, text in what.items():
            lines.add_row(Text(word, "dim"), Text(text))
        table.add_row(f"{name}\nevery {level.period}", lines, f"{count:,}" if count else "–")
    console = Console()
    console.print(table)
    console.print(
        f"{found.slow:,} slow parameters, {found.initial:,} of them initial states. After {length} tokens a lane's state has "
        f"{cost['state_bytes_per_lane']:,} bytes; a token costs {cost['forward_flops_per_token']:,.0f} FLOPs in reading them, "
        f"{cost['decode_flops_per_token']:,.0f} in decoding one more (matrix products; nestling plan says more).",
        highlight=False,
    )
    console.print(f"Models: {', '.join(models.names())}.\nSizes: {', '.join(models.SIZES)}.", highlight=False)
    return 0


def _asked(config: LevelsConfig) -> TrainConfig:
    """The settings of the run that is named, or of the model."""
    from nestling import models
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
        raise SettingError(f"there is no model and no run named {word!r}.{did_you_mean(word, models.names())}")
    return settings_of(path)
