"""Language models by name and size."""

from nestling.models import zoo
from nestling.models.block import Block, ModelConfig
from nestling.models.convert import convert
from nestling.models.lm import LanguageModel, ModelState
from nestling.models.registry import SIZES, build, describe, levels, names, register, settings

__all__ = [
    "SIZES",
    "Block",
    "LanguageModel",
    "ModelConfig",
    "ModelState",
    "build",
    "convert",
    "describe",
    "levels",
    "names",
    "register",
    "settings",
    "zoo",
]
