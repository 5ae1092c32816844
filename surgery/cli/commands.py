"""The command line: parse, call one verb, write and show the result.

Exit 0 done and passed, 1 a gate failed, 2 wrong use or input, 3 a damaged checkpoint. And what no input can cause: 70 a
bug in surgery, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import click

from ..checkpoint.results import json_text, require_result_file, require_result_folder, write_result
from ..errors import SurgeryError, out_of_memory
from ..words import asked, reached
from .console import complain, output, show_warning

FILE = click.Path(path_type=Path)
BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


def _options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write the result as JSON too.")
_revision = click.option("--revision", help="Branch, tag or commit of a hub id.")
_dtype = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype to dequantise a GGUF to (float32)."
)
_link = click.option("--link", is_flag=True, help="Hard-link unchanged shards instead of copying them.")
_tasks = click.option(
    "--tasks", type=FILE, metavar="DIR", help="Task files of lm-evaluation-harness, beside its own, if gates need them."
)
_text = click.option("--text", multiple=True, type=FILE, metavar="FILE", help="Evaluation text, UTF-8 (repeatable).")
_device = click.option(
    "--device", default="cpu", show_default=True, help="torch device, or auto to spread over GPUs, memory and disk."
)


def _chunking(count: int, least: int):
    return _options(
        click.option(
            "--chunks", type=click.IntRange(least), default=count, show_default=True, help="Chunks of text to read."
        ),
        click.option(
            "--chunk-length", type=click.IntRange(8), default=512, show_default=True, help="Tokens in a chunk."
        ),
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="surgery")
def cli() -> None:
    """Turn a checkpoint's massive activations into an explicit attention bias, and prove that nothing was lost."""


@cli.command()
@click.argument("recipe", type=FILE)
@click.argument("source")
@_options(
    click.option("--out", type=FILE, help="Also check that this output can be created."),
    _link, _dtype, _revision, _json,
)  # fmt: skip
def plan(recipe, source, out, link, dtype, revision, json_file) -> int:
    """Print which tensors and files RECIPE would add, change and keep in SOURCE. Reads headers only, writes nothing."""
    require_result_file(json_file, "--json", _given(recipe, source, out))
    from ..verbs.plan import plan as verb
    from .plan import show_plan

    result = verb(recipe, source, out=out, link=link, dtype=dtype, revision=revision).to_dict()
    write_result(json_file, "--json", json_text(result))
    show_plan(output(), result)
    return 0


@cli.command()
@click.argument("recipe", type=FILE)
@click.argument("source")
@click.argument("out", type=FILE)
@_options(
    _text,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for search and scales (repeatable); else half of --text.",
    ),
    click.option("--no-verify", is_flag=True, help="Write without proof; the manifest says unverified."),
    click.option("--keep-failed", type=FILE, metavar="DIR", help="Keep an output that failed its gates here."),
    click.option("--report", type=FILE, metavar="FILE", help="What was gained, and surveys of both, in one HTML file."),
    click.option("--tuning", type=FILE, metavar="DIR", help="Keep the state of tuning here, and go on from it."),
    click.option("--adapter", type=FILE, metavar="DIR", help="Also write what was tuned as a PEFT adapter."),
    _tasks, _chunking(64, 2), _link, _dtype, _revision, _device, _json,
)  # fmt: skip
def run(recipe, source, out, no_verify, report, chunks, chunk_length, json_file, **given) -> int:
    """Convert SOURCE (a directory, hub id or .gguf file) by RECIPE into the new directory OUT, verified."""
    first = os.environ.get("RANK", "0") == "0"  # of several processes that `accelerate launch` started
    if first:
        texts = (*given["text"], *given["calibration"])
        paths = _given(recipe, source, out, *texts, given["keep_failed"], given["adapter"])
        require_result_file(json_file, "--json", [*paths, *_given(report)])
        require_result_file(report, "--report", paths)
    from ..live.text import Chunking
    from ..progress import SILENT
    from ..steps.options import RunOptions
    from ..verbs.run import run as verb
    from ..verification.verdict import plain_json
    from .plan import show_output
    from .progress import TerminalReporter
    from .verdict import show_verdict

    options = RunOptions(
        verify=not no_verify, surveys=report is not None, chunking=Chunking(chunks, chunk_length), **given
    )  # fmt: skip
    verdict = verb(recipe, source, out, options, TerminalReporter() if first else SILENT)
    if verdict is None:  # this process has helped to tune
        return 0
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    show_verdict(output(), verdict)
    if report is not None:
        from ..report import write_report

        write_report(verdict["surveys"], report, verdict)
    if verdict["passed"] is not False:
        show_output(output(), out, verdict)
    kept = options.keep_failed
    return _judged(verdict, f"what was written is in {kept}" if kept else f"{out} was not created")


