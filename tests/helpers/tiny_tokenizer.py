"""Tokenizers built with the tokenizers library, without training, and the files of a checkpoint that hold them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

BOS, EOS = 1, 2
BOS_FIRST = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
)
ONCE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def byte_level(post=None) -> Tokenizer:
    """A byte-level BPE without merges; <unk>, <s> and </s> are its first ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return finished(tokenizer, post)


def llama_like(post=None) -> Tokenizer:
    """A SentencePiece-like BPE: words begin with U+2581, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefilnoprstuw[]:"]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return finished(tokenizer, post)


def finished(tokenizer: Tokenizer, post) -> Tokenizer:
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if post is not None:
        tokenizer.post_processor = post
    return tokenizer


def write(directory: Path, tokenizer: Tokenizer, template: str | None = None, **settings) -> Path:
    """A source directory's config.json, tokenizer.json and tokenizer_config.json."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    given.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if template is not None:
        given["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return directory
