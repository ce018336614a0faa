"""Groups of parameters from a model's levels: which decay, which are hidden matrices, and how often each moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import nn

from nestling.optim import named
from nestling.optim.base import Optimizer
from nestling.optim.joined import Joined
from nestling.optim.periodic import Periodic


class Level(Protocol):
    """What is read of a level (`nestling.layers.Level`)."""

    @property
    def name(self) -> str: ...
    @property
    def moves(self) -> tuple[str, ...]: ...
    @property
    def period(self) -> Any: ...


def split(module: nn.Module, outer: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The parameters of any module in groups for `Muon` and `M3`: hidden matrices ("matrix": None), and the rest (False).

    Hidden matrices are the weights of linear layers and convolutions, but not those shared with an embedding, nor an output
    layer as wide as one, nor what is `outer`: patterns of names, for example ("patches.*", "head.*") of a vision transformer.
    Weights that are several matrices in one, of `Joined` layers and of PyTorch's attention, have groups that say so ("parts").
    Raises ValueError for a pattern that fits nothing.
    """
    hidden = hidden_matrices(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    inside: dict[int, list[nn.Parameter]] = {}
    outside: list[nn.Parameter] = []
    left = set(patterns := tuple(outer))
    for name, p in module.named_parameters():
        fits = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        left -= fits
        (inside.setdefault(hidden[id(p)], []) if id(p) in hidden and not fits else outside).append(p)
    if left:
        raise ValueError(f"outer: {sorted(left)[0]!r} fits no parameter's name")
    made: list[dict[str, Any]] = [
        {"params": ps, "matrix": None} | ({"parts": parts} if parts > 1 else {}) for parts, ps in sorted(inside.items())
    ]
    return made + ([{"params": outside, "matrix": False}] if outside else [])


def hidden_matrices(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[int, int]:
    """The ids of weights that map hidden states to hidden states, and how many matrices each is."""
    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    shared, words = {id(m.weight) for m in embeddings}, {m.num_embeddings for m in embeddings}
    found = {
        id(m.weight): m.parts if isinstance(m, Joined) else 1
        for m in module.modules()
        if isinstance(m, kinds)
        and id(m.weight) not in shared
        and not (isinstance(m, nn.Linear) and m.out_features in words)
    }
    attention = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return found | {id(m.in_proj_weight): 3 for m in attention if m.in_proj_weight is not None}


def groups(
    module: nn.Module,
    levels: Iterable[Level],
    *,
    weight_decay: float = 0.1,
    every: Mapping[str, int] | None = None,
    matrices: bool = True,
) -> list[dict[str, Any]]:
    """One group per level, kind and frequency, with the names of its parameters; each carries its level's name as "level".

    Decay is for the weights of linear maps alone. Gains, biases and embeddings have none, and neither have convolutions and
    initial memories, which start at something other than zero for a reason.

    every: steps between two updates, by the name of a level or a pattern of parameters' names ("blocks.0.*"), the last that
    fits counting; else the level's own period, where that is in steps.
    matrices: say of every group whether it has hidden matrices, and of how many each weight is made, as `Muon` and `M3` read it
    ("matrix", "parts").

    Raises ValueError unless every parameter belongs to one level, and for a pattern that fits nothing.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embeddings
    hidden = hidden_matrices(module)
    left, found = dict(module.named_parameters()), []
    patterns: dict[str, int] = dict(every or {})
    fitting: set[str] = set()
    for pattern, steps in patterns.items():
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"every: {pattern!r} has {steps!r}; expected a whole number of steps, at least 1")
    for level in levels:
        mine = [(name, left.pop(name)) for name in level.moves if name in left]
        if len(mine) != len(level.moves):
            raise ValueError(f"level {level.name!r} claims a parameter that is not there, or that another level has.")
        kinds: dict[tuple[int, bool, bool, int], list[tuple[str, nn.Parameter]]] = {}
        for name, weight in mine:
            fits = [p for p in patterns if p == level.name or fnmatchcase(name, p)]
            fitting.update(fits)
            own = level.period.n if level.period.unit == "step" else 1
            steps = patterns[fits[-1]] if fits else own
            parts = hidden.get(id(weight), 0) if matrices else 1
            kind = (steps, id(weight) not in linear, not parts, parts)
            kinds.setdefault(kind, []).append((name, weight))
        for (steps, plain, outer, parts), members in sorted(kinds.items(), key=lambda item: item[0]):
            group: dict[str, Any] = {"params": members, "weight_decay": weight_decay * (not plain), "level": level.name}
            if matrices:
                group["matrix"] = False if outer else None
                if parts > 1:
                    group["parts"] = parts
            found.append(group | {"every": steps})
    if left:
        raise ValueError(f"no level claims {', '.join(left)}.")
    if unused := [p for p in patterns if p not in fitting]:
        raise ValueError(f"every: {unused[0]!r} is no level and fits no parameter's name")
    return found


def from_levels(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    every: Mapping[str, int] | None = None,
    horizon: float | None = None,
    weight_decay: float = 0.1,
    **settings: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the levels of a model that has `levels()`, as those of `nestling.models` do.

    optimizer       by name, see `nestling.optim.names()`
    every           steps between two updates of what a pattern names; see `groups`. None: all at every step
    horizon         outer steps that every group's momentum reaches back, p/(1−β); None: the share β that the optimizer has, of
                    each group's own updates
    weight_decay    of linear maps alone
    settings        lr (default: `named.default_lr`), and whatever else the optimizer takes

    Returns the optimizer itself where all groups move at every step, else a `Periodic` round it.
    Raises ValueError for names, patterns and settings that are not known.
    """
    if not callable(getattr(model, "levels", None)):
        raise TypeError(
            f"from_levels got {type(model).__name__}, which has no levels(); use split(module) for its groups"
        )
    matrices = named.takes_matrices(optimizer)
    made = groups(model, model.levels(), weight_decay=weight_decay, every=every, matrices=matrices)  # type: ignore[operator]
    slow = any(group["every"] > 1 for group in made)
    for group in made:
        if not slow:
            del group["every"]
    settings = {"lr": named.default_lr(optimizer), **settings}
    found = named.make(optimizer, model, made, **settings)
    if horizon is not None:
        _reach(found, horizon)
    return Periodic(found) if slow else found


def _reach(optimizer: torch.optim.Optimizer, horizon: float) -> None:
    """Give every group the share of momentum that reaches `horizon` outer steps back."""
    if not horizon >= 1:
        raise ValueError(f"horizon is {horizon}; expected at least 1 step")
    for group in optimizer.param_groups:
        share = max(0.0, 1 - group.get("every", 1) / horizon)
        names = [name for name in ("momentum", "betas", "adam_betas") if name in group]
        if not names:
            raise ValueError(f"horizon: {type(optimizer).__name__} has no momentum to set")
        for name in names:
            group[name] = share if name == "momentum" else (share, group[name][1])
        if isinstance(optimizer, Optimizer):
            try:
                optimizer._check(group)
            except ValueError as error:
                raise ValueError(f"horizon of {horizon} steps, at {group.get('every', 1)} a step: {error}") from error
