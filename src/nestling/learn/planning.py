"""What a model will cost before it is trained: FLOPs, activations and state, counted on tensors without data.

The model's own code runs at its own width and length on fake tensors (shapes, no numbers), so that whatever a layer does is
counted and none has to describe itself. Only the number of blocks is scaled, see `plan`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nestling import models, native
from nestling import state as fast
from nestling.memory.cost import FLOPS

WEIGHT = 4  # bytes: slow weights are float32 in every precision
SMALL = 30_000_000  # weights up to which a real model is counted in less time than one without numbers
TRAINING_PASSES = 10  # forward, backward, gradient written; AdamW reads four numbers a weight and writes three


class Counts(NamedTuple):
    """Of one lane that reads a stretch from the start; FLOPs are those of matrix products.

    forward      FLOPs of the whole stretch
    backward     FLOPs of its gradient with respect to the slow weights
    decode       FLOPs of one token more, without a gradient
    activations  bytes that the backward keeps, weights not counted, with the framework's operations
    state        bytes of the lane's state behind the stretch
    """

    forward: float
    backward: float
    decode: float
    activations: float
    state: float


class Plan(NamedTuple):
    """What `plan` finds.

    slow, initial  parameters: all, and how many of them are initial states
    counts         of one lane and the whole model
    traced         numbers of blocks that were traced; more than one: the whole was extrapolated from them
    """

    slow: int
    initial: int
    embedding: int
    length: int
    counts: Counts
    traced: tuple[int, ...]


class Machine(NamedTuple):
    """Peaks of one device: FLOP/s, bytes/s, bytes."""

    flops: float
    bandwidth: float
    memory: float


class Bounds(NamedTuple):
    """Upper bounds in tokens/s over all devices, and lanes whose state fits beside the weights on each."""

    train_compute: float
    train_bandwidth: float
    decode_compute: float
    decode_bandwidth: float
    sessions: int


class _Calm(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what cannot be known without data: no guard has fired."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


def plan(
    name: str,
    size: str,
    length: int,
    dtype: torch.dtype = torch.float32,
    *,
    vocab_size: int = 257,
    training: bool = True,
    **settings: Any,
) -> Plan:
    """Count a named model that reads `length` tokens a lane.

    settings: as of `models.build`, which refuses what cannot be.  dtype: of the slow weights' products.
    training: False leaves out what training alone needs, backward and activations, which are then 0. It is quicker.

    Blocks of a kind cost the same. Where the mix of kinds in the whole is that of the first 1, 2 or 4 blocks, n, models
    of n and 2n blocks are traced and the whole follows, linear in the number of blocks; else all blocks are traced.
    Tracing time grows with length / chunk.
    """
    if length < 1:
        raise ValueError(f"length is {length}; expected at least 1 token")
    with torch.device("meta"):
        whole = models.build(name, size, vocab_size=vocab_size, **settings)
    layers = whole.config.layers
    settings = settings | {"ffn": whole.config.ffn}

    weights = sum(p.numel() for p in whole.parameters())

    def counted(blocks: int) -> Counts:
        # What backward keeps depends on whether numbers can be looked at, as they can on a CPU and not on a GPU.
        real = not training and weights * blocks <= SMALL * layers
        with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
            model = models.build(name, size, vocab_size=vocab_size, **settings | {"layers": blocks})
        with warnings.catch_warnings():  # a fake tensor made from a real one is asked for its gradient
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return count(model, length, dtype, training=training)

    kinds = _kinds(whole)
    traced: tuple[int, ...] = (layers,)
    for unit in (1, 2, 4):
        if layers > 3 * unit and layers % unit == 0:
            with torch.device("meta"):
                part = _kinds(models.build(name, size, vocab_size=vocab_size, **settings | {"layers": unit}))
            if {kind: n * layers // unit for kind, n in part.items()} == kinds:
                traced = (unit, 2 * unit)
                break
    found = [counted(blocks) for blocks in traced]
    if len(traced) == 1:
        counts = found[0]
    else:
        more = layers / traced[0] - 1
        counts = Counts(*(a + more * (b - a) for a, b in zip(*found, strict=True)))
    initial = sum(p.numel() for n, p in whole.named_parameters() if ".initial" in n)
    return Plan(weights, initial, whole.embedding.weight.numel(), length, counts, traced)


def _kinds(model: models.LanguageModel) -> Counter[str]:
    """How many blocks there are of each kind: same modules, same shapes, same learning."""
    return Counter(
        repr(block) + str([(n, tuple(p.shape)) for n, p in block.named_parameters()]) + str(model.continuum(n).window)
        for n, block in enumerate(model.blocks)
    )


def count(
    model: models.LanguageModel, length: int, dtype: torch.dtype = torch.float32, *, training: bool = True
) -> Counts:
    """Count a model of real or fake weights on the CPU, one lane; training as in `plan`."""
    tokens = torch.zeros(1, length, dtype=torch.int64)
    half = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    calm: Any = _Calm  # its constructor has no types
    with native.without(), calm(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        with _kept(model) if training else torch.no_grad() as kept, half:
            logits, state = model(tokens)
        forward = counter.get_total_flops()
        if training:
            logits.sum().backward()
        both = counter.get_total_flops()
        state = fast.detach(state)
        with torch.no_grad(), half:
            model(tokens[:, :1], state)
        decode = counter.get_total_flops() - both
    activations = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept or ()}.values())
    return Counts(forward, both - forward, decode, activations, fast.nbytes(state))


@contextmanager
def _kept(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what autograd saves, without the slow weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept.append(x.detach())  # kept alive, so that no storage is counted under another's address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def bounds(found: Plan, machine: Machine, lanes: int, devices: int = 1) -> Bounds:
    """What peaks allow at best: `lanes` on each of `devices` that share nothing (the exchange of gradients costs extra).

    Training moves each weight ten times a step (AdamW) and each activation twice; decoding reads every weight but the
    embedding once for all lanes of a device, and reads and writes every lane's state.
    """
    c, tokens = found.counts, lanes * found.length
    step = TRAINING_PASSES * WEIGHT * found.slow + 2 * lanes * c.activations
    token = WEIGHT * (found.slow - found.embedding) + 2 * lanes * c.state
    free = machine.memory - WEIGHT * found.slow
    return Bounds(
        devices * machine.flops * found.length / (c.forward + c.backward),
        devices * machine.bandwidth * tokens / step,
        devices * machine.flops / c.decode,
        devices * machine.bandwidth * lanes / token,
        max(int(free // c.state), 0),
    )


def measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy (read and written) on a device: the best of several."""
    import time

    a = torch.ones(2048, 2048, device=device, dtype=dtype)
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)

    def best(work: Any) -> float:
        took, end = float("inf"), time.perf_counter() + seconds
        work()
        while True:
            _wait(device)
            begin = time.perf_counter()
            work()
            _wait(device)
            took = min(took, time.perf_counter() - begin)
            if time.perf_counter() > end:
                return took

    return 2 * 2048**3 / best(lambda: a @ a), 2 * source.nbytes / best(lambda: target.copy_(source))


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
