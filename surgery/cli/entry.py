"""The command line: parse, call one verb, write and show the result.

Exit 0 done and passed, 1 a gate failed, 2 wrong use or input, 3 a damaged checkpoint. And what no input can cause: 70 a
bug in surgery, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings

import click

from ..errors import SurgeryError, out_of_memory
from ..version import VERSION
from .commands import COMMANDS
from .show.console import complain, show_warning

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="surgery")
def cli() -> None:
    """Turn a checkpoint's massive activations into an explicit attention bias, and prove that nothing was lost."""


for _command in COMMANDS:
    cli.add_command(_command)


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
