"""The tokenizer of an export for vLLM: n placeholders in front of every request, as a BOS is.

A post-processor puts them in front of a text, the chat template in front of a chat (vLLM reads a rendered chat without
special tokens, so they are there once). All else stays: the ids of a text are those of the converted checkpoint behind
the placeholders, and `require_same` tries that on texts and chats.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..bounded import GIB, Unbounded, bounded
from ..errors import UnsupportedModel
from ..live.templates import CONVERSATIONS, REFUSALS, templates_of
from ..live.text import token_texts
from ..words import named

CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is; others write their own post-processor over it
NEW = "<|slot|>"
SPARE_NAMES = ("reserved", "unused", "placeholder", "extra")
SECONDS = 20
TEXTS = ("", " ", "A", " the", "Hello, world!\n", "\n\nx", "1 2  3", "na\u00efve \u4f60\u597d \U0001f600")


@dataclass(frozen=True)
class Placeholders:
    """The n ids that requests begin with, and the text of each; `added`: the token is new in the tokenizer."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    added: bool = False


def choose(
    tokenizer: PreTrainedTokenizerBase, rows: int, prefix: Sequence[int], taken: Collection[int], n_slots: int
) -> Placeholders:
    """The placeholders: a token that no text is read as, so that a request without them cannot pass for one with them.

    `rows`: how many ids have embeddings. `prefix`: the folded ids. `taken`: ids that something else means. In this
    order: a special token that its makers left unused, a new one where embeddings have rows to spare, another special
    one, and where there is none the folded prefix itself. A text that begins with that is read as the original reads
    it: its first tokens are what the slots hold.
    """
    templates = "".join(map(str, templates_of(tokenizer).values()))
    special = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
    }
    free = {
        number: text
        for number, text in special.items()
        if number < rows and number not in taken and number not in prefix and text and text not in templates
    }
    unused = {number: text for number, text in free.items() if any(name in text.lower() for name in SPARE_NAMES)}
    number = next(iter(unused), None)
    new = _next_id(tokenizer.get_vocab())
    if number is None and new is not None and new < rows:
        return Placeholders((new,) * n_slots, (NEW,) * n_slots, added=True)
    number = max(free, default=None) if number is None else number
    if number is not None:
        return Placeholders((number,) * n_slots, (free[number],) * n_slots)
    if len(prefix) != n_slots:
        raise UnsupportedModel(
            "the tokenizer has no special token to spare, which vLLM's requests would begin with; add one to it."
        )
    return Placeholders(tuple(prefix), tuple(token_texts(tokenizer, prefix)))


def _next_id(vocabulary: Mapping[str, int]) -> int | None:
    """The id that the tokenizers library gives to a new token; None where another token has it, or the name is taken.

    It counts tokens. Where some numbers stand for none, that count is the number of another.
    """
    count = len(vocabulary)
    return count if NEW not in vocabulary and max(vocabulary.values(), default=0) < count else None


