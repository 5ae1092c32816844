"""What a verdict comes to: the exit code, and the sentence for standard error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import asked, reached
from .show.console import complain


def judged(verdict: Mapping[str, Any], way_out: str) -> int:
    """The exit code; where it is not 0, a sentence on standard error says what failed first."""
    failed = [(3, f"{c['name']}: {c['detail']}") for c in verdict["integrity"]["checks"] if not c["passed"]]
    failed += [
        (1, f"the gate {g['name']} failed, {reached(g)} is not {asked(g)}") for g in verdict["gates"] if not g["passed"]
    ]
    failed += [(1, f"{c['name']}: {c['detail']}") for c in verdict.get("required", ()) if not c["passed"]]
    if not failed:
        return 0
    code, sentence = failed[0]
    if not verdict["gates"] and code == 1:  # nothing was found to be wrong, but less was proved than is required
        way_out = "verify it against its source on text, or convert it anew"
    complain(f"{sentence.rstrip('.')}; {way_out}")
    return code
