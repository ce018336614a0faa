"""What the settings of the continuum cost: processor time to train, to read and to decode, as ratios to the default.

python benchmarks/continuum_cost.py --model hope_swa --size small
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nestling as nl
from common import interleaved, machine, spread

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "outer=full": {"outer": "full"},
    "outer=2": {"outer": 2},
    "error=local": {"error": "local"},
    "rank=8": {"rank": 8},
    "periods=[]": {"periods": []},
}
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope_swa")
    parser.add_argument("--size", default="small")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lanes", type=int, default=2, help="to train and to read")
    parser.add_argument("--sessions", type=int, default=32, help="lanes that decode side by side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    text = torch.randint(257, (given.lanes, given.length))
    prompt = torch.randint(257, (given.sessions, STEPS))
    models = {name: nl.models.build(given.model, given.size, **chosen) for name, chosen in SETTINGS.items()}

    def train(model: nl.models.LanguageModel) -> None:
        model.zero_grad()
        model(text)[0].square().mean().backward()

    @torch.no_grad()
    def read(model: nl.models.LanguageModel) -> None:
        model(text)

    @torch.no_grad()
    def decode(model: nl.models.LanguageModel) -> None:
        """From the start, so that no window closes."""
        state = model.start(given.sessions)
        for token in prompt.unbind(1):
            _, state = model(token[:, None], state)

    table = Table(title=f"{given.model} {given.size}; ratios to the default in processor time, median and quartiles")
    columns = {
        f"train, {given.lanes} × {given.length}": train,
        f"read, {given.lanes} × {given.length}": read,
        f"decode, {given.sessions} lanes": decode,
    }
    for column in ("", *columns, "state bytes per lane"):
        table.add_column(column)
    found: dict[str, list[str]] = {name: [] for name in models}
    for verb in columns.values():
        runs = tuple((lambda model=model, verb=verb: verb(model)) for model in models.values())
        rounds = interleaved(runs, budget=3600, least=given.rounds, most=given.rounds, clock=time.process_time)
        for place, name in enumerate(models):
            found[name].append(str(spread([times[place] / times[0] for times in rounds])))
    for name, model in models.items():
        table.add_row(name, *found[name], f"{nl.state.nbytes(model.start(1)):,}")
    Console(width=130).print(table)
    print(machine(given.seed))


if __name__ == "__main__":
    main()
