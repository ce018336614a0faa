"""`nestling doctor`: is everything here that Nestling needs, and does it work?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from nestling.config import SettingError


@dataclass(frozen=True)
class DoctorConfig:
    """Look at Python, PyTorch, threads, speed, devices, extras and disk, and train for a few steps as a test.

    Exit code 0: everything needed works. 1: something is broken; the line says what to do.
    """

    device: str = "cpu"
    """Device of the self-test: cpu, cuda, mps."""


@dataclass(frozen=True)
class Finding:
    """One line of the table; `ok` None means: nice to have, and not there."""

    name: str
    ok: bool | None
    text: str


EXTRAS = {
    "hub": "transformers",
    "serve": "fastapi",
    "quant": "torchao",
    "data": "datasets",
    "eval": "lm_eval",
    "track": "trackio",
    "cloud": "obstore",
    "bench": "sklearn",
    "cuda": "triton",
    "ray": "ray",
}


def run(config: DoctorConfig) -> int:
    """Check one thing after the other, print what was found; 1 if something is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"nestling {version('nestling')}", title_justify="left", show_header=False)
    findings = []
    checks: list[Callable[[], Finding]] = [_python, _torch, _threads, _speed, _native, _devices, _extras, _disk]
    checks.append(partial(_self_test, config.device))
    for check in checks:
        try:
            finding = check()
        except Exception as error:  # whatever breaks is what this command is for telling
            name = getattr(check, "__name__", "self-test").strip("_")
            told = str(error) if isinstance(error, SettingError) else f"{type(error).__name__}: {error}"
            finding = Finding(name, False, told)
        findings.append(finding)
        mark = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]–[/]"}[finding.ok]
        table.add_row(finding.name, mark, escape(finding.text))
    console = Console()
    console.print(table)
    broken = [finding.name for finding in findings if finding.ok is False]
    console.print(
        f"Broken: {', '.join(broken)}" if broken else "Everything needed works. Try: nestling train --minutes 3"
    )
    return 1 if broken else 0


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    return Finding("python", sys.version_info >= (3, 11), text)


def _torch() -> Finding:
    import torch

    return Finding(
        "torch", True, f"{torch.__version__}, numpy {version('numpy')}, safetensors {version('safetensors')}"
    )


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    hint = "" if threads <= cores else "; more threads than cores is slow: set OMP_NUM_THREADS or --threads"
    return Finding("threads", True if threads <= cores else None, f"{threads} on {cores} cores{hint}")


def _speed() -> Finding:
    import torch

    size, best = 768, float("inf")
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    blas = "MKL" if mkl else "OpenBLAS or other"
    return Finding("matmul", True, f"{2 * size**3 / best / 1e9:.0f} GFLOP/s in float32 on the CPU ({blas})")


def _native() -> Finding:
    from nestling import native

    text = native.status()
    on = text.startswith("on")
    hint = "" if on else "; memories then train up to several times slower on the CPU"
    return Finding("code in C", True if on else None, text + hint)


def _devices() -> Finding:
    import torch

    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("Apple MPS")
    return Finding("accelerator", True if found else None, ", ".join(found) or "none: everything runs on the CPU")


def _extras() -> Finding:
    present = [extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module) is not None]
    absent = [extra for extra in EXTRAS if extra not in present]
    text = f"installed: {', '.join(present) or 'none'}"
    return Finding(
        "extras",
        True if present else None,
        text + (f"; for more: pip install 'nestling[{absent[0]}]'" if absent else ""),
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    with tempfile.NamedTemporaryFile(dir=Path.cwd()):
        pass
    hint = "" if free > 1e9 else "; a run needs some hundred MB: make room"
    return Finding("disk", free > 2e8, f"{free / 1e9:.1f} GB free in {Path.cwd()}{hint}")


def _self_test(device: str) -> Finding:
    """Train a tiny model for two steps, go on for two more from its checkpoint, load it, and let it write."""
    import io

    from rich.console import Console

    from nestling import learn, models

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        text.write_text("Nestlings learn while they listen. " * 40, encoding="utf-8")
        config = learn.TrainConfig(
            model=models.names()[0],
            out=Path(temporary) / "run",
            data=(str(text),),
            tokens=64,
            lanes=2,
            length=16,
            eval_documents=1,
            device=device,
        )
        quiet = Console(file=io.StringIO())
        result = learn.train(config, quiet)
        run = learn.load_run(result.out, device)
        written = [token for token, _ in learn.generate(run.model, [run.tokenizer.bos], count=4)]
    works = result.step == 2 and len(written) == 4 and result.bits_per_byte < 20
    return Finding(
        "self-test", works, f"trained, saved, loaded and wrote on {device} in {time.perf_counter() - start:.1f} s"
    )
