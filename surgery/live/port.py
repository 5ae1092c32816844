"""What a model reads: token ids of text, images, or sound. The rest of surgery sees batches, and does not ask.

Notation: N sequences, images or recordings, T tokens of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..anatomy.patching import PIXELS, SOUND, TOKENS, Handed, Patching
from ..anatomy.sound import grid_of
from ..anatomy.tower import given_to
from ..words import IMAGE, RECORDING, SPECTROGRAM, WRITTEN, Called
from .text import behind, token_texts

if TYPE_CHECKING:
    from ..anatomy.sites import Anatomy
    from .model import Live

# Logits are the largest tensor of a pass over text; this bounds a batch of them, and with it the batch size.
LOGIT_BYTES = 256 * 2**20
TRIED = (2, 16)  # rows and tokens of the random text that `answer` is about
IMAGE_BYTES = 64 * 2**20  # of one layer's hidden states of a batch of images or recordings


@dataclass(frozen=True, eq=False)
class Batch:
    """tokens (B, T) as fed to the model; the first `lead` of each row are a prefix that belongs to no text.

    `index`: how many batches of the same text come before it. Of images and sound `tokens` are the numbers of places,
    and `given` what the model is called with.
    """

    tokens: torch.Tensor
    lead: int
    index: int = 0
    given: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Text:
    """Token ids (N, T), each row a text of its own."""

    predicts = of_text = True

    def batches(self, live: Live, chunks: torch.Tensor, prefix: Sequence[int]) -> Iterator[Batch]:
        vocabulary = live.model.config.get_text_config().vocab_size
        size = max(1, LOGIT_BYTES // (4 * vocabulary * (chunks.shape[1] + len(prefix))))
        for index, rows in enumerate(behind(prefix, chunks).split(size)):
            yield Batch(rows, len(prefix), index)

    def run(self, live: Live, batch: Batch, wanted: bool) -> torch.Tensor | None:
        """Have the model compute; logits (B, T, V) where they are `wanted`."""
        keep, model = {}, live.model
        if (
            not wanted
            and len({*getattr(model, "hf_device_map", {}).values()}) < 2  # else logits may be elsewhere than the place
            and "logits_to_keep" in inspect.signature(type(model).forward).parameters
        ):
            # One row of logits is enough for a pass that nobody reads them from. It is named by its place: given a
            # number of rows, some models (Gemma 4) compute their last blocks for only as many tokens.
            keep = {"logits_to_keep": torch.tensor([batch.tokens.shape[1] - 1], device=batch.tokens.device)}
        logits: torch.Tensor = model(input_ids=batch.tokens, use_cache=False, **keep).logits
        return logits if wanted else None

    def names(self, tokenizer: Any, tokens: Sequence[int]) -> list[str]:
        """What each of `tokens` is called."""
        return token_texts(tokenizer, tokens)


@dataclass(frozen=True)
class Images:
    """Pixels (N, C, H, W), of which an encoder makes `special` tokens and then one for each patch of a `grid`, row by
    row. Of the special ones the first is CLS, unless all are `registers`, which come then."""

    grid: tuple[int, int]
    special: int
    registers: int
    handed: Handed = "whole"  # see `anatomy.patching.Patching`, as `patch`
    patch: tuple[int, int] | None = None

    predicts = of_text = False
    input = PIXELS  # the name of what the model is called with

    @property
    def called(self) -> Called:
        """What it reads, and what of it is a token, in words."""
        return IMAGE

    @property
    def cls(self) -> int:
        """How many CLS there are."""
        return int(self.special > self.registers)

    @property
    def whole(self) -> Literal["cls", "last"] | None:
        """Which token stands for the whole of what is read; None: the mean of all."""
        return "cls" if self.cls else None

    @property
    def begins(self) -> bool:
        """Whether the first token is another than those that follow it."""
        return self.cls > 0

    @property
    def tokens(self) -> int:
        return self.special + self.grid[0] * self.grid[1]

    def batches(self, live: Live, pixels: torch.Tensor, prefix: Sequence[int]) -> Iterator[Batch]:
        """pixels (N, C, H, W), or of sound (N, ...)."""
        width = live.trunk.config.get_text_config().hidden_size
        size = max(1, IMAGE_BYTES // (4 * width * self.tokens))
        for index, part in enumerate(pixels.split(size)):
            yield Batch(torch.arange(self.tokens).expand(len(part), -1), 0, index, self.given(live, part))

    def given(self, live: Live, part: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the encoder is called with."""
        return given_to(self.input, part.to(live.device, live.model.dtype), self.handed, self.patch)

    def run(self, live: Live, batch: Batch, wanted: bool) -> torch.Tensor | None:
        """Have the encoder compute; where they are `wanted`, what a head makes of it: logits (B, classes)."""
        assert batch.given is not None
        if not wanted:
            live.trunk(**batch.given)
            return None
        logits: torch.Tensor = live.model(**batch.given).logits
        return logits

    def names(self, tokenizer: Any, tokens: Sequence[int]) -> list[str]:
        """What each of the places `tokens` is called."""
        return [self._name(token) for token in tokens]

    def _name(self, token: int) -> str:
        if token >= self.special:
            row, column = divmod(token - self.special, self.grid[1])
            return self._of_grid(row, column)
        if token < self.cls:
            return "CLS"
        number = token - self.cls + 1
        return f"register {number}" if number <= self.registers else f"special {token + 1}"

    def _of_grid(self, row: int, column: int) -> str:
        return f"patch {row + 1},{column + 1}"