def with_placeholders(tokenizer: PreTrainedTokenizerBase, chosen: Placeholders) -> dict[str, Any]:
    """tokenizer.json (its content) that puts the placeholders in front of a text. UnsupportedModel if there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} is none of the tokenizers library, so placeholders cannot be put in front of "
            "its texts."
        )
    content = json.loads(backend.to_str())
    if chosen.added:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": chosen.ids[0], "content": chosen.texts[0], **flags, "special": True})
    content["post_processor"] = _leading(content.get("post_processor"), chosen)
    content["truncation"] = content["padding"] = None  # as somebody has last used them
    return content


def with_chats(templates: Any, chosen: Placeholders) -> Any:
    """The chat template (or name -> template) with the placeholders in front of what it writes."""
    if isinstance(templates, Mapping):
        return [{"name": name, "template": with_chats(text, chosen)} for name, text in templates.items()]
    # A literal, so that neither braces in a token nor whitespace control in the template can change it.
    return f"{{{{ {json.dumps(''.join(chosen.texts), ensure_ascii=False)} }}}}{templates}"


def require_same(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, chosen: Placeholders) -> int:
    """How many texts and chats `after` reads as `before` does behind the placeholders; UnsupportedModel unless all."""
    try:
        changed, pairs = bounded(_readings, before, after, seconds=SECONDS, memory=GIB)
    except Unbounded as error:
        raise UnsupportedModel(f"the tokenizer could not be tried with placeholders: {error}.") from error
    if changed:
        raise UnsupportedModel(
            f"with placeholders the tokenizer's token {named(changed[0])} has another id, or one that is not its "
            "alone, so vLLM would read another text."
        )
    for what, expected, found in pairs:
        if found != [*chosen.ids, *expected]:
            raise UnsupportedModel(
                f"the tokenizer does not put placeholders in front of {named(what)} and leave the rest as it is "
                f"({found[: len(chosen.ids) + 4]} for {expected[:4]}), so vLLM would read another text."
            )
    return len(pairs)


# ---- post-processors of the tokenizers library


def _leading(processor: dict[str, Any] | None, chosen: Placeholders) -> dict[str, Any]:
    """A post-processor that does what `processor` does, with the placeholders in front of it all.

    The library has one that puts tokens in front (TemplateProcessing), and of two such in a row the second would take
    the first one's pieces for texts. So what there is is extended.
    """
    kind = None if processor is None else processor["type"]
    if processor is None:
        return _template([], [], {}, chosen)
    if kind == "TemplateProcessing":
        return _template(processor["single"], processor["pair"], processor["special_tokens"], chosen)
    if kind == "Sequence":
        steps = copy.deepcopy(processor["processors"])
        at = next((i for i, step in enumerate(steps) if step["type"] != "ByteLevel"), None)
        if at is None:
            return {**processor, "processors": [*steps, _leading(None, chosen)]}
        return {**processor, "processors": [*steps[:at], _leading(steps[at], chosen), *steps[at + 1 :]]}
    if kind == "ByteLevel":
        return {"type": "Sequence", "processors": [processor, _leading(None, chosen)]}
    raise UnsupportedModel(f"placeholders cannot be put in front of a tokenizer's post-processor {named(kind)}.")


def _template(
    single: list[Any], pair: list[Any], special: Mapping[str, Any], chosen: Placeholders
) -> dict[str, Any]:  # fmt: skip
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    # One special token of the template may stand for several ids: its name is ours.
    name = NEW
    lead = {"SpecialToken": {"id": name, "type_id": 0}}
    entry = {"id": name, "ids": list(chosen.ids), "tokens": list(chosen.texts)}
    return {
        "type": "TemplateProcessing",
        "single": [lead, *(single or [text])],
        "pair": [lead, *(pair or [text, other])],
        "special_tokens": {**special, name: entry},
    }


# ---- in a child: templates are programs of strangers


def _readings(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> tuple[list[str], list[tuple[str, Any, Any]]]:  # fmt: skip
    """Tokens of `before` that `after` numbers otherwise, or has a new token beside; and (what, ids of `before`, ids of
    `after`) of texts, and of the chats that the templates take."""
    vocabulary, numbers = before.get_vocab(), after.get_vocab()
    taken = {number for token, number in numbers.items() if token not in vocabulary}
    changed = [token for token, number in vocabulary.items() if numbers.get(token) != number or number in taken]
    found: list[tuple[str, Any, Any]] = []
    for text in TEXTS:
        expected, now = (list(one(text)["input_ids"]) for one in (before, after))
        found.append((f"the text {text!r}", expected, now))
    for name in templates_of(before):
        for chat in CONVERSATIONS:
            try:
                expected = _chat(before, chat, name)
            except REFUSALS:  # as templates do refuse a chat
                continue
            found.append((f"a chat of {len(chat)} turns", expected, _chat(after, chat, name)))
    return changed, found


def _chat(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], name: str) -> list[int]:
    template = None if isinstance(tokenizer.chat_template, str) else name
    text = str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
