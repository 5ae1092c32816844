"""The command `surgery export`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..judged import judged
from ..options import DEVICE, FILE, JSON, QUIET, TEXT, chunking, command, options
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Give a converted checkpoint to another program.")
@click.argument("engine")
@click.argument("checkpoint", type=FILE)
@click.argument("out", type=FILE)
@options(
    click.option(
        "--original", metavar="SRC", help="What it was converted from, where the manifest names no hub id."
    ),
    click.option(
        "--engine-python", metavar="PYTHON", type=FILE,
        help="The Python that has the program, where it is not surgery's (vllm).",
    ),
    TEXT, chunking(None, 1), DEVICE, QUIET, JSON,
)  # fmt: skip
def export(engine, checkpoint, out, chunks, chunk_length, quiet, json_file, **given) -> int:
    """Write the converted CHECKPOINT as ENGINE (peft, mlx, vllm) takes it into the new directory OUT.

    With --text, perplexity and the largest |delta log-probability| to CHECKPOINT are measured in that program.
    """
    require_result_file(json_file, "--json", given_paths(checkpoint, out, given["original"], *given["text"]))
    from ...steps.options import ExportOptions
    from ...verbs.export import export as verb
    from ...verbs.verify import chunking_of
    from ...verification.verdict import plain_json
    from ..show.export import outcome, show_export

    cut = None if chunks is None and chunk_length is None else chunking_of(checkpoint, chunks, chunk_length)
    chosen = ExportOptions(chunking=cut, command=command(), **given)
    screen = Screen(quiet, json_file)
    exported = verb(engine, checkpoint, out, chosen, screen.reporter)
    write_result(json_file, "--json", json_text(plain_json(exported)))
    show_export(screen.tables, exported, out)
    screen.end(outcome(exported, out))
    return judged(exported, f"{out} was not written")
