"""Options that several commands share, and what they are refused for."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import click

from ..checkpoint.results import STDOUT

FILE = click.Path(path_type=Path)
RECIPE = click.argument("recipe")  # as it is written: a path loses what tells a file from a name


def options(*wanted):
    def decorate(command):
        for option in reversed(wanted):
            command = option(command)
        return command

    return decorate


class ResultFile(click.Path):
    """A file for a result; "-" and "/dev/stdout" are standard output, and "./-" a file of that name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx):
        if value in (str(STDOUT), "/dev/stdout"):
            return STDOUT
        path = super().convert(value, param, ctx)
        return Path.cwd() / path if path == STDOUT else path


RESULT = ResultFile()
JSON = click.option("--json", "json_file", type=RESULT, metavar="FILE", help="Write the result as JSON (-: to stdout).")


def _without_notes(context, parameter, quiet):
    if quiet:
        warnings.showwarning = lambda *_args, **_options: None
    return quiet


QUIET = click.option(
    "-q", "--quiet", is_flag=True, is_eager=True, callback=_without_notes, help="Show only errors and the last line."
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub id; or write id@REVISION.")
DTYPE = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype to dequantise a GGUF to (float32)."
)
LINK = click.option("--link", is_flag=True, help="Hard-link unchanged shards instead of copying them.")
TASKS = click.option(
    "--tasks", type=FILE, metavar="DIR", help="Task files of lm-evaluation-harness, beside its own, if gates need them."
)
SIGN = click.option(
    "--sign", type=FILE, metavar="KEY", help="Sign all files with this private key (elliptic curve, PEM)."
)
TEXT = click.option("--text", multiple=True, type=FILE, metavar="FILE", help="Evaluation text, UTF-8 (repeatable).")
IMAGES = click.option(
    "--images", multiple=True, type=FILE, metavar="FILE|DIR",
    help="Images for an encoder, in place of text (repeatable); --chunks says how many are read.",
)  # fmt: skip
AUDIO = click.option(
    "--audio", multiple=True, type=FILE, metavar="FILE|DIR",
    help="Recordings (wav, flac, ogg) for an encoder of sound, in place of text (repeatable).",
)  # fmt: skip
DEVICE = click.option(
    "--device", default="cpu", show_default=True, help="torch device, or auto to spread over GPUs, memory and disk."
)


class Memory(click.ParamType):
    """A size such as 8GiB, in bytes."""

    name = "size"

    def convert(self, value, param, ctx):
        from ..live.memory import parse_memory

        return value if value is None or isinstance(value, int) else parse_memory(value)


MEMORY = click.option(
    "--memory", type=Memory(), metavar="SIZE", show_default="what is free",
    help="Memory that may be taken, such as 8GiB: a larger model comes layer by layer.",
)  # fmt: skip


def chunking(count: int | None, least: int):
    """How text is cut; `count` None: as the run that wrote the checkpoint cut it."""
    unsaid = {"default": None, "show_default": "as run did"}
    return options(
        click.option(
            "--chunks",
            type=click.IntRange(least),
            help="Chunks of text to read.",
            **(unsaid if count is None else {"default": count, "show_default": True}),
        ),
        click.option(
            "--chunk-length",
            type=click.IntRange(8),
            help="Tokens in a chunk.",
            **(unsaid if count is None else {"default": 512, "show_default": True}),
        ),
    )


def command() -> tuple[str, ...]:
    """The words of this command line."""
    return ("surgery", *sys.argv[1:])


def given(*paths: Path | str | None) -> list[Path | str]:
    return [path for path in paths if path is not None]
