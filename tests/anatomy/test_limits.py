"""When max_position_embeddings is a limit and nothing else, from one parse and one model on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import EXACT, families, in_tiers
from helpers.tiny import TINY, tiny_config
from transformers import AutoModelForCausalLM

from surgery.anatomy.limits import LIMIT, LIMIT_ONLY_ROPE, is_only_a_limit, max_length, max_positions
from surgery.anatomy.parsed import parse_config
from surgery.anatomy.sites import examine
from surgery.converted.files import lowered_limits

SLOTS = 3
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3, its original length the limit": {**LLAMA3, "original_max_position_embeddings": 256},
    "llama3 without its original length": LLAMA3,
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def by_two_models(config: dict) -> dict:
    """The reference: build the model under both limits, and compare rotary settings and every shape."""
    limit = config.get(LIMIT)
    if not isinstance(limit, int):
        return {}
    lowered = {LIMIT: limit - SLOTS}
    rope, other = (getattr(parse_config(c), "rope_parameters", None) or {} for c in (config, {**config, **lowered}))
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    if not {kind.get("rope_type", "default") for kind in kinds} <= LIMIT_ONLY_ROPE:
        return {}
    return lowered if rope == other and shapes(config) == shapes({**config, **lowered}) else {}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parse_config(copy.deepcopy(config)), dtype=torch.bfloat16)
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_each_exact_type_is_judged_as_two_models_judge_it(kind):
    family = families()[kind]
    with family.default_dtype():
        config = family.config().to_dict()
        assert lowered_limits(config, examine(config), SLOTS) == by_two_models(config)


@pytest.mark.parametrize("kind", in_tiers(TINY))
def test_each_tiny_config_is_judged_as_two_models_judge_it(kind):
    config = tiny_config(kind).to_dict()
    assert lowered_limits(config, examine(config), SLOTS) == by_two_models(config)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rotary_settings_are_judged_as_two_models_judge_them(name, rope):
    config = tiny_config("llama").to_dict()
    del config["rope_parameters"]
    config[name] = copy.deepcopy(rope)
    assert lowered_limits(config, examine(config), SLOTS) == by_two_models(config)
    assert config[name] == rope, "the raw config was changed"


@pytest.mark.parametrize("size", [{"hidden_size": 256}, {"vocab_size": 256}, {"intermediate_size": 256}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss", "cohere"])
def test_a_size_of_the_model_that_is_the_same_number_is_no_table(kind, size):
    config = tiny_config(kind, **size).to_dict()
    assert lowered_limits(config, examine(config), SLOTS) == {LIMIT: 256 - SLOTS} == by_two_models(config) or (
        kind == "gpt_oss"  # YaRN by default
    )


@pytest.mark.parametrize("kind", ["opt", "bert", "xglm", "gpt_neo"])
def test_a_table_of_positions_is_found_on_the_blank_model(kind):
    """Learned with and without unused rows, sinusoidal, a causal mask."""
    family = families()[kind]
    anatomy = examine(family.config().to_dict())
    assert not is_only_a_limit({LIMIT: 256}, anatomy.config, anatomy.blank)
    assert is_only_a_limit({LIMIT: 512}, anatomy.config, anatomy.blank)


def test_limits_of_a_config():
    assert max_positions(tiny_config("llama")) == 256 and max_length(tiny_config("llama")) is None
    dynamic = parse_config(tiny_config("llama").to_dict() | {"rope_parameters": ROPES["dynamic"]})
    assert max_positions(dynamic) == max_length(dynamic) == 256
    assert max_positions(families()["mpt"].config()) == 256 and max_positions(families()["bloom"].config()) is None
