"""Tiny quantised checkpoints of each format, and what their weights are: in float64, by the format's definition.

Those of compressed-tensors are written by that library. fp8 and MXFP4, whose quantisers want a GPU, are written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_checkpoint import edit_json, enlarge, save_model

SINGLE = "model.safetensors"
GROUP, BLOCK = 16, 16
_INT8: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
# What each format of compressed-tensors rounds: weights, and inputs of layers.
COMPRESSED: dict[str, dict[str, dict[str, Any]]] = {
    "w8a8 static": {"weights": _INT8, "input_activations": {"num_bits": 8, "strategy": "tensor"}},
    "w8a8 per token": {"weights": _INT8, "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}},
    "w4a16": {"weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP}},
    "w4a16 off centre": {"weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}},
    "float8": {"weights": _FP8, "input_activations": {**_FP8, "strategy": "token", "dynamic": True}},
}
FORMS = (*COMPRESSED, "fp8", "mxfp4")
INPUT_SCALE = 0.05
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def save_packed(root: Path, form: str) -> Path:
    """A tiny causal language model in `root`, quantised in `form`: two layers, 320 token ids."""
    root.mkdir(parents=True, exist_ok=True)
    if form == "mxfp4":
        _save_gpt_oss(root)
        return _rewritten(root, _mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    if form == "bitsandbytes":
        return save_four_bits(root)
    save_model(root)
    if form == "fp8":
        says = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK] * 2}
        return _rewritten(root, _fp8, says)
    _compress(root, COMPRESSED[form])
    return root


def unpacked_by_hand(root: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as the model has it, in float64, by its name in the model."""
    tensors = load_file(root / SINGLE)
    settings = json.loads((root / "config.json").read_text())["quantization_config"]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        base = name.rpartition(".")[0]
        scale = tensors.get(f"{base}.weight_scale")
        if name.endswith("_blocks"):
            found[name.removesuffix("_blocks")] = _of_mxfp4(tensor, tensors[name.replace("_blocks", "_scales")])
        elif name.endswith("weight_packed") and scale is not None:
            zero = tensors.get(f"{base}.weight_zero_point")
            points = 0 if zero is None else _of_int4(zero.T).T.repeat_interleave(GROUP, dim=1)
            found[f"{base}.weight"] = (_of_int4(tensor) - points) * scale.double().repeat_interleave(GROUP, dim=1)
        elif name.endswith(".weight") and f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"].double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            found[name] = tensor.double() * scales
        elif name.endswith(".weight") and scale is not None:
            found[name] = tensor.double() * scale.double()
        elif tensor.is_floating_point() and not name.endswith(("_scale", "_scale_inv")):
            found[name] = tensor.double()
    assert settings["quant_method"] in ("compressed-tensors", "fp8", "mxfp4")
    return found


# ---- compressed-tensors


def _compress(root: Path, rounds: dict[str, dict[str, Any]]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    from surgery.anatomy.quiet import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        group = {"targets": ["Linear"], **rounds}
        config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for module in model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is None:
                continue
            rows, size = module.weight.shape[0], getattr(scheme.weights, "group_size", None)
            cut = module.weight.detach().reshape(
                1 if scheme.weights.strategy == "tensor" else rows, -1, size or module.weight.shape[1]
            )
            low, high = (cut.amin((1, 2), True), cut.amax((1, 2), True)) if size is None else (cut.amin(2), cut.amax(2))
            scale, zero = calculate_qparams(low, high, scheme.weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(INPUT_SCALE)
            module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(root)
    compressor.update_config(root)


def _of_int4(packed: torch.Tensor) -> torch.Tensor:
    """packed (out, in / 8) int32, eight integers from -8 to 7 in each, lowest bits first, 8 added -> (out, in)."""
    nibbles = packed[..., None] >> (4 * torch.arange(8)) & 15
    return nibbles.flatten(1).double() - 8


# ---- written here


def _rewritten(root: Path, pack: Any, says: dict[str, Any]) -> Path:
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(root / SINGLE).items():
        packed |= pack(name, tensor)
    save_file(packed, root / SINGLE, {"format": "pt"})
    edit_json(root / "config.json", quantization_config=says)
    return root


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """float8 (e4m3) in blocks, each times its own scale: DeepSeek-V3's format."""
    if "_proj" not in name:
        return {name: weight}
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # (R, BLOCK, C, BLOCK)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    packed = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scales}


def _mxfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """e2m1 in blocks of 32 along the inputs, two in a byte, low one first; each block times a power of two: gpt-oss's.

    The model has (experts, in, out), the format (experts, out, in).
    """
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}
    blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
    power = blocks.abs().amax(-1).log2().floor() - 2
    steps = blocks / power.exp2()[..., None]
    code = (steps.abs()[..., None] - torch.tensor(_E2M1)).abs().argmin(-1) + 8 * (steps < 0)
    packed = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": packed, f"{name}_scales": (power + 127).to(torch.uint8)}


def _of_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks (E, out, in / 32, 16) and scales (E, out, in / 32) -> (E, in, out)."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(3).long()
    return (values[codes] * (scales.double() - 127).exp2()[..., None]).flatten(2).transpose(1, 2)


def save_four_bits(root: Path, hidden_size: int = 64) -> Path:
    """NF4 by bitsandbytes, in blocks of 64."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=hidden_size, intermediate_size=hidden_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    enlarge(model)
    model.save_pretrained(root)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    AutoModelForCausalLM.from_pretrained(
        root, quantization_config=four_bits, dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(root)
    return root


def _save_gpt_oss(root: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, sliding_window=8, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=None, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    enlarge(model)
    model.save_pretrained(root)
