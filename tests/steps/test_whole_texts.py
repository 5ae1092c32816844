"""Text for an encoder: chunks are whole texts, framed as the tokenizer frames one, less what slots hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_checkpoint import save_tokenizer, write_text
from helpers.writing import VOCABULARY, text_config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from surgery.anatomy.encoders import examine_encoder
from surgery.errors import SourceError
from surgery.live.features import features_of
from surgery.live.port import Words, port_of
from surgery.live.text import Chunking, around, no_longer_added, tokenize
from surgery.steps.inputs import WholeReader


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A tokenizer that frames texts, and a text."""
    root = tmp_path_factory.mktemp("framed")
    text = write_text(root / "text.txt", 800, 0)
    save_tokenizer(root, text, framed=True)
    return AutoTokenizer.from_pretrained(root), text.read_text()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(5, 30), st.booleans())
def test_chunks_are_the_text_framed(framed: tuple[Any, str], count: int, length: int, folded: bool) -> None:
    tokenizer, text = framed
    reader = WholeReader(tokenizer, VOCABULARY, (0,) if folded else ())
    before = () if folded else (0,)
    rows = reader.cut(text, Chunking(count, length), "--text")
    inside = length - len(before) - 1
    assert rows.shape == (count, length) and rows.dtype == torch.long
    assert rows[:, len(before) : -1].flatten().tolist() == tokenize(tokenizer, text)[: count * inside]
    assert bool((rows[:, -1] == 1).all()) and (folded or bool((rows[:, 0] == 0).all()))
    every = reader.rows([text], Chunking(count, length))
    assert torch.equal(every[:count], rows) and len(every) == len(tokenize(tokenizer, text)) // inside


def test_what_stands_around_a_text(framed: tuple[Any, str]) -> None:
    tokenizer, text = framed
    assert around(tokenizer) == ((0,), (1,))
    assert no_longer_added(tokenizer, (0,)) == no_longer_added(tokenizer, (5, 0)) == (0,)
    assert no_longer_added(tokenizer, (5,)) == no_longer_added(None, (0,)) == ()
    with pytest.raises(SourceError, match="chunks of 3 tokens leave too few"):
        WholeReader(tokenizer, VOCABULARY).cut(text, Chunking(1, 3), "--text")
    with pytest.raises(SourceError, match="do not belong together"):
        WholeReader(tokenizer, 50).cut(text, Chunking(4, 20), "--text")


@pytest.mark.parametrize(("kind", "whole", "special"), [("clip", "last", 0), ("bert", "cls", 1)])
def test_which_token_stands_for_a_text(kind: str, whole: str, special: int) -> None:
    anatomy = examine_encoder(text_config_of(kind), "text")
    ids = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
    port = port_of(anatomy, ids)
    assert isinstance(port, Words) and (port.whole, port.special, port.tokens) == (whole, special, 4)
    assert port_of(anatomy, ids.flip(0) + torch.tensor([[0], [1]])).whole == ("last" if kind == "clip" else None)
    states = torch.arange(4.0).view(1, 4, 1)
    parts = [part.flatten().tolist() for part in features_of(port, states)]
    assert parts == ([[3.0], [0.0, 1.0, 2.0]] if kind == "clip" else [[0.0], [1.0, 2.0, 3.0]])
    behind = port_of(anatomy, ids[:, 1:], 1)  # BOS is there, and is no feature
    assert isinstance(behind, Words) and behind.tokens == 4 and behind.registers == 1
    assert features_of(behind, states)[-1].flatten().tolist() == ([1.0, 2.0] if kind == "clip" else [1.0, 2.0, 3.0])
