"""A few trials of each campaign; `bin/campaign NAME` holds hundreds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts"), [("kill", ["--count", "10"]), ("signals", ["--count", "10", "--starts", "3"])]
)
def test_a_campaign_holds(name: str, counts: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", f"campaigns.{name}", *counts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "0 failures" in done.stdout, done.stdout + done.stderr
