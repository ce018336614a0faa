"""State is data: a few verbs that work on the state of any memory, layer or model.

A state is any nest of NamedTuples, tuples, lists and dicts with tensor leaves, the lane first in every leaf; None and empty
tuples may stand in it. Verbs never look inside further than that. Saved files are safetensors with a JSON description of the
nest; no pickle, no code is run on loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
_CLASSES: dict[str, type] = {}
_GROWS: dict[type, Mapping[str, int]] = {}
T = TypeVar("T", bound=type)


class StateError(ValueError):
    """A state that does not fit, cannot be read, or belongs to another model."""


def register(cls: T, *, grows: Mapping[str, int] | None = None) -> T:
    """Class decorator: let a NamedTuple be rebuilt by `load` under its own name.

    grows: fields whose given dimension grows with the stream (a key-value cache); `stack` and `where` pad these with zeros.
    With it, decorate by `functools.partial(register, grows={"key": 1})` or call `register(Class, grows=…)`.
    """
    known = _CLASSES.setdefault(cls.__name__, cls)
    if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
        raise ValueError(f"two state classes are named {cls.__name__}: rename one")
    _CLASSES[cls.__name__] = cls
    _GROWS[cls] = dict(grows or {})
    return cls


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _like(node: Any, children: Sequence[Any]) -> Any:
    if _is_named(node):
        return type(node)(*children)
    if isinstance(node, dict):
        return dict(zip(node, children, strict=True))
    return type(node)(children)


def _children(node: Any) -> list[Any] | None:
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, tuple | list):
        return list(node)
    return None


def tree_map(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply a function of one leaf of each state; all states must have the same structure."""
    first = states[0]
    if isinstance(first, Tensor):
        if not all(isinstance(s, Tensor) for s in states):
            raise StateError("the states differ in structure: a tensor stands where another has none")
        return function(*states)
    if first is None:
        if any(s is not None for s in states):
            raise StateError("the states differ in structure: one is empty where another is not")
        return None
    children = [_children(s) for s in states]
    if children[0] is None:
        raise StateError(f"a state holds {type(first).__name__}; expected tensors, tuples, lists, dicts or None")
    if any(
        type(s) is not type(first) or c is None or len(c) != len(children[0])
        for s, c in zip(states, children, strict=True)
    ):
        raise StateError("the states differ in structure: they were made by different models or with other settings")
    return _like(first, [tree_map(function, *parts) for parts in zip(*(c or [] for c in children), strict=True)])


