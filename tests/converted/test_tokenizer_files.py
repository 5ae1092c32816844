"""The tokenizer of a converted checkpoint: the original's, but for a BOS that is folded into the slots.

Tokenizers are built here with the tokenizers library; ids are those of the files as emitted, loaded with AutoTokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_checkpoint import edit_json
from helpers.tiny_tokenizer import BOS, BOS_FIRST, EOS, ONCE, byte_level, finished, llama_like, write
from tokenizers import processors
from transformers import AutoTokenizer

from surgery.converted.bos import silent_processor
from surgery.converted.files import converted_tokenizer
from surgery.live.loading import load_tokenizer
from surgery.verification.tokens import check_tokenizer

TEXTS = ["a cab", "  two  spaces ", "", "<s>fed", "line\nbreak"]
NAMED = processors.TemplateProcessing(single="begin $A", pair="begin $A $B", special_tokens=[("begin", BOS)])
ROBERTA = processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS), trim_offsets=False, add_prefix_space=False)
# Templates as they are written in the wild: the BOS in front, in each turn of the user, spelt out, or never.
TEMPLATES = {
    "once": ONCE,
    "indented": "\n  {{ bos_token }}{%- for m in messages %}\n  {{ m.content }}\n{% endfor %}\n",
    "in the loop": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ m.content }}\n{% endfor %}",
    "every turn": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST]{% endif %}{{ m.content }}"
    "{% endfor %}",
    "spelt out": "  {% for m in messages %}\n<s>{{ m.role }}: {{ m.content }}\n  {% endfor %}\n",
    "defined": "{% if bos_token is defined %}{{ bos_token }}{% endif %}{{ messages[0].content }}",
    "users only": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ bos_token + messages[0].content }}",
    "never": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}
CHATS = [
    [{"role": "user", "content": "abc"}],
    [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}, {"role": "user", "content": " cab"}],
]


def emit(source: Path, folded: bool, n_slots: int = 2) -> Path:
    """The tokenizer files that a run writes for `source`, in a directory beside it."""
    out = source.with_name(source.name + "-out")
    out.mkdir()
    files = sorted(path.name for path in source.iterdir() if path.name != "config.json")
    original = load_tokenizer(source)
    changed = converted_tokenizer(source, files, original, n_slots, original.bos_token if folded else None)
    for name in files:
        if name not in changed:
            (out / name).write_bytes((source / name).read_bytes())
    for name, text in changed.items():
        (out / name).write_text(text, encoding="utf-8")
    (out / "config.json").write_text(json.dumps({"model_type": "eab_llama"}), encoding="utf-8")
    return out


def less_bos(ids: list[int], tokenizer) -> list[int]:
    """`ids` without the BOS that `tokenizer` adds (one that stands in the text is not added by it)."""
    return ids[1:] if tokenizer("x")["input_ids"][0] == BOS else ids


def assert_same(source: Path, out: Path, folded: bool) -> None:
    """The same ids for every text, alone and in pairs, and the same chats; each less its BOS where that is folded."""
    original, emitted = load_tokenizer(source), AutoTokenizer.from_pretrained(out)
    assert type(emitted) is type(original)
    for text in TEXTS:
        alone = original(text)["input_ids"]
        assert emitted(text)["input_ids"] == (less_bos(alone, original) if folded else alone), text
        bare = original(text, add_special_tokens=False)["input_ids"]
        assert emitted(text, add_special_tokens=False)["input_ids"] == bare, text  # what the user wrote stays
    pair = original("one", "two")["input_ids"]
    assert emitted("one", "two")["input_ids"] == ([i for i in pair if i != BOS] if folded else pair)
    if original.chat_template is None:
        return
    for chat in CHATS:
        for prompt in (True, False):
            text = original.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            found = emitted.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert found == (text.removeprefix("<s>") if folded else text)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


CASES = {
    "post-processor": (byte_level, BOS_FIRST, {}, None),
    "post-processor that names it otherwise": (byte_level, NAMED, {}, None),
    "post-processor in a sequence": (byte_level, processors.Sequence([processors.ByteLevel(), BOS_FIRST]), {}, None),
    "RoBERTa's post-processor": (byte_level, ROBERTA, {}, None),
    "flag": (byte_level, None, {"add_bos_token": True}, None),
    "template": (byte_level, None, {}, ONCE),
    "post-processor, flag and template": (byte_level, BOS_FIRST, {"add_bos_token": True}, ONCE),
    "never": (byte_level, None, {}, None),
    "llama, post-processor": (llama_like, BOS_FIRST, {"tokenizer_class": "LlamaTokenizer"}, None),
    "llama, all three": (llama_like, BOS_FIRST, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, ONCE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "kept"])
def test_ids_are_the_originals_less_a_folded_bos(source, case, folded):
    build, post, settings, template = CASES[case]
    out = emit(write(source, build(post), template, **settings), folded)
    assert_same(source, out, folded)
    if folded:
        assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"][0] != BOS
    assert check_tokenizer(out, load_tokenizer(source), [BOS] if folded else [7], "a cab\nfed").passed


@pytest.mark.parametrize("case", TEMPLATES)
@pytest.mark.parametrize("where", ["config", "file", "named", "mapped", "processor"])
def test_chat_templates_are_the_originals_less_a_folded_bos(source, case, where):
    template = TEMPLATES[case]
    write(source, byte_level(), template if where == "config" else None)
    if where == "file":
        (source / "chat_template.jinja").write_text(template, encoding="utf-8")
    if where == "named":
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings["chat_template"] = [{"name": "default", "template": template}, {"name": "other", "template": template}]
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if where == "mapped":
        edit_json(source / "tokenizer_config.json", chat_template={"default": template, "other": template})
    if where == "processor":  # as processors of transformers 4 kept it; the tokenizer does not look there
        (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    kept = emit(source, folded=False)
    assert_same(source, kept, folded=False)
    out = emit(source.rename(source.with_name("again")), folded=True)
    assert_same(out.with_name("again"), out, folded=True)
    if where == "processor":
        tokenizers = [load_tokenizer(root) for root in (out.with_name("again"), out)]
        for tokenizer, root in zip(tokenizers, (out.with_name("again"), out), strict=True):
            tokenizer.chat_template = json.loads((root / "chat_template.json").read_text())["chat_template"]
        before, after = (t.apply_chat_template(CHATS[0], tokenize=False) for t in tokenizers)
        assert after == before.removeprefix("<s>")
    if case == "never":
        assert "set " not in "".join(path.read_text() for path in out.iterdir() if path.name != "tokenizer.json")


def test_assistant_masks_survive_if_the_template_writes_one_bos(source):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    out = emit(write(source, byte_level(), template), folded=True)
    how = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
    before = load_tokenizer(source).apply_chat_template(CHATS[1], **how)
    after = AutoTokenizer.from_pretrained(out).apply_chat_template(CHATS[1], **how)
    assert after["input_ids"] == before["input_ids"][1:] and sum(after["assistant_masks"]) == 2
    assert after["assistant_masks"] == before["assistant_masks"][1:]


def test_the_tokenizer_class_of_a_derived_type_is_written_out(source):
    """Qwen2's tokenizer is chosen by model_type; the derived type has none to be chosen by."""
    write(source, byte_level(), tokenizer_class="PreTrainedTokenizerFast")
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    original = load_tokenizer(source)
    out = emit(source, folded=False)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    assert type(AutoTokenizer.from_pretrained(out)) is type(original)
    decomposed = "e\u0301 123"  # Qwen2 composes characters, a plain tokenizer of the same file does not
    assert AutoTokenizer.from_pretrained(out)(decomposed)["input_ids"] == original(decomposed)["input_ids"]


