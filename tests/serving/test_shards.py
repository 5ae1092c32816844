"""Under tensor parallelism a rank has the slots of the key/value heads that vLLM gives it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.serving import vllm_python

pytestmark = pytest.mark.serve


@pytest.mark.slow
def test_slots_are_cut_as_vllm_cuts_keys(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    script = Path(__file__).with_name("shards.py")
    ended = subprocess.run([vllm_python(), str(script), str(found)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    cases = json.loads(found.read_text(encoding="utf-8"))
    assert {(heads, ranks) for heads, ranks, *_ in cases} >= {(4, 2), (2, 4)}, "fewer ranks than heads, and more"
    for heads, ranks, slots, projection in cases:
        assert slots == projection, (heads, ranks)
        assert {head for rank in slots for head in rank} == {*range(heads)}
