"""What every test shares: Hypothesis profiles, one thread per process, the `gpu` marker, and what the C code has read."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from nestling.memory.native.lanes import Lanes

# "fast" draws the same few examples on every run, so that a red test is never luck; "deep" explores.
settings.register_profile("fast", derandomize=True, max_examples=6, deadline=None)
settings.register_profile(
    "deep", max_examples=200, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deep" if os.environ.get("NESTLING_DEEP") == "1" else "fast")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs the C code has read of the lane that has most, scan after scan: tiles, or single tokens where it goes so."""
    seen: list[int] = []
    outputs = Lanes.outputs

    def counting(self: Lanes, *arguments: object) -> object:
        found = outputs(self, *arguments)
        if found is not None:
            seen.append(self.cut.table.shape[1])
        return found

    monkeypatch.setattr(Lanes, "outputs", counting)
    return seen
