"""What a training run does to the process around it."""

from __future__ import annotations

import torch

from nestling.learn.run import flushing


def test_small_numbers_vanish_during_a_run_and_are_back_after_it() -> None:
    def there() -> bool:
        return bool(torch.tensor(1e-40) * 1.0 != 0)

    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    assert there()
    with flushing():
        assert there() is not can
        with flushing():
            pass
        assert there() is not can, "an inner run leaves the outer one's setting"
    assert there()
