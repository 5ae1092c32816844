"""The command `surgery run`."""

from __future__ import annotations

import os

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ...recipe.builtin import recipe_file
from ..judged import judged
from ..options import (
    AUDIO,
    DEVICE,
    DTYPE,
    FILE,
    IMAGES,
    JSON,
    LINK,
    MEMORY,
    QUIET,
    RECIPE,
    RESULT,
    REVISION,
    SIGN,
    TASKS,
    TEXT,
    chunking,
    command,
    options,
)  # fmt: skip
from ..options import given as given_paths
from ..screen import Screen


def require_pushing(push: str, no_verify: bool) -> None:
    """Refuse what could not be pushed in the end, before anything else is done."""
    from ...checkpoint.pushing import require_push
    from ...errors import SourceError

    if no_verify:
        raise SourceError(f"--push {push} sends what was proved, which --no-verify leaves out; take one away.")
    require_push(push)


@click.command(short_help="Convert a checkpoint by a recipe, and prove it.")
@RECIPE
@click.argument("source")
@click.argument("out", type=FILE)
@options(
    TEXT,
    IMAGES,
    AUDIO,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for search and scales (repeatable), images or recordings; else half of those.",
    ),
    click.option("--no-verify", is_flag=True, help="Write without proof; the manifest says unverified."),
    click.option("--keep-failed", type=FILE, metavar="DIR", help="Keep an output that failed its gates here."),
    click.option("--report", type=RESULT, metavar="FILE", help="What was gained, and surveys of both, in one page."),
    click.option(
        "--resume", type=FILE, metavar="DIR", help="Keep finished steps here, and go on from those of a run cut off."
    ),
    click.option("--tuning", type=FILE, metavar="DIR", help="Keep the state of tuning here, and go on from it."),
    click.option("--push", metavar="ID", help="Then push OUT to the hub: owner/name, or owner/name@branch."),
    click.option("--adapter", type=FILE, metavar="DIR", help="Also write what was tuned as a PEFT adapter."),
    SIGN, TASKS, chunking(64, 2), LINK, DTYPE, REVISION, DEVICE, MEMORY, QUIET, JSON,
)  # fmt: skip
def run(recipe, source, out, no_verify, report, push, chunks, chunk_length, quiet, json_file, **given) -> int:
    """Convert SOURCE (a directory, hub id or .gguf file) by RECIPE into the new directory OUT, verified.

    RECIPE is the name of one that comes with surgery (`surgery recipes`), or a file.
    """
    recipe = recipe_file(recipe)
    first = os.environ.get("RANK", "0") == "0"  # of several processes that `accelerate launch` started
    if first:
        texts = (*given["text"], *given["images"], *given["audio"], *given["calibration"])
        outputs = given["keep_failed"], given["adapter"], given["resume"]
        paths = given_paths(recipe, source, out, *texts, *outputs, given["sign"])
        require_result_file(json_file, "--json", [*paths, *given_paths(report)])
        require_result_file(report, "--report", paths)
        if push is not None:
            require_pushing(push, no_verify)
    from ...live.text import Chunking
    from ...progress import SILENT
    from ...report.verdict import outcome
    from ...steps.options import RunOptions
    from ...verbs.run import run as verb
    from ...verification.verdict import plain_json
    from ..show.plan import show_output, show_pushed
    from ..show.verdict import show_verdict

    chosen = RunOptions(
        verify=not no_verify, surveys=report is not None, chunking=Chunking(chunks, chunk_length), command=command(),
        **given,
    )  # fmt: skip
    screen = Screen(quiet, json_file, report)
    verdict = verb(recipe, source, out, chosen, screen.reporter if first else SILENT)
    if verdict is None:  # this process has helped to tune
        return 0
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    if nothing := verdict.get("nothing_to_do"):
        unwritten = f"{out} was not written" if report is None else f"neither {out} nor {report} was written"
        screen.end(f"nothing to do, and {unwritten}: {nothing}")
        return 0
    show_verdict(screen.tables, verdict)
    if report is not None:
        from ...report import write_report

        write_report(verdict["surveys"], report, verdict)
    if verdict["passed"] is not False:
        show_output(screen.tables, out, verdict)
    kept = chosen.keep_failed
    end = f"wrote {out}" if verdict["passed"] is not False else f"{out} was not created"
    if push is not None and verdict["passed"]:
        from ...verbs.push import push as push_verb

        pushed = push_verb(out, push, screen.reporter)
        show_pushed(screen.tables, pushed)
        end += f", pushed {pushed['id']}"
    screen.end(f"{outcome(verdict)}; {end}")
    return judged(verdict, f"what was written is in {kept}" if kept else f"{out} was not created")
