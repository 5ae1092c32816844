"""`torch.export` with named dimensions: one program for every batch and length, which computes what the model does."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.pair import PREFIX, N, Pair, derived_model, worst
from helpers.tiny import one_thread, tiny_config, tiny_model, tiny_text
from torch.export import Dim, export

SIZES = {0: Dim("batch", min=1, max=16), 1: Dim("length", min=2, max=240)}
PADDING = 2


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


@functools.cache
def small(family: str) -> Pair:
    """Of few layers: it is the tracing that takes long. Gemma 2 keeps those that its config lists by type."""
    layers = {} if family == "gemma2" else {"num_hidden_layers": 2}
    return Pair(tiny_model(family, config=tiny_config(family, **layers)))


def given(way: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = tiny_text(rows, length)
    mask, positions = torch.ones_like(ids), torch.arange(length).repeat(rows, 1)
    mask[0, : min(PADDING, length - 1)] = 0
    return {"input_ids": ids, **{"mask": {"attention_mask": mask}, "places": {"position_ids": positions}}.get(way, {})}


def exported(model, way: str, strict: bool = False):
    inputs = given(way, 3, 12)
    sizes = {**dict.fromkeys(inputs, SIZES), "use_cache": None}
    program = export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=sizes, strict=strict)
    return program.module()


def same_everywhere(model, program, way: str) -> None:
    for rows, length in ((3, 2), (1, 9), (2, 40), (1, 239)):
        inputs = given(way, rows, length)
        got, expected = (call(**inputs, use_cache=False).logits for call in (program, model))
        seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert worst(got[seen], expected[seen]) < 1e-12, (rows, length)


@pytest.mark.slow
def test_an_exported_program_is_the_original_after_the_prefix():
    """One program for every length. Its slots stand in front of the keys, which is what failed to be told of all."""
    pair = small("llama")
    model = derived_model(pair=pair)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        program = exported(model, "plain")
        same_everywhere(model, program, "plain")
        for length in (5, 70):
            ids = tiny_text(2, length)
            expected = pair.model(input_ids=torch.cat([torch.tensor([PREFIX] * 2), ids], 1)).logits[:, N:]
            assert worst(program(input_ids=ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.slow
def test_an_exported_program_refuses_packed_sequences():
    """Tracing cannot see whether positions start again; what was traced must. Gradients take the concatenated path."""
    model = derived_model(pair=small("llama"))
    program = exported(model, "places")
    with torch.no_grad():
        same_everywhere(model, program, "places")
        packed = {**given("places", 1, 8), "position_ids": torch.arange(4).repeat(2)[None]}
        with pytest.raises(RuntimeError, match="packed sequences are not supported"):
            program(**packed, use_cache=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # strict mode of transformers
@pytest.mark.parametrize("way", ["plain", "mask", "places"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "strict"), [("llama", False), ("llama", True), ("mistral", False), ("gpt_neox", False), ("gemma2", True)]
)
def test_every_way_of_exporting_serves_every_length(family, implementation, way, strict):
    model = derived_model(family, pair=small(family))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        same_everywhere(model, exported(model, way, strict), way)
