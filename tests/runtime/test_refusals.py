"""What a model with slots refuses: calls under which the slots would be left out or misplaced."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers.pair import N, derived_model, pair_of, worst
from helpers.tiny import one_thread, tiny_text

from surgery.converted.derived import load_derived
from surgery.runtime.eab_runtime import Slots, eab_attention


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def test_another_attention_implementation_is_refused():
    """It is refused when it is set, and when it is called."""
    model = derived_model()
    for name in ("flash_attention_2", "flash_attention_3", "paged|sdpa", "kernels-community/flash-attn"):
        with pytest.raises(ValueError, match="no version with slots"):
            model.set_attn_implementation(name)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eab_eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "eab"
    for name in ("sdpa", "eager", "flash_attention_2"):  # what an engine does that swaps in its own
        model.config._attn_implementation_internal = name
        with pytest.raises(ValueError, match="would leave out the slots"), torch.no_grad():
            model(input_ids=tiny_text())


def test_an_implementation_of_one_site_alone_is_refused():
    model = derived_model()
    site = model.model.layers[2].self_attn
    site.config = copy.deepcopy(site.config)
    site.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="would leave out the slots"), torch.no_grad():
        model(input_ids=tiny_text())


def test_a_mask_without_columns_for_the_slots_is_refused():
    ids = tiny_text(1, 6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with_slots = torch.cat([torch.ones(1, 1, 6, N, dtype=torch.bool), mask], -1)
    additive = torch.zeros(1, 1, 6, 6 + N, dtype=torch.float64).masked_fill(~with_slots, -torch.inf)
    with pair_of("llama").converted() as model:
        plain = model(input_ids=ids).logits
        with pytest.raises(ValueError, match=r"needs 3 \+ 6 columns"):
            model(input_ids=ids, attention_mask=mask)
        assert worst(model(input_ids=ids, attention_mask=with_slots).logits, plain) < 1e-5
        assert worst(model(input_ids=ids, attention_mask=additive).logits, plain) < 1e-5


def test_unknown_tensors_are_refused():
    with pair_of("llama").converted() as model, pytest.raises(ValueError, match="argument 'position_bias'"):
        model(input_ids=tiny_text(), position_bias=torch.zeros(1))


def test_bidirectional_attention_is_refused():
    model, ids = derived_model(), tiny_text(1, 6)
    with torch.no_grad():
        with pytest.raises(ValueError, match="slots need causal attention"):
            model(input_ids=ids, is_causal=False)
        model.model.layers[1].self_attn.is_causal = False
        with pytest.raises(ValueError, match="causal attention only"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match="causal attention only"):
            eab_attention(model.model.layers[0].self_attn, *torch.zeros(3, 1, 4, 2, 8), None, is_causal=False)


def test_packed_sequences_are_refused():
    ids, restarting = tiny_text(1, 8), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pair_of("llama").converted() as model:
        with pytest.raises(ValueError, match="packed sequences are not supported"):
            model(input_ids=ids, position_ids=restarting, use_cache=False)
        plain = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, position_ids=torch.arange(8)[None], use_cache=False).logits, plain)


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    ids = tiny_text(1, 10)
    with pair_of("llama").converted() as model:
        past = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="covers 2 tokens, but 8 are cached and 2 are given"):
            model(input_ids=ids[:, 8:], attention_mask=torch.ones(1, 2, dtype=torch.long), past_key_values=past)


def test_lost_slots_are_refused():
    model = derived_model()
    require_added = vars(sys.modules[load_derived("llama").AttentionBiasMixin.__module__])["require_added"]
    require_added(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.attention_bias.value[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.attention_bias\.value is missing"):
        require_added(model)
    with pytest.raises(ValueError, match="has no slots"):
        require_added(torch.nn.Linear(2, 2))
    fresh = Slots(2, 1, 4, 4)
    assert fresh.key.isnan().all() and fresh.value.isnan().all()


@pytest.mark.parametrize("argument", ["tp_plan", "tp_size", "device_mesh", "distributed_config"])
def test_tensor_parallelism_is_refused(argument, tmp_path):
    with pytest.raises(ValueError, match="tensor parallelism"):
        type(derived_model()).from_pretrained(tmp_path, **{argument: "auto"})
