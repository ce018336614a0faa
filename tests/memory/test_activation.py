"""The exponential of the C code's activations: right where it is used, and defined for what is no number."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nestling.native import HEADERS

PROGRAM = r"""
#include "activation.h"
#include <stdio.h>

int main(void) {
    double worst = 0;
    for (double x = -87; x < 88; x += 0.01) {
        double off = fabs(exponential((real)x) / exp((double)(real)x) - 1);
        if (!(off <= worst)) worst = off;
    }
    int nan = exponential(NAN) != exponential(NAN);
    printf("%g %d %d %d\n", worst, nan, exponential(-1e30f) > 0, exponential(INFINITY) < INFINITY);
    return 0;
}
"""
CHECKS = ("-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_exponential_is_right_and_no_number_is_cast(tmp_path: Path) -> None:
    source, program = tmp_path / "exponential.c", tmp_path / "exponential"
    source.write_text(PROGRAM)
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }")
    known = subprocess.run(["cc", *CHECKS, tmp_path / "empty.c", "-o", program], capture_output=True).returncode == 0
    checks = CHECKS if known else ()  # not every compiler has its sanitizers installed
    subprocess.run(
        ["cc", "-O1", *checks, f"-I{HEADERS}", source, "-o", program, "-lm"], check=True, capture_output=True
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    worst, nan, least, most = map(float, done.stdout.split())
    assert worst < 2e-7
    assert (nan, least, most) == (1, 1, 1)
