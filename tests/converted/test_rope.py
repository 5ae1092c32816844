"""The older spelling of rotary settings beside the newer, for engines that know no other."""

from __future__ import annotations

import json

import pytest
from helpers.tiny import tiny_config
from transformers import CONFIG_MAPPING, Gemma3TextConfig, LlamaConfig, NemotronConfig, Phi3Config, PreTrainedConfig

from surgery.converted.rope import spelled_for_conversion, with_both_spellings

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def raw(config) -> dict:
    """config.json as transformers writes it."""
    return json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e5}), {"rope_theta": 1e5}),
        (
            LlamaConfig(rope_parameters=LLAMA3),
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            NemotronConfig(rope_parameters={"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}),
            {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
        ),
        (Gemma3TextConfig(), {}),  # by kind of layer, which each family spelt in its own way
        (Phi3Config(), {}),  # would be read as another configuration
    ],
    ids=["base", "scaled", "partial", "by layer", "read otherwise"],
)
def test_the_older_spelling_is_added_where_it_says_the_same(config, added: dict) -> None:
    before = raw(config)
    both = with_both_spellings(before)
    assert both == {**before, **added}
    assert CONFIG_MAPPING[config.model_type].from_dict(both).to_dict() == config.to_dict()


@pytest.mark.parametrize("old", [{"rope_theta": 7e3}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_a_spelling_that_is_there_stays_alone(old: dict) -> None:
    given = {**raw(tiny_config("llama")), **old}
    assert with_both_spellings(given) == given


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "scaling", [{k: v for k, v in LLAMA3.items() if k != "rope_theta"}, YARN], ids=["llama3", "yarn"]
)
@pytest.mark.parametrize("spelt", ["newer", "older"])
def test_a_tokenizer_that_reads_a_bare_config_is_not_stopped(scaling: dict, spelt: str) -> None:
    rope = {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    plain = {k: v for k, v in raw(tiny_config("llama")).items() if k != "rope_parameters"}
    given = plain | (rope if spelt == "newer" else old)
    written = spelled_for_conversion(given)
    PreTrainedConfig.from_dict({**written, "model_type": "eab_llama"})
    assert LlamaConfig.from_dict(written).to_dict() == LlamaConfig.from_dict(given).to_dict()
    with pytest.raises(AttributeError):  # if this no longer raises, both spellings can be written
        PreTrainedConfig.from_dict({**plain, **old, "model_type": "eab_llama"})


def test_the_text_part_of_a_larger_model_is_spelt_too() -> None:
    given = raw(CONFIG_MAPPING["llava"](text_config=tiny_config("llama")))
    assert (
        with_both_spellings(given)["text_config"]["rope_theta"] == given["text_config"]["rope_parameters"]["rope_theta"]
    )