@dataclass(frozen=True)
class Sound(Images):
    """Recordings (N, ...), as an encoder of sound is called with them by the name `input`, of which it makes a row of
    frames: a `grid` of one row, and nothing special but registers of test time. Of a picture of sound that is cut as an
    image is (`cut`), it makes what `Images` are."""

    input: str = SOUND[0]
    cut: bool = False

    @property
    def called(self) -> Called:
        return SPECTROGRAM if self.cut else RECORDING

    def _of_grid(self, row: int, column: int) -> str:
        return super()._of_grid(row, column) if self.cut else f"frame {column + 1}"


@dataclass(frozen=True)
class Words(Images):
    """Token ids (N, T) of texts, which an encoder makes a row of, behind `registers`: tokens that stand before each
    text, and that a converted encoder has in its slots. What stands for a text is its last token, where tokens see only
    those before them (`causal`), or else the first, if that is `special` and no register."""

    input: str = TOKENS
    causal: bool = False

    of_text = True

    @property
    def called(self) -> Called:
        return WRITTEN

    @property
    def whole(self) -> Literal["cls", "last"] | None:
        return "last" if self.causal else super().whole

    @property
    def begins(self) -> bool:
        return self.causal or self.special > 0

    def batches(self, live: Live, pixels: torch.Tensor, prefix: Sequence[int]) -> Iterator[Batch]:
        """pixels: token ids (N, T)."""
        for batch in super().batches(live, behind(prefix, pixels), ()):
            assert batch.given is not None
            yield replace(batch, tokens=batch.given[self.input], lead=len(prefix))

    def given(self, live: Live, part: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.input: part.to(live.device)}

    def names(self, tokenizer: Any, tokens: Sequence[int]) -> list[str]:
        return token_texts(tokenizer, tokens)


Port = Text | Images
TEXT = Text()


def port_of(anatomy: Anatomy, chunks: torch.Tensor | None = None, lead: int = 0) -> Port:
    """What a model reads, given what it is to read: token ids (N, T), pixels (N, C, H, W), or recordings (N, ...); of
    the size that it was made for, where there are none. `lead`: how many tokens stand before each text
    besides, of which a converted encoder has slots.

    UnsupportedModel for recordings that it does not take.
    """
    if anatomy.patching is None:
        return TEXT
    patching = anatomy.patching
    if patching.is_text:
        return _words(patching, lead, chunks)
    grid = grid_of(anatomy, patching.shape if chunks is None else tuple(chunks.shape[1:]))
    if patching.is_sound:
        cut = patching.patch is not None
        return Sound(grid, patching.special, patching.registers, input=patching.input, cut=cut)
    return Images(grid, patching.special, patching.registers, patching.handed, patching.patch)


def _words(patching: Patching, lead: int, ids: torch.Tensor | None) -> Words:
    count = patching.shape[0] if ids is None else ids.shape[1]
    # A token that stands first in each of several texts is CLS, where it can be.
    first = not patching.causal and ids is not None and len(ids) > 1 and bool((ids[:, 0] == ids[0, 0]).all())
    return Words((1, count - first), lead + first, lead, causal=patching.causal)


@torch.no_grad()
def answer(live: Live) -> torch.Tensor:
    """What the model makes of a few random tokens, the same each time: logits; of an encoder, its last hidden states of
    random images or recordings."""
    if live.anatomy.patching is not None:
        port = port_of(live.anatomy)
        assert isinstance(port, Images)
        states: torch.Tensor = live.trunk(**port.given(live, random_inputs(live.anatomy, TRIED[0])))[0]
        return states
    vocabulary, generator = live.model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, TRIED, generator=generator).to(live.device)
    logits: torch.Tensor = live.model(input_ids=tokens, use_cache=False).logits
    return logits


def random_inputs(anatomy: Anatomy, count: int) -> torch.Tensor:
    """So many random inputs of an encoder, of the shape that it was made for, the same each time."""
    generator, patching = torch.Generator().manual_seed(0), anatomy.patching
    assert patching is not None
    if patching.is_text:
        assert anatomy.vocab_size is not None
        return torch.randint(anatomy.vocab_size, (count, *patching.shape), generator=generator)
    return torch.randn(count, *patching.shape, generator=generator)