def leaves(state: Any) -> list[Tensor]:
    """All tensors, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for child in _children(state) or [] for leaf in leaves(child)]


def growing(state: Any) -> list[bool]:
    """For every tensor, in order, whether it grows with the stream (see `register`)."""
    grows = _GROWS.get(type(state), {})
    names = getattr(state, "_fields", None) or [""] * len(_children(state) or [])
    if isinstance(state, Tensor):
        return [False]
    parts = zip(names, _children(state) or [], strict=True)
    return [name in grows or more for name, child in parts for more in growing(child)]


def lanes(state: Any) -> int:
    """Number of lanes. Raises StateError where leaves disagree or there is none."""
    counts = {leaf.shape[0] for leaf in leaves(state)}
    if len(counts) != 1:
        raise StateError(
            f"the leaves of a state must agree on the number of lanes; they have {sorted(counts) or 'no leaves'}"
        )
    return counts.pop()


def _pad_to(states: Sequence[Any]) -> list[Any]:
    """Bring growing leaves (see `register`) to a common capacity."""
    first = states[0]
    if isinstance(first, Tensor) or first is None:
        return list(states)
    children = [_children(s) or [] for s in states]
    columns = (
        [_pad_to(column) for column in zip(*children, strict=True)] if len({len(c) for c in children}) == 1 else None
    )
    if columns is None:
        raise StateError("the states differ in structure: they were made by different models or with other settings")
    for field, dim in _GROWS.get(type(first), {}).items():
        place = first._fields.index(field)
        column = columns[place]
        size = max(x.shape[dim] for x in column)
        columns[place] = [
            torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, size - x.shape[dim]]) for x in column
        ]
    return [_like(first, [column[i] for column in columns]) for i in range(len(states))]


def stack(states: Sequence[Any]) -> Any:
    """Join the lanes of several states into one."""
    if not states:
        raise StateError("stack needs at least one state")
    return tree_map(lambda *xs: torch.cat(xs), *_pad_to(list(states)))


def take(state: Any, which: Tensor | Sequence[int]) -> Any:
    """Some lanes, by number, in the order given; a lane may be taken more than once."""
    chosen = torch.as_tensor(which, dtype=torch.int64)
    count = lanes(state)
    if chosen.dim() != 1 or (chosen.numel() and not bool(((chosen >= 0) & (chosen < count)).all())):
        raise StateError(
            f"take: lanes {chosen.tolist()} of a state with {count} lanes; expected numbers from 0 to {count - 1}"
        )
    return tree_map(lambda x: x[chosen.to(x.device)], state)


def split(state: Any) -> list[Any]:
    """One state per lane; `stack(split(s))` is s."""
    return [take(state, [lane]) for lane in range(lanes(state))]


def repeat(state: Any, times: int) -> Any:
    """Every lane `times` times, copies side by side: a fork."""
    if times < 1:
        raise StateError(f"repeat: times is {times}; expected at least 1")
    return tree_map(lambda x: x.repeat_interleave(times, 0), state)


def clone(state: Any) -> Any:
    """A copy that shares no memory."""
    return tree_map(lambda x: x.clone(), state)


def detach(state: Any) -> Any:
    """The same values without their history."""
    return tree_map(lambda x: x.detach(), state)


def to(state: Any, device: torch.device | str) -> Any:
    """Move to a device. Positions (int64 leaves named `position`) stay on the CPU, where schedules read them."""
    if isinstance(state, Tensor):
        return state.to(device)
    children = _children(state)
    if children is None:
        return state
    names = getattr(state, "_fields", None) or (list(state) if isinstance(state, dict) else [None] * len(children))
    return _like(state, [c if n == "position" else to(c, device) for n, c in zip(names, children, strict=True)])


def where(mask: Tensor, a: Any, b: Any, *, keep: Sequence[str] = ()) -> Any:
    """Per lane a where the mask (bool `[lane]`) is true, else b. Fields named in `keep` are b's in every lane."""

    def select(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(mask.to(x.device).view(-1, *[1] * (x.dim() - 1)), x, y)

    chosen = _cut(tree_map(select, *_pad_to([a, b])))
    return _keep(chosen, b, keep) if keep else chosen


def _cut(node: Any) -> Any:
    """Growing leaves whose nest also says how long each lane is (`position`), cut behind the longest."""
    children = _children(node)
    if children is None:
        return node
    grows, parts = _GROWS.get(type(node), {}), [_cut(child) for child in children]
    if grows and "position" in node._fields:
        longest = int(node.position.max()) if len(node.position) else 0
        parts = [
            x.narrow(grows[name], 0, min(longest, x.shape[grows[name]])) if name in grows else x
            for name, x in zip(node._fields, parts, strict=True)
        ]
    return _like(node, parts)


def _keep(chosen: Any, b: Any, names: Sequence[str]) -> Any:
    """`chosen` with the fields named in `names` taken from b."""
    if isinstance(chosen, Tensor) or chosen is None:
        return chosen
    fields = getattr(chosen, "_fields", None) or (list(chosen) if isinstance(chosen, dict) else [None] * len(chosen))
    pairs = zip(fields, _children(chosen) or [], _children(b) or [], strict=True)
    return _like(chosen, [theirs if name in names else _keep(mine, theirs, names) for name, mine, theirs in pairs])


def nbytes(state: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def save(path: str | os.PathLike[str], state: Any, *, digests: Mapping[str, str] | None = None) -> None:
    """Write a state to one safetensors file, atomically and durably.

    digests: names and digests of what the state belongs to (model, tokenizer, config); `load` can require them.
    """
    tensors: dict[str, Tensor] = {}
    structure = _describe(state, tensors)
    header = {"format": FORMAT, "structure": structure, "digests": dict(digests or {})}
    content = safetensors.torch.save(tensors, {"nestling": json.dumps(header)})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _describe(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().contiguous().clone()
        return {"tensor": name}
    if node is None:
        return {"none": True}
    children = _children(node)
    if children is None:
        raise StateError(f"a state holds {type(node).__name__}; expected tensors, tuples, lists, dicts or None")
    parts = [_describe(child, tensors) for child in children]
    fields = getattr(node, "_fields", None)
    if fields is not None:
        name = type(node).__name__
        if _CLASSES.get(name) is not type(node):
            raise StateError(f"state class {name} is not registered: decorate it with nestling.state.register")
        return {"class": name, "parts": dict(zip(fields, parts, strict=True))}
    if isinstance(node, dict):
        return {"dict": dict(zip(node, parts, strict=True))}
    return {"tuple" if isinstance(node, tuple) else "list": parts}


def load(
    path: str | os.PathLike[str],
    *,
    expect: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Any:
    """Read what `save` wrote.

    expect        digests that the file must carry; a difference is named
    check_finite  refuse NaN and Inf in floating point leaves

    Raises StateError where the file is damaged, of another format, or belongs to something else; FileNotFoundError as usual.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["nestling"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        structure, found, version = header["structure"], header["digests"], header["format"]
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise StateError(f"{path} is not a readable state: {error}") from error
    if version != FORMAT:
        raise StateError(f"{path} has state format {version}; this version of Nestling reads format {FORMAT}")
    for name, digest in (expect or {}).items():
        if found.get(name) != digest:
            raise StateError(f"{path} belongs to another {name} (digest {found.get(name)}; expected {digest})")
    for name, tensor in tensors.items():
        if check_finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StateError(f"{path} holds NaN or Inf in tensor {name}: the state is damaged")
    try:
        state = _rebuild(structure, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{path} does not describe a state: {error}") from error
    return to(state, device)


def _rebuild(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind,) = set(node) - {"parts"}
    content = node[kind]
    if kind == "tensor":
        return tensors[content]
    if kind == "none":
        return None
    if kind == "class":
        if content not in _CLASSES:
            raise StateError(f"state class {content} is unknown here: import the package that defines it first")
        return _CLASSES[content](**{field: _rebuild(part, tensors) for field, part in node["parts"].items()})
    if kind == "dict":
        return {key: _rebuild(part, tensors) for key, part in content.items()}
    if kind in ("tuple", "list"):
        parts = [_rebuild(part, tensors) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    raise StateError(f"unknown node {kind!r}")
