"""A check: one thing that was looked at in the files of a checkpoint, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import NoSpace, NoTemporary, SourceError, SurgeryError, shortened

Found = tuple[bool, str] | tuple[bool, str, tuple[str, ...]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` says what was found, in words, naming the file or tensor at fault.

    `notes`: what has to be told though it is no fault.
    """

    name: str
    passed: bool
    detail: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", shortened(self.detail))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


def check(name: str, look: Callable[[], Found]) -> Check:
    """What `look` finds; an error of ours, or one of reading files, is a check that failed.

    What is missing here, room on disks or in memory, says nothing of the checkpoint: that is raised.
    """
    try:
        return Check(name, *look())
    except (NoSpace, NoTemporary):
        raise
    except SurgeryError as error:
        return Check(name, False, str(error))
    except PermissionError as error:  # says nothing about what is in it
        raise SourceError(f"{error.filename} cannot be read ({error.strerror}); check its permissions.") from error
    except OSError as error:
        return Check(name, False, f"{error.filename} cannot be read ({error.strerror})")


def integrity_to_dict(checks: list[Check]) -> dict[str, Any]:
    return {"passed": all(check.passed for check in checks), "checks": [check.to_dict() for check in checks]}
