"""What can go wrong in a way a person can mend: one base class, a leaf for each kind of mending.

`str(error)` is one sentence that names the file or key at fault and the way out; the command line prints it as it is
and exits with `exit_code`. Anything else that is raised is a bug in surgery and keeps its traceback.
"""

from __future__ import annotations

from .plain import cut

LONGEST_WORD, LONGEST_SENTENCE = 300, 900  # characters; a path may well be long


class SurgeryError(Exception):
    """Base of every error that a user can act on. `exit_code` is the process exit status (2: wrong use or input)."""

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class RecipeError(SurgeryError):
    """The recipe does not say something we can do; the message names line and key."""


class SourceError(SurgeryError):
    """What was given as input (checkpoint, text, token) is not what the command takes."""


class UnsupportedModel(SurgeryError):
    """The model is readable, but the operation would not be exact on it; the message says why."""


class OutputError(SurgeryError):
    """The target exists already or cannot be written."""


class NoSpace(SurgeryError):
    """The disk cannot hold what the plan writes, or memory what is loaded."""


class NoTemporary(SurgeryError):
    """Temporary files cannot be written: says nothing about what was given, and so is never a part of a verdict."""


class DamagedCheckpoint(SurgeryError):
    """The checkpoint's own bytes are wrong: truncated, inconsistent, tampered with, not finite."""

    exit_code = 3


def shortened(text: str) -> str:
    """`text`, the middle left out of words and of the whole where a file from a stranger has made them endless."""
    return cut(" ".join(cut(word, LONGEST_WORD) for word in text.split(" ")), LONGEST_SENTENCE)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: torch has a class of its own for some GPUs, else only a text."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
    return any(text in str(error).lower() for text in texts)


def brief(error: BaseException) -> str:
    """What an error of foreign code says, as part of a sentence: its type and its first sentence, cut short."""
    said = " ".join(str(error).split()).split(". ")[0][:160].rstrip(" .:")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
