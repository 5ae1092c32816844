"""Slots in whole models: the converted model on a text is the original on prefix + text, however it is called.

Models are tiny and in float64, so that "the same function" means agreement to rounding: 1e-12, or 1e-5 where the
original itself rounds to float32 on the way (RMSNorm, softmax, query scales). A slot at a wrong position, or seen by
one query too many, makes it 0.01 to 5.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys

import pytest
import torch
from tiny import TINY, one_thread, tiny_config, tiny_model, tiny_text
from transformers import DynamicCache, Gemma3Config, StaticCache

from surgery.anatomy.sites import examine
from surgery.converted.derived import load_derived
from surgery.operations.attention_bias import eab_config, fold, grafted
from surgery.runtime.eab_runtime import Slots, eab_attention

PREFIX = [5, 7, 9]
N = len(PREFIX)
FAMILIES = [  # the rest of TINY is only tested for exactness
    "llama", "mistral", "qwen2", "gpt2", "opt", "gpt_neox", "mixtral", "gpt_oss", "gemma2", "gemma3_text",
    "llama4_text",
]  # fmt: skip
WINDOWED = {"mistral": 8, "gpt_oss": 8, "gemma2": 8, "gemma3_text": 8, "llama4_text": 16}
ROUNDS_TO_FLOAT32 = set(TINY) - {"gpt2", "opt", "gpt_neox", "phi", "stablelm"}


def tolerance(family: str) -> float:
    return 1e-5 if family in ROUNDS_TO_FLOAT32 else 1e-12


class Pair:
    """An original model, its slots, and what it says about [prefix, text]."""

    def __init__(self, model, prefix=PREFIX):
        self.model, self.prefix = model, list(prefix)
        self.anatomy = examine(model.config.to_dict())
        self.slots = fold(model, self.anatomy, self.prefix)

    @torch.no_grad()
    def control(self, ids, **arguments):
        """Logits of the original at the text behind the prefix."""
        before = torch.tensor([self.prefix] * len(ids))
        return self.model(input_ids=torch.cat([before, ids], 1), use_cache=False, **arguments).logits[
            :, len(self.prefix) :
        ]

    @contextlib.contextmanager
    def converted(self, visible="as_prefix", implementation="eab"):
        with grafted(self.model, self.anatomy, self.prefix, self.slots, visible), torch.no_grad():
            for config in {id(m.config): m.config for m in (self.model, self.model.base_model)}.values():
                config._attn_implementation_internal = implementation
            yield self.model


PAIRS: dict[str, Pair] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_pairs_for_this_module():
    with one_thread():
        yield
    PAIRS.clear()


def pair_of(family: str) -> Pair:
    if family not in PAIRS:
        PAIRS[family] = Pair(tiny_model(family))
    return PAIRS[family]


def without_temperature(family: str) -> Pair:
    """Llama 4 scales queries by a count that includes padding, so rows differ when padded; here it scales by 1."""
    if family != "llama4_text":
        return pair_of(family)
    if "llama4_cold" not in PAIRS:
        PAIRS["llama4_cold"] = Pair(tiny_model(family, config=tiny_config(family, floor_scale=8192)))
    return PAIRS["llama4_cold"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    return pair_of(family)


def derived_model(family="llama", prefix=PREFIX):
    """The class that a converted checkpoint loads, in float64, with the tiny model's weights and its folded slots."""
    pair, module = pair_of(family), load_derived(family)
    config = {**pair.model.config.to_dict(), "eab": eab_config(pair.anatomy, prefix, "as_prefix")}
    del config["model_type"]
    config_class, model_class = (vars(module)[f"Eab{c.__name__}"] for c in (type(pair.model.config), type(pair.model)))
    model = model_class(config_class(**config)).to(torch.float64).eval()
    lost = model.load_state_dict(pair.model.state_dict(), strict=False)
    assert not lost.unexpected_keys and all(".attention_bias." in name for name in lost.missing_keys)
    trunk = model.get_submodule(pair.anatomy.trunk)
    for name, (key, value) in pair.slots.items():
        trunk.get_submodule(name).attention_bias.load_state_dict({"key": key, "value": value})
    return model


