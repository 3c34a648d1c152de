"""A sample of what ``tools/chaos/faults.py`` breaks; ``nox -s faults`` is the long form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "chaos" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork a process")
@pytest.mark.parametrize(
    "kinds", [["kills:2", "flips:1"], ["full-disk:2", "refused:1", "cut:2"], ["kills-of-two:2", "clock:1"]]
)
def test_a_sample_goes_on_to_the_same_weights(kinds):
    done = subprocess.run(
        [sys.executable, str(TOOL), *kinds, "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(", 0 findings") == len(kinds)
