"""Tokenizers and chat templates that are made to hang, to grow or to crash: each ends soon, and in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.tiny_checkpoint import edit_json
from helpers.tiny_tokenizer import ONCE, byte_level, write

from surgery.errors import SourceError
from surgery.live import loading, templates, text
from surgery.live.loading import load_tokenizer
from surgery.live.templates import equals_less
from surgery.live.text import decoded, token_texts, tokenize

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Every letter becomes 60, again and again: 60^5 of them.
GROWING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 60}] * 5}
# One special token that nothing defines: the library panics, which is no Exception.
PANIC = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "lost", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(templates, "SECONDS", 1)
    monkeypatch.setattr(loading, "LOADING_SECONDS", 3)
    return write(tmp_path / "source", byte_level(), ONCE)


def refused(source: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        load_tokenizer(source)
    assert all(word in str(caught.value) for word in (str(source), *words)), caught.value
    assert len(str(caught.value)) < 200 + len(str(source))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "does not end within 1 s"),
        ("{{ 'a' * 10**10 }}", "more than 1 GiB of memory"),
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("x" * 1_000_001, "has more than 1,000,000 characters"),
        (5, "no text but int"),
        ([{"name": "default", "template": ONCE}, {"name": "tools", "template": LOOP}], "('default' and 'tools')"),
        ([{"name": f"t{i}", "template": ONCE} for i in range(1000)], "has 1,000 chat templates"),
        ({"default": ONCE, "tools": [1]}, "'tools' is no text but list"),
    ],
    ids=["loop", "memory", "zero", "recursion", "syntax", "huge", "number", "listed", "many", "mapped"],
)
def test_a_template_that_nobody_can_use_is_refused(source: Path, template: object, words: str) -> None:
    edit_json(source / "tokenizer_config.json", chat_template=template)
    refused(source, "chat template", words, "remove")


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_templates_in_files_beside_the_tokenizer_count(source: Path, name: str) -> None:
    text = "{{ 1/0 }}"
    (source / name).write_text(text if name.endswith(".jinja") else json.dumps({"chat_template": text}))
    refused(source, "chat template", "division by zero")


@pytest.mark.parametrize("template", [ONCE, "{{ raise_exception('tools alone') }}", "{{ messages[9].content.x }}"])
def test_templates_may_refuse_a_conversation(source: Path, template: str) -> None:
    edit_json(source / "tokenizer_config.json", chat_template=template)
    assert load_tokenizer(source).chat_template == template


def test_a_template_that_does_not_end_equals_nothing(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    assert equals_less("{{ 'x' }}", "{{ bos_token }}x", "<s>", tokenizer)
    assert not equals_less("{{ 'y' }}", "{{ bos_token }}x", "<s>", tokenizer)
    assert not equals_less("x" + LOOP, "x" + LOOP, "<s>", tokenizer)


def inside(**changes: object) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "tokenizer.json", **changes)


def beside(**changes: object) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    "damage",
    [
        inside(normalizer=GROWING),
        inside(post_processor=PANIC),
        lambda source: (source / "tokenizer.json").write_text("[" * 100_000),
        beside(model_max_length="x"),
        beside(bos_token=5),
        beside(tokenizer_class=5),
        beside(tokenizer_class="RagTokenizer"),
        beside(added_tokens_decoder={"x": 5}),
        lambda source: (source / "special_tokens_map.json").write_text("[1]"),
        lambda source: (source / "chat_template.jinja").write_bytes(b"\xff"),
    ],
    ids=["growing", "panic", "deep", "limit", "bos", "class", "no tokenizer", "added", "map", "bytes"],
)
def test_a_tokenizer_that_does_not_load_is_refused(source: Path, damage: Callable[[Path], None]) -> None:
    damage(source)
    refused(source, "has no tokenizer that loads", "put the model's own files there")


def test_a_text_on_which_a_tokenizer_hangs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what it is tried on. Its pattern is quadratic in the length of a text that never ends as it should."""
    split = {"type": "Split", "pattern": {"Regex": "x.*y"}, "behavior": "Isolated", "invert": False}
    edit_json(source / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load_tokenizer(source)
    assert tokenize(tokenizer, "a cab") == tokenizer("a cab", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(text, "READING_SECONDS", 1)
    monkeypatch.setattr(text, "SLOWEST", 10**9)
    with pytest.raises(SourceError, match="cannot read the text"):
        tokenize(tokenizer, "x" * 200_000)


def test_what_a_hostile_decoder_writes_is_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows what it is not tried on: each Z becomes ten, again and again."""
    steps = [{"type": "Replace", "pattern": {"String": "Z"}, "content": "Z" * 10}] * 10
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    edit_json(source / "tokenizer.json", decoder={"type": "Sequence", "decoders": [*steps, last]})
    tokenizer = load_tokenizer(source)
    ids = tokenize(tokenizer, "aZ")
    assert token_texts(tokenizer, ids[:1]) == ["a"] and decoded(tokenizer, ids[:1]) == "a"
    monkeypatch.setattr(text, "READING_MEMORY", 2**30)
    for writes in (token_texts, decoded):
        with pytest.raises(SourceError, match="cannot write tokens as text"):
            writes(tokenizer, ids)


def test_no_token_is_decoded_outside_of_a_child() -> None:
    """What decodes is a stranger's program: few places call it, each in a function that a child runs."""
    calls = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "surgery").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"tokenizer\.(batch_)?decode\(|emitted\.decode\(|tokenizer\(\w+, add_special", line)
    ]
    inside = {"surgery/live/loading.py", "surgery/live/text.py", "surgery/delivery/vllm_tokenizer.py"}
    assert {call.partition(":")[0] for call in calls} == inside  # in what they have a child do
