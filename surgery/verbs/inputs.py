"""What verbs are given, made ready: texts, chunks, prefix tokens. Everything here can be refused before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..anatomy.sites import Anatomy
from ..checkpoint.source import Source
from ..checkpoint.stage import Stage
from ..errors import SourceError
from ..verification.text import Chunking, read_texts, split_text


@dataclass(frozen=True)
class Texts:
    """Text to search, scale and tune on, and other text to evaluate on; None where none was given."""

    calibration: str | None
    evaluation: str | None


def gather_texts(text: Sequence[Path], calibration: Sequence[Path]) -> Texts:
    """Read the files. Given only evaluation text, its first half calibrates and its second half evaluates."""
    evaluation = read_texts(text) if text else None
    if calibration:
        return Texts(read_texts(calibration), evaluation)
    if evaluation is None:
        return Texts(None, None)
    return Texts(*split_text(evaluation))


def fit_chunks(chunking: Chunking, anatomy: Anatomy, n_slots: int) -> Chunking:
    """Chunks no longer than the model's positions behind the prefix."""
    limit = anatomy.max_positions
    return chunking if limit is None else replace(chunking, length=min(chunking.length, limit - n_slots))


def resolve_prefix(prefix: Sequence[str | int], tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Token ids of a recipe's prefix: an id as it is, a text only if it is exactly one token."""
    ids = []
    for token in prefix:
        if isinstance(token, str):
            token_id = _one_token(token, tokenizer)
        elif token >= vocab_size:
            raise SourceError(f"attention_bias.prefix: token id {token} is not in the vocabulary of {vocab_size}; give a smaller id")
        else:
            token_id = token
        ids.append(token_id)
    return tuple(ids)


def _one_token(text: str, tokenizer) -> int:
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (tokenizer.unk_token_id is not None and ids[0] == tokenizer.unk_token_id):
        raise SourceError(
            f"attention_bias.prefix: {text!r} is not one token of the vocabulary but {len(ids)} ({ids[:8]}); "
            "list its tokens one by one, or give token ids"
        )
    return ids[0]


def has_tokenizer(source: Source) -> bool:
    """Whether the source carries tokenizer files."""
    return any(name.startswith("tokenizer") for name in source.companions)


def source_work(stage: Stage) -> Path:
    """Where in a stage a GGUF is written out before its shards take their place."""
    return stage.path / ".source"
