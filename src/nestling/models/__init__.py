"""Language models by name and size."""

from nestling.models.lm import LanguageModel, ModelConfig, ModelState
from nestling.models.registry import SIZES, build, describe, levels, names, register

__all__ = ["SIZES", "LanguageModel", "ModelConfig", "ModelState", "build", "describe", "levels", "names", "register"]
