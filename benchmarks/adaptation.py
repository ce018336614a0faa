"""Several runs of `nestling demo` with different seeds, pooled: does it bring something to keep learning while reading?

    for seed in 0 1 2; do nestling demo --tokens 2000000 --seed $seed --out runs/adaptation/$seed; done
    python benchmarks/adaptation.py runs/adaptation/0 runs/adaptation/1 runs/adaptation/2 --out runs/adaptation

Prints the table of the pooled runs (standard errors over documents), the spread over seeds, and writes a plot.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from nestling.bench.adaptation import Adaptation, draw, pool, tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that `nestling demo` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for adaptation.png and adaptation.json")
    given = parser.parse_args()
    results = [Adaptation.load(run / "adaptation.json") for run in given.runs]
    settings = [json.loads(path.read_text()) for run in given.runs for path in sorted(run.glob("*/config.json"))]
    memory = next(config for config in settings if config["model"] != "transformer")
    summaries = [json.loads(path.read_text()) for run in given.runs for path in sorted(run.glob("*/summary.json"))]
    console = Console(width=110)
    pooled = pool(results)
    console.print(f"{memory['model']} {memory['size']}, {len(results)} seeds, settings: {json.dumps(memory)}")
    for summary in summaries:
        console.print({key: value for key, value in summary.items() if not isinstance(value, dict | list)})
    tell(pooled, console)
    for worse in ("erased", "transformer"):
        gains = [float(r.gain("running", worse)[0][-1]) for r in results]
        console.print(
            f"running against {worse} at the last position, seed by seed: {', '.join(f'{g:+.3f}' for g in gains)}"
        )
    again = [float(r.total("second", "running")[0]) for r in results]
    console.print(f"first minus second reading, seed by seed: {', '.join(f'{g:+.3f}' for g in again)}")
    pooled.save(given.out / "adaptation.json")
    title = f"{memory['model']} {memory['size']}, {len(results)} seeds"
    draw(pooled, given.out / "adaptation.png", title=title, segment=memory["length"])


if __name__ == "__main__":
    main()
