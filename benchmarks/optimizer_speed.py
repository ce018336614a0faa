"""What a step of an optimizer costs: M3 beside Muon, DGD beside SGD and one product more.

    python benchmarks/optimizer_speed.py              to runs/optimizer_speed
    python benchmarks/optimizer_speed.py --device cuda

First table: `step()` alone over the hidden matrices of a transformer, gradients given, in turns. Goal: M3 at most 1.5 × Muon.
Second: a training step (forward, backward, `step()`) of a perceptron of that width. DGD takes one product per layer more than
SGD, Σ r xᵀ; goal: at most 1.3 × what SGD's step and those products take together. Median and quartiles over rounds of ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from common import Spread, interleaved, machine, screen, spread, told, write
from nestling import optim

GOALS = {"M3": 1.5, "DGD": 1.3}


@dataclass
class Settings:
    """Cost of an optimizer's step.

    width, layers: of the model. tokens: per training step. budget: seconds a table. period: of M3's slow memory.
    cpu_time: count the processor's time in place of the wall clock's, where others use the machine too.
    """

    width: int = 384
    layers: int = 4
    tokens: int = 2048
    budget: float = 20.0
    period: int = 20
    seed: int = 0
    device: str = "cpu"
    cpu_time: bool = False
    out: Path = Path("runs/optimizer_speed")


def matrices(settings: Settings) -> list[nn.Parameter]:
    """Attention and feed-forward matrices of every layer, with gradients."""
    d = settings.width
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * settings.layers
    params = [nn.Parameter(torch.randn(shape, device=settings.device) / d**0.5) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def timed(runs: dict[str, Callable[[], object]], settings: Settings, rounds: int) -> dict[str, list[float]]:
    wait = torch.cuda.synchronize if settings.device.startswith("cuda") else lambda: None

    def of(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            run()
            wait()

        return whole

    ready = tuple(of(run) for run in runs.values())
    for run in ready:
        run()
    clock = time.process_time if settings.cpu_time else time.perf_counter
    found = interleaved(ready, budget=settings.budget, least=rounds, most=2000, clock=clock)
    return {name: list(times) for name, times in zip(runs, zip(*found, strict=True), strict=True)}


def steps(settings: Settings) -> list[dict[str, Any]]:
    """`step()` alone; M3's over whole periods, so that the slow memory's part is in it."""
    makers = {
        "SGD, momentum (torch)": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        "AdamW (torch)": lambda p: torch.optim.AdamW(p, 1e-3),
        "AdamMemory": lambda p: optim.AdamMemory(p, 1e-3),
        "PreconditionedMomentum": lambda p: optim.PreconditionedMomentum(p, 1e-3),
        "DeltaMomentum": lambda p: optim.DeltaMomentum(p, 1e-3),
        "FeatureMomentum": lambda p: optim.FeatureMomentum(p, 1e-3),
        "DeepMomentum": lambda p: optim.DeepMomentum(p, 1e-3),
        "Muon (torch, bfloat16)": lambda p: torch.optim.Muon(p, 1e-3),
        "Muon": lambda p: optim.Muon(p, 1e-3),
        "M3": lambda p: optim.M3(p, 1e-3, period=settings.period),
    }
    runs = {}
    for name, make in makers.items():
        optimizer = make(matrices(settings))
        runs[name] = optimizer.step
    times = timed(runs, settings, 2 * settings.period)
    mean = {name: sum(t) / len(t) for name, t in times.items()}  # of M3: whole periods, nearly
    return [
        {
            "name": name,
            "seconds": mean[name],
            "quartiles": spread(t)._asdict(),
            "to_muon": mean[name] / mean["Muon"],
            "rounds": len(t),
        }
        for name, t in times.items()
    ]


def training(settings: Settings) -> list[dict[str, Any]]:
    """A whole training step, and the products that DGD adds."""
    d = settings.width
    x = torch.randn(settings.tokens, d, device=settings.device)

    def net() -> nn.Module:
        torch.manual_seed(settings.seed)
        parts = [part for _ in range(settings.layers) for part in (nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))]
        return nn.Sequential(*parts).to(settings.device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def once() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return once

    layers = [layer for layer in net() if isinstance(layer, nn.Linear)]
    pairs = [(torch.randn(settings.tokens, w.in_features, device=settings.device), w.out_features) for w in layers]
    made = [(seen, torch.randn(settings.tokens, out, device=settings.device)) for seen, out in pairs]

    def products() -> None:
        for seen, read in made:
            seen.mT @ read

    runs: dict[str, Callable[[], object]] = {"one product per layer": products}
    model = net()
    runs["SGD (torch)"] = step(model, torch.optim.SGD(model.parameters(), 1e-4))
    for form in ("normalized", "exact"):
        model = net()
        runs[f"DGD {form}"] = step(model, optim.DGD(model, 1e-4, form=form))
    times = timed(runs, settings, 10)
    base = [a + b for a, b in zip(times["SGD (torch)"], times["one product per layer"], strict=True)]
    return [
        {
            "name": name,
            "seconds": spread(t).mid,
            "ratio": spread([a / b for a, b in zip(t, base, strict=True)])._asdict(),
            "rounds": len(t),
        }
        for name, t in times.items()
    ]


def show(alone: list[dict[str, Any]], whole: list[dict[str, Any]], settings: Settings, console: Console) -> None:
    title = f"step() over {settings.layers} layers of width {settings.width}; goal for M3 ≤ {GOALS['M3']} × Muon"
    table = Table(title=title, title_justify="left")
    for heading in ("", "mean ms", "median (quartiles) ms", "× Muon", "rounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in alone:
        quartiles = Spread(*(1e3 * v for v in row["quartiles"].values()))
        table.add_row(
            row["name"], f"{1e3 * row['seconds']:.2f}", str(quartiles), f"{row['to_muon']:.2f}", str(row["rounds"])
        )
    console.print(table)
    title = f"training step, {settings.tokens} tokens; goal for DGD normalized ≤ {GOALS['DGD']} × (SGD + products)"
    table = Table(title=title, title_justify="left")
    for heading in ("", "median ms", "× (SGD + products) (quartiles)", "rounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in whole:
        table.add_row(row["name"], f"{1e3 * row['seconds']:.2f}", str(Spread(**row["ratio"])), str(row["rounds"]))
    console.print(table)


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    words = machine(settings.seed)
    if settings.device.startswith("cuda"):
        words["device"] = torch.cuda.get_device_name()
    console = screen(120, words)
    alone, whole = steps(settings), training(settings)
    show(alone, whole, settings, console)
    write(
        settings.out / "optimizer_speed.json",
        {"machine": words, "settings": told(settings), "goals": GOALS, "steps": alone, "training": whole},
    )
    console.print(f"Written: {settings.out}/optimizer_speed.json", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
