"""The outer level: a learner that reads ordered text and moves the slow weights, its checkpoints, and measuring.

Names load when first used, so that settings and help need no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nestling.schedule import Schedule as Schedule

if TYPE_CHECKING:
    from nestling.learn.budget import Budget as Budget
    from nestling.learn.checkpoint import Checkpoint as Checkpoint
    from nestling.learn.checkpoint import CheckpointError as CheckpointError
    from nestling.learn.config import TrainConfig as TrainConfig
    from nestling.learn.evaluation import Passage as Passage
    from nestling.learn.evaluation import Score as Score
    from nestling.learn.evaluation import bits_per_byte as bits_per_byte
    from nestling.learn.evaluation import by_position as by_position
    from nestling.learn.evaluation import evaluate as evaluate
    from nestling.learn.evaluation import mean_and_error as mean_and_error
    from nestling.learn.evaluation import passages as passages
    from nestling.learn.evaluation import read as read
    from nestling.learn.generation import generate as generate
    from nestling.learn.learner import Learner as Learner
    from nestling.learn.learner import LearningError as LearningError
    from nestling.learn.learner import StepResult as StepResult
    from nestling.learn.optimizer import adamw as adamw
    from nestling.learn.run import Run as Run
    from nestling.learn.run import TrainResult as TrainResult
    from nestling.learn.run import load_run as load_run
    from nestling.learn.run import train as train

_WHERE = {
    "budget": ("Budget",),
    "checkpoint": ("Checkpoint", "CheckpointError"),
    "config": ("TrainConfig",),
    "evaluation": (
        "Passage",
        "Score",
        "bits_per_byte",
        "by_position",
        "evaluate",
        "mean_and_error",
        "passages",
        "read",
    ),
    "generation": ("generate",),
    "learner": ("Learner", "LearningError", "StepResult"),
    "optimizer": ("adamw",),
    "run": ("Run", "TrainResult", "load_run", "train"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestling.learn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nestling.learn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
