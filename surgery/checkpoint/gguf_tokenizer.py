"""The tokenizer that a GGUF file holds, as files of Hugging Face."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from ..bounded import GIB, Unbounded, bounded
from ..endings.temporary import temporary
from ..errors import UnsupportedModel
from .disk import disk_errors
from .gguf_header import Header
from .gguf_model import INSTEAD

_GPT2_SPLITS = ("default", "gpt-2", "gpt2")  # pre-tokenizers for which falling back to GPT-2's is right
_PROBE_TEXT = "Hello,  World 2024!\n\tdef f(x): return x<|im_end|> \u00fcn\u00ef \u6f22\u5b57 </s>"
SECONDS, MEMORY = 180, 4 * GIB  # vocabularies are converted in Python


def tokenizer_files(header: Header) -> tuple[str, ...]:
    """The files `write_tokenizer` will write; warns where transformers does not know the pre-tokenizer."""
    if "tokenizer.ggml.model" not in header.metadata:
        return ()
    split = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata["tokenizer.ggml.model"] == "gpt2" and split not in (*_GPT2_SPLITS, *_known_splits()):
        warnings.warn(
            f"{header.path.name} names the pre-tokenizer {split!r}, which transformers does not know: it "
            "splits text as GPT-2 does, so compare token ids with the original tokenizer.",
            stacklevel=4,
        )
    template = ("chat_template.jinja",) if "tokenizer.chat_template" in header.metadata else ()
    return (*template, "tokenizer.json", "tokenizer_config.json")


def _known_splits() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # transformers versions that split every byte-level vocabulary as GPT-2 does
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def write_tokenizer(header: Header, into: Path) -> None:
    """Write the file's tokenizer to `into` (which has config.json), and check that it reads back to the same ids.

    The vocabulary and its patterns are a stranger's, so all of it happens in a child with limits of time and memory.
    """
    # Other tokenizer files beside the GGUF must not mix in, and the child must not write to `into`.
    with temporary() as alone, temporary() as saved:
        (alone / header.path.name).symlink_to(header.path.resolve())
        shutil.copyfile(into / "config.json", saved / "config.json")
        memory = MEMORY + header.path.stat().st_size  # it is mapped
        try:
            same = bounded(_save, str(alone), header.path.name, str(saved), seconds=SECONDS, memory=memory)
        except Unbounded as error:
            raise UnsupportedModel(
                f"{header.path} has no tokenizer that loads ({str(error)[:100]}); {INSTEAD}."
            ) from error
        if not same:
            raise UnsupportedModel(f"The tokenizer of {header.path} gives other token ids once saved; {INSTEAD}.")
        with disk_errors(into):
            for file in saved.iterdir():
                shutil.copyfile(file, into / file.name)


def _save(directory: str, name: str, into: str) -> bool:
    """Save the tokenizer of a GGUF to `into`; whether it reads back to the same ids."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    tokenizer.save_pretrained(into)
    return bool(AutoTokenizer.from_pretrained(into)(_PROBE_TEXT).input_ids == tokenizer(_PROBE_TEXT).input_ids)
