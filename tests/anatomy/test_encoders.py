"""Encoders of images and sound are found by the seam: where they attend, and what their tokens are."""

from __future__ import annotations

import pytest
import torch
from helpers.encoders import BLOCKS, ENCODERS, GRID, REFUSED, config_of, encoder_model
from helpers.recordings import BLOCKS as HEARING_BLOCKS
from helpers.recordings import DEAF, HEARING, WIDTH, hearing_config, hearing_model
from helpers.writing import BLOCKS as WRITING_BLOCKS
from helpers.writing import CAUSAL, TEXT_ENCODERS, VOCABULARY, WORDLESS, text_config_of, text_model

from surgery.anatomy.encoders import examine_encoder
from surgery.anatomy.tower import dropping_none, given_to
from surgery.errors import SourceError, UnsupportedModel
from surgery.live.features import Features
from surgery.live.model import Live
from surgery.live.port import Batch, Images, Sound, port_of
from surgery.live.stream import Observer, stream


class Keep(Observer):
    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}
        self.blocks: list[int] = []

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        self.states[layer] = states

    def attention(self, block: int, call: object, batch: Batch) -> None:
        self.blocks.append(block)


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_type_is_read_as_its_own_code_reads_it(kind: str) -> None:
    _, special, registers = ENCODERS[kind]
    anatomy, model = examine_encoder(config_of(kind)), encoder_model(kind)
    found = anatomy.patching
    assert found is not None
    assert (found.special, found.registers, found.grid(*found.size)) == (special, registers, (GRID, GRID))
    assert len(anatomy.sites) == len(anatomy.blocks) == BLOCKS
    dropping_none(model.config)
    tower, port, keep = model.get_submodule(anatomy.trunk), port_of(anatomy), Keep()
    assert (port.grid, port.special, port.registers) == ((GRID, GRID), special, registers)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stream(Live(model, anatomy, port), pixels, [keep])
    with torch.no_grad():
        theirs = tower(
            **given_to("pixel_values", pixels, found.handed, (8, 8)), output_hidden_states=True
        ).hidden_states
    assert sorted(keep.states) == list(range(BLOCKS + 1)) and keep.blocks == list(range(BLOCKS))
    for layer, states in keep.states.items():
        assert states.shape == (2, port.tokens, 32)
        if kind != "dpt" and layer < BLOCKS:  # what comes last may be normed by the time that it is told
            assert torch.equal(states, theirs[layer])


@pytest.mark.parametrize("kind", HEARING)
def test_each_type_is_heard_as_its_own_code_hears_it(kind: str) -> None:
    _, shape, tokens = HEARING[kind]
    anatomy, model = examine_encoder(hearing_config(kind)), hearing_model(kind)
    assert len(anatomy.sites) == len(anatomy.blocks) == HEARING_BLOCKS
    given = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    port = port_of(anatomy, given)
    assert isinstance(port, Sound) and port.tokens == tokens and port.registers == 0
    live, keep = Live(model, anatomy, port), Keep()
    features = Features(live)
    stream(live, given, [keep, features])
    with torch.no_grad():
        theirs = live.trunk(**{port.input: given}, output_hidden_states=True)
    assert sorted(keep.states) == list(range(HEARING_BLOCKS + 1)) and keep.blocks == list(range(HEARING_BLOCKS))
    for layer, states in keep.states.items():
        assert states.shape == (2, tokens, WIDTH)
        if layer < HEARING_BLOCKS:  # what comes last may be normed by the time that it is told
            assert torch.equal(states, theirs.hidden_states[layer])
    last = theirs[0] if not port.cut else torch.cat([theirs[0][:, :1], theirs[0][:, port.special :]], dim=1)
    if kind != "sew":  # which draws its tokens out again behind the blocks
        assert torch.allclose(torch.stack(features.found), last, atol=1e-6)


@pytest.mark.parametrize("kind", DEAF)
def test_what_does_not_hear_so_says_why(kind: str) -> None:
    settings, words = DEAF[kind]
    with pytest.raises(UnsupportedModel) as caught:
        examine_encoder({"model_type": kind, **settings})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_each_type_reads_text_as_its_own_code_does(kind: str) -> None:
    anatomy, model = examine_encoder(text_config_of(kind), "text"), text_model(kind)
    assert len(anatomy.sites) == len(anatomy.blocks) == WRITING_BLOCKS
    assert anatomy.sees_all is (kind not in CAUSAL) and anatomy.reads == "text" and anatomy.vocab_size == VOCABULARY
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    live, keep = Live(model, anatomy, port_of(anatomy, ids)), Keep()
    features = Features(live)
    stream(live, ids, [keep, features])
    with torch.no_grad():
        theirs = live.trunk(input_ids=ids, output_hidden_states=True)
        longer = live.trunk(input_ids=torch.cat([ids, ids[:, :3]], dim=1))[0]
    for layer, states in keep.states.items():
        assert states.shape == (2, 9, 32)
        if layer < WRITING_BLOCKS:
            assert torch.equal(states, theirs.hidden_states[layer])
    found = torch.stack(features.found)
    last = torch.cat([theirs[0][:, -1:], theirs[0][:, :-1]], dim=1) if kind in CAUSAL else theirs[0]
    assert torch.allclose(found, last, atol=1e-5)
    # Whether what comes later is seen, by what the model makes of it.
    assert torch.allclose(longer[:, :9], theirs[0], atol=1e-5) is (kind in CAUSAL)
    places = torch.zeros(1, anatomy.max_positions or 1, dtype=torch.long) + 3
    assert live.trunk(input_ids=places)[0].shape[1] == places.shape[1]


@pytest.mark.parametrize("kind", WORDLESS)
def test_what_does_not_read_text_so_says_why(kind: str) -> None:
    settings, words = WORDLESS[kind]
    with pytest.raises(UnsupportedModel) as caught:
        examine_encoder({"model_type": kind, **settings}, "text")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_model_that_reads_both_one_is_meant() -> None:
    with pytest.raises(UnsupportedModel, match="no part of it reads sound alone"):
        examine_encoder(config_of("vit"), "audio")
    with pytest.raises(UnsupportedModel, match="no part of it reads images alone"):
        examine_encoder(hearing_config("wav2vec2"), "images")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_such_encoder_says_why(kind: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        examine_encoder(config_of(kind))
    assert REFUSED[kind][1] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "eva99"}, "is not an architecture of the installed transformers"),
        ({"model_type": "vit", "image_size": "large"}, "transformers does not accept it as 'vit'"),
        ({"model_type": "swin", "hidden_size": 32, "depths": 3}, "swin"),
        ({"model_type": "whisper", "d_model": 32}, "no model can be built of its config"),
    ],
)
def test_bad_configs_are_one_sentence(config: dict, words: str) -> None:
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        examine_encoder(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_places_have_names() -> None:
    port = Images((2, 3), 4, 2)
    names = ["CLS", "register 1", "register 2", "special 4", "patch 1,1", "patch 1,2", "patch 1,3", "patch 2,1"]
    assert port.names(None, range(8)) == names and port.tokens == 10
