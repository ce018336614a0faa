"""Models by name and size. A new architecture is one entry in a file of `zoo`, which says what its blocks are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from nestling.layers import Attention, Level
from nestling.layers.low_rank import pays
from nestling.models import nest
from nestling.models.block import Block, ModelConfig
from nestling.models.lm import LanguageModel


@dataclass(frozen=True)
class Size:
    """What a size gives every model, in tokens where it is a time.

    chunk    anchoring period of chunk-wise memories
    periods  of the levels of a continuum
    window   of sliding-window attention
    shard    of TNT: between two resets of its local memories, and the global memory's chunk
    ffn      hidden width of the transformer's feed-forward network, which says how many parameters models of this size have;
             None: 8/3 of the width, so that its three matrices weigh as much as two of width 4
    narrow   heads of models whose memories' initial weights would leave no room for levels as wide as the model, as these weigh
             the more the wider a head is; None: as many as the others
    """

    dim: int
    layers: int
    heads: int
    chunk: int
    periods: tuple[int, ...]
    window: int
    shard: int
    ffn: int | None = None
    narrow: int | None = None


SIZES = {
    "tiny": Size(32, 2, 4, 4, (4, 8), 6, 8, ffn=128),
    "small": Size(192, 4, 4, 64, (64, 256), 128, 128, narrow=8),
    "base": Size(384, 8, 6, 16, (64, 256, 1024), 256, 512, narrow=8),
    "340M": Size(1024, 24, 16, 64, (512, 2048, 8192), 1024, 2048),
    "760M": Size(1536, 24, 16, 64, (512, 2048, 8192), 1024, 2048),
    "1.3B": Size(2048, 24, 16, 64, (512, 2048, 8192), 1024, 2048),
}
"""tiny is for tests (its feed-forward network is wider than usual: gates and initial memories weigh more in narrow models),
small (about 2 M parameters) for a laptop; the large ones are the papers' (Miras, Table 5), their periods and window ours."""

SLACK = 0.01
"""Share of its parameters that a model may have too many, where its feed-forward networks are then as wide as the model."""
PERSISTENT = 4
"""Persistent tokens, where a model has them (Titans does not say how many)."""

Setting = Literal[
    "chunk",
    "periods",
    "window",
    "persistent",
    "locals",
    "refined",
    "shard",
    "global_chunk",
    "chunk_others",
    "network",
    "adaptive",
    "dgd",
    "momentum",
    "decay",
]
LISTS: tuple[Setting, ...] = ("periods", "locals", "refined")
"""Settings that are lists of whole numbers."""
CONTINUUM = ("arrangement", "outer", "error", "rank", "rule")
"""What every model with periods has beside them; the continuum itself refuses what cannot be."""
CHOICES: dict[Setting, tuple[Any, ...]] = {
    "network": ("mlp", "matrix"),
    "dgd": (True, False),
    "momentum": (False, True),
    "decay": (True, False),
}
"""Settings that are one of a few; the first is the default."""
PROJECTIONS = ("k", "v", "q")
"""What `adaptive` may name."""
Make = Callable[[ModelConfig, int], Block]


@dataclass(frozen=True)
class Entry:
    """A named model.

    description  what it is, in a sentence
    block        its blocks, by number
    settings     those it has beside the widths
    levels       how many of the size's periods it has unless told otherwise, the fastest first; None: all
    narrow       whether it has as many heads as a size has for models of large memories
    """

    description: str
    block: Make
    settings: tuple[Setting, ...]
    levels: int | None
    narrow: bool


_MODELS: dict[str, Entry] = {}


def register(
    name: str, description: str, *settings: Setting, levels: int | None = None, narrow: bool = False
) -> Callable[[Make], Make]:
    """Decorator: a function from a config and a block's number to that block becomes a named model.

    settings: which the model has beside the widths; the others are None (or empty) in its config.
    levels: how many of the size's periods the model has unless told otherwise, the fastest first; None: all.
    narrow: it has as many heads as the size has for models of large memories.
    """

    def add(block: Make) -> Make:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already")
        _MODELS[name] = Entry(description, block, settings, levels, narrow)
        return block

    return add


