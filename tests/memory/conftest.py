"""What several tests of memories watch."""

from __future__ import annotations

import pytest

from nestling.memory.native.lanes import Lanes


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
