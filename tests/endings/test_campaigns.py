"""A few trials of each campaign; `tests/campaigns/*.py` by themselves hold hundreds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts"), [("kill", ["--count", "10"]), ("signals", ["--count", "10", "--starts", "3"])]
)
def test_a_campaign_holds(name: str, counts: list[str]) -> None:
    script = ROOT / "tests" / "campaigns" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *counts], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "0 failures" in done.stdout, done.stdout + done.stderr
