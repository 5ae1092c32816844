"""Mixers that remember their prefix, indexers that can choose it: the original after it, however it is called.

Tiny hybrids in float64. Kernels of gated delta nets and state spaces compute in float32, so 1e-3 is rounding there; a
prefix at a wrong place, or given twice, is off by 0.01 and more.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from helpers.families import any_model, families
from helpers.pair import N, Pair, counted, padded, worst
from helpers.tiny import build, one_thread, tiny_text
from transformers import DynamicCache, StaticCache

from surgery.errors import UnsupportedModel
from surgery.live.graft import grafted
from surgery.runtime import eab_mixers
from surgery.verification.equivalence import compare_random_ids, take_control

# Gated delta net; Mamba-2 beside attention; Mamba; short convolution; delta attention; lightning attention; a
# convolution inside of attention; an indexer.
KINDS = (
    "qwen3_next", "falcon_h1", "jamba", "lfm2", "kimi_linear", "minimax", "zaya", "deepseek_v32",
)  # fmt: skip
QUICK = {"qwen3_next", "lfm2", "deepseek_v32"}
FORGETS = {"jamba"}  # between pieces of more than one token, as the original does
NO_STATIC = {"minimax"}  # has a cache of its own, and no other
ROUNDING = 1e-3


@functools.cache
def hybrid(kind: str) -> Pair:
    """Shared, so leave it as it is."""
    return Pair(any_model(kind))


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield
    hybrid.cache_clear()


@pytest.fixture(params=[kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.matrix) for kind in KINDS])
def pair(request) -> Pair:
    return hybrid(request.param)


def kind_of(pair: Pair) -> str:
    return pair.live.anatomy.model_type


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(pair: Pair, side: str) -> None:
    rows = [tiny_text(1, length, seed=length)[0] for length in (40, 29, 13)]
    ids, mask = padded(rows, side)
    with pair.converted() as model:
        for use_cache in (False, True):
            got = model(input_ids=ids, attention_mask=mask, position_ids=counted(mask), use_cache=use_cache).logits
            for i, row in enumerate(rows):
                expected = model(input_ids=row[None], use_cache=False).logits[0]
                assert worst(got[i, mask[i].bool()], expected) < ROUNDING, use_cache
    for i, row in enumerate(rows):
        assert worst(got[i, mask[i].bool()], pair.control(row[None])[0]) < ROUNDING


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_through_a_cache(pair: Pair, cache: str) -> None:
    if cache == "static" and kind_of(pair) in NO_STATIC:
        pytest.skip("the original has no static cache")
    ids = tiny_text()
    cuts = (0, 38, 39, 40) if kind_of(pair) in FORGETS else (0, 5, 25, 38, 39, 40)
    with pair.converted() as model:
        past = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=64)}[
            cache
        ]
        past, got = None if kind_of(pair) in NO_STATIC else past, []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            out = model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
            past, _ = out.past_key_values, got.append(out.logits)
    assert worst(torch.cat(got, 1), pair.control(ids)) < ROUNDING


def test_padding_that_is_longer_than_the_first_piece(pair: Pair) -> None:
    """A row whose text has not begun yet is given its prefix behind the padding of the piece, in front of the text."""
    if kind_of(pair) in FORGETS:
        pytest.skip("the original forgets its state between pieces")
    rows = [tiny_text(1, length, seed=length)[0] for length in (40, 20)]
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        past, got = None, []
        for start, stop in ((0, 20), (20, 40)):
            out = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop],
                position_ids=counted(mask)[:, start:stop], past_key_values=past, use_cache=True,
            )  # fmt: skip
            past, _ = out.past_key_values, got.append(out.logits)
    for i, row in enumerate(rows):
        assert worst(torch.cat(got, 1)[i, mask[i].bool()], pair.control(row[None])[0]) < ROUNDING, i


def test_padding_that_goes_on_in_the_second_piece_is_refused(pair: Pair) -> None:
    rows = [tiny_text(1, length, seed=length)[0] for length in (40, 15)]
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        first = model(input_ids=ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
        given = {"input_ids": ids[:, 20:], "attention_mask": mask, "past_key_values": first.past_key_values}
        if pair.live.anatomy.mixers:
            with pytest.raises(ValueError, match="first piece longer than the padding"):
                model(**given, use_cache=True)
        else:
            got = torch.cat([first.logits, model(**given, use_cache=True).logits], 1)[1, mask[1].bool()]
    if not pair.live.anatomy.mixers:
        assert worst(got, pair.control(rows[1][None])[0]) < ROUNDING


@pytest.mark.parametrize("kind", ["lfm2", "deepseek_v32"])
def test_what_stands_in_front_is_copied_and_pickled(kind: str) -> None:
    pair, ids = hybrid(kind), tiny_text(1)
    with pair.converted() as model:
        expected = model(input_ids=ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["lfm2", "deepseek_v32"])
def test_a_forward_put_in_its_place_is_refused(kind: str) -> None:
    """Kernels from the hub replace the forward of a mixer, and with it what stands in front of its class."""
    pair = hybrid(kind)
    anatomy = pair.live.anatomy
    module = pair.live.trunk.get_submodule((*anatomy.mixers, *anatomy.indexers)[0].name)
    with pair.converted() as model:
        module.forward = types.MethodType(type(module).__mro__[2].forward, module)
        try:
            with pytest.raises(ValueError, match="use_kernels"):
                model(input_ids=tiny_text(1))
        finally:
            del module.forward


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_what_the_original_writes(pair: Pair, beams: int) -> None:
    rows = [tiny_text(1, length, seed=length)[0] for length in (12, 7)]
    settings = {
        "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
    }  # fmt: skip
    expected = []
    for row in rows:
        prompt = torch.cat([torch.tensor(pair.prefix), row])[None]
        written = pair.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        expected.append(written[0, prompt.shape[1] :])
    ids, mask = padded(rows, "left")
    with pair.converted() as model:
        got = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(got[:, ids.shape[1] :], torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_no_worse_than_the_original_in_it(dtype: torch.dtype) -> None:
    model = any_model("falcon_h1")
    exact, ids = Pair(model).control(tiny_text()), tiny_text()
    pair = Pair(model.to(dtype))
    original = worst(pair.control(ids), exact)
    with pair.converted() as converted:
        logits = converted(input_ids=ids).logits
    assert logits.dtype == dtype and worst(logits, exact) < 3 * original + 1e-6


def test_packed_texts_are_refused() -> None:
    pair = hybrid("falcon_h1")
    mixer = pair.live.trunk.get_submodule(pair.live.anatomy.mixers[0].name)
    with pair.converted(), pytest.raises(ValueError, match="packed"):
        mixer(torch.zeros(1, 4, 32, dtype=torch.float64), seq_idx=torch.zeros(1, 4))


def test_text_with_an_image_in_a_multimodal_hybrid() -> None:
    """Places of an image are the wrapper's own (M-RoPE), and stand after the prefix like all others."""
    family = families()["qwen3_5"]
    with family.default_dtype():
        pair = Pair(build(family.config(image_token_id=90, vision_start_token_id=91, vision_end_token_id=92)))
    vision = pair.model.config.vision_config
    grid = torch.tensor([[1, 4, 4]])
    patches = int(grid.prod())
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = [90] * (patches // vision.spatial_merge_size**2)
    ids = torch.tensor([[11, 12, 91, *image, 92, 14, 15, 16, 17]])
    behind = torch.cat([torch.tensor([pair.prefix]), ids], 1)

    def given(ids: torch.Tensor) -> dict:
        kinds = (ids == 90).long()
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    with torch.no_grad():
        expected = pair.model(**given(behind), use_cache=False).logits[:, N:]
        written = pair.model.generate(**given(behind), max_new_tokens=6, do_sample=False)[:, behind.shape[1] :]
    with pair.converted() as model:
        for mask in (None, torch.ones_like(ids)):
            assert worst(model(**given(ids), attention_mask=mask, use_cache=False).logits, expected) < 1e-9
        found = model.generate(**given(ids), attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(found[:, ids.shape[1] :], written)


# ---- what goes wrong is noticed: by the comparison that every run makes


def _at_the_start(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(mask), dtype=torch.long)


def _not_extended(sequence: torch.Tensor, what: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    inserted = _INSERTED(sequence, what, padding)
    return inserted if sequence.ndim == 3 else inserted[:, len(what) :]


_INSERTED = eab_mixers._inserted

WRONG: dict[str, tuple[str, Callable]] = {
    "in front of the padding": ("_padding", _at_the_start),
    "again, with a filled cache": ("_has_state", lambda *arguments: False),
    "never": ("_has_state", lambda *arguments: True),
    "outputs not dropped": ("_dropped", lambda sequence, n, padding: sequence),
    "the text's end dropped": ("_dropped", lambda sequence, n, padding: sequence[:, :-n]),
    "the mask not extended": ("_inserted", _not_extended),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["qwen3_next", pytest.param("falcon_h1", marks=pytest.mark.matrix), "lfm2"])
def test_a_prefix_that_is_remembered_wrongly_is_noticed(kind: str, wrong: str, monkeypatch) -> None:
    pair = hybrid(kind)
    control = take_control(pair.live, pair.prefix)
    with grafted(pair.live, pair.folded):
        compare_random_ids(pair.live, control)
    name, instead = WRONG[wrong]
    monkeypatch.setattr(eab_mixers, name, instead)
    with grafted(pair.live, pair.folded), pytest.raises(UnsupportedModel, match="nothing was written|does not run"):
        compare_random_ids(pair.live, control)


@pytest.mark.parametrize("part", ["remembered_inputs.hidden_states", "attention_bias.value"])
def test_each_part_counts(part: str) -> None:
    """Without any one of them, the model is another."""
    pair = hybrid("qwen3_next")
    names = [name for name in pair.folded.tensors if name.endswith(part)]
    assert names
    ids = tiny_text()
    with pair.converted() as model:
        expected = model(input_ids=ids).logits
        for name in names:
            parameter = pair.live.trunk.get_parameter(name)
            before = parameter.data
            parameter.data = before.roll(1, dims=0)
            assert worst(model(input_ids=ids).logits, expected) > 1e-2, name
            parameter.data = before


def test_an_indexer_chooses_among_slots_and_text() -> None:
    """Below `index_topk` everything is seen, above it what is seen after the prefix; without its keys, other places."""
    pair = hybrid("deepseek_v32")
    topk = pair.model.config.index_topk
    for length in (topk - N - 1, topk, 5 * topk):
        ids = tiny_text(1, length)
        expected = pair.control(ids)
        with pair.converted() as model:
            assert worst(model(input_ids=ids).logits, expected) < ROUNDING, length
    name = next(name for name in pair.folded.tensors if name.endswith("index_keys.key"))
    with pair.converted() as model, contextlib.ExitStack() as undo:
        parameter = pair.live.trunk.get_parameter(name)
        undo.callback(setattr, parameter, "data", parameter.data)
        parameter.data = -parameter.data
        assert worst(model(input_ids=ids).logits, expected) > 1e-2
