"""The command line: parse, call one verb, show the result. Exit 0 done and passed, 1 a gate failed, 2 wrong use or input, 3 damaged."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import click
from rich.console import Console

from . import __version__
from .errors import SurgeryError

FILE = click.Path(path_type=Path)


def _options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write the result as JSON too.")
_revision = click.option("--revision", help="Branch, tag or commit of a hub id.")
_dtype = click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype to dequantise a GGUF to (float32).")
_link = click.option("--link", is_flag=True, help="Hard-link unchanged shards instead of copying them.")
_text = click.option("--text", multiple=True, type=FILE, metavar="FILE", help="Evaluation text, UTF-8 (repeatable).")
_device = click.option("--device", default="cpu", show_default=True, help="torch device, or auto to spread over GPUs, memory and disk.")


def _chunking(count: int):
    return _options(
        click.option("--chunks", type=click.IntRange(1), default=count, show_default=True, help="Chunks of text to evaluate on."),
        click.option("--chunk-length", type=click.IntRange(8), default=512, show_default=True, help="Tokens in a chunk."),
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Turn a checkpoint's massive activations into an explicit attention bias, and prove that nothing was lost."""


@cli.command()
@click.argument("recipe", type=FILE)
@click.argument("source")
@_options(click.option("--out", type=FILE, help="Also check that this output can be created."), _link, _dtype, _revision, _json)
def plan(recipe, source, out, link, dtype, revision, json_file):
    """Print which tensors and files RECIPE would add, change and keep in SOURCE. Reads headers only, writes nothing."""
    from .reporting import show_plan
    from .verbs.plan import plan as verb

    result = verb(recipe, source, out=out, link=link, dtype=dtype, revision=revision).to_dict()
    show_plan(_console(), result)
    _write_json(json_file, result)


@cli.command()
@click.argument("recipe", type=FILE)
@click.argument("source")
@click.argument("out", type=FILE)
@_options(
    _text,
    click.option("--calibration", multiple=True, type=FILE, metavar="FILE", help="Text for the search (repeatable); else half of --text."),
    click.option("--no-verify", is_flag=True, help="Write without proof; the manifest says unverified."),
    click.option("--keep-failed", type=FILE, metavar="DIR", help="Keep an output that failed its gates here."),
    _chunking(64), _link, _dtype, _revision, _device, _json,
)  # fmt: skip
def run(recipe, source, out, text, calibration, no_verify, keep_failed, chunks, chunk_length, link, dtype, revision, device, json_file):
    """Convert SOURCE (a directory, hub id or .gguf file) by RECIPE into the new directory OUT, verified."""
    from .reporting import TerminalReporter, show_verdict
    from .verbs.run import run as verb
    from .verification.text import Chunking

    verdict = verb(
        recipe, source, out, text=text, calibration=calibration, verify=not no_verify, keep_failed=keep_failed, link=link, dtype=dtype,
        revision=revision, device=device, chunking=Chunking(chunks, chunk_length), reporter=TerminalReporter(),
    )  # fmt: skip
    show_verdict(_console(), verdict)
    _write_json(json_file, verdict)
    if verdict["passed"] is False:
        _console().print(f"\nNot published: {f'what was written is in {keep_failed}' if keep_failed else f'{out} was not created'}")
    else:
        from .reporting import show_output

        show_output(_console(), out, verdict)
    sys.exit(_exit_code(verdict))


@cli.command()
@click.argument("checkpoint", type=FILE)
@_options(
    click.option("--against", metavar="SOURCE", help="What it was converted from: compare every kept tensor, and measure both."),
    _text, _chunking(64), _revision, _device,
    click.option("--junit", type=FILE, metavar="FILE", help="Write gates and checks as JUnit XML."),
    _json,
)  # fmt: skip
def verify(checkpoint, against, text, chunks, chunk_length, revision, device, junit, json_file):
    """Check the converted CHECKPOINT: its files and tensors; with --text also its quality; with --against also its source."""
    from .reporting import TerminalReporter, show_verdict
    from .verbs.verify import verify as verb
    from .verification.text import Chunking
    from .verification.verdict import write_junit

    verdict = verb(
        checkpoint, against=against, text=text, revision=revision, device=device, chunking=Chunking(chunks, chunk_length),
        reporter=TerminalReporter(),
    )  # fmt: skip
    show_verdict(_console(), verdict)
    _write_json(json_file, verdict)
    if junit is not None:
        write_junit(verdict, junit)
    sys.exit(_exit_code(verdict))


@cli.command()
@click.argument("source")
@_options(_text, _chunking(8), _dtype, _revision, _device, _json)
def scan(source, text, chunks, chunk_length, dtype, revision, device, json_file):
    """Survey SOURCE on text: massive activations and attention sinks, layer by layer."""
    from .reporting import TerminalReporter, show_survey
    from .verbs.scan import scan as verb
    from .verification.text import Chunking

    survey = verb(
        source, text=text, dtype=dtype, revision=revision, device=device, chunking=Chunking(chunks, chunk_length), reporter=TerminalReporter()
    )
    show_survey(_console(), survey)
    _write_json(json_file, survey)


def _console() -> Console:
    """Standard output; when it is not a terminal, wide enough that no table is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _exit_code(verdict: dict) -> int:
    if not verdict["integrity"]["passed"]:
        return 3
    return 1 if verdict["passed"] is False else 0


def _write_json(path: Path | None, result: dict) -> None:
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise SurgeryError(f"{path}: cannot be written ({error.strerror}); give another path for --json") from error


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as notes for a person, without the place in the code."""
    Console(stderr=True, highlight=False).print("  [yellow]note[/]", end=" ")
    print(message, file=sys.stderr)


def main() -> None:
    """Entry point of the `surgery` command."""
    warnings.showwarning = _show_warning
    try:
        cli(standalone_mode=True)
    except SurgeryError as error:
        Console(stderr=True, highlight=False).print("[bold red]error[/]", end=" ")
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
