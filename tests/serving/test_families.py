"""Model types in vLLM: an export of each is tried there on random token ids, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.serving import make, vllm_python

from surgery.delivery.vllm_models import PROVED, REFUSED

pytestmark = [pytest.mark.serve, pytest.mark.slow]
ROUNDING = 1e-2  # float32 beside float32, of random weights; the bare original is off by 2 to 13


@pytest.mark.parametrize("kind", PROVED)
def test_family_is_the_same_in_vllm(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path / kind, "--engine-python", vllm_python())
    proof = re.search(r"in vLLM, the largest \|delta log-probability\| is (\S+)\.", made.card)
    assert proof is not None and float(proof[1]) < ROUNDING


def test_no_family_is_both() -> None:
    assert not set(PROVED) & REFUSED.keys()
