"""Whether the emitted tokenizer gives the text what the original gave, less a folded BOS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import NoTemporary, SurgeryError
from ..live.loading import load_tokenizer
from ..live.text import SENTENCE, decoded, tokenize
from .checks import Check

SAMPLE = 200_000  # characters; tokenizers differ in the first few hundred if they differ


def check_tokenizer(root: Path, original, prefix: Sequence[int], text: str | None) -> Check:
    """Compare token ids on `text`, special tokens included, with those of the `original` tokenizer where it is given.

    Without it, only a folded token that the tokenizer adds again can be found.
    """
    try:
        return _compared(root, original, prefix, text)
    except NoTemporary:
        raise
    except SurgeryError as error:
        return Check("tokenizer", False, str(error))


def _compared(root: Path, original, prefix: Sequence[int], text: str | None) -> Check:
    emitted = load_tokenizer(root)
    sample = (text or SENTENCE)[:SAMPLE]
    found = tokenize(emitted, sample, special=True)
    begins = tokenize(emitted, sample)[:1]
    if found[:1] != begins and found[0] in prefix:
        shown = decoded(emitted, found[:1])
        return Check(
            "tokenizer", False, f"its files put {shown!r} before a text, and that is folded into the slots already"
        )
    if original is None:
        return Check("tokenizer", True, "no folded token is added again")
    expected = tokenize(original, sample, special=True)
    if original.bos_token_id in prefix and expected[:1] == [original.bos_token_id]:
        expected = expected[1:]
    if found != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        return Check(
            "tokenizer",
            False,
            f"token {at} of the text differs from the original tokenizer's; tokenizer files were lost or changed",
        )
    return Check("tokenizer", True, f"{len(found)} token ids as the original tokenizer gives them")
