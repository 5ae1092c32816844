"""What verbs are given, made ready: texts, chunks, gates. All of it can be refused before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles, described
from ..errors import SourceError
from ..live.text import Chunking, chunk, in_turn, read_each, read_texts, split_text, tokenize
from ..progress import Reporter
from ..verification.gates import GATES, Gate
from ..verification.gates.base import Inputs

CALIBRATION_CHUNKS = 32


@dataclass(frozen=True)
class Texts:
    """Texts to search, scale and tune on, of each alike much, and other text to evaluate on; None where none was given.

    `files`: their own.
    """

    calibration: tuple[str, ...] | None
    evaluation: str | None
    files: TextFiles = TextFiles()


def gather_texts(text: Sequence[Path], calibration: Sequence[Path], reporter: Reporter) -> Texts:
    """Read the files. Given only evaluation text, its first half calibrates and its second half evaluates."""
    if both := {Path(path).resolve() for path in text} & {Path(path).resolve() for path in calibration}:
        reporter.note(f"{min(both)} is both --text and --calibration: figures are then on text that was fitted to")
    evaluation = read_texts(text) if text else None
    fitted = read_each(calibration) if calibration else None
    split = fitted is None and evaluation is not None
    files = TextFiles(evaluation=described(text), calibration=described(calibration), split=split)
    if evaluation is None or fitted is not None:
        return Texts(fitted, evaluation, files)
    first, second = split_text(evaluation)
    return Texts((first,), second, files)


def whole_texts(text: Sequence[Path]) -> Texts:
    """The files, all of them to evaluate on; None where there are none."""
    return Texts(None, read_texts(text) if text else None, TextFiles(evaluation=described(text)))


def room_after(anatomy: Anatomy, tokens: int) -> int | None:
    """How many positions the model has after so many tokens; None where there is no end of them."""
    return None if anatomy.max_positions is None else anatomy.max_positions - tokens


def fit_chunks(chunking: Chunking, anatomy: Anatomy, tokens: int) -> Chunking:
    """Chunks no longer than the model's positions after so many tokens.

    Those are the slots, and where the original is measured too at least one: it is measured after BOS as well.
    """
    room = room_after(anatomy, tokens)
    return chunking if room is None else replace(chunking, length=min(chunking.length, room))


def require_inputs(gates: Sequence[Gate], inputs: Inputs) -> dict[str, Any]:
    """What gates make ready before weights are read, by name.

    SourceError for what they lack, and for what is given and only a gate would use that is not asked for.
    """
    for absent in {*GATES} - {type(gate) for gate in gates}:
        absent.refuse(inputs)
    return {gate.name: gate.require(inputs) for gate in gates}


def calibrated(chunking: Chunking, sets: int = 1) -> int:
    """How many chunks are calibrated on: as many as are evaluated on and no more than 32, so many `sets` of them."""
    return sets * min(CALIBRATION_CHUNKS, chunking.count)


class Cutter(Protocol):
    """How what is given becomes what a model reads: texts token ids (`Reader`), files of images pixels
    (`pictures.PixelReader`), recordings what their feature extractor makes (`recordings.SoundReader`)."""

    def cut(self, given: Any, chunking: Chunking, name: str) -> torch.Tensor:
        """(N, ...) to evaluate on. SourceError where there is too little; `name` is that of the option."""

    def cut_calibration(self, given: Any, chunking: Chunking, sets: int = 1) -> torch.Tensor:
        """(M, ...) to fit on, `sets` times as much for gates that calibrate several times."""


@dataclass(frozen=True)
class Reader:
    """How text becomes token ids: a tokenizer, and how many ids the model has embeddings for."""

    tokenizer: Any
    vocab_size: int

    def cut(self, text: str, chunking: Chunking, name: str) -> torch.Tensor:
        """Chunks (N, T) of token ids. SourceError for too short a text, or a tokenizer that is not the model's."""
        chunks = chunk(tokenize(self.tokenizer, text), chunking, name)
        self.require_known(chunks.flatten().tolist())
        return chunks

    def cut_calibration(self, texts: Sequence[str], chunking: Chunking, sets: int = 1) -> torch.Tensor:
        """Chunks (M, T) to search, scale and tune on: as long as those of the evaluation, and no more than 32.

        Several texts take turns. `sets`: so many times as much, for gates that calibrate several times.
        """
        wanted = Chunking(calibrated(chunking, sets), chunking.length)
        read = [tokenize(self.tokenizer, text) for text in texts]
        short = min(read, key=len)
        if len(read) > 1 and len(short) < chunking.length:
            raise SourceError(
                f"calibration text {read.index(short) + 1} of {len(read)} has {len(short):,} tokens, and a chunk "
                f"{chunking.length:,}; leave that file out, or give a longer one."
            )
        ids = in_turn(read, chunking.length)
        chunks = chunk(ids, wanted, "the calibration text")
        self.require_known(chunks.flatten().tolist())
        return chunks

    def require_known(self, ids: Sequence[int]) -> None:
        """SourceError unless the model has embeddings for all of `ids`, and for BOS, after which a baseline is
        measured."""
        if (largest := max(self.tokenizer.bos_token_id or 0, *ids)) >= self.vocab_size:
            raise SourceError(
                f"the tokenizer gives the token id {largest}, and the model's vocabulary has {self.vocab_size}: they "
                "do not belong together; put the model's own tokenizer files beside it."
            )
