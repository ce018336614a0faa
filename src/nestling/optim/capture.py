"""What a layer's weights saw: inputs x and products r = W x of linear, embedding and convolution layers, one row per token.

Sums are taken while gradients flow back, so that only what a loss was made of counts: several backward passes before a step
(accumulation, shared weights) add up, evaluation adds nothing.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory.norm import EPS
from nestling.memory.rules.delta import erasure

Layer = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Sum = Literal["erased", "gram"]


@dataclass
class Seen:
    """Sums over the tokens that one weight has seen since the last step.

    count    tokens of linear layers and convolutions
    erased   Σ r xᵀ, or Σ r x̂ᵀ/‖x‖ for unit inputs, in the weight's shape
    gram     Σ x xᵀ `[group, in, in]`
    used     tokens of an embedding
    uses     how often each row of an embedding was one `[vocabulary]`
    """

    count: int = 0
    erased: Tensor | None = None
    gram: Tensor | None = None
    used: int = 0
    uses: Tensor | None = None


class Capture:
    """Hooks on every layer of a module whose weight is trained.

    sums        which sums are needed: "erased" or "gram"
    normalize   divide every input by its norm
    """

    def __init__(self, module: nn.Module, sums: Sum, normalize: bool) -> None:
        self.sums, self.normalize = sums, normalize
        self.seen: dict[Tensor, Seen] = {}
        self.names: dict[Tensor, str] = {}
        self.sides: dict[Tensor, set[str]] = {}
        self._handles = []
        own = weakref.ref(self)  # a module that outlives its optimizer does not keep it
        for name, layer in module.named_modules():
            if not isinstance(layer, LAYERS) or not layer.weight.requires_grad:
                continue
            self.names.setdefault(layer.weight, f"{name}.weight" if name else "weight")
            self.sides.setdefault(layer.weight, set()).add("rows" if isinstance(layer, nn.Embedding) else "columns")

            def watch(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
                capture = own()
                if capture is None or not torch.is_grad_enabled() or not output.requires_grad:
                    return
                x, y = inputs[0].detach(), output.detach()
                output.register_hook(lambda grad: capture.add(layer, x, y))

            self._handles.append(layer.register_forward_hook(watch))

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def add(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        """Take in one call of a layer: its input and output."""
        found = self.seen.setdefault(layer.weight, Seen())
        if isinstance(layer, nn.Embedding):
            used = x if layer.padding_idx is None else x[x != layer.padding_idx]
            found.used += used.numel()
            uses = torch.bincount(used.flatten(), minlength=layer.num_embeddings).to(_up(layer.weight))
            found.uses = uses if found.uses is None else found.uses + uses
            return
        seen, groups = tokens(layer, x.to(_up(x)))
        found.count += seen.shape[1]
        square = seen.square().sum(-1, keepdim=True) + EPS**2
        if self.sums == "gram":
            gram = erasure(seen, seen, 1 / square if self.normalize else 1.0)
            found.gram = gram if found.gram is None else found.gram + gram
            return
        if y.dtype == _up(y) == layer.weight.dtype:
            read = answers(layer, y, groups)
        else:  # what a low precision has rounded away would be missing from W itself
            weight = layer.weight.to(_up(layer.weight)).reshape(groups, -1, seen.shape[-1])
            read = seen.to(weight.dtype) @ weight.mT
        lost = erasure(seen, read, 1 / square if self.normalize else 1.0).mT.reshape(layer.weight.shape)
        found.erased = lost if found.erased is None else found.erased + lost


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


def answers(layer: Layer, y: Tensor, groups: int) -> Tensor:
    """Outputs without bias as rows `[group, token, out]`, in the order of `tokens`."""
    if isinstance(layer, nn.Linear):
        flat = y.reshape(1, -1, y.shape[-1])
        return flat if layer.bias is None else flat - layer.bias
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    y = y if y.dim() == len(layer.kernel_size) + 2 else y[None]
    y = y.flatten(2)
    if layer.bias is not None:
        y = y - layer.bias[:, None]
    return y.reshape(y.shape[0], groups, -1, y.shape[-1]).permute(1, 0, 3, 2).reshape(groups, -1, y.shape[1] // groups)


def _up(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
