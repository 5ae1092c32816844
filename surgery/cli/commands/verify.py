"""The command `surgery verify`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..judged import judged
from ..options import (
    AUDIO,
    DEVICE,
    FILE,
    IMAGES,
    JSON,
    MEMORY,
    QUIET,
    RESULT,
    REVISION,
    TASKS,
    TEXT,
    chunking,
    command,
    options,
)  # fmt: skip
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Check a converted checkpoint.")
@click.argument("checkpoint", type=FILE)
@options(
    click.option(
        "--against", metavar="SOURCE", help="What it was converted from: compare every kept tensor, and measure both."
    ),
    TEXT,
    IMAGES,
    AUDIO,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for static scales, as given to run (repeatable), images or recordings; else half.",
    ),
    click.option("--digest", metavar="SHA256", help="The digest of surgery.json that run printed: compare it."),
    click.option("--public-key", type=FILE, metavar="KEY", help="Check the signature of all files by this key (PEM)."),
    click.option(
        "--require", type=click.Choice(["verified"]), help="Fail (1) unless it was verified when it was written."
    ),
    TASKS, chunking(None, 2), REVISION, DEVICE, MEMORY,
    click.option("--junit", type=RESULT, metavar="FILE", help="Write gates and checks as JUnit XML."),
    click.option("--summary", type=RESULT, metavar="FILE", help="Write what was found as Markdown, as for CI jobs."),
    QUIET, JSON,
)  # fmt: skip
def verify(checkpoint, chunks, chunk_length, junit, summary, quiet, json_file, **given) -> int:
    """Check the converted CHECKPOINT: files and tensors; with --text also quality; with --against also the source."""
    inputs = given_paths(
        checkpoint,
        given["against"],
        *given["text"],
        *given["images"],
        *given["audio"],
        *given["calibration"],
        given["public_key"],
    )
    require_result_file(json_file, "--json", given_paths(*inputs, junit, summary))
    require_result_file(junit, "--junit", given_paths(*inputs, summary))
    require_result_file(summary, "--summary", inputs)
    from ...report.verdict import markdown, outcome
    from ...steps.options import VerifyOptions
    from ...verbs.verify import chunking_of
    from ...verbs.verify import verify as verb
    from ...verification.verdict import junit_xml, plain_json
    from ..show.verdict import show_verdict

    cut = None if chunks is None and chunk_length is None else chunking_of(checkpoint, chunks, chunk_length)
    chosen = VerifyOptions(chunking=cut, command=command(), **given)
    screen = Screen(quiet, json_file, junit, summary)
    verdict = verb(checkpoint, chosen, screen.reporter)
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    write_result(junit, "--junit", junit_xml(verdict, checkpoint.name))
    write_result(summary, "--summary", markdown(verdict, str(checkpoint)))
    show_verdict(screen.tables, verdict)
    screen.end(outcome(verdict))
    return judged(verdict, f"do not use {checkpoint}")
