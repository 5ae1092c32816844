"""A folded BOS is in the slots: neither post-processor nor chat template may put it in front of the text again.

Token ids are then the original's less the BOS, with one exception: SentencePiece-like tokenizers that mark the first
word of a text (prepend_scheme "first") mark that of a chat too, which stood unmarked after the BOS of its template.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..endings.temporary import temporary
from ..live.templates import equals_less
from ..live.text import around

GENERIC = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is

# ---- chat templates


def silent_templates(templates: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """`chat_template` of a JSON file (one template, a list of named ones, or a mapping) without the BOS in front."""
    if isinstance(templates, dict):
        return {name: silent_templates(template, tokenizer) for name, template in templates.items()}
    if isinstance(templates, list):
        return [{**entry, "template": silent_templates(entry["template"], tokenizer)} for entry in templates]
    return silent_template(templates, tokenizer) if isinstance(templates, str) else templates


def silent_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that writes what `template` writes, less a BOS at the very beginning.

    Emptying `bos_token` does that for most. Templates that write the BOS again in later turns, or spell it out, are
    rendered as they are and cut afterwards; that hides from transformers where the assistant speaks ({% generation %}),
    hence not for all.
    """
    bos = tokenizer.bos_token
    if bos not in template and "bos_token" not in template:
        return template
    # trim_blocks, which chat templates are rendered with, eats the newline; what follows begins a line as before.
    emptied = "{%- set bos_token = '' %}\n" + template
    if bos not in template and equals_less(emptied, template, bos, tokenizer):
        return emptied
    inner = template.removesuffix("\n")  # as Jinja removes it at the end of a template
    text = json.dumps(bos, ensure_ascii=False)
    return (
        f"{{%- set rendered %}}\n{inner}{{%+ endset %}}"
        f"{{{{- rendered[{len(bos)}:] if rendered.startswith({text}) else rendered }}}}"
    )


# ---- post-processors of the tokenizers library


def silent_processor(processor: dict | None, token_id: int) -> dict | None:
    """A post-processor of tokenizer.json (its JSON) that does all that `processor` does but add `token_id`."""
    if processor is None:
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        kept = [silent_processor(step, token_id) for step in processor["processors"]]
        return {**processor, "processors": [step for step in kept if step is not None]}
    if kind == "TemplateProcessing":
        return _silent_pieces(processor, token_id)
    if kind in ("BertProcessing", "RobertaProcessing") and processor["cls"][1] == token_id:
        return _separators_only(processor)
    return processor


def _silent_pieces(processor: dict, token_id: int) -> dict:
    """TemplateProcessing: its special tokens have names of their own, and stand for one or more tokens."""
    specials = processor["special_tokens"]
    silenced = {name for name, entry in specials.items() if entry["ids"] == [token_id]}
    cleaned = {**processor, "special_tokens": {name: specials[name] for name in specials if name not in silenced}}
    for part in ("single", "pair"):
        cleaned[part] = [piece for piece in processor[part] if piece.get("SpecialToken", {}).get("id") not in silenced]
    return cleaned


def _separators_only(processor: dict) -> dict:
    """BERT's and RoBERTa's `<cls> A <sep>` (and their pairs) without the first token."""
    text, number = processor["sep"]
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    separator = {"SpecialToken": {"id": text, "type_id": 0}}
    doubled = [separator] if processor["type"] == "RobertaProcessing" else []
    return {
        "type": "TemplateProcessing",
        "single": [first, separator],
        "pair": [first, separator, *doubled, second, separator],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


# ---- classes that write their own


def puts_back(
    tokenizer: PreTrainedTokenizerBase, directory: Path, files: Sequence[str], changed: Mapping[str, str]
) -> bool:  # fmt: skip
    """Whether the tokenizer's class, loaded from the `files` of `directory` with some `changed`, puts BOS before a text
    all the same: those of CLIP and RoBERTa write their post-processor themselves, whatever tokenizer.json says."""
    kind: Any = type(tokenizer)
    if "post_processor" not in kind.__init__.__code__.co_names:
        return False
    with temporary() as folder:
        for name in files:
            if "/" not in name and (directory / name).is_file():
                shutil.copyfile(directory / name, folder / name)
        for name, text in changed.items():
            (folder / name).write_text(text, encoding="utf-8")
        before, _ = around(kind.from_pretrained(folder, local_files_only=True))
    return before[:1] == (tokenizer.bos_token_id,)


def generic_files(tokenizer: Any, settings: str) -> dict[str, str]:
    """tokenizer.json with all that the class of `tokenizer` does but add BOS, and tokenizer_config.json (`settings`)
    with the class that does what is written there."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["post_processor"] = silent_processor(data["post_processor"], tokenizer.bos_token_id)
    if suffix := data["model"].get("end_of_word_suffix"):  # of which CLIP's class makes spaces itself
        data["decoder"] = _spaced(data["decoder"], suffix)
    told = {**json.loads(settings), "tokenizer_class": GENERIC}
    return {
        "tokenizer.json": json.dumps(data, ensure_ascii=False, indent=2),
        "tokenizer_config.json": json.dumps(told, ensure_ascii=False, indent=2) + "\n",
    }


def _spaced(decoder: dict, suffix: str) -> dict:
    """A decoder of tokenizer.json that writes what `decoder` does, with spaces for the ends of words."""
    steps = (({"String": suffix}, " "), ({"Regex": r"^\s+|\s+$"}, ""))
    spaces = [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in steps]
    return {"type": "Sequence", "decoders": [decoder, *spaces]}
