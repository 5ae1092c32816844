"""Text to tune on from a dataset of the hub, or a directory that the `datasets` library reads as one."""

from __future__ import annotations

from ..errors import SourceError, brief
from .settings import Dataset


def dataset_text(wanted: Dataset) -> str:
    """The first `wanted.characters` characters of its rows, joined by blank lines; streamed, not downloaded as a whole.

    SourceError where the library is missing, the dataset cannot be read, or its column holds no text.
    """
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            "tune.dataset is read by the library datasets: pip install 'checkpoint-surgery[datasets]', or leave it out "
            "and give --calibration FILE."
        ) from error
    name = wanted.name if wanted.config is None else f"{wanted.name} ({wanted.config})"
    parts, left = [], wanted.characters
    try:
        rows = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        for row in rows:
            if wanted.column not in row:
                raise SourceError(
                    f"tune.dataset: {name} has no column {wanted.column!r}; it has {', '.join(sorted(row))}."
                )
            text = row[wanted.column]
            if not isinstance(text, str | None):
                raise SourceError(
                    f"tune.dataset: column {wanted.column!r} of {name} holds {type(text).__name__}, not text; name "
                    "another."
                )
            if text and (text := text.strip()):
                parts.append(text[:left])
                left -= len(parts[-1])
            if not left:
                break
    except SourceError:
        raise
    except Exception as error:  # the library has its own errors, and those of every file format and of the network
        raise SourceError(f"tune.dataset: {name} cannot be read ({brief(error)}); check its name and split.") from error
    if not parts:
        raise SourceError(f"tune.dataset: {name} holds no text in its column {wanted.column!r}; name another.")
    return "\n\n".join(parts)
