"""Models by name and size. A new architecture is one entry: which sequence layer its blocks have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nestling import memory
from nestling.layers import Attention, Layer, Level, Memory, SelfModifying
from nestling.models.lm import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Size:
    """Width, blocks, heads, the anchoring period of chunk-wise memories and the periods of a continuum, in tokens."""

    dim: int
    layers: int
    heads: int
    chunk: int
    periods: tuple[int, ...]


SIZES = {
    "tiny": Size(32, 2, 4, 4, (4, 8)),
    "small": Size(192, 4, 4, 64, (64, 256)),
    "base": Size(384, 8, 6, 16, (64, 256, 1024)),
    "340M": Size(1024, 24, 16, 64, (512, 2048, 8192)),
    "760M": Size(1536, 24, 16, 64, (512, 2048, 8192)),
    "1.3B": Size(2048, 24, 16, 64, (512, 2048, 8192)),
}
"""tiny is for tests, small (about 2 M parameters) for a laptop; the large ones are the papers' (Miras, Table 5)."""

Mixer = Callable[[ModelConfig], Layer]


@dataclass(frozen=True)
class Entry:
    """A named model: what it is in a sentence, its blocks' sequence layer, whether its feed-forward levels learn from tokens."""

    description: str
    mixer: Mixer
    continuum: bool


_MODELS: dict[str, Entry] = {}


def register(name: str, description: str, *, continuum: bool = False) -> Callable[[Mixer], Mixer]:
    """Decorator: a function from config to a block's sequence layer becomes a named model.

    continuum: its feed-forward networks are a Continuum Memory System with the size's periods.
    """

    def add(mixer: Mixer) -> Mixer:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already")
        _MODELS[name] = Entry(description, mixer, continuum)
        return mixer

    return add


def names() -> list[str]:
    """All named models."""
    return sorted(_MODELS)


def describe(name: str) -> str:
    """One sentence on a named model."""
    return _entry(name).description


def build(name: str, size: str = "tiny", *, vocab_size: int = 257, **overrides: Any) -> LanguageModel:
    """A fresh model.

    overrides: dim, layers, heads, ffn, chunk, periods (of models that have a continuum). Unless ffn is given it is solved
    for, so that all models of a size have as many parameters as the transformer (to within one hidden unit a block).

    Raises ValueError for what cannot be built.
    """
    entry = _entry(name)
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not known; expected one of: {', '.join(SIZES)}")
    known = ["dim", "layers", "heads", "ffn", "chunk", *(["periods"] if entry.continuum else [])]
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; expected some of: {', '.join(known)}")
    given = SIZES[size]
    periods = _periods(overrides.pop("periods", given.periods)) if entry.continuum else ()
    numbers = {"dim": given.dim, "layers": given.layers, "heads": given.heads, "chunk": given.chunk, **overrides}
    for setting, number in (*numbers.items(), ("vocab_size", vocab_size)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{setting} is {number!r}; expected a whole number of at least 1")
    ffn = numbers.pop("ffn", None)

    def config(kind: str, hidden: int) -> ModelConfig:
        here = periods if kind == name else ()
        return ModelConfig(kind, size, vocab_size=vocab_size, ffn=hidden, periods=here, **numbers)

    if ffn is None:
        dim = numbers["dim"]
        standard = 8 * round(dim / 3)  # 8/3 of the width: three matrices then weigh as much as two of width 4
        target = _count(config("transformer", standard))
        without, one = (_count(config(name, hidden)) for hidden in (1, 2))
        ffn = 1 + round((target - without) / (one - without))
        if ffn * max(len(periods), 1) < dim // 2:
            raise ValueError(
                f"{name} at size {size} would need a feed-forward width of {ffn} to be as large as the transformer: "
                "raise dim or give ffn"
            )
    return _make(config(name, ffn))


def levels(model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> list[Level]:
    """The nested system: every level of a model by frequency, fast to slow. With an optimizer, its name stands in the rule."""
    found = model.levels()
    if optimizer is None:
        return found
    from dataclasses import replace

    return [replace(x, rule=type(optimizer).__name__) if x.period.unit == "step" else x for x in found]


def _periods(given: Any) -> tuple[int, ...]:
    """Refuse what is no list of periods; which fit together `Continuum` knows."""
    whole = isinstance(given, list | tuple) and all(isinstance(p, int) and not isinstance(p, bool) for p in given)
    if not whole or not given:
        raise ValueError(f"periods is {given!r}; expected a list of whole numbers of tokens, for example [64, 256]")
    return tuple(given)


def _entry(name: str) -> Entry:
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is not known; expected one of: {', '.join(names())}")
    return _MODELS[name]


def _make(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, [_MODELS[config.name].mixer(config) for _ in range(config.layers)])


def _count(config: ModelConfig) -> int:
    """Parameters, without making them: one block on the meta device stands for all."""
    from dataclasses import replace

    with torch.device("meta"):
        one, two = (sum(p.numel() for p in _make(replace(config, layers=layers)).parameters()) for layers in (1, 2))
    return one + (config.layers - 1) * (two - one)


@register("transformer", "Llama-style transformer: causal softmax attention with rotary positions, SwiGLU, RMSNorm.")
def _transformer(config: ModelConfig) -> Layer:
    return Attention(config.dim, config.heads)


def _spec(system: str, config: ModelConfig, **choices: Any) -> Any:
    """A named memory at a model's size."""
    if config.dim % config.heads:
        raise ValueError(f"dim {config.dim} cannot be split into {config.heads} heads: choose a multiple")
    chunk = {} if config.chunk is None else {"chunk": config.chunk}
    return memory.named(system, key_dim=config.dim // config.heads, **chunk, **choices)


@register(
    "hope",
    "Hope: self-modifying Titans and a continuum of feed-forward levels that learn from the model's own loss "
    "(Nested Learning, §8.3).",
    continuum=True,
)
def _hope(config: ModelConfig) -> Layer:
    return SelfModifying(config.dim, config.heads, _spec("self_modifying", config, unit_values=True))


def _memory_model(name: str, system: str, description: str) -> None:
    def mixer(config: ModelConfig) -> Layer:
        return Memory(config.dim, config.heads, _spec(system, config))

    register(name, description)(mixer)


for _name, _system, _description in (
    ("titans_lmm", "titans", "Titans without attention: deep memory, momentum, decay (Titans, §4.4)."),
    ("ttt", "ttt_mlp", "TTT-MLP as the sequence layer."),
    ("deltanet", "deltanet", "DeltaNet: matrix memory, delta rule."),
    ("gated_deltanet", "gated_deltanet", "Gated DeltaNet: decay, then the delta rule."),
    ("retnet", "retnet", "RetNet's recurrence with a data-dependent scalar decay."),
    ("omeganet", "omeganet", "OmegaNet: deep memory trained on a window (Atlas, §3.2), identity features."),
    ("memora", "memora", "Memora: deep memory on the simplex, KL retention (Miras, eq. 27)."),
):
    _memory_model(_name, _system, _description)