def names() -> list[str]:
    """All named models."""
    return sorted(_MODELS)


def describe(name: str) -> str:
    """One sentence on a named model."""
    return _entry(name).description


def settings(name: str) -> tuple[str, ...]:
    """What `build` takes for a named model beside dim, layers, heads and ffn."""
    own = _entry(name).settings
    return (*own, *CONTINUUM) if "periods" in own else own


def build(name: str, size: str = "tiny", *, vocab_size: int = 257, **overrides: Any) -> LanguageModel:
    """A fresh model.

    overrides: dim, layers, heads, ffn, and what `settings` says that the model has (see `ModelConfig`). Unless ffn is given it
    is solved for, so that all models of a size have as many parameters as the transformer (to within one hidden unit a
    feed-forward network, or a hundredth where it is then as wide as the model), initial memory states included. Unless told
    otherwise, every feed-forward network of every model is at least as wide as the model.

    Raises ValueError for what cannot be built, and where the feed-forward networks of a block would have to be narrower than
    the model even side by side.
    """
    entry = _entry(name)
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not known; expected one of: {', '.join(SIZES)}")
    known = ["dim", "layers", "heads", "ffn", *settings(name)]
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; expected some of: {', '.join(known)}")
    given = SIZES[size]
    own: dict[Setting, Any] = {
        "chunk": given.chunk,
        "periods": given.periods[: entry.levels],
        "window": given.window,
        "persistent": PERSISTENT,
        "locals": (min(given.chunk, 16),),
        "refined": (),
        "shard": given.shard,
        "global_chunk": given.shard,
        "chunk_others": None,
        "adaptive": PROJECTIONS[:2],
        **{setting: choices[0] for setting, choices in CHOICES.items()},
    }
    heads = (given.narrow if entry.narrow and overrides.get("dim", given.dim) == given.dim else None) or given.heads
    numbers: dict[str, Any] = {"dim": given.dim, "layers": given.layers, "heads": heads}
    numbers |= {setting: own[setting] for setting in entry.settings} | overrides
    others: dict[str, Any] = {setting: _whole(setting, numbers.pop(setting)) for setting in LISTS if setting in numbers}
    others |= {setting: numbers.pop(setting) for setting in CONTINUUM if setting in numbers}
    others |= {setting: _chosen(setting, numbers.pop(setting)) for setting in CHOICES if setting in numbers}
    if "adaptive" in numbers:
        others["adaptive"] = _projections(numbers.pop("adaptive"))
    if numbers.get("chunk_others", 0) is None:
        others["chunk_others"] = numbers.pop("chunk_others")
    for setting, number in (*numbers.items(), ("vocab_size", vocab_size)):
        least = 0 if setting == "persistent" else 1
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{setting} is {number!r}; expected a whole number of at least {least}")
    ffn = numbers.pop("ffn", None)
    config = ModelConfig(name, size, vocab_size=vocab_size, ffn=1 if ffn is None else ffn, **numbers, **others)
    if ffn is None:
        config = replace(config, ffn=_solve(config, given.ffn if config.dim == given.dim else None))
    _check_used(config)
    return _make(config, entry)


