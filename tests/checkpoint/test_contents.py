"""Which names are documents, and which files no run writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.checkpoint.contents import begins_as_code, is_document, is_foreign, may_change, names_code, without_code

SHARDS = ("model-00001-of-00002.safetensors",)


@pytest.mark.parametrize("name", ["README.md", "NOTES.md", "notes.txt", "images/loss.png", "docs/a.b.SVG", "x.pdf"])
def test_what_people_read_may_change(name: str) -> None:
    assert is_document(name) and may_change(name) and not is_foreign(name, SHARDS)


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt", "merges.txt", "dict.txt", "target_vocab.TXT", "tokenizer.md", "LICENSE", "LICENSE.md",
        "NOTICE.txt", "chat_template.md", "config.json", "tokenizer.json", "surgery.json", "chat_template.jinja",
        *SHARDS,
    ],
)  # fmt: skip
def test_what_programs_read_may_not(name: str) -> None:
    assert not is_document(name) and not may_change(name)
    assert may_change("generation_config.json") and not is_document("generation_config.json")


@pytest.mark.parametrize(
    "name",
    [
        "kernel.so", "pytorch_model.bin", "tokenizer.pkl", "tokenizer.bin", "vocab.npy", "model.safetensors",
        "adapter_model.safetensors", "adapter_config.json", "tf_model.h5", "model.gguf", "model.onnx", "run.sh", "m.pt",
        "pytorch_model.bin.index.json", "model_index.json", "below/tokenizer.json", "below/config.json",
        "additional_chat_templates/x.jinja", "CONFIG.JSON", "video_processor.json", "requirements", "a.pyc", "x.zip",
    ],
)  # fmt: skip
def test_files_that_something_might_load_are_foreign(name: str) -> None:
    assert is_foreign(name, SHARDS)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "vocab.txt", "spiece.model", "LICENSE", "eab_kernel.py", "model.sig", *SHARDS],
)
def test_what_a_run_writes_is_not_foreign(name: str) -> None:
    assert not is_foreign(name, SHARDS)


@pytest.mark.parametrize("head", [b"\x80\x04\x95", b"PK\x03\x04", b"\x7fELF\x02"])
def test_code_is_known_by_how_it_begins(tmp_path: Path, head: bytes) -> None:
    for content, expected in ((head + b"rest", True), (b'{"a": 1}', False), (b"", False)):
        (tmp_path / "x").write_bytes(content)
        assert begins_as_code(tmp_path / "x") is expected


MAP = {"AutoModel": "a/b--c.C"}


@pytest.mark.parametrize(
    ("content", "key", "left"),
    [
        ({"auto_map": MAP, "a": 1}, "auto_map", {"a": 1}),
        ({"a": [{"b": {"auto_map": MAP}}]}, "auto_map", {"a": [{"b": {}}]}),
        ({"custom_pipelines": {"x": {}}}, "custom_pipelines", {}),
        ({"auto_map": "c.C"}, "auto_map", {}),
        ({"vocab": {"auto_map": 7}}, None, {"vocab": {"auto_map": 7}}),  # a token of a vocabulary
        ([1, "auto_map", None], None, [1, "auto_map", None]),
    ],
)
def test_code_is_named_anywhere_in_json(content: object, key: str | None, left: object) -> None:
    assert names_code(content) == key and without_code(content) == left
    assert names_code(without_code(content)) is None