@pytest.mark.parametrize(
    ("limit", "emitted"),
    [(2048, 2045), (3, 3), (10**30, 10**30), (None, None)],
    ids=["lowered", "tiny", "none", "absent"],
)
def test_model_max_length_leaves_room_for_the_slots(source, limit, emitted):
    write(source, byte_level(), **({} if limit is None else {"model_max_length": limit}))
    settings = json.loads((emit(source, folded=False, n_slots=3) / "tokenizer_config.json").read_text())
    assert settings.get("model_max_length") == emitted


def test_other_settings_and_files_stay(source):
    write(source, byte_level(BOS_FIRST), padding_side="left", extra={"caf\u00e9": 1})
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    before = json.loads((source / "tokenizer_config.json").read_text())
    out = emit(source, folded=False)
    after = json.loads((out / "tokenizer_config.json").read_text())
    assert {**after, "tokenizer_class": None} == {**before, "tokenizer_class": None}
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "kept"])
def test_without_a_tokenizer_config(source, folded):
    write(source, byte_level(BOS_FIRST))
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    assert load_tokenizer(source).bos_token == "<s>"
    out = emit(source, folded)
    assert "tokenizer_class" in json.loads((out / "tokenizer_config.json").read_text())
    assert_same(source, out, folded)


def test_a_vocabulary_without_tokenizer_json(source):
    """GPT-2's older files: the flag alone decides about BOS, so it must be written."""
    tokenizer = byte_level()
    write(source, tokenizer, tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (source / "tokenizer.json").unlink()
    tokenizer.model.save(str(source))
    assert load_tokenizer(source)("abc")["input_ids"][0] == BOS
    assert_same(source, emit(source, folded=True), folded=True)


def test_a_doubled_bos_is_caught(source):
    """What a run would do wrong: fold the BOS and leave the tokenizer as it is, or lose a post-processor."""
    out = emit(write(source, byte_level(BOS_FIRST)), folded=False)
    original = load_tokenizer(source)
    for reference in (original, None):
        check = check_tokenizer(out, reference, [7, BOS], None)
        assert not check.passed and "'<s>'" in check.detail
    lost = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps({**lost, "post_processor": None}))
    check = check_tokenizer(out, original, [7], "a cab")
    assert not check.passed and "token 0" in check.detail
    (out / "tokenizer.json").write_text("{")
    assert not check_tokenizer(out, original, [7], "a cab").passed


def test_processors_that_do_not_add_the_token_stay():
    assert silent_processor(None, "<s>") is None
    for given in (processors.ByteLevel(), processors.BertProcessing(("</s>", EOS), ("[CLS]", 9)), BOS_FIRST):
        as_json = json.loads(finished(byte_level(), given).to_str())["post_processor"]
        assert silent_processor(as_json, 99) == as_json
