"""`nestling plan`: what a model costs before it is trained."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nestling.config import SettingError
from nestling.learn.config import Overrides, TrainConfig

if TYPE_CHECKING:
    from nestling.learn.planning import Machine

Peak = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]


@dataclass(frozen=True)
class PlanConfig:
    """Count what a model costs: parameters, state, FLOPs, activations, and the speed that a machine allows at best.

    The model's own code runs without data, so nothing is trained. That takes seconds, or minutes at lengths of many chunks.
    Peaks that are not given are measured on --device.
    """

    model: str = "hope"
    """Which model."""
    size: str = "tiny"
    """How large."""
    overrides: Overrides = field(default_factory=dict)
    """Settings of the model that differ from its size's, for example --set dim=128 layers=4."""
    vocab_size: Number = None
    """Size of the vocabulary (default: that of the bytes that train reads); the papers' models have 32000."""
    length: int = 128
    """Tokens per lane and step, from a lane's start; also where the lane stands when it decodes."""
    lanes: int = 8
    """Texts read side by side on each device."""
    devices: int = 1
    """How many devices, each with a copy of the model; what they exchange is not counted."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products of slow weights."""
    flops: Peak = None
    """Peak of one device in TFLOP/s (10¹²), in the precision chosen."""
    bandwidth: Peak = None
    """Peak of one device's memory in GB/s (10⁹)."""
    memory: Peak = None
    """Memory of one device in GB (10⁹)."""
    device: str = "cpu"
    """Where peaks that are not given are measured: cpu, cuda, cuda:1."""
    json: bool = False
    """Print JSON, in FLOPs, bytes and seconds, instead of a table."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "lanes", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name.replace('_', '-')}: got {value}, but expected a number from 1 on.")
        if "vocab_size" in self.overrides:
            raise SettingError(
                f"set: got vocab_size, which is an option of its own here: --vocab-size {self.overrides['vocab_size']}."
            )
        for name in ("flops", "bandwidth", "memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingError(f"{name}: got {value}, but expected a number above 0.")
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingError(f"dtype: got {self.dtype!r}, but expected one of float32, bfloat16.")


def run(config: PlanConfig) -> int:
    """Print the table, 0."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from nestling.learn import planning
    from nestling.learn.run import build_model
    from nestling.stream import ByteTokenizer

    vocabulary = ByteTokenizer.vocab_size if config.vocab_size is None else config.vocab_size
    with torch.device("meta"):  # says in words what cannot be
        build_model(TrainConfig(model=config.model, size=config.size, overrides=config.overrides), vocabulary)
    machine = _machine(config)
    found = planning.plan(
        config.model,
        config.size,
        config.length,
        getattr(torch, config.dtype),
        vocab_size=vocabulary,
        **config.overrides,
    )
    best = planning.bounds(found, machine, config.lanes, config.devices)
    counts = found.counts
    values = {
        "parameters": found.slow,
        "initial_state_parameters": found.initial,
        "state_bytes_per_lane": round(counts.state),
        "forward_flops_per_token": counts.forward / config.length,
        "backward_flops_per_token": counts.backward / config.length,
        "decode_flops_per_token": counts.decode,
        "activation_bytes_per_device": round(counts.activations * config.lanes),
        "train_tokens_per_second_by_compute": best.train_compute,
        "train_tokens_per_second_by_bandwidth": best.train_bandwidth,
        "decode_tokens_per_second_by_compute": best.decode_compute,
        "decode_tokens_per_second_by_bandwidth": best.decode_bandwidth,
        "sessions_per_device": best.sessions,
    }
    if config.json:
        head = {name: getattr(config, name) for name in ("model", "size", "length", "lanes", "devices", "dtype")}
        head["vocab_size"] = vocabulary
        print(json.dumps(head | {"machine": machine._asdict(), "blocks_traced": found.traced} | values, indent=1))
        return 0
    table = Table(
        title=f"{config.model} {config.size}, vocabulary of {vocabulary:,}: {config.length:,} tokens in {config.lanes} lanes on "
        f"each of {config.devices} device(s), {config.dtype}",
        title_justify="left",
        show_header=False,
    )
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for name, value in values.items():
        words = name.replace("_", " ").replace("flops", "FLOPs")
        table.add_row(words, _readable(value, "B" if "bytes" in name else ""))
    console = Console()
    console.print(table)
    console.print(
        f"Peaks of a device: {_readable(machine.flops, 'FLOP/s')}, {_readable(machine.bandwidth, 'B/s')}, "
        f"{_readable(machine.memory, 'B')} of memory. Tokens per second are upper bounds over all devices.\n"
        "FLOPs are those of matrix products. A decoded token closes no chunk; activations are those of PyTorch's own operations.",
        highlight=False,
    )
    return 0


def _machine(config: PlanConfig) -> Machine:
    """The peaks that are given, the rest measured."""
    import torch

    from nestling.learn.planning import Machine, measured
    from nestling.learn.run import open_device

    flops, bandwidth, memory = (
        None if given is None else given * unit
        for given, unit in ((config.flops, 1e12), (config.bandwidth, 1e9), (config.memory, 1e9))
    )
    if flops is None or bandwidth is None or memory is None:
        device = open_device(config.device)
        if memory is None and device.type == "cuda":
            memory = float(torch.cuda.get_device_properties(device).total_memory)
        elif memory is None and device.type == "cpu" and hasattr(os, "sysconf"):
            memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if memory is None:
            raise SettingError(f"memory: that of {config.device} cannot be asked for: give --memory in GB.")
        if flops is None or bandwidth is None:
            rate, moved = measured(device, getattr(torch, config.dtype))
            flops, bandwidth = flops or rate, bandwidth or moved
    return Machine(flops, bandwidth, memory)


def _readable(value: float, unit: str) -> str:
    """Three digits and a prefix; whole numbers below a thousand as they are."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
