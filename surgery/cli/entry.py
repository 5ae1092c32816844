"""The command line: parse, call one verb, write and show the result.

Exit 0 done and passed, 1 a gate failed, 2 wrong use or input, 3 a damaged checkpoint. And what no input can cause: 70 a
bug in surgery, 130 interrupted (129 and 143: SIGHUP, SIGTERM), 141 nobody reads the output any more.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from typing import TextIO

import click

from ..endings.signals import published
from ..endings.temporary import as_os_error, of_temporary
from ..errors import OutputError, SourceError, SurgeryError, out_of_memory
from ..plain import shown
from ..version import VERSION
from .commands import COMMANDS
from .show.console import complain, show_warning

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
# Of a call that we have made wrongly. All others tell about files, disks and rights: what a person can mend.
_OURS = (errno.EBADF, errno.EINVAL, errno.EFAULT, errno.ENOTTY, errno.ESPIPE, errno.ECHILD, errno.EAGAIN)
# Without a name of a file only these are sure to be of the machine.
_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="surgery")
def cli() -> None:
    """Turn a checkpoint's massive activations into an explicit attention bias, and prove that nothing was lost."""


for _command in COMMANDS:
    cli.add_command(_command)


def command() -> int:
    """Run the command that the arguments name, and tell on standard error why it ends, if not well; the exit code."""
    warnings.showwarning = show_warning
    # The first two are imported by transformers, where installed, and miss kernels for GPUs, as the third says of
    # mixers; of what the hub has or has not we say what matters.
    kernels = "transformers.integrations.hub_kernels"
    for imported in ("torchao", "torch.utils._pytree", kernels, "huggingface_hub._snapshot_download"):
        logging.getLogger(imported).setLevel(logging.ERROR)
    _make_streams_safe()
    code = _ended(_invoked)
    if (failed := _flush_output()) is not None and code == 0:
        return _ended(lambda: _raise(failed))
    return code


def _invoked() -> int:
    _require_place()
    return cli.main(standalone_mode=False) or 0


def _ended(invoked) -> int:
    """Call `invoked`; every way it can end as an exit code."""
    try:
        return invoked()
    except click.ClickException as error:
        vars(error)["message"] = shown(error.message)
        error.show()
        return SurgeryError.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain(_with_published("interrupted; nothing unfinished is left behind"))
        return INTERRUPTED
    except SystemExit as stop:
        # Whatever code of others chose, or a pipe that nobody reads, for which click and rich say 1.
        return BROKEN_PIPE if stop.code == 1 else stop.code if isinstance(stop.code, int) else BUG
    except Exception as error:
        if (told := _mendable(error)) is not None:
            complain(_with_published(str(told)))
            return told.exit_code
        print("\n".join(map(shown, traceback.format_exc().splitlines())), file=sys.stderr)
        complain(
            _with_published("this is a bug in surgery, not in what you gave it; please report it with the lines above")
        )
        return BUG


def _mendable(error: Exception) -> SurgeryError | None:
    """`error` as one that a person can mend; None for a bug."""
    if isinstance(error, SurgeryError):
        return error
    if out_of_memory(error):
        return SourceError("memory ran out; give fewer or shorter chunks (--chunks, --chunk-length), or --device auto")
    if (temporary := of_temporary(error)) is not None:
        return temporary
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # of pathlib, before 3.13
        return SourceError(f"{str(error).removeprefix('Symlink loop from ')} is a link to itself; check the path")
    found = as_os_error(error)
    if found is None or found.errno is None:
        return None
    if isinstance(found.filename, (str, bytes)) and found.errno not in _OURS:
        return SourceError(f"{os.fsdecode(found.filename)}: {found.strerror}; check the path and its permissions")
    if found.errno in _MACHINE:
        return OutputError(f"the system reports: {found.strerror}; mend that, and run again")
    return None


def _with_published(sentence: str) -> str:
    """`sentence`, and that what was published before is complete."""
    done = published()
    return sentence if done is None or "is complete" in sentence else f"{sentence.rstrip('.')}; {done}"


def _require_place() -> None:
    """SourceError for arguments that no manifest could name, and for a working directory that is no more."""
    for argument in sys.argv[1:]:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise SourceError(f"{argument} is not UTF-8; rename it, or write it in UTF-8") from None
    try:
        os.getcwd()
    except OSError as error:
        raise SourceError(f"the working directory cannot be read ({error.strerror}); change to another one") from error


# ---- streams


def _make_streams_safe() -> None:
    """Nothing is opened where a standard stream was closed, and no character and no full disk stops what is told."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not stop the work


def _flush_output() -> Exception | None:
    """Write what standard output holds; why it cannot be, if so. What cannot be written is not tried again at exit."""
    failed: Exception | None = None
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            _drop(stream)  # whoever reads has had enough: the exit code is that of the work
        except OSError as error:
            _drop(stream)
            if stream is sys.stdout:
                failed = OutputError(f"standard output cannot be written ({error.strerror})")
    return failed


def _drop(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _raise(error: Exception) -> int:
    raise error
