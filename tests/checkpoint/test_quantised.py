"""How a checkpoint is quantised is read from config.json and headers, and what a stranger may say there is bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.checkpoint.layout import SINGLE
from surgery.checkpoint.quantised import Quantised, sealed, unpacking
from surgery.checkpoint.source import open_source
from surgery.checkpoint.writing import plan_file
from surgery.errors import SourceError

LAYER = "model.layers.0.q_proj"


def written(root: Path, config: dict, entries: list[tuple[str, str, tuple[int, ...]]] | None = None) -> Path:
    (root / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    header, infos = plan_file(SINGLE, entries or [("x", "F32", (2,))], {"format": "pt"})
    (root / SINGLE).write_bytes(header + bytes(sum(info.nbytes for info in infos.values())))
    return root


SAYS = {
    "empty": {"quantization_config": {}},
    "gptq": {"quantization_config": {"quant_method": "gptq"}},
    "nested": {"vision_config": {"quantization_config": {"quant_method": "gptq"}}},
    "in a list": {"parts": [{"quantization_config": {}}]},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "older": {"compression_config": {"format": "pack-quantized"}},
}
PACKED = {
    "GPTQ": ("model.layers.0.q_proj.qweight", "I32"),
    "AWQ": ("model.layers.0.q_proj.qzeros", "I32"),
    "bitsandbytes": ("model.layers.0.q_proj.weight.absmax", "U8"),
    "int8": ("model.layers.0.q_proj.SCB", "F32"),
    "MLX": ("model.layers.0.q_proj.weight", "U32"),
    "fp8": ("model.layers.0.q_proj.weight_scale_inv", "F32"),
    "fp8 weights": ("model.layers.0.q_proj.weight", "F8_E4M3"),
    "compressed-tensors": ("model.layers.0.q_proj.weight_packed", "I32"),
    "MXFP4": ("model.layers.0.experts.gate_up_proj_blocks", "U8"),
    "HQQ": ("model.layers.0.q_proj.W_q", "U8"),
}


@pytest.mark.parametrize("case", SAYS)
def test_a_config_that_says_quantised_is_named_so(case: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="quantised from"):
        open_source(str(written(tmp_path, SAYS[case])))


@pytest.mark.parametrize("case", PACKED)
def test_packed_tensors_are_named_where_no_config_says_so(case: str, tmp_path: Path) -> None:
    name, dtype = PACKED[case]
    with pytest.raises(SourceError, match="quantised") as caught:
        open_source(str(written(tmp_path, {}, [("a.weight", "F32", (2, 2)), (name, dtype, (2, 2))])))
    assert name in str(caught.value)


def test_older_tools_say_quantised_in_a_file_beside(tmp_path: Path) -> None:
    (written(tmp_path, {}) / "quantize_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"quantize_config\.json"):
        open_source(str(tmp_path))


def test_null_and_whole_numbers_in_buffers_say_nothing(tmp_path: Path) -> None:
    root = written(tmp_path, {"quantization_config": None}, [("h.0.attn.bias", "U8", (2, 2)), ("ids", "I64", (1, 2))])
    assert list(open_source(str(root)).layout.tensors) == ["h.0.attn.bias", "ids"]


INT8: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
TOKEN: dict[str, Any] = {"num_bits": 8, "strategy": "token", "dynamic": True}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"], "sparsity_config": {},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8, "input_activations": TOKEN}},
}  # fmt: skip
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def found(root: Path, settings: dict, entries: list | None = None) -> Quantised:
    quantised = open_source(str(written(root, {"quantization_config": settings}, entries))).quantised
    assert quantised is not None
    return quantised


WORDS = {
    "compressed-tensors": (
        COMPRESSED,
        "compressed-tensors, int-quantized: weights int8 per channel and inputs int8 per token, dynamic",
        True,
    ),
    "fp8": (FP8, "fp8, in blocks of 128 x 128", False),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4", False),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, nf4", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", WORDS)
def test_a_format_is_said_in_words(method: str, tmp_path: Path) -> None:
    settings, words, rounds = WORDS[method]
    quantised = found(tmp_path, settings)
    assert (quantised.method, quantised.words, quantised.rounds_activations) == (method, words, rounds)
    assert open_source(str(tmp_path)).config["quantization_config"] == settings  # and is carried on


def group(**changes: object) -> dict:
    first = COMPRESSED["config_groups"]["group_0"]
    return {**COMPRESSED, "config_groups": {"group_0": {**first, **changes}}}


HOSTILE = {
    "how to load": ({**FP8, "dequantize": True}, "quantization_config.dequantize says how to load"),
    "kernels": ({**COMPRESSED, "use_optimized_inference": True}, "use_optimized_inference"),
    "a number beyond reason": ({**FP8, "weight_block_size": [2**40, 1]}, "weight_block_size holds more"),
    "blocks of nothing": ({**FP8, "weight_block_size": [{}, 16]}, "weight_block_size is not two numbers"),
    "blocks of one number": ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size is not two numbers"),
    "no number": ({**FP8, "weight_block_size": [float("nan"), 1]}, "weight_block_size holds more"),
    "an endless text": ({**COMPRESSED, "ignore": ["a" * 5000]}, "ignore holds more"),
    "endless texts": ({**COMPRESSED, "ignore": ["a"] * 10_000}, "ignore holds more"),
    "the cache": ({**COMPRESSED, "kv_cache_scheme": INT8}, "kv_cache_scheme the cache is rounded"),
    "rotated": ({**COMPRESSED, "transform_config": {"config_groups": {"R3": {}}}}, "transform_config"),
    "sparse": ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "one scale a batch": (group(input_activations={"num_bits": 8, "dynamic": True}), "each batch has one scale"),
    "one scale of outputs": (
        group(output_activations={"num_bits": 8, "strategy": "tensor", "dynamic": True}), "all of a layer's outputs"
    ),
    "8 bits of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "others of its batch"),
    "a method that is none": ({"quant_method": ["fp8"]}, "method ['fp8']"),
    "another method": ({"quant_method": "hqq"}, "method hqq"),
    "awq": ({"quant_method": "awq"}, "AutoAWQConverter"),
    "a list": ([1], "method unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_format_says_is_refused(case: str, tmp_path: Path) -> None:
    settings, words = HOSTILE[case]
    with pytest.raises(SourceError) as caught:
        open_source(str(written(tmp_path, {"quantization_config": settings})))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("shape", "whole"), [((256, 384), True), ((576, 128), False), ((192, 128), False), ((64, 7), True)]
)
def test_blocks_that_are_not_filled_are_refused(shape: tuple[int, int], whole: bool, tmp_path: Path) -> None:
    """transformers would take five blocks of 115 rows for 576, and two of 96 for 192."""
    scales = tuple(-(-length // 128) for length in shape)
    entries = [(f"{LAYER}.weight", "F8_E4M3", shape), (f"{LAYER}.weight_scale_inv", "F32", scales)]
    if whole:
        assert found(tmp_path, FP8, entries).method == "fp8"
        return
    with pytest.raises(
        SourceError, match=f"{LAYER}.weight is {shape[0]} x {shape[1]}, which blocks of 128 x 128 do not"
    ):
        found(tmp_path, FP8, entries)


def test_weights_are_unpacked_whatever_the_device() -> None:
    assert unpacking(FP8) == {**FP8, "dequantize": True}
    assert unpacking(COMPRESSED) == COMPRESSED


def test_the_seal_is_of_the_content() -> None:
    assert sealed({}) is None and sealed({"quantization_config": None}) is None
    seal = sealed({"quantization_config": {"a": 1, "b": [2]}})
    assert seal == sealed({"quantization_config": {"b": [2], "a": 1}, "x": 1})
    assert seal != sealed({"quantization_config": {"a": 1, "b": [3]}})
