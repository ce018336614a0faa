"""What a layer's weights saw: inputs x, products r = W x and errors δ = ∇_y L of linear, embedding and convolution layers, one
row per token.

Sums are taken while gradients flow back, so that only what a loss was made of counts: several backward passes before a step
(accumulation, shared weights) add up, evaluation adds nothing.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory.norm import EPS
from nestling.memory.rules.delta import erasure

Layer = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Sum = Literal["erased", "gram", "errors"]


@dataclass
class Seen:
    """Sums over the tokens that one weight has seen since the last step.

    count    tokens of linear layers and convolutions
    erased   Σ r xᵀ, or Σ r x̂ᵀ/‖x‖ for unit inputs, in the weight's shape
    gram     Σ x xᵀ `[group, in, in]`, or Σ ‖δ‖² x xᵀ
    used     tokens of an embedding
    uses     how often each row of an embedding was one `[vocabulary]`, or Σ ‖δ‖² of its uses
    unit     what errors are measured in, the largest entry of any: their squares stay in range
    """

    count: int = 0
    erased: Tensor | None = None
    gram: Tensor | None = None
    used: int = 0
    uses: Tensor | None = None
    unit: Tensor | None = None

    def add(self, other: Seen) -> None:
        """Take in what another has seen of the same weight."""
        if self.unit is not None and other.unit is not None:
            unit = torch.maximum(self.unit, other.unit)
            self._measure(unit)
            other._measure(unit)
        for field in fields(self):
            own, new = getattr(self, field.name), getattr(other, field.name)
            if field.name == "unit":
                self.unit = new if own is None else own
            elif new is not None:
                setattr(self, field.name, new if own is None else own + new)

    def _measure(self, unit: Tensor) -> None:
        """Change to a unit that is no smaller."""
        assert self.unit is not None
        ratio = torch.where(unit > 0, self.unit / unit, 1.0).square()
        self.gram = None if self.gram is None else self.gram * ratio
        self.uses = None if self.uses is None else self.uses * ratio
        self.unit = unit


class Capture:
    """Hooks on every layer of a module.

    sums        which sums are needed: "erased", "gram", or "errors", the gram whose tokens count by ‖δ‖²
    normalize   divide every input by its norm
    """

    def __init__(self, module: nn.Module, sums: Sum, normalize: bool) -> None:
        self.sums, self.normalize = sums, normalize
        self.seen: dict[Tensor, Seen] = {}
        self.names: dict[Tensor, str] = {}
        self.sides: dict[Tensor, set[str]] = {}
        self.made: list[str] = []
        """Names of weights that are no parameters, but made of some in every pass."""
        self._handles: list[Any] = []
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.watch(module)

    def watch(self, module: nn.Module) -> None:
        """Put hooks on the module's layers that have none yet."""
        own = weakref.ref(self)  # a module that outlives its optimizer does not keep it

        def note(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            capture = own()
            if capture is None or not torch.is_grad_enabled() or not output.requires_grad:
                return
            if layer.weight not in capture.names or not layer.weight.requires_grad:
                return
            x, version = (inputs[0] if inputs else named["input"]).detach(), output._version
            y = output.detach() if capture.sums == "erased" else None

            def take_in(grad: Tensor) -> None:
                # What a layer after this one has overwritten, as activations in place do, is W x no more.
                capture.add(layer, x, None if y is None or y._version != version else y, grad)

            output.register_hook(take_in)

        for name, layer in module.named_modules():
            if not isinstance(layer, LAYERS) or layer in self._watched:
                continue
            self._watched.add(layer)
            full = f"{name}.weight" if name else "weight"
            if not isinstance(layer.weight, nn.Parameter):
                self.made.append(full)
                continue
            self.names.setdefault(layer.weight, full)
            self.sides.setdefault(layer.weight, set()).add("rows" if isinstance(layer, nn.Embedding) else "columns")
            self._handles.append(layer.register_forward_hook(note, with_kwargs=True))

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def add(self, layer: Layer, x: Tensor, y: Tensor | None, errors: Tensor) -> None:
        """Take in one call of a layer: its input, its output if that is still there, and the loss's gradient by the output."""
        new = Seen()
        weigh: Tensor | None = None
        if self.sums == "errors":
            new.unit = (
                errors.abs().amax().to(_up(errors)) if errors.numel() else errors.new_zeros((), dtype=_up(errors))
            )
            errors = errors.to(_up(errors)) / torch.where(new.unit == 0, 1.0, new.unit)
        if isinstance(layer, nn.Embedding):
            real = torch.ones_like(x, dtype=torch.bool) if layer.padding_idx is None else x != layer.padding_idx
            used = x[real]
            if self.sums == "errors":
                weigh = errors[real].square().sum(-1).flatten()
            new.used = used.numel()
            new.uses = torch.bincount(used.flatten(), weigh, layer.num_embeddings).to(_up(layer.weight))
        else:
            self._add_rows(new, layer, x, y, errors)
        if layer.weight in self.seen:
            self.seen[layer.weight].add(new)
        else:
            self.seen[layer.weight] = new

    def _add_rows(self, new: Seen, layer: Layer, x: Tensor, y: Tensor | None, errors: Tensor) -> None:
        seen, groups = tokens(layer, x.to(_up(x)))
        new.count = seen.shape[1]
        if self.sums == "errors":
            new.gram = erasure(seen, seen, outputs(layer, errors, groups).square().sum(-1, keepdim=True))
            return
        square = seen.square().sum(-1, keepdim=True) + EPS**2
        if self.sums == "gram":
            new.gram = erasure(seen, seen, 1 / square if self.normalize else 1.0)
            return
        if y is not None and y.dtype == _up(y) == layer.weight.dtype:
            read = answers(layer, y, groups)
        else:  # what a low precision has rounded away would be missing from W itself
            weight = layer.weight.to(_up(layer.weight)).reshape(groups, -1, seen.shape[-1])
            read = seen.to(weight.dtype) @ weight.mT
        new.erased = erasure(seen, read, 1 / square if self.normalize else 1.0).mT.reshape(layer.weight.shape)


def tokens(layer: Layer, x: Tensor) -> tuple[Tensor, int]:
    """Inputs as rows `[group, token, in]`: for a convolution the patch under every output place, padded as it pads."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]), 1
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    lanes, width = x.shape[0], layer.in_channels // layer.groups
    places = x.shape[2 : 2 + spatial]
    x = x.reshape(lanes, layer.groups, width, math.prod(places), *layer.kernel_size)
    x = x.transpose(2, 3).flatten(3)  # [lane, group, place, in · kernel]
    return x.transpose(0, 1).reshape(layer.groups, lanes * math.prod(places), -1), layer.groups


def outputs(layer: Layer, y: Tensor, groups: int) -> Tensor:
    """Outputs, or their gradients, as rows `[group, token, out]`, in the order of `tokens`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    y = y if y.dim() == len(layer.kernel_size) + 2 else y[None]
    y = y.flatten(2)
    return y.reshape(y.shape[0], groups, -1, y.shape[-1]).permute(1, 0, 3, 2).reshape(groups, -1, y.shape[1] // groups)


def answers(layer: Layer, y: Tensor, groups: int) -> Tensor:
    """Outputs without bias as rows."""
    found = outputs(layer, y, groups)
    assert not isinstance(layer, nn.Embedding)
    return found if layer.bias is None else found - layer.bias.view(groups, 1, -1)


def _up(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