def levels(model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> list[Level]:
    """The nested system: every level of a model by frequency, fast to slow, with what it weighs. With an optimizer, its name
    stands in the rule, and what it remembers of gradients are levels too; see `nestling.models.nest.of_optimizer`.
    """
    found = nest.weighed(model, model.levels())
    if optimizer is None:
        return found
    rule = nest.name_of(optimizer)
    found = [replace(x, rule=rule) if x.period.unit == "step" else x for x in found]
    return sorted([*nest.memories(optimizer), *found], key=lambda level: level.period.key())


def _whole(setting: Setting, given: Any) -> tuple[int, ...]:
    """Refuse what is no list of periods; which fit together the layers know."""
    whole = isinstance(given, list | tuple) and all(isinstance(p, int) and not isinstance(p, bool) for p in given)
    if not whole or (not given and setting == "locals"):
        raise ValueError(f"{setting} is {given!r}; expected a list of whole numbers of tokens, for example [64, 256]")
    return tuple(given)


def _chosen(setting: Setting, given: Any) -> Any:
    """Refuse what is none of a setting's choices."""
    if not any(given is choice or (isinstance(given, str) and given == choice) for choice in CHOICES[setting]):
        words = " or ".join(str(choice).lower() for choice in CHOICES[setting])
        raise ValueError(f"{setting} is {given!r}; expected {words}")
    return given


def _projections(given: Any) -> tuple[str, ...]:
    """Refuse what is no list of projections."""
    if not isinstance(given, list | tuple) or any(name not in PROJECTIONS for name in given):
        raise ValueError(
            f"adaptive is {given!r}; expected a list of some of {', '.join(PROJECTIONS)}, for example {['k', 'v']}"
        )
    return tuple(name for name in PROJECTIONS if name in given)


def _check_used(config: ModelConfig) -> None:
    """Refuse settings of a continuum that change nothing, as there is none, or no matrix that a product would be smaller than."""
    for setting in CONTINUUM if not config.periods else ():
        value = getattr(config, setting)
        if value != getattr(ModelConfig, setting):
            raise ValueError(
                f"{setting} is {value!r}, but periods is [], so that there are no levels that it could concern: leave it out, or "
                "give periods"
            )
    shapes = [(2 * config.ffn, config.dim), (config.dim, config.ffn)]
    if config.rank is not None and config.rank >= 1 and not any(pays(shape, config.rank) for shape in shapes):
        words = " and ".join(f"{a} × {b}" for a, b in shapes)
        raise ValueError(
            f"rank is {config.rank}, but a product of that rank is no smaller than any of a level's matrices, {words}: choose a "
            "smaller one, or leave it out to keep them in full"
        )


def _entry(name: str) -> Entry:
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is not known; expected one of: {', '.join(names())}")
    return _MODELS[name]


def _make(config: ModelConfig, entry: Entry) -> LanguageModel:
    return LanguageModel(config, [entry.block(config, number) for number in range(config.layers)])


def _solve(config: ModelConfig, standard: int | None) -> int:
    """Hidden width of the feed-forward networks that makes the model as large as the transformer with `standard`."""
    standard = 8 * round(config.dim / 3) if standard is None else standard
    with torch.device("meta"):  # first, as it knows best what cannot be
        model = _make(replace(config, ffn=1), _entry(config.name))
    if config.dim % 2:
        raise ValueError(
            f"{config.name}: dim is {config.dim}; expected an even number, which the transformer needs that says how wide "
            "feed-forward networks are: choose one, or give ffn"
        )
    target = _transformer(config.dim, config.layers, config.vocab_size, standard)
    networks = [len(model.continuum(number).periods) for number in range(config.layers)]
    unit = 3 * config.dim * sum(networks)  # what one hidden unit more in each of them weighs
    ffn = 1 + round((target - _count(model)) / unit)
    if ffn < config.dim and (config.dim - ffn) * unit <= SLACK * target:
        ffn = config.dim
    if ffn * min(networks) < config.dim:
        raise ValueError(
            f"{config.name} at size {config.size} would need feed-forward networks of width {ffn}, {ffn * min(networks)} a "
            f"block, to be as large as the transformer of {target:,} parameters; expected at least the width of the model, "
            f"{config.dim}: choose a larger dim or size, or give ffn"
        )
    return ffn


@lru_cache(maxsize=64)
def _transformer(dim: int, layers: int, vocab_size: int, ffn: int) -> int:
    """Parameters of the transformer that sets the size; as many with any number of heads."""
    heads = 1
    config = ModelConfig("transformer", "", dim, layers, heads, vocab_size, ffn)
    with torch.device("meta"):
        return _count(LanguageModel(config, [Block(config, Attention(dim, heads)) for _ in range(layers)]))


def _count(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.parameters())
