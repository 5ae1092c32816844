"""The command `surgery run`."""

from __future__ import annotations

import os

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..judged import judged
from ..options import DEVICE, DTYPE, FILE, JSON, LINK, REVISION, TASKS, TEXT, chunking, options
from ..options import given as given_paths
from ..show.console import output


@click.command()
@click.argument("recipe", type=FILE)
@click.argument("source")
@click.argument("out", type=FILE)
@options(
    TEXT,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for search and scales (repeatable); else half of --text.",
    ),
    click.option("--no-verify", is_flag=True, help="Write without proof; the manifest says unverified."),
    click.option("--keep-failed", type=FILE, metavar="DIR", help="Keep an output that failed its gates here."),
    click.option("--report", type=FILE, metavar="FILE", help="What was gained, and surveys of both, in one HTML file."),
    click.option("--tuning", type=FILE, metavar="DIR", help="Keep the state of tuning here, and go on from it."),
    click.option("--adapter", type=FILE, metavar="DIR", help="Also write what was tuned as a PEFT adapter."),
    TASKS, chunking(64, 2), LINK, DTYPE, REVISION, DEVICE, JSON,
)  # fmt: skip
def run(recipe, source, out, no_verify, report, chunks, chunk_length, json_file, **given) -> int:
    """Convert SOURCE (a directory, hub id or .gguf file) by RECIPE into the new directory OUT, verified."""
    first = os.environ.get("RANK", "0") == "0"  # of several processes that `accelerate launch` started
    if first:
        texts = (*given["text"], *given["calibration"])
        paths = given_paths(recipe, source, out, *texts, given["keep_failed"], given["adapter"])
        require_result_file(json_file, "--json", [*paths, *given_paths(report)])
        require_result_file(report, "--report", paths)
    from ...live.text import Chunking
    from ...progress import SILENT
    from ...steps.options import RunOptions
    from ...verbs.run import run as verb
    from ...verification.verdict import plain_json
    from ..show.plan import show_output
    from ..show.progress import TerminalReporter
    from ..show.verdict import show_verdict

    chosen = RunOptions(
        verify=not no_verify, surveys=report is not None, chunking=Chunking(chunks, chunk_length), **given
    )  # fmt: skip
    verdict = verb(recipe, source, out, chosen, TerminalReporter() if first else SILENT)
    if verdict is None:  # this process has helped to tune
        return 0
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    if nothing := verdict.get("nothing_to_do"):
        output().print(f"Nothing to do, and {out} was not written: {nothing}", markup=False)
        return 0
    show_verdict(output(), verdict)
    if report is not None:
        from ...report import write_report

        write_report(verdict["surveys"], report, verdict)
    if verdict["passed"] is not False:
        show_output(output(), out, verdict)
    kept = chosen.keep_failed
    return judged(verdict, f"what was written is in {kept}" if kept else f"{out} was not created")
