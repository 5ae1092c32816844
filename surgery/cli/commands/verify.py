"""The command `surgery verify`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..judged import judged
from ..options import DEVICE, FILE, JSON, REVISION, TASKS, TEXT, chunking, command, options
from ..options import given as given_paths
from ..show.console import output


@click.command()
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
    click.option("--digest", metavar="SHA256", help="The digest of surgery.json that run printed: compare it."),
    click.option("--public-key", type=FILE, metavar="KEY", help="Check the signature of all files by this key (PEM)."),
    click.option(
        "--require", type=click.Choice(["verified"]), help="Fail (1) unless it was verified when it was written."
    ),
    TASKS, chunking(None, 2), REVISION, DEVICE,
    click.option("--junit", type=FILE, metavar="FILE", help="Write gates and checks as JUnit XML."),
    JSON,
)  # fmt: skip
def verify(checkpoint, chunks, chunk_length, junit, json_file, **given) -> int:
    """Check the converted CHECKPOINT: files and tensors; with --text also quality; with --against also the source."""
    inputs = given_paths(checkpoint, given["against"], *given["text"], *given["calibration"], given["public_key"])
    require_result_file(json_file, "--json", given_paths(*inputs, junit))
    require_result_file(junit, "--junit", inputs)
    from ...steps.options import VerifyOptions
    from ...verbs.verify import chunking_of
    from ...verbs.verify import verify as verb
    from ...verification.verdict import junit_xml, plain_json
    from ..show.progress import TerminalReporter
    from ..show.verdict import show_verdict

    chosen = VerifyOptions(chunking=chunking_of(checkpoint, chunks, chunk_length), command=command(), **given)
    verdict = verb(checkpoint, chosen, TerminalReporter())
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    write_result(junit, "--junit", junit_xml(verdict))
    show_verdict(output(), verdict)
    return judged(verdict, f"do not use {checkpoint}")
