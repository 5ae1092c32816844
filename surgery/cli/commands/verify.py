"""The command `surgery verify`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..judged import judged
from ..options import DEVICE, FILE, JSON, QUIET, RESULT, REVISION, TASKS, TEXT, chunking, options
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Check a converted checkpoint.")
@click.argument("checkpoint", type=FILE)
@options(
    click.option(
        "--against", metavar="SOURCE", help="What it was converted from: compare every kept tensor, and measure both."
    ),
    TEXT,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for static scales, as given to run (repeatable); else half of --text.",
    ),
    TASKS, chunking(64, 2), REVISION, DEVICE,
    click.option("--junit", type=RESULT, metavar="FILE", help="Write gates and checks as JUnit XML."),
    click.option("--summary", type=RESULT, metavar="FILE", help="Write what was found as Markdown, as for CI jobs."),
    QUIET, JSON,
)  # fmt: skip
def verify(checkpoint, chunks, chunk_length, junit, summary, quiet, json_file, **given) -> int:
    """Check the converted CHECKPOINT: files and tensors; with --text also quality; with --against also the source."""
    inputs = given_paths(checkpoint, given["against"], *given["text"], *given["calibration"])
    require_result_file(json_file, "--json", given_paths(*inputs, junit, summary))
    require_result_file(junit, "--junit", given_paths(*inputs, summary))
    require_result_file(summary, "--summary", inputs)
    from ...live.text import Chunking
    from ...report.verdict import markdown, outcome
    from ...steps.options import VerifyOptions
    from ...verbs.verify import verify as verb
    from ...verification.verdict import junit_xml, plain_json
    from ..show.verdict import show_verdict

    screen = Screen(quiet, json_file, junit, summary)
    verdict = verb(checkpoint, VerifyOptions(chunking=Chunking(chunks, chunk_length), **given), screen.reporter)
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    write_result(junit, "--junit", junit_xml(verdict))
    write_result(summary, "--summary", markdown(verdict, str(checkpoint)))
    show_verdict(screen.tables, verdict)
    screen.end(outcome(verdict))
    return judged(verdict, f"do not use {checkpoint}")
