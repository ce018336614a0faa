"""Checkpoints: everything that is needed to go on, in one folder, there completely or not at all.

    run/checkpoints/
      latest                      the name of the checkpoint to go on from
      step-00000200/
        model.safetensors         slow weights
        optimizer.safetensors     the optimizer's tensors; its numbers are in checkpoint.json
        state.safetensors …       fast state of every lane, as `nestling.state.save` writes it
        checkpoint.json           counters, cursor, random generators, settings, and the SHA-256 of every other file

A checkpoint is written under a temporary name, every file and then the folder is forced to disk, and one rename
makes it visible; only then `latest` is replaced, by another rename. Whatever the moment of a crash, `latest`
names a complete checkpoint. Nothing is pickled, and what is read is checked against its digest before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestling import state as fast

FORMAT = 1
KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit; the message says which and what to do."""


@dataclass
class Checkpoint:
    """The contents of one checkpoint. `numbers` is JSON: counters, cursor, settings, whatever the run keeps;
    `fast` may be None (start).
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    fast: Any
    numbers: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> Path:
    """Write `checkpoint` into `folder` (a run's `checkpoints/`), point `latest` at it, drop all but the newest
    `keep`; returns its folder.

    A step that is already there is left as it is. Raises `CheckpointError` if it cannot be written (a full
    disk, say); the checkpoints before it are then untouched.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".writing-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _write(temporary, checkpoint)
            _sync(temporary)
            os.rename(temporary, target)
            _sync(folder)
        replace_file(folder / "latest", target.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({error}; {free / 1e6:.0f} MB are free there). "
            "Earlier checkpoints are untouched: make room and go on with --resume."
        ) from error
    for old in _complete(folder)[:-keep]:
        if old != target:
            _remove(old)
    return target


def load(path: Path) -> Checkpoint:
    """Read the checkpoint in the folder `path`, every file checked; raises `CheckpointError`."""
    record = read_record(path)
    for name, expected in record["files"].items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error})") from error
        if found != expected:
            raise _damaged(path, f"{name} is not what was written (SHA-256 {found[:12]}…, expected {expected[:12]}…)")
    try:
        tensors = load_file(path / "optimizer.safetensors")
        return Checkpoint(
            step=record["step"],
            model=load_file(path / "model.safetensors"),
            optimizer=_join(record["optimizer"], tensors),
            # Its digest vouches for it: a lane that holds NaN is the run's own business, and resumes as it was.
            fast=fast.load(path / "state.safetensors", check_finite=False)
            if "state.safetensors" in record["files"]
            else None,
            numbers=record["numbers"],
        )
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error


def read_record(path: Path) -> dict[str, Any]:
    """`checkpoint.json` of the checkpoint folder `path`, checked against its own digest; raises `CheckpointError`."""
    file = path / "checkpoint.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no checkpoint here (no checkpoint.json).") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"checkpoint.json cannot be read ({error})") from error
    if not isinstance(record, dict) or "digest" not in record:
        raise _damaged(path, "checkpoint.json is no record of a checkpoint")
    digest = record.pop("digest")
    if digest != _digest_json(record):
        raise _damaged(path, "checkpoint.json is not what was written")
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {record['format']}, but this version of Nestling reads format {FORMAT}. "
            f"It was written by version {record['version']}: use that one."
        )
    return record


def latest(folder: Path) -> Path | None:
    """The checkpoint to go on from in a run's `checkpoints/`: the one `latest` names, or the newest if that is
    gone; None: there is none.
    """
    complete = _complete(folder)
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    named = [path for path in complete if path.name == name]
    return next(reversed(named or complete), None)


def clean(folder: Path) -> None:
    """Remove what a killed write left in a run's `checkpoints/`: unfinished folders, and any that `latest`
    never came to name.
    """
    current = latest(folder)
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in _complete(folder):
        if current is not None and _step(path) > _step(current):
            _remove(path)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers by name; a tensor with several names (tied weights) is
    there once, under the first.
    """
    seen: set[tuple[Any, ...]] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
        seen.add(place)
    return tensors


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy `tensors` (of `model_tensors`) into `model`, in place; raises `CheckpointError` where names, shapes
    or dtypes differ.
    """
    own = model_tensors(model)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(f"{source}: does not fit this model (missing {missing[:3]}, unknown {unknown[:3]}).")
    for name, tensor in own.items():
        came = tensors[name]
        if came.shape != tensor.shape or came.dtype != tensor.dtype:
            raise CheckpointError(
                f"{source}: {name} is {came.dtype} {list(came.shape)}, but the model has {tensor.dtype} {list(tensor.shape)}."
            )
        tensor.copy_(came)


def random_state(device: torch.device) -> dict[str, str]:
    """The state of PyTorch's random generators that a run on `device` can draw from, as hexadecimal text."""
    state = {"cpu": bytes(torch.get_rng_state().tolist()).hex()}
    if device.type == "cuda":
        state["cuda"] = bytes(torch.cuda.get_rng_state(device).tolist()).hex()
    return state


def set_random_state(state: Mapping[str, str], device: torch.device) -> None:
    """Put the generators back to what `random_state` returned; one for a kind of device that is not in use is
    left alone.
    """
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["cpu"])), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8), device)


def replace_file(path: Path, text: str) -> None:
    """Write a small text file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    temporary = path.with_name(f".writing-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    groups, tensors = _part(checkpoint.optimizer)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, folder / "model.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")
    if checkpoint.fast is not None:
        fast.save(folder / "state.safetensors", checkpoint.fast)
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = _digest(path)
    record = {
        "format": FORMAT,
        "version": version("nestling"),
        "step": checkpoint.step,
        "files": files,
        "optimizer": groups,
        "numbers": checkpoint.numbers,
    }
    replace_file(folder / "checkpoint.json", json.dumps(record | {"digest": _digest_json(record)}, indent=1) + "\n")


def _part(optimizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's `state_dict` as what JSON holds and what safetensors holds."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    return {"groups": optimizer["param_groups"], "scalars": scalars}, tensors


def _join(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_part`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in record["scalars"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor.clone()  # into memory of its own, aligned as fresh tensors are
    groups = [
        {name: tuple(value) if name == "betas" else value for name, value in group.items()}
        for group in record["groups"]
    ]
    return {"state": state, "param_groups": groups}


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = (path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that one half removed is never taken for a whole one."""
    doomed = path.with_name(f".writing-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _damaged(path: Path, what: str) -> CheckpointError:
    others = [other for other in _complete(path.parent) if other != path]
    hint = (
        f"Remove that folder to go on from {others[-1].name}." if others else "There is no other checkpoint beside it."
    )
    return CheckpointError(f"{path}: damaged, {what}. {hint}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(record: dict[str, Any]) -> str:
    record = json.loads(json.dumps(record))  # as it will be read back: keys are text, tuples lists
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk (where the system can open a folder: Windows cannot)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
