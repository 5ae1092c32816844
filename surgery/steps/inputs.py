"""What verbs are given, made ready: texts, chunks, gates. All of it can be refused before weights are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles, described
from ..errors import SourceError
from ..live.port import Port, port_of
from ..live.text import Chunking, around, behind, chunk, in_turn, read_each, read_texts, split_text, tokenize
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


def taken_by(anatomy: Anatomy, slots: int) -> int:
    """How many positions a text leaves free where both models are measured: the original of a language model is
    measured after BOS as well, and to an encoder texts are given whole."""
    return max(slots, int(anatomy.patching is None))


def fit_chunks(chunking: Chunking, anatomy: Anatomy, tokens: int) -> Chunking:
    """Chunks no longer than the model's positions after so many tokens.

    Those are the slots, and where the original is measured too, what else stands before a text (`taken_by`).
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

    def every(self, texts: Sequence[str], length: int) -> list[int]:
        """All of several texts as token ids, which take turns of so many tokens."""
        ids = in_turn([tokenize(self.tokenizer, text) for text in texts], length)
        self.require_known(ids)
        return ids

    def require_known(self, ids: Sequence[int]) -> None:
        """SourceError unless the model has embeddings for all of `ids`, and for BOS, after which a baseline is
        measured."""
        if (largest := max(self.tokenizer.bos_token_id or 0, *ids)) >= self.vocab_size:
            raise SourceError(
                f"the tokenizer gives the token id {largest}, and the model's vocabulary has {self.vocab_size}: they "
                "do not belong together; put the model's own tokenizer files beside it."
            )


@dataclass(frozen=True)
class WholeReader(Reader):
    """How text becomes the token ids of an encoder: chunks as its tokenizer gives whole texts, with the tokens that it
    puts around them, less one that slots hold (`without`)."""

    without: tuple[int, ...] = ()

    @functools.cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before each text, and behind it."""
        before, after = around(self.tokenizer)
        return before[len(self.without) :] if self.without == before[: len(self.without)] else before, after

    def cut(self, text: str, chunking: Chunking, name: str) -> torch.Tensor:
        return self._whole(super().cut(text, self._inside(chunking, name), name))

    def cut_calibration(self, texts: Sequence[str], chunking: Chunking, sets: int = 1) -> torch.Tensor:
        inside = self._inside(chunking, "the calibration text")
        return self._whole(super().cut_calibration(texts, inside, sets))

    def rows(self, texts: Sequence[str], chunking: Chunking) -> torch.Tensor:
        """All chunks that there are, (N, T)."""
        length = self._inside(chunking, "the calibration text").length
        ids = self.every(texts, length)
        return self._whole(torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length))

    def _inside(self, chunking: Chunking, name: str) -> Chunking:
        """What is left for the text in a chunk."""
        before, after = self.around
        if (length := chunking.length - len(before) - len(after)) < 2:
            raise SourceError(
                f"{name}: chunks of {chunking.length} tokens leave too few between those that the tokenizer adds; make "
                "them longer (--chunk-length)."
            )
        return replace(chunking, length=length)

    def _whole(self, rows: torch.Tensor) -> torch.Tensor:
        before, after = self.around
        return torch.cat([behind(before, rows), torch.tensor(after, dtype=torch.long).expand(len(rows), -1)], dim=1)


def text_reader(anatomy: Anatomy, tokenizer: Any, vocab_size: int, without: tuple[int, ...] = ()) -> Reader:
    """How text becomes the token ids of a language model, or of an encoder."""
    if anatomy.patching is None:
        return Reader(tokenizer, vocab_size)
    return WholeReader(tokenizer, vocab_size, without)


def words_of(anatomy: Anatomy, reader: WholeReader, rows: torch.Tensor) -> Port:
    """What an encoder reads, of which `rows` are given as they are: of a causal one, what stands before a text is told
    from it, as it may become slots."""
    lead = 0 if anatomy.sees_all else len(reader.around[0])
    return port_of(anatomy, rows[:, lead:], lead)
