"""Evaluation and calibration text, cut into chunks of tokens."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..bounded import GIB, Unbounded, bounded
from ..checkpoint.regular import open_regular
from ..errors import SourceError


@dataclass(frozen=True)
class Chunking:
    """How much text a measurement reads: `count` chunks of `length` tokens, non-overlapping."""

    count: int = 64
    length: int = 512


Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # as callers may give them: one, or several


def files(given: Files | None) -> tuple[Path, ...]:
    """What was given as paths: one file is a sequence of one."""
    if given is None:
        return ()
    return (Path(given),) if isinstance(given, (str, os.PathLike)) else tuple(map(Path, given))


CHUNKS = Chunking()
READING_SECONDS, SLOWEST = 30, 20_000  # the slowest tokenizers, in Python, read 100,000 characters a second
READING_MEMORY, PER_CHARACTER = 2 * GIB, 400  # bytes
LONGEST_TOKEN = 1000  # characters that are told of one; the longest that are known have some hundred
FEW_CHUNKS = Chunking(8)  # enough to see massive activations, not to measure perplexity


def read_texts(paths: Sequence[Path]) -> str:
    """The files' contents, joined by blank lines. SourceError for a file that is missing, empty or not UTF-8."""
    return "\n\n".join(read_each(paths))


def read_each(paths: Sequence[Path]) -> tuple[str, ...]:
    """The content of each file; errors as `read_texts`."""
    parts = []
    for path in paths:
        try:
            with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8-sig") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path}: is not UTF-8 text (byte {error.start}); convert it, or give another file."
            ) from error
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); give a text file.") from error
        if not text.strip():
            raise SourceError(f"{path}: holds no text; give a file with some.")
        parts.append(text)
    return tuple(parts)


def split_text(text: str) -> tuple[str, str]:
    """Calibration and evaluation halves of a single text, cut at a line end near the middle where there is one."""
    middle = len(text) // 2
    cut = text.find("\n", middle)
    cut = middle if cut < 0 or cut > middle + len(text) // 10 else cut + 1
    return text[:cut], text[cut:]


def tokenize(tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids of `text`; without the tokens a tokenizer adds around a text, unless `special`.

    A tokenizer's patterns may take for ever on one text and not on another, so each is read in a child with limits.
    SourceError where it does not end well.
    """
    seconds, memory = READING_SECONDS + len(text) // SLOWEST, READING_MEMORY + PER_CHARACTER * len(text)
    try:
        return list(bounded(_encode, tokenizer, text, special, seconds=seconds, memory=memory))
    except Unbounded as error:
        raise SourceError(f"the tokenizer cannot read the text ({error}); give another text, or mend it.") from error


def _encode(tokenizer, text: str, special: bool) -> list[int]:
    # A tokenizer warns about texts longer than the model; we cut the text into chunks ourselves.
    return [int(token) for token in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


SENTENCE = "The quick brown fox jumps over the lazy dog."


def around(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that a tokenizer puts before a text, and behind it."""
    try:
        plain, whole = bounded(_both, tokenizer, SENTENCE, seconds=READING_SECONDS, memory=READING_MEMORY)
    except Unbounded as error:
        raise SourceError(f"the tokenizer cannot read a text ({error}); mend it.") from error
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
    if at is None:
        raise SourceError("the tokenizer puts special tokens inside of a text, which are not told from its own.")
    return tuple(whole[:at]), tuple(whole[at + len(plain) :])


def no_longer_added(tokenizer, prefix: Sequence[int]) -> tuple[int, ...]:
    """The token that a tokenizer puts before each text and that is in the slots of a model in which `prefix` is folded:
    BOS, or none."""
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return () if bos is None or bos not in prefix or around(tokenizer)[0][:1] != (bos,) else (bos,)


def _both(tokenizer, text: str) -> tuple[list[int], list[int]]:
    return _encode(tokenizer, text, False), _encode(tokenizer, text, True)


def in_turn(texts: Sequence[Sequence[int]], piece: int) -> list[int]:
    """Token ids of several texts, `piece` of each in turn, so that any beginning of them holds as much of each.

    One that has come to its end is passed over, and less than a piece at an end is left out. A single text stays whole.
    """
    if len(texts) == 1:
        return list(texts[0])
    longest = max(map(len, texts))
    starts = range(0, longest - piece + 1, piece)
    whole = (text[start : start + piece] for start in starts for text in texts if len(text) >= start + piece)
    return [token for part in whole for token in part]


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each of `ids` is as text, by itself: the same limits, since what decodes is a stranger's program too.

    SourceError where it does not end well.
    """
    return _texts(tokenizer, [[token] for token in ids])


def decoded(tokenizer, ids: Sequence[int]) -> str:
    """`ids` as one text; as `token_texts`."""
    return _texts(tokenizer, [list(ids)])[0]


def _texts(tokenizer, sequences: list[list[int]]) -> list[str]:
    if not sequences:
        return []
    try:
        return list(bounded(_decode, tokenizer, sequences, seconds=READING_SECONDS, memory=READING_MEMORY))
    except Unbounded as error:
        raise SourceError(f"the tokenizer cannot write tokens as text ({error}); mend its decoder.") from error


def _decode(tokenizer, sequences: list[list[int]]) -> list[str]:
    return [tokenizer.decode(ids)[: LONGEST_TOKEN * len(ids)] for ids in sequences]


def behind(prefix: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
    """Token ids (N, T), each row behind `prefix`: (N, n + T)."""
    lead = torch.tensor(list(prefix), dtype=torch.long).expand(len(rows), -1)
    return torch.cat([lead, rows], dim=1)


def chunk(ids: Sequence[int], chunking: Chunking, name: str) -> torch.Tensor:
    """The first `count` chunks of `ids`: LongTensor (count, length). SourceError if the text is too short, or none."""
    if chunking.length < 2:
        raise SourceError(f"{name}: chunks of {chunking.length} tokens predict nothing; make them of 2 or more.")
    if chunking.count < 1:
        raise SourceError(f"{name}: {chunking.count} chunks hold no text; read 1 or more.")
    needed = chunking.count * chunking.length
    if len(ids) < needed:
        raise SourceError(
            f"{name}: has {len(ids)} tokens, and {chunking.count} chunks of {chunking.length} need {needed}; "
            "give more text, or fewer or shorter chunks (--chunks, --chunk-length)."
        )
    return torch.tensor(ids[:needed], dtype=torch.long).view(chunking.count, chunking.length)
