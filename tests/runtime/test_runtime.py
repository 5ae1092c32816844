"""Slots in whole models: the converted model on a text is the original on prefix + text, however it is called.

Models are tiny and in float64, so that "the same function" means agreement to rounding: 1e-12, or 1e-5 where the
original itself rounds to float32 on the way (RMSNorm, softmax, query scales). A slot at a wrong position, or seen by
one query too many, makes it 0.01 to 5.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.families import in_tiers
from helpers.pair import PREFIX, N, Pair, counted, derived_model, padded, pair_of, worst
from helpers.tiny import TINY, one_thread, tiny_config, tiny_model, tiny_text
from transformers import DynamicCache, Gemma3Config, StaticCache

FAMILIES = [  # the rest of TINY is only tested for exactness
    "llama", "mistral", "qwen2", "gpt2", "opt", "gpt_neox", "mixtral", "gpt_oss", "gemma2", "gemma3_text",
    "llama4_text",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
WINDOWED = {"mistral": 8, "gpt_oss": 8, "gemma2": 8, "gemma3_text": 8, "llama4_text": 16}
ROUNDS_TO_FLOAT32 = set(TINY) - {"gpt2", "opt", "gpt_neox", "phi", "stablelm"}


def tolerance(family: str) -> float:
    return 1e-5 if family in ROUNDS_TO_FLOAT32 else 1e-12


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


@functools.cache
def without_temperature(family: str) -> Pair:
    """Llama 4 scales queries by a count that includes padding, so rows differ when padded; here it scales by 1."""
    if family != "llama4_text":
        return pair_of(family)
    return Pair(tiny_model(family, config=tiny_config(family, floor_scale=8192)))


@pytest.fixture(params=in_tiers(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    return pair_of(family)


# ---- the same function


@pytest.mark.parametrize("family", in_tiers(TINY))
def test_text_behind_the_slots_is_text_behind_the_prefix(family):
    pair, ids = pair_of(family), tiny_text()
    expected = pair.control(ids)
    with torch.no_grad():
        bare = pair.model(input_ids=ids, use_cache=False).logits
    assert worst(bare[:, :3], expected[:, :3]) > 0.05, "the prefix makes no difference: this test would prove nothing"
    for implementation in ("eab", "eab_eager", "eab_flex"):
        with pair.converted(implementation=implementation) as model:
            assert worst(model(input_ids=ids, use_cache=False).logits, expected) < tolerance(family)
            assert worst(model(input_ids=ids, use_cache=True).logits, expected) < tolerance(family)
            embedded = model.get_input_embeddings()(ids)
            assert worst(model(inputs_embeds=embedded, use_cache=False).logits, expected) < tolerance(family)
    with torch.no_grad():
        after = pair.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(after, bare), "the graft was not taken out again"


@pytest.mark.parametrize(("family", "length"), [("mistral", 9), ("gemma3_text", 8), ("llama4_text", 17)])
def test_a_prefix_longer_than_the_window(family, length):
    pair, ids = Pair(pair_of(family).model, range(3, 3 + length)), tiny_text()
    expected = pair.control(ids)
    with pair.converted() as model:
        assert worst(model(input_ids=ids).logits, expected) < tolerance(family)


@pytest.mark.parametrize("family", WINDOWED)
def test_texts_about_as_long_as_the_window(family):
    """Where the text fits into the window and the prefix no longer does, plain causal attention would be wrong."""
    pair, ids = pair_of(family), tiny_text(1)
    for length in range(WINDOWED[family] - N - 1, WINDOWED[family] + 2):
        expected = pair.control(ids[:, :length])
        with pair.converted() as model:
            for use_cache in (False, True):
                got = model(input_ids=ids[:, :length], use_cache=use_cache).logits
                assert worst(got, expected) < tolerance(family), length


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(family, side):
    pair = without_temperature(family)
    rows = [tiny_text(1, length, seed=length)[0] for length in (40, 29, 13)]
    ids, mask = padded(rows, side)
    expected = [pair.control(row[None])[0] for row in rows]
    with pair.converted() as model:
        for positions in (None, counted(mask)):
            for use_cache in (False, True):
                got = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
                for i, row in enumerate(expected):
                    assert worst(got[i, mask[i].bool()], row) < tolerance(family)


def test_llama4_temperature_counts_padding_as_the_original_does():
    pair = pair_of("llama4_text")
    ids, mask = padded([tiny_text(1, 40)[0], tiny_text(1, 30)[0]], "left")
    rows = [torch.cat([ids[i][mask[i] == 0], torch.tensor(PREFIX), ids[i][mask[i] == 1]]) for i in range(2)]
    long_mask = torch.cat([mask, torch.ones(2, N, dtype=torch.long)], 1)
    long_mask[1, 10 : 10 + N] = 1
    with torch.no_grad():
        control = pair.model(
            input_ids=torch.stack(rows), attention_mask=long_mask, position_ids=counted(long_mask), use_cache=False
        ).logits[:, N:]
    with pair.converted() as model:
        got = model(input_ids=ids, attention_mask=mask).logits
    assert worst(got[mask.bool()], control[mask.bool()]) < 1e-5


@pytest.mark.parametrize("cache", ["default", "dynamic", "static"])
def test_chunked_prefill_and_decoding_through_a_cache(pair, family, cache):
    ids = tiny_text()
    expected = pair.control(ids)
    with pair.converted() as model:
        static = StaticCache(model.config, max_cache_len=64)
        past = {"default": None, "dynamic": DynamicCache(), "static": static}[cache]
        got = []
        for start, stop in ((0, 5), (5, 25), (25, 38), (38, 39), (39, 40)):
            out = model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
            past, _ = out.past_key_values, got.append(out.logits)
    assert worst(torch.cat(got, 1), expected) < tolerance(family)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_padded_batch_through_a_cache(family, cache):
    pair = without_temperature(family)
    rows = [tiny_text(1, length, seed=length)[0] for length in (40, 31)]
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=48)
        got = [
            model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past).logits
            for a, b in ((0, 20), (20, 39), (39, 40))
        ]
    got = torch.cat(got, 1)
    for i, row in enumerate(rows):
        assert worst(got[i, mask[i].bool()], pair.control(row[None])[0]) < tolerance(family)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_what_the_original_writes(family, cache):
    """A left-padded batch against the original on each row alone (gemma2 gives NaN for padded float64 rows itself)."""
    pair = without_temperature(family)
    rows = [tiny_text(1, length, seed=length)[0] for length in (12, 7)]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = []
    for row in rows:
        prompt = torch.cat([torch.tensor(PREFIX), row])[None]
        written = pair.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        expected.append(written[0, prompt.shape[1] :])
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        got = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **settings)
    assert torch.equal(got[:, ids.shape[1] :], torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_is_no_worse_than_the_original_in_it(family, dtype):
    exact, ids = pair_of(family).control(tiny_text()), tiny_text()
    pair = Pair(copy.deepcopy(pair_of(family).model).to(dtype))
    original = worst(pair.control(ids), exact)
    with pair.converted() as model:
        logits = model(input_ids=ids).logits
    assert logits.dtype == dtype
    assert worst(logits, exact) < 3 * original + 1e-6


# ---- windows


def test_always_visible_slots_differ_only_beyond_the_window(pair, family):
    ids = tiny_text()
    with pair.converted() as model:
        as_prefix = model(input_ids=ids).logits
    with pair.converted("always") as model:
        always = model(input_ids=ids).logits
    different = (as_prefix - always).abs().amax((0, 2)) > 1e-3
    window = WINDOWED.get(family)
    if window is None:
        assert not different.any()
    else:  # slot 0 stands at 0 and query i at i + n; it is out of sight from i + n = window on
        assert different.nonzero()[0].item() == window - N


@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_always_visible_slots_are_seen_from_everywhere(family):
    """Through a cache as in one pass, and with the first half of the text out of sight of the last token."""
    pair, ids = pair_of(family), tiny_text(1)
    with pair.converted("always") as model:
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :33], use_cache=True)
        rest = [model(input_ids=ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(33, 40)]
    assert worst(torch.cat([first.logits, *rest], 1), whole) < tolerance(family)


# ---- attention weights


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "gpt2"])
def test_attention_weights_are_those_over_real_keys(family):
    ids = tiny_text()
    original = Pair(tiny_model(family))
    original.model.set_attn_implementation("eager")
    with torch.no_grad():
        control = original.model(
            input_ids=torch.cat([torch.tensor([PREFIX] * 2), ids], 1), output_attentions=True, use_cache=False
        ).attentions
    with original.converted(implementation="eab_eager") as model:
        weights = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    assert len(weights) == 4
    for ours, theirs in zip(weights, control, strict=True):
        assert ours.shape == (2, 4, 40, 40)
        assert ours.sum(-1).max() <= 1 + 1e-6 and ours[:, :, 0].sum(-1).max() < 1
        assert worst(ours, theirs[:, :, N:, N:]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "gpt2"])
@torch.no_grad()
def test_attention_weights_of_slots_are_those_of_the_prefix(family):
    """On request; the rows then sum to 1, but for the sinks of GPT-OSS, which take a share in the original too."""
    ids, pair = tiny_text(), Pair(tiny_model(family))
    original, model = pair.model, derived_model(family, pair=pair)
    original.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    behind = torch.cat([torch.tensor([PREFIX] * 2), ids], 1)
    control = original(input_ids=behind, output_attentions=True, use_cache=False).attentions
    plain = model(input_ids=ids, output_attentions=True, use_cache=False)
    with model.slot_attentions():
        shown = model(input_ids=ids, output_attentions=True, use_cache=False)
    assert torch.equal(shown.logits, plain.logits)
    for ours, theirs, without in zip(shown.attentions, control, plain.attentions, strict=True):
        assert ours.shape == (2, 4, 40, N + 40) and torch.equal(ours[..., N:], without)
        assert worst(ours, theirs[:, :, N:]) < 1e-5
        if family != "gpt_oss":
            assert (ours.sum(-1) - 1).abs().max() < 1e-12
    after = model(input_ids=ids, output_attentions=True, use_cache=False)
    assert after.attentions[0].shape[-1] == 40


@torch.no_grad()
def test_attention_weights_of_slots_through_a_padded_cache():
    """Two steps of a left-padded batch, each with the slots in front."""
    model = derived_model()
    model.set_attn_implementation("eager")
    ids, mask = padded([tiny_text(1, 12)[0], tiny_text(1, 7, seed=2)[0]], "left")
    with model.slot_attentions():
        first = model(input_ids=ids[:, :11], attention_mask=mask[:, :11], output_attentions=True)
        last = model(
            input_ids=ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True
        )
    weights = last.attentions[0]
    assert weights.shape == (2, 4, 1, N + 12) and (weights.sum(-1) - 1).abs().max() < 1e-12
    assert (weights[1, :, 0, N : N + 5] == 0).all() and (weights[..., :N] > 0).all()


# ---- multimodal wrappers expand the mask before their language model sees it


def test_a_language_model_inside_a_multimodal_one():
    text = tiny_config("gemma3_text").to_dict()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=96)
    pair = Pair(tiny_model("gemma3", config=config))
    rows = [tiny_text(1, length, seed=length)[0].clamp(max=95) for length in (40, 30)]
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        got = model(input_ids=ids, attention_mask=mask).logits  # no position_ids
        with pytest.raises(ValueError, match="masks that group tokens"):
            model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
    for i, row in enumerate(rows):
        assert worst(got[i, mask[i].bool()], pair.control(row[None])[0]) < 1e-5
