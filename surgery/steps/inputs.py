"""What verbs are given, made ready: texts, chunks, prefix tokens. All of it can be refused before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.layout import Layout
from ..checkpoint.stage import Stage
from ..errors import SourceError
from ..live.executed import require_int8
from ..live.quantised import SCHEMES
from ..live.text import Chunking, chunk, read_texts, split_text, tokenize
from ..progress import Reporter
from ..recipe import Verify
from ..verification.gates.streaming import KEPT
from ..verification.gates.tasks import TaskSet, open_tasks, require_harness

CALIBRATION_CHUNKS = 32
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Texts:
    """Text to search, scale and tune on, and other text to evaluate on; None where none was given."""

    calibration: str | None
    evaluation: str | None


def gather_texts(text: Sequence[Path], calibration: Sequence[Path], reporter: Reporter) -> Texts:
    """Read the files. Given only evaluation text, its first half calibrates and its second half evaluates."""
    if both := {Path(path).resolve() for path in text} & {Path(path).resolve() for path in calibration}:
        reporter.note(f"{min(both)} is both --text and --calibration: figures are then on text that was fitted to")
    evaluation = read_texts(text) if text else None
    if calibration:
        return Texts(read_texts(calibration), evaluation)
    if evaluation is None:
        return Texts(None, None)
    return Texts(*split_text(evaluation))


def room_behind(anatomy: Anatomy, tokens: int) -> int | None:
    """How many positions the model has behind so many tokens; None where there is no end of them."""
    return None if anatomy.max_positions is None else anatomy.max_positions - tokens


def fit_chunks(chunking: Chunking, anatomy: Anatomy, tokens: int) -> Chunking:
    """Chunks no longer than the model's positions behind so many tokens.

    Those are the slots, and where the original is measured too at least one: it is measured behind BOS as well.
    """
    room = room_behind(anatomy, tokens)
    return chunking if room is None else replace(chunking, length=min(chunking.length, room))


def cut(tokenizer, text: str, chunking: Chunking, vocab_size: int, name: str) -> torch.Tensor:
    """Chunks (N, T) of token ids. SourceError for text that is too short, or a tokenizer that is not the model's."""
    chunks = chunk(tokenize(tokenizer, text), chunking, name)
    require_known(chunks.flatten().tolist(), tokenizer, vocab_size)
    return chunks


def require_known(ids: Sequence[int], tokenizer, vocab_size: int) -> None:
    """SourceError unless the model has embeddings for all of `ids`, and for BOS, with which a baseline is measured."""
    if (largest := max(tokenizer.bos_token_id or 0, *ids)) >= vocab_size:
        raise SourceError(
            f"the tokenizer gives the token id {largest}, and the model's vocabulary has {vocab_size}: they do not "
            "belong together; put the model's own tokenizer files beside it."
        )


def cut_calibration(tokenizer, text: str, chunking: Chunking, vocab_size: int) -> torch.Tensor:
    """Chunks (M, T) to search, scale and tune on: as long as those of the evaluation, and no more than 32."""
    wanted = Chunking(min(CALIBRATION_CHUNKS, chunking.count), chunking.length)
    return cut(tokenizer, text, wanted, vocab_size, "the calibration text")


def require_length(gates: Verify, chunking: Chunking) -> None:
    """SourceError unless chunks leave the window that a recipe streams them through, and hold what it edits."""
    if gates.streaming is not None and chunking.length <= gates.streaming.window:
        raise SourceError(
            f"verify.streaming.window is {gates.streaming.window}, and chunks of {chunking.length} tokens never leave "
            "it; give a longer --chunk-length, or a smaller window."
        )
    if gates.cache_edits is not None and chunking.length // 2 < gates.cache_edits.tokens + 2 * KEPT:
        raise SourceError(
            f"verify.cache_edits.tokens is {gates.cache_edits.tokens}, and the first half of {chunking.length} tokens "
            f"has room for {chunking.length // 2 - 2 * KEPT}; give a longer --chunk-length, or fewer tokens."
        )


def require_tools(gates: Verify, device: str) -> None:
    """SourceError unless what the gates are measured with is installed, and runs here."""
    if gates.quantised.executed():
        require_int8(device)
    if gates.tasks is not None:
        require_harness()


def calibrates(gates: Verify) -> bool:
    """Whether a gate is on a quantised model whose scales come from calibration text."""
    return any(SCHEMES[name].calibrated for name in gates.quantised.gates())


def gather_tasks(gates: Verify, files: Path | None, max_length: int | None) -> TaskSet | None:
    """The tasks that the gates are on, `files` among them, cut to `max_length` tokens; None where they are on none."""
    if gates.tasks is not None:
        return open_tasks(gates.tasks.names, gates.tasks.limit, files, max_length)
    if files is not None:
        raise SourceError(f"--tasks {files}: no gate of the recipe is on tasks; name them under verify.tasks.")
    return None


def vocabulary_size(layout: Layout, config: dict) -> int:
    """How many token ids the model has embeddings for, from headers; else as its config says."""
    for info in layout.tensors.values():
        if info.name.endswith(EMBEDDINGS) and info.shape:
            return info.shape[0]
    text_config = config.get("text_config")
    sizes = (config.get("vocab_size"), text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    return next((size for size in sizes if isinstance(size, int)), 2**31)


def resolve_prefix(prefix: Sequence[str | int], tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Token ids of a recipe's prefix: an id as it is, a text only if it is exactly one token."""
    ids = tuple(_one_token(token, tokenizer) if isinstance(token, str) else token for token in prefix)
    for token_id in ids:
        if token_id >= vocab_size:
            raise SourceError(
                f"attention_bias.prefix: token id {token_id} is not in the vocabulary of {vocab_size}; "
                "give a smaller id."
            )
    return ids


def _one_token(text: str, tokenizer) -> int:
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids == [tokenizer.unk_token_id]:
        raise SourceError(
            f"attention_bias.prefix: {text!r} is not in the vocabulary; give another token, or a token id."
        )
    if len(ids) != 1:
        raise SourceError(
            f"attention_bias.prefix: {text!r} is not one token of the vocabulary but {len(ids)} ({ids[:8]}); "
            "list its tokens one by one, or give token ids."
        )
    return ids[0]


SILENT = Reporter()


def source_work(stage: Stage) -> Path:
    """Where in a stage a GGUF is written out before its shards take their place."""
    return stage.path / ".source"
