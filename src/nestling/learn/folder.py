"""A run's folder: made with its settings in one move, owned by one process at a time, found again by its name.

runs/hope-tiny-0/
  config.json      the run's settings           metrics.jsonl   one line a step
  checkpoints/     see checkpoint.py            loss.png        the loss curve
  summary.json     what came out, at the end
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path

from nestling.config import SettingError, did_you_mean, override, to_json
from nestling.learn import checkpoint
from nestling.learn.checkpoint import CheckpointError
from nestling.learn.config import TrainConfig

ROOT = Path("runs")
MAY_CHANGE = {"out", "resume", "checkpoint_every", "eval_documents", "device", "threads"}
"""Settings that a resumed run may change: they do not touch what is learned (device and threads may change the
last bits).
"""


def check_free(folder: Path) -> None:
    """Raises `SettingError` if a new run cannot live in `folder`, because there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / "config.json").exists():
            raise SettingError(
                f"out: there is a run in {folder} already. Go on with it (--resume {folder}) or choose another folder (--out …)."
            )
        raise SettingError(f"out: {folder} exists and is not empty. Choose a new or an empty folder.")


def create(config: TrainConfig) -> Path:
    """Make the folder of a new run, `config.json` in it from its first moment; raises `SettingError` as
    `check_free` does, and `CheckpointError` if the folder cannot be made.
    """
    folder = config.folder
    check_free(folder)
    try:
        return _make(folder, config)
    except OSError as error:  # it names a file that nobody asked for
        raise CheckpointError(
            f"out: {folder} cannot be made ({error.strerror or error}). Choose a folder where files can be written (--out …)."
        ) from error


def _make(folder: Path, config: TrainConfig) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder with settings in it, moved into place in one rename: a run's folder never stands there without.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        stage = Path(temporary) / "run"
        stage.mkdir()
        settings = {name: value for name, value in to_json(config).items() if name not in ("out", "resume")}
        checkpoint.replace_file(stage / "config.json", json.dumps(settings, indent=1) + "\n")
        os.replace(stage, folder)
    return folder


def read_config(folder: Path) -> TrainConfig:
    """The settings of the run in `folder` (its `out` is `folder`); raises `CheckpointError` if there is no run."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("expected settings by name")
        return override(TrainConfig(out=folder), settings, str(folder / "config.json"))
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder} is no folder, but expected a run's folder, or one of its checkpoints (checkpoints/step-…)."
        ) from error
    except FileNotFoundError as error:
        near = did_you_mean(str(folder), [str(path) for path in _runs(folder.parent)]) if _runs(folder.parent) else ""
        raise CheckpointError(f"{folder}: there is no run here (no config.json).{near}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}") from error


def settings_of(path: Path) -> TrainConfig:
    """The settings of a run, or of one of its checkpoints; raises `CheckpointError`."""
    if (path / "checkpoint.json").exists():
        return override(TrainConfig(), checkpoint.read_record(path)["numbers"]["config"], str(path))
    return read_config(path)


def begin(config: TrainConfig) -> TrainConfig:
    """The settings of a new run; one that begins from another has that one's model, but for what `config` sets otherwise."""
    if config.source is None:
        return config
    stored = settings_of(config.source)
    if (config.model, config.size) != (stored.model, stored.size):
        raise SettingError(
            f"from: the run in {config.source} is {stored.model} {stored.size}, but model and size are {config.model} "
            f"{config.size}. Leave these out, or begin from another run."
        )
    return replace(config, overrides=stored.overrides | config.overrides)


def check_unchanged(config: TrainConfig, stored: TrainConfig) -> None:
    """Refuse to go on with other settings than the run began with: the curve would be neither the old run's nor
    a new one's.
    """
    changed = [
        f"{field.name} was {getattr(stored, field.name)!r}, now {getattr(config, field.name)!r}"
        for field in fields(TrainConfig)
        if field.name not in MAY_CHANGE and getattr(config, field.name) != getattr(stored, field.name)
    ]
    if changed:
        raise SettingError(
            f"resume: the run in {stored.folder} began with other settings ({'; '.join(changed)}). "
            "Leave these out to go on, or start a new run in another folder (--out …) without --resume."
        )


def resume(config: TrainConfig) -> TrainConfig:
    """The settings to go on with: the run's own, with what may change taken from `config`."""
    stored = read_config(config.folder)
    check_unchanged(config, stored)
    return replace(config, out=config.folder)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """While this context lasts no other process may train in `folder`; the system lets go of it even if this
    process is killed.
    """
    with open(folder / ".lock", "w") as file:
        with suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{folder}: another process is training in this folder. Wait for it or stop it."
                ) from error
        yield


def find_checkpoint(path: Path | None) -> Path:
    """The checkpoint that `path` means: itself, the latest of the run it is, or (None) the latest of the newest
    run in `runs/`.
    """
    if path is None:
        runs = [run for run in _runs(ROOT) if _written(run)]
        if not runs:
            raise CheckpointError(
                f"There is no run in {ROOT.absolute()} yet: train one (nestling train), or name a run's folder."
            )
        path = max(runs, key=_written)
    if (path / "checkpoint.json").exists():
        return path
    read_config(path)
    found = checkpoint.latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: this run has no checkpoint yet. Train it first: nestling train --resume {path}")
    return found


def _written(run: Path) -> float:
    """When the checkpoint to go on from was written; 0: there is none."""
    found = checkpoint.latest(run / "checkpoints")
    return 0.0 if found is None else found.stat().st_mtime


def _runs(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.glob("*/config.json"))
