"""`nestling train`; its settings are `nestling.learn.TrainConfig`."""

from __future__ import annotations

from nestling.learn.config import TrainConfig


def run(config: TrainConfig) -> int:
    """0 when the run is complete; 128 + the signal's number when one stopped it."""
    from nestling.learn.run import train

    result = train(config)
    return 0 if result.interrupted is None else 128 + result.interrupted