@cli.command()
@click.argument("checkpoint", type=FILE)
@_options(
    click.option(
        "--against", metavar="SOURCE", help="What it was converted from: compare every kept tensor, and measure both."
    ),
    _text,
    click.option(
        "--calibration", multiple=True, type=FILE, metavar="FILE",
        help="Text for static scales, as given to run (repeatable); else half of --text.",
    ),
    _tasks, _chunking(64, 2), _revision, _device,
    click.option("--junit", type=FILE, metavar="FILE", help="Write gates and checks as JUnit XML."),
    _json,
)  # fmt: skip
def verify(checkpoint, chunks, chunk_length, junit, json_file, **given) -> int:
    """Check the converted CHECKPOINT: files and tensors; with --text also quality; with --against also the source."""
    inputs = _given(checkpoint, given["against"], *given["text"], *given["calibration"])
    require_result_file(json_file, "--json", _given(*inputs, junit))
    require_result_file(junit, "--junit", inputs)
    from ..live.text import Chunking
    from ..steps.options import VerifyOptions
    from ..verbs.verify import verify as verb
    from ..verification.verdict import junit_xml, plain_json
    from .progress import TerminalReporter
    from .verdict import show_verdict

    verdict = verb(checkpoint, VerifyOptions(chunking=Chunking(chunks, chunk_length), **given), TerminalReporter())
    write_result(json_file, "--json", json_text(plain_json(verdict)))
    write_result(junit, "--junit", junit_xml(verdict))
    show_verdict(output(), verdict)
    return _judged(verdict, f"do not use {checkpoint}")


@cli.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@_options(
    _text, _chunking(8, 1),
    click.option(
        "--interventions", is_flag=True, help="Also change the live model as the survey suggests, and measure."
    ),
    click.option("--report", type=FILE, metavar="FILE", help="Write a report as one HTML file."),
    click.option("--plots", type=FILE, metavar="DIR", help="Write the report's plots as PNG and SVG files."),
    _dtype, _revision, _device, _json,
)  # fmt: skip
def scan(
    sources, text, chunks, chunk_length, interventions, report, plots, dtype, revision, device, json_file
) -> int:  # fmt: skip
    """Survey each SOURCE on text, layer by layer: massive activations, geometry, attention, super neurons."""
    require_result_file(json_file, "--json", _given(*sources, *text, report))
    require_result_file(report, "--report", _given(*sources, *text))
    require_result_folder(plots, "--plots", _given(*sources, *text))
    from ..live.text import Chunking
    from ..verbs.scan import scan as verb
    from ..verification.verdict import plain_json
    from .progress import TerminalReporter
    from .survey import show_survey

    surveys: list[dict] = []
    for source in sources:
        survey = verb(
            source, text=text, dtype=dtype, revision=revision, device=device, interventions=interventions,
            chunking=Chunking(chunks, chunk_length), reporter=TerminalReporter(),
        )  # fmt: skip
        surveys.append(survey)
        show_survey(output(), survey)
    result = plain_json(surveys[0] if len(surveys) == 1 else {"surveys": surveys})
    write_result(json_file, "--json", json_text(result))
    if report is not None or plots is not None:
        from ..report import write_plots, write_report

        if report is not None:
            write_report(surveys, report)
        if plots is not None:
            write_plots(surveys, plots)
    return 0


@cli.command()
@click.argument("recipe", type=FILE)
@click.argument("out", type=FILE)
@_options(
    click.option("--text", multiple=True, type=FILE, metavar="FILE", help="Text to train on, UTF-8 (repeatable)."),
    click.option(
        "--held-out", multiple=True, type=FILE, metavar="FILE",
        help="Text to judge on (repeatable); else the first sequences of --text.",
    ),
    _json,
)  # fmt: skip
def pretrain(recipe, out, text, held_out, json_file) -> int:
    """Train the small GPT-2 variants of RECIPE from nothing; checkpoints and curves go to the new directory OUT."""
    require_result_file(json_file, "--json", _given(recipe, out, *text, *held_out))
    from ..verbs.pretrain import pretrain as verb
    from .pretrain import show_curves
    from .progress import TerminalReporter

    result = verb(recipe, out, text=text, held_out=held_out, reporter=TerminalReporter())
    write_result(json_file, "--json", json_text(result))
    show_curves(output(), result, out)
    return 0


def _given(*paths: Path | str | None) -> list[Path | str]:
    return [path for path in paths if path is not None]


def _judged(verdict: dict, way_out: str) -> int:
    """The exit code; where it is not 0, a sentence on standard error says what failed first."""
    failed = [(3, f"{c['name']}: {c['detail']}") for c in verdict["integrity"]["checks"] if not c["passed"]]
    failed += [
        (1, f"the gate {g['name']} failed, {reached(g)} is not {asked(g)}") for g in verdict["gates"] if not g["passed"]
    ]
    if not failed:
        return 0
    code, sentence = failed[0]
    complain(f"{sentence.rstrip('.')}; {way_out}")
    return code


def _invoke() -> int | str | None:
    """Run the command; every way it can end as an exit code."""
    try:
        return cli.main(standalone_mode=False) or 0
    except SurgeryError as error:
        complain(str(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return SurgeryError.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted; nothing unfinished is left behind")
        return INTERRUPTED
    except SystemExit as stop:
        # A signal that `Stage` caught, or a pipe that nobody reads, for which click and rich say 1.
        return BROKEN_PIPE if stop.code == 1 else stop.code
    except Exception as error:
        if out_of_memory(error):
            complain("memory ran out; give fewer or shorter chunks (--chunks, --chunk-length), or --device auto")
            return SurgeryError.exit_code
        traceback.print_exc()
        complain("this is a bug in surgery, not in what you gave it; please report it with the lines above")
        return BUG


def main() -> None:
    """Entry point of the `surgery` command."""
    warnings.showwarning = show_warning
    for imported in ("torchao", "torch.utils._pytree"):  # by transformers, where installed; it misses kernels for GPUs
        logging.getLogger(imported).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not stop the work
    sys.exit(_invoke())
