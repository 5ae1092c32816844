"""What surgery learns about a model from its config alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers.families import in_tiers
from helpers.tiny import TINY, live_of, one_thread, tiny_config, tiny_model, tiny_text
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from surgery.anatomy.calls import observing
from surgery.anatomy.sites import examine
from surgery.errors import SourceError, UnsupportedModel


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


# Full-size models of each family: trunk, layers, query heads, key/value heads, key dim, value dim, positions.
FULL_SIZE = {
    "llama": ("model", 32, 32, 32, 128, 128, 2048),
    "mistral": ("model", 32, 32, 8, 128, 128, 131072),
    "qwen2": ("model", 32, 32, 32, 128, 128, 32768),
    "gpt2": ("transformer", 12, 12, 12, 64, 64, 1024),
    "opt": ("model.decoder", 12, 12, 12, 64, 64, 2048),
    "gpt_neox": ("gpt_neox", 44, 64, 64, 96, 96, 2048),
    "mixtral": ("model", 32, 32, 8, 128, 128, 131072),
    "gpt_oss": ("model", 36, 64, 8, 64, 64, 131072),
    "gemma2": ("model", 26, 8, 4, 256, 256, 8192),
    "gemma3_text": ("model", 26, 8, 4, 256, 256, 131072),
    "llama4_text": ("model", 48, 40, 8, 128, 128, 131072),
    "phi": ("model", 24, 32, 32, 64, 64, 2048),
    "stablelm": ("model", 32, 32, 32, 80, 80, 4096),
    "olmo2": ("model", 32, 32, 32, 128, 128, 2048),
    "cohere": ("model", 40, 64, 64, 128, 128, 8192),
    "granite": ("model", 32, 32, 32, 128, 128, 2048),
    "deepseek_v3": ("model", 61, 128, 128, 192, 128, 4096),  # keys and values of different width
    "gemma3": ("model.language_model", 26, 8, 4, 256, 256, 131072),  # the language model of a multimodal one
}


@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_each_layer_of_a_full_size_model_has_its_site(model_type):
    anatomy = examine(CONFIG_MAPPING[model_type]().to_dict())
    found = {(site.heads, site.kv_heads, site.key_dim, site.value_dim) for site in anatomy.sites}
    trunk, layers, *shape, positions = FULL_SIZE[model_type]
    assert found == {tuple(shape)}
    assert anatomy.trunk == trunk and anatomy.max_positions == positions
    assert [site.block for site in anatomy.sites] == list(range(layers))
    assert len({site.name for site in anatomy.sites}) == len(anatomy.blocks) == layers
    assert all(site.name.startswith(f"{block}.") for site, block in zip(anatomy.sites, anatomy.blocks, strict=True))
    assert anatomy.eab(2, "always")["sites"] == {site.name: [shape[1], *shape[2:]] for site in anatomy.sites}


@pytest.mark.parametrize("model_type", in_tiers(TINY))
def test_what_is_found_without_weights_is_what_runs(model_type):
    model, calls = tiny_model(model_type), []
    live = live_of(model)
    with observing(calls.append), torch.no_grad():
        model(input_ids=tiny_text())
    trunk = live.trunk
    assert [call.module for call in calls] == [trunk.get_submodule(site.name) for site in live.anatomy.sites]
    for call, site in zip(calls, live.anatomy.sites, strict=True):
        assert (call.query.shape[1], call.key.shape[1]) == (site.heads, site.kv_heads)
        assert (call.key.shape[-1], call.value.shape[-1]) == (site.key_dim, site.value_dim)


def test_a_padding_token_does_not_hide_the_structure():
    """A config with a padding token is examined like one without."""
    assert len(examine(tiny_config("gpt2", pad_token_id=0).to_dict()).sites) == 4


# ---- refusals


REFUSED = {
    "cpmant": "does not go through transformers' AttentionInterface",
    "doge": "does not go through transformers' AttentionInterface",
    "rwkv": "does not go through transformers' AttentionInterface",
    "mamba": "no layer attends",
    "recurrent_gemma": "keep their state in themselves",
    "deepseek_v4": "layers of type 'compressed_sparse_attention' are neither plain attention",
    "diffllama": "model.layers.0.self_attn attends 2 times in one forward pass",
    "hrm_text": "model.L_module.layers.0.self_attn attends 6 times in one forward pass",
    "mllama": "attend to images",
    "bert": "is not causal, and a prefix is constant only under causal attention",
    "bart": "attends to an encoder",
    "vit": "has no causal language model",
    "lama": "model_type 'lama' is not an architecture of the installed transformers",
}


def refusal(config, error=UnsupportedModel):
    """What surgery says about `config`: one sentence that names the model or config.json."""
    with pytest.raises(error) as caught:
        examine(config)
    said = str(caught.value)
    assert "\n" not in said and ". " not in said and not said.endswith(".")
    assert caught.value.exit_code == 2
    return said


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_where_slots_are_not_exact_is_refused(model_type):
    """A model on which slots would not be exact is refused, and the reason is given."""
    known = model_type in CONFIG_MAPPING
    said = refusal(CONFIG_MAPPING[model_type]().to_dict() if known else {"model_type": model_type})
    assert REFUSED[model_type] in said
    assert said.startswith((model_type, "config.json:", "qwen", "mllama"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "by_layer_type"])
def test_rotary_that_depends_on_the_length_of_the_text_bounds_it(kind, nested):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    if nested:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = tiny_config("gemma3_text" if nested else "llama").to_dict() | {"rope_parameters": rope}
    anatomy = examine(config)
    assert anatomy.max_length == anatomy.max_positions == (64 if kind == "longrope" else 256)
    assert anatomy.eab(1, "as_prefix")["max_length"] == anatomy.max_length


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rotary_that_is_scaled_once_and_for_all_is_taken(kind):
    rope = {
        "rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    if kind != "llama3":
        del rope["low_freq_factor"], rope["high_freq_factor"]
    anatomy = examine(tiny_config("llama").to_dict() | {"rope_parameters": rope})
    assert len(anatomy.sites) == 4 and anatomy.max_length is None


def test_attention_to_an_encoder_is_refused():
    config = tiny_config("gpt2").to_dict() | {"add_cross_attention": True}
    assert "attends to an encoder" in refusal(config)


def test_bidirectional_attention_is_refused():
    config = tiny_config("gemma3_text").to_dict() | {"use_bidirectional_attention": True}
    assert "is not causal" in refusal(config)


@pytest.mark.parametrize(
    "broken", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"rope_parameters": {"rope_type": "nonsense"}}]
)
def test_a_config_that_transformers_rejects_is_one_sentence(broken):
    """A config that transformers cannot use is refused in one sentence."""
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        examine(tiny_config("llama").to_dict() | broken)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


# ---- the probe leaves nothing behind


def test_nothing_stays_registered_or_patched():
    names, ask = set(AttentionInterface._global_mapping), ALL_ATTENTION_FUNCTIONS.get_interface
    examine(tiny_config("llama").to_dict())
    refusal(CONFIG_MAPPING["cpmant"]().to_dict())
    examine(CONFIG_MAPPING["falcon"]().to_dict())
    with pytest.raises(ZeroDivisionError), observing(lambda call: 1 / 0):
        tiny_model("llama")(input_ids=tiny_text())
    assert set(AttentionInterface._global_mapping) == names
    assert ALL_ATTENTION_FUNCTIONS.get_interface == ask
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_observing_changes_nothing():
    model, ids, calls = tiny_model("gemma3_text"), tiny_text(), []
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with observing(calls.append):
            observed = model(input_ids=ids).logits
    assert torch.equal(plain, observed) and len(calls) == 4
    assert calls[0].scale == 8**-0.5
