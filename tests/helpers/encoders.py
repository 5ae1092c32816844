"""Tiny encoders of images, made from configs: 3 blocks, images of 32 x 32 in patches of 8 x 8; and images for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from surgery.anatomy.calls import Call
from surgery.anatomy.encoders import examine_encoder
from surgery.live.model import Live
from surgery.live.port import port_of

SIDE, PATCH, BLOCKS = 32, 8, 3
GRID = SIDE // PATCH
_TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Model type -> its config, and how many tokens stand before the patches, registers among them.
ENCODERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "dinov2": (_TINY, 1, 0),
    "dinov2_with_registers": ({**_TINY, "num_register_tokens": 4}, 5, 4),
    "dinov3_vit": ({**_TINY, "num_register_tokens": 2}, 3, 2),
    "vit": (_TINY, 1, 0),
    "vit_msn": (_TINY, 1, 0),
    "deit": (_TINY, 2, 0),
    "beit": ({**_TINY, "use_relative_position_bias": True}, 1, 0),  # whose places are cached by the size of images
    "ijepa": (_TINY, 0, 0),
    "dpt": (_TINY, 1, 0),
    "clip_vision_model": (_TINY, 1, 0),
    "siglip_vision_model": (_TINY, 0, 0),
    "aimv2_vision_model": (_TINY, 0, 0),
    "vit_mae": (  # which drops patches at random unless it is told not to
        {**_TINY, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}, 1, 0,
    ),
    "siglip2_vision_model": ({**_TINY, "num_patches": GRID**2}, 0, 0),  # is called with patches that are cut already
    "clip": ({"vision_config": _TINY, "text_config": _TEXT}, 1, 0),
    "siglip": ({"vision_config": _TINY, "text_config": _TEXT}, 0, 0),
    "siglip2": ({"vision_config": {**_TINY, "num_patches": GRID**2}, "text_config": _TEXT}, 0, 0),
    "llava": (
        {
            "vision_config": {"model_type": "clip_vision_model", **_TINY},
            "text_config": {"model_type": "llama", **_TEXT},
        },
        1, 0,
    ),
}  # fmt: skip
# Those whose tokens stand in another way, which shows once they are run: what is said of them.
ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "yolos": (
        {**_TINY, "image_size": [SIDE, SIDE], "num_detection_tokens": 5},
        "its tokens do not stand as its patches",
    ),
    "pixtral": (_TINY, "two images of 4 x 4 patches become (1, 32, 32)"),
}
# Those that are refused, and what of the reason is said.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "data2vec-vision": (_TINY, "AttentionInterface, where it could be seen"),
    "llama": (_TEXT, "no part of it reads images alone; give --text for a model of text"),
    "videomae": (_TINY, "its structure could not be read without weights"),
}


def config_of(kind: str) -> dict[str, Any]:
    """What config.json of a tiny one says."""
    settings = next(known[kind][0] for known in (ENCODERS, ELSEWHERE, REFUSED) if kind in known)
    return {"model_type": kind, **copy.deepcopy(settings)}


def encoder_model(kind: str) -> PreTrainedModel:
    """With random weights that make each part matter."""
    torch.manual_seed(0)
    config = config_of(kind)
    model: PreTrainedModel = AutoModel.from_config(CONFIG_MAPPING[config.pop("model_type")](**config)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "lambda" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def live_encoder(kind: str) -> Live:
    """The same, ready for images of the size that it was made for."""
    anatomy = examine_encoder(config_of(kind))
    return Live(encoder_model(kind), anatomy, port_of(anatomy))


def save_encoder(root: Path, kind: str) -> Path:
    """A checkpoint with an image processor in `root`."""
    encoder_model(kind).save_pretrained(root)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
    }  # fmt: skip
    if kind.startswith("siglip2"):
        settings |= {"image_processor_type": "Siglip2ImageProcessor", "patch_size": PATCH, "max_num_patches": GRID**2}
    (root / "preprocessor_config.json").write_text(json.dumps(settings))
    return root


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth noise."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save_pictures(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(index).save(root / f"{index}.png")
    return root


def marked(seed: int) -> Image.Image:
    """A grey picture of one size with the patches, of which one is white: the patch that stands out."""
    source = np.random.default_rng(seed)
    values = source.integers(120, 136, (SIDE, SIDE, 3), dtype=np.uint8)
    row, column = (PATCH * int(at) for at in source.integers(0, GRID, 2))
    values[row : row + PATCH, column : column + PATCH] = 255
    return Image.fromarray(values)


def save_marked(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        marked(index).save(root / f"{index:02}.png")
    return root


BLOCK, UNIT, DIM = 0, 7, 5  # of the register neuron that is planted


@torch.no_grad()
def plant_register_neuron(model: PreTrainedModel) -> None:
    """Have one unit of a DINOv2 put a spike on patches that stand out (arXiv 2506.08010), and on no other token.

    Its row tells the marked patches of `marked` from others, by their mean difference where the MLP reads them.
    """
    pixels = torch.stack([_as_pixels(marked(seed)) for seed in range(40, 72)])
    read: list[torch.Tensor] = []
    mlp = model.encoder.layer[BLOCK].mlp
    handle = mlp.fc1.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(pixel_values=pixels)
    handle.remove()
    tokens = read[0][:, 1:].flatten(0, 1)
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (N, C, rows, columns, P, P)
    loud = (cut.abs().mean(dim=(1, 4, 5)) > 0.5).flatten()
    # Least squares of "is marked", which separates better than the difference of means.
    wanted = loud.to(tokens.dtype) - 0.5
    solution = torch.linalg.lstsq(torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1), wanted[:, None]).solution
    mlp.fc1.weight[UNIT], mlp.fc1.bias[UNIT] = 40 * solution[:-1, 0], 40 * solution[-1, 0] - 4
    mlp.fc2.weight[:, UNIT] = 0
    mlp.fc2.weight[DIM, UNIT] = 60 / model.encoder.layer[BLOCK].layer_scale2.lambda1[DIM].abs()


def _as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def save_planted(root: Path) -> Path:
    """A DINOv2 with a register neuron in `root`."""
    save_encoder(root, "dinov2")
    model = encoder_model("dinov2")
    plant_register_neuron(model)
    model.save_pretrained(root)
    return root


def reference(call: Call, slots: bool = True) -> torch.Tensor:
    """What a site gives, (B, T, Hq, E), by a plain softmax in float64 over its slots, if `slots`, and its keys."""
    query, key, value = (states.double() for states in (call.query, call.key, call.value))
    bias = torch.zeros(1, 1, 1, key.shape[2]).double()
    if call.mask is not None:
        bias = call.mask.double() if call.mask.dtype != torch.bool else bias.masked_fill(~call.mask, -torch.inf)
    if slots:
        own = [part.double().transpose(0, 1).expand(len(key), -1, -1, -1) for part in call.module.attention_bias()]
        key, value = torch.cat([own[0], key], dim=2), torch.cat([own[1], value], dim=2)
        bias = torch.cat([bias.new_zeros(*bias.shape[:-1], own[0].shape[2]), bias], dim=-1)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return ((query @ key.transpose(2, 3) * call.scale + bias).softmax(-1) @ value).transpose(1, 2)
