"""A folded BOS is in the slots: neither post-processor nor chat template may put it in front of the text again.

Token ids are then the original's less the BOS, with one exception: SentencePiece-like tokenizers that mark the first
word of a text (prepend_scheme "first") mark that of a chat too, which stood unmarked after the BOS of its template.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# What a chat template is tried on: each line is a system message or none, then turns of user and assistant.
_CONVERSATIONS = [
    [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    for roles in (["user"], ["user", "assistant"] * 2 + ["user"], ["system", "user", "assistant", "user"])
]


# ---- chat templates


def silent_templates(templates, tokenizer: PreTrainedTokenizerBase):
    """`chat_template` of tokenizer_config.json (one template, or a list of named ones) without the BOS in front."""
    if isinstance(templates, str):
        return silent_template(templates, tokenizer)
    return [{**entry, "template": silent_template(entry["template"], tokenizer)} for entry in templates]


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
    if bos not in template and _equals_less_bos(emptied, template, tokenizer):
        return emptied
    inner = template.removesuffix("\n")  # as Jinja removes it at the end of a template
    text = json.dumps(bos, ensure_ascii=False)
    return (
        f"{{%- set rendered %}}\n{inner}{{%+ endset %}}"
        f"{{{{- rendered[{len(bos)}:] if rendered.startswith({text}) else rendered }}}}"
    )


def _equals_less_bos(candidate: str, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `candidate` writes what `template` does less a leading BOS, on every conversation that it accepts."""
    tried = 0
    for conversation in _CONVERSATIONS:
        for prompt in (True, False):

            def render(source: str, conversation=conversation, prompt=prompt):
                return tokenizer.apply_chat_template(
                    conversation, chat_template=source, tokenize=False, add_generation_prompt=prompt
                )

            if (expected := _rendered(render, template)) is None:
                continue
            tried += 1
            if _rendered(render, candidate) != expected.removeprefix(tokenizer.bos_token):
                return False
    return tried > 0


def _rendered(render: Callable[[str], str], template: str) -> str | None:
    try:
        return render(template)
    except (
        TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
    ):  # a template's way to refuse a conversation
        return None


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
