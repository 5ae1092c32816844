"""Tiny encoders of text, made from configs: 3 blocks, a vocabulary of 320; and a tokenizer that frames each text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from surgery.anatomy.encoders import examine_encoder
from surgery.live.model import Live
from surgery.live.port import port_of

from .tiny_checkpoint import save_tokenizer, write_text

VOCABULARY, LONGEST, BLOCKS = 320, 24, 3
_TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_TEXT = {
    **_TINY, "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
_BOTH = {"text_config": _TEXT, "vision_config": {**_TINY, "image_size": 32, "patch_size": 8}}
# Model type -> its config.
CAUSAL: dict[str, dict[str, Any]] = {
    "clip": _BOTH, "clip_text_model": _TEXT, "metaclip_2": _BOTH, "clipseg": _BOTH, "owlvit": _BOTH,
}  # fmt: skip
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "bert": _TEXT, "roberta": _TEXT, "xlm-roberta": _TEXT, "camembert": _TEXT, "electra": _TEXT, "ernie": _TEXT,
    "modernbert": {**_TEXT, "global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "n_layers": BLOCKS, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY,
                   "max_position_embeddings": LONGEST},
    "data2vec-text": _TEXT, "eurobert": _TEXT, "nomic_bert": _TEXT,
    "siglip": _BOTH, "siglip2": _BOTH, "chinese_clip": _BOTH,
}  # fmt: skip
TEXT_ENCODERS = {**CAUSAL, **BOTH_WAYS}
# Those that are refused, and what of the reason is said.
WORDLESS: dict[str, tuple[dict[str, Any], str]] = {
    "clap": ({"text_config": _TEXT}, "does not say whether tokens see those after them"),
    "splinter": (_TEXT, "does not say whether tokens see those after them"),
    "aimv2": (_BOTH, "given an attention_mask its tokens see others than without"),
    "albert": (_TEXT, "attends 3 times in one forward pass"),
    "mpnet": (_TEXT, "AttentionInterface, where it could be seen"),
    "whisper": ({}, "no part of it reads text alone"),
    "llama": (_TEXT, "no part of it reads text alone"),
    "t5gemma": ({}, "attends to an encoder, and a prefix of the decoder is then not constant"),
    "blip-2": ({}, "no part of it reads text alone"),  # a language model, which has images before its BOS
    "kosmos-2": ({}, "no part of it reads text alone"),
    "vit": (_BOTH["vision_config"], "no part of it reads text alone; give --images for an encoder of images"),
}


def text_config_of(kind: str) -> dict[str, Any]:
    """What config.json of a tiny one says."""
    return {"model_type": kind, **copy.deepcopy(TEXT_ENCODERS[kind])}


def text_model(kind: str, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    """With random weights that make each part matter."""
    torch.manual_seed(0)
    config = text_config_of(kind)
    (config["text_config"] if "text_config" in config else config)["vocab_size"] = vocab_size
    model: PreTrainedModel = AutoModel.from_config(CONFIG_MAPPING[config.pop("model_type")](**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def live_text_encoder(kind: str) -> Live:
    anatomy = examine_encoder(text_config_of(kind), "text")
    return Live(text_model(kind), anatomy, port_of(anatomy))


def save_text_encoder(root: Path, kind: str, words: int = 4000) -> Path:
    """A checkpoint with a tokenizer, which puts a token before a text and one behind it, in `root`; its text beside."""
    text_model(kind).save_pretrained(root)
    save_tokenizer(root, write_text(root.parent / f"{root.name}.txt", words, 0), framed=True)
    return root


def save_clip_tokenizer(root: Path, text: Path) -> None:
    """CLIP's own, whose class frames each text itself, whatever its files say; with an image processor beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    backend = CLIPTokenizer().backend_tokenizer
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learnt.normalizer, learnt.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ends = [f"{byte}</w>" for byte in sorted(alphabet)]
    learnt.train([str(text)], trainers.BpeTrainer(
        vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=alphabet, special_tokens=ends, show_progress=False
    ))  # fmt: skip
    found = json.loads(learnt.to_str())["model"]
    names = ["<|startoftext|>", "<|endoftext|>", *sorted(found["vocab"], key=found["vocab"].__getitem__)]
    tokenizer = CLIPTokenizer(
        vocab={name: number for number, name in enumerate(names)}, merges=[tuple(pair) for pair in found["merges"]],
        model_max_length=LONGEST,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer).save_pretrained(root)