def padded(rows, side):
    """Rows of different lengths as one batch: ids, attention_mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


def counted(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def worst(got, expected):
    return (got.double() - expected.double()).abs().max().item()


# ---- the same function


@pytest.mark.parametrize("family", TINY)
def test_text_behind_the_slots_is_text_behind_the_prefix(family):
    pair, ids = pair_of(family), tiny_text()
    expected = pair.control(ids)
    with torch.no_grad():
        bare = pair.model(input_ids=ids, use_cache=False).logits
    assert worst(bare[:, :3], expected[:, :3]) > 0.05, "the prefix makes no difference: this test would prove nothing"
    for implementation in ("eab", "eab_eager"):
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


# ---- compiling


def test_compiled_forward_and_decoding_step():
    model, ids = derived_model(), tiny_text()
    expected = pair_of("llama").control(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert worst(compiled(input_ids=ids, use_cache=False).logits, expected) < 1e-5
        cache = StaticCache(model.config, max_cache_len=64)
        start = model(input_ids=ids[:, :38], past_key_values=cache).logits
        steps = [compiled(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in (38, 39)]
        assert worst(torch.cat([start, *steps], 1), expected) < 1e-5
        # Tracing cannot see whether positions start again; what runs must.
        numbered = compiled(input_ids=ids, position_ids=torch.arange(40)[None], use_cache=False).logits
        assert worst(numbered, expected) < 1e-5
        with pytest.raises(ValueError, match="packed sequences"):
            compiled(input_ids=ids, position_ids=torch.arange(20).repeat(2)[None], use_cache=False)
    torch._dynamo.reset()


def test_compiled_training_step_gives_the_gradients_of_the_plain_one():
    model, ids = derived_model(), tiny_text(2, 12)
    names = [name for name, _ in model.named_parameters() if name.endswith("self_attn.attention_bias.key")]
    torch._dynamo.reset()
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([model.get_parameter(name).grad.clone() for name in names])
    torch._dynamo.reset()
    assert len(names) == 4 and all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert max(worst(a, b) for a, b in zip(*gradients, strict=True)) < 1e-5


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


# ---- what is refused


def test_another_attention_implementation_is_refused_when_set_and_when_called():
    model = derived_model()
    for name in ("flash_attention_2", "flex_attention", "paged|sdpa", "kernels-community/flash-attn"):
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


def test_an_attention_mask_that_does_not_cover_the_cache_is_refused():
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


# ---- copies, training


def test_copies_are_whole_and_independent():
    model, ids = derived_model(), tiny_text()
    expected = pair_of("llama").control(ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    model.config._attn_implementation_internal = "sdpa"  # the original is broken now; the copies must not notice
    with torch.no_grad():
        model.model.layers[0].self_attn.attention_bias.key.fill_(torch.nan)
        for other in copies:
            assert worst(other(input_ids=ids).logits, expected) < 1e-5


def test_training_the_slots_with_peft_changes_them_alone():
    peft = pytest.importorskip("peft")
    model, ids = derived_model(), tiny_text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        untrained = model(input_ids=ids).logits
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attention_bias"], r=2)
    )
    tuned.train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert tuned(input_ids=ids, labels=ids).loss < loss
        with tuned.disable_adapter():
            assert worst(tuned(input_ids=ids).logits, untrained) < 1e-9
    after = tuned.merge_and_unload().state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".attention_bias." in name}


def test_training_mode_takes_the_same_function():
    """Gradients, checkpointing and a frozen model in train() all give the logits of evaluation."""
    model, ids = derived_model("qwen2"), tiny_text()
    expected = pair_of("qwen2").control(ids)
    model.train()
    assert worst(model(input_ids=ids).logits.detach(), expected) < 1e-5
    model.gradient_checkpointing_enable()
    out = model(input_ids=ids, position_ids=torch.arange(40)[None], labels=ids)
    out.loss.backward()
    assert worst(out.logits.detach(), expected) < 1e-5
    assert model.model.layers[0].self_attn.attention_bias.value.grad.abs().max() > 0
    model.requires_grad_(False)
    assert worst(model(input_ids=ids).logits, expected) < 1e-5
