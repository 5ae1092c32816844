"""A source's config is parsed once and its model built once, on the meta device, whatever a recipe asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.families import families, in_tiers
from helpers.tiny import TINY, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import surgery
from surgery.anatomy.linears import linears
from surgery.anatomy.sites import examine
from surgery.checkpoint.source import open_source
from surgery.converted.described import read_described
from surgery.live.text import Chunking
from surgery.steps.options import VerifyOptions

RECIPES = Path(__file__).parents[2] / "recipes"
OTHERS = ("pretrain:", "fidelity:")  # what trains from nothing, or is for encoders
CONVERTING = [
    path.stem for path in sorted(RECIPES.glob("*.yaml")) if not any(word in path.read_text() for word in OTHERS)
]
ADAPTED = ["bloom", "falcon", "gpt_neo", "openai-gpt"]


@pytest.fixture
def made(monkeypatch) -> dict[str, int]:
    """How many configs surgery has parsed since, and how many models it has built from configs."""
    counts = {"parsed": 0, "built": 0}
    parse, build = PreTrainedConfig.from_dict.__func__, PreTrainedModel._from_config.__func__

    def from_dict(cls, *args, **kwargs):
        counts["parsed"] += sys._getframe(1).f_globals["__name__"].startswith("surgery.")  # tokenizers read it too
        return parse(cls, *args, **kwargs)

    def from_config(cls, *args, **kwargs):
        counts["built"] += "CausalLM" in cls.__name__  # other heads are looked at too
        return build(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedConfig, "from_dict", classmethod(from_dict))
    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(from_config))
    return counts


@pytest.mark.parametrize("recipe", CONVERTING)
def test_a_plan_examines_its_source_once(recipe, place, made):
    surgery.plan(RECIPES / f"{recipe}.yaml", str(place.source))
    assert made == {"parsed": 1, "built": 1}


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")
def test_a_plan_examines_a_gguf_once(smollm2_gguf, made):
    surgery.plan(RECIPES / "eab-tuned.yaml", str(smollm2_gguf))
    assert made == {"parsed": 1, "built": 1}


def test_verify_examines_a_checkpoint_once(place, made):
    options = VerifyOptions(against=str(place.source), text=[place.text], chunking=Chunking(4, 32))
    verdict = surgery.verify(place.converted, options)
    # One model of each. The source's config is parsed for its plan and in both spellings of its rotary settings, as a
    # run does, and each time that it is loaded: what chooses code is taken out before.
    assert verdict["passed"] and made == {"parsed": 6, "built": 2}


def test_a_checkpoint_describes_the_anatomy_of_its_source(place):
    described = read_described(place.converted)
    assert described.anatomy is described.anatomy
    assert described.anatomy == examine(json.loads((place.source / "config.json").read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")
def test_a_gguf_is_examined_on_the_model_of_its_names(smollm2_gguf):
    source = open_source(str(smollm2_gguf))
    anatomy = examine(source.config, source.blank)
    assert anatomy.blank is source.blank and anatomy == examine(source.config)
    assert json.loads(anatomy.config.to_json_string()) == source.config


# ---- the blank model is as transformers builds it


@pytest.mark.parametrize("kind", in_tiers([*TINY, *ADAPTED]))
def test_nothing_of_the_probe_stays_on_the_blank_model(kind):
    config = tiny_config(kind) if kind in TINY else families()[kind].config()
    anatomy = examine(config.to_dict())
    blank = anatomy.blank
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
    assert [type(module) for module in blank.modules()] == [type(module) for module in fresh.modules()]
    for module, other in zip(blank.modules(), fresh.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
        if isinstance(module, PreTrainedModel):
            assert module.config._attn_implementation is None
    assert {name: p.shape for name, p in blank.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert all(parameter.is_meta for parameter in blank.parameters())
    assert anatomy.config.dtype == config.dtype and anatomy.vocab_size == 97


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_the_blank_model_tells_the_linear_layers(kind):
    anatomy = examine(tiny_config(kind).to_dict())
    found = linears(anatomy.blank, anatomy)
    assert found and all(name.startswith(anatomy.blocks) for name in found)


def test_an_anatomy_is_compared_and_shown_by_what_it_says():
    anatomy, again = (examine(tiny_config("llama").to_dict()) for _ in range(2))
    assert anatomy == again and anatomy.blank is not again.blank and hash(anatomy) == hash(again)
    assert "LlamaConfig {" not in repr(anatomy) and "Linear(" not in repr(anatomy)
