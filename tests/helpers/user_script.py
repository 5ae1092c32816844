"""What somebody writes who has surgery installed. `bin/check types` reads it, and a test runs it."""

from __future__ import annotations

from pathlib import Path

import surgery
from surgery import Chunking, RunOptions, SurgeryError, VerifyOptions
from surgery.report import write_report

FEW = Chunking(4, 32)


def convert(recipe: dict[str, object], source: str, out: Path, text: str) -> tuple[surgery.Verdict, surgery.Survey]:
    """Every verb that reads a checkpoint, with everything given as lightly as it can be."""
    planned: surgery.Plan = surgery.plan(recipe, source)
    assert planned.to_dict()["sites"] > 0
    verdict = surgery.run(recipe, source, out, text=text, chunking=FEW)
    assert verdict is not None and verdict["passed"]
    again = surgery.verify(out, against=source, text=Path(text), chunking=FEW)
    whole = surgery.verify(out, VerifyOptions(against=source, text=[text], chunking=FEW))
    assert again["perplexity"]["converted"]["ppl"] == whole["perplexity"]["converted"]["ppl"]
    survey = surgery.scan(out, text=(text,), chunking=FEW)
    write_report([survey], out.with_suffix(".html"), verdict)
    return again, survey


def refusal(source: str, out: str) -> str:
    """What a person is told who asks for what is not there."""
    try:
        surgery.run("eab", source, out, RunOptions(text="missing.txt"), keep_failed="kept")
    except SurgeryError as error:
        return str(error)
    return ""
