"""How the hub's client is called: several requests at once, bars that others show, each failure as one sentence."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ..endings.temporary import FULL
from ..errors import SourceError, SurgeryError, brief
from ..progress import Advance
from .disk import translated

WORKERS = 8  # requests at a time, as many as the client makes by itself
_T = TypeVar("_T")


# ---- at once, with progress


def at_once(work: Callable[[str], _T], names: Sequence[str], stop: threading.Event) -> list[_T]:
    """`work` of each name, a few at a time. After an error none begins, and those that run may end, since what they
    fetch serves another try; after Ctrl-C `stop` tells them to break off."""
    from huggingface_hub import close_session

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            failed = [future for future in wait(futures, return_when=FIRST_EXCEPTION).done if future.exception()]
            for future in failed[:1]:
                pool.shutdown(cancel_futures=True)
                future.result()
            return [future.result() for future in futures]
        except (KeyboardInterrupt, SystemExit):
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            close_session()  # a slow connection would otherwise be read to the end of its part of 10 MB
            raise


class _Stopped(Exception):
    """The user has had enough."""


class _Bar:
    """What the client takes for a progress bar of tqdm, and shows nothing by itself."""

    advance: Advance
    stop: threading.Event
    total: int | None = None
    n = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        if self.stop.is_set():
            raise _Stopped
        type(self).advance(int(n or 0), "")

    def update_transfer(self, n: float | None = 1) -> None:
        """Bytes on the network, where they are counted apart from those of the file."""

    def ignore(self, *_: object, **__: object) -> None:
        pass

    close = refresh = set_description = set_description_str = set_postfix_str = set_transfer_postfix_str = ignore
    format_dict: Mapping[str, object] = {}


def bars(advance: Advance, stop: threading.Event) -> type[_Bar]:
    """A class of bars that tell `advance` of bytes, and break off once `stop` is set."""
    return type("Bar", (_Bar,), {"advance": staticmethod(advance), "stop": stop})


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """The client's own bars, which it draws for uploads, are left out where standard error is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# ---- failures


@contextlib.contextmanager
def hub_errors(at: str) -> Iterator[None]:
    """Turn whatever the client raises while it reads `at`, "owner/name@revision", into one sentence of SourceError, or
    into NoSpace."""
    try:
        yield
    except SurgeryError:
        raise
    except foreign_errors() as error:
        raise _said(at, error) from error


def foreign_errors() -> tuple[type[Exception], ...]:
    """What the client may raise when something other than surgery is at fault."""
    from huggingface_hub import errors as hub

    # What is no answer of a hub, such as the page of a captive portal, ends in errors of any of these kinds.
    nonsense = (ValueError, KeyError, TypeError, AttributeError, AssertionError)
    return (hub.HTTPError, hub.XetDownloadError, OSError, RuntimeError, *nonsense)


def _said(at: str, error: Exception) -> SurgeryError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    repo, _, revision = at.partition("@")
    if isinstance(error, hub.HFValidationError):
        return SourceError(f"{repo} is neither a directory here nor a name that the hub allows; check it.")
    if isinstance(error, hub.GatedRepoError):
        return SourceError(f"{repo} is gated on the hub; accept its terms there, then log in: hf auth login.")
    if isinstance(error, hub.RevisionNotFoundError):
        return SourceError(f"The hub has no revision {revision or 'main'} of {repo}; check the branch, tag or commit.")
    if isinstance(error, hub.RepositoryNotFoundError):
        return SourceError(
            f"{repo} is neither a directory here nor a model on the hub; check the name (a private one "
            "needs: hf auth login)."
        )
    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, hub.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return SourceError(
            f"{at} is neither a directory here nor complete in the local hub cache, and HF_HUB_OFFLINE forbids to ask "
            "the hub; unset it, or check the path."
        )
    if isinstance(cause, hub.HfHubHTTPError):
        return SourceError(refusal(f"{at} could not be read", cause))
    if isinstance(cause, OSError) and cause.errno in FULL:
        return translated(cause, Path(constants.HF_HUB_CACHE))
    if isinstance(cause, PermissionError):
        return SourceError(f"{cause.filename} is not writable; set HF_HOME to a directory that is.")
    if isinstance(cause, hub.HTTPError):
        return SourceError(
            f"{at} is neither a directory here nor complete in the local hub cache, and {constants.ENDPOINT} cannot "
            f"be reached ({brief(cause)}); go online, or check the path."
        )
    return SourceError(f"{at} could not be downloaded ({brief(cause)}); try again, or give a directory.")


def refusal(what: str, error: Exception) -> str:
    """A sentence on an HTTP status that the hub answered with: `what` failed, why, and the way out."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{what}: the hub does not accept the token; log in anew (hf auth login), or unset HF_TOKEN."
    if status == 403:
        return f"{what}: the token does not allow it (403); make one that does at the hub, then: hf auth login."
    if status == 429:
        return f"{what}: the hub has had too many requests from here (429); wait and run again."
    if status is not None and status >= 500:
        return f"{what}: the hub is out of order ({status}); wait and run again."
    return f"{what}: the hub answers {status}; check the name, or run again later."
