"""`nestling convert`: a trained model with other levels."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from nestling.config import SettingError
from nestling.learn.config import Overrides, Rate

Run = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")]
Model = Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Numbers = Annotated[tuple[str, ...], tyro.conf.arg(metavar="LEVEL", help_behavior_hint="")]


@dataclass(frozen=True)
class ConvertConfig:
    """Make levels that learn while they read of a trained model's feed-forward networks, or change the levels it has.

    The weights become the levels' initial state, and levels that are new add nothing at first, so the new model begins by
    predicting what the old one did. It is written as a run that train --resume, train --from, eval and generate take.
    """

    run: Run = None
    """The run's folder, or one checkpoint of it. Default: the newest run in runs/."""
    to: Model = None
    """The model to make: hope_attention of a transformer, hope_swa or ttt_e2e of a swa_transformer. Default: the same model with
    other settings."""
    overrides: Overrides = field(default_factory=dict)
    """Settings of the new model that differ from the old one's, for example --set periods=[64,256]. periods=[] takes all levels
    away."""
    origins: Numbers = ()
    """For every new level the number of the old one (from 0) whose weights it takes, or new. Default: by order or by period. For
    the one feed-forward network that takes the place of several levels: the number of the level whose weights it has."""
    rate: Rate = None
    """Step size of all levels that learn. Default: the one that each has learned, as long as the rule counts it in the same unit
    (gradient, momentum and dgd do); a change to or from adam or m3 begins at the new rule's own."""
    lr: Rate = None
    """Full learning rate of the slow weights when the new run is trained on (default: the old run's)."""
    out: Folder = None
    """The new run's folder (default runs/MODEL-SIZE-SEED)."""

    def levels(self) -> list[int | None] | None:
        """`origins` as the library takes them."""
        for word in self.origins:
            if word != "new" and not word.isdecimal():
                raise SettingError(f"origins: got {word!r}, but expected the number of a level, from 0 on, or new.")
        return [None if word == "new" else int(word) for word in self.origins] or None


def run(config: ConvertConfig) -> int:
    """Convert, say what was made of what, 0."""
    from rich.console import Console

    from nestling.learn.conversion import convert_run
    from nestling.learn.run import parameters

    made = convert_run(
        config.run, config.out, config.to, config.overrides, config.levels(), lr=config.lr, rate=config.rate
    )
    old, new = made.before.config, made.after.config
    lines = [
        f"{old.name} {old.size}, {parameters(made.before):,} parameters ({made.source})",
        f"→ {new.name} {new.size}, {parameters(made.after):,} parameters, feed-forward levels of the last block:",
    ]
    periods, ours = (x.continuum(new.layers - 1).periods for x in (made.before, made.after))
    for period, origin in zip(ours, made.origins, strict=True):
        source = (
            "new, adds nothing at first" if origin is None else f"weights of level {origin} ({_moves(periods[origin])})"
        )
        lines.append(f"    {_moves(period)}: {source}")
    lost = [n for n in range(len(periods)) if n not in made.origins]
    if lost:
        lines.append(
            f"    removed: {', '.join(f'level {n} ({_moves(periods[n])})' for n in lost)}; what it knew is gone"
        )
    where = shlex.quote(str(made.out))
    lines += [
        f"Everything is in {made.out}; try next:",
        f"  nestling eval {where}",
        f"  nestling train --resume {where}",
    ]
    Console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return 0


def _moves(period: int | None) -> str:
    return "moved by no token" if period is None else f"every {period} tokens"
