"""What can be opened as a source, what is refused and how, and what is carried along."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from surgery.checkpoint.layout import INDEX, SINGLE
from surgery.checkpoint.source import materialise, open_source, source_hashes
from surgery.checkpoint.writing import plan_file
from surgery.errors import DamagedCheckpoint, SourceError, SurgeryError


def checkpoint(root: Path, config: dict | str | None = None, weights: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps({"model_type": "llama"} if config is None else config)
    (root / "config.json").write_text(text)
    if weights:
        header, _ = plan_file(SINGLE, [("x", "F32", (2,))], {"format": "pt"})
        (root / SINGLE).write_bytes(header + bytes(8))
    return root


def refused(kind: type[SurgeryError], *words: str, spec: str | Path, **options: str) -> None:
    with pytest.raises(kind) as caught:
        open_source(str(spec), **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_a_directory_is_opened_as_it_is(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    source = open_source(str(root))
    assert (source.kind, source.root, source.revision, source.spec) == ("directory", root, None, str(root))
    assert source.config == {"model_type": "llama"} and list(source.layout.tensors) == ["x"]
    assert materialise(source, tmp_path / "unused") == root and not (tmp_path / "unused").exists()


def test_hashes_cover_weights_and_config(tmp_path: Path) -> None:
    source = open_source(str(checkpoint(tmp_path / "model")))
    done: dict[str, int] = Counter()
    hashes = source_hashes(source, lambda count, what: done.update({what: count}))
    expected = {name: hashlib.sha256((source.root / name).read_bytes()).hexdigest() for name in (SINGLE, "config.json")}
    assert hashes == expected
    assert done == {name: (source.root / name).stat().st_size for name in expected}


def test_companions_are_what_belongs_to_the_model_and_no_more(tmp_path: Path) -> None:
    root = checkpoint(
        tmp_path / "model",
        {
            "model_type": "llama",
            "auto_map": {
                "AutoModel": "modeling_x.Model",
                "AutoConfig": "other/repo--conf.Config",
                "AutoTokenizer": ["tok.Slow", None],
            },
        },
    )
    carried = [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "LICENSE",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "added_tokens.json",
        "NOTICE.txt",
        "modeling_x.py",
        "tok.py",
    ]
    left = [
        "README.md",
        "pytorch_model.bin",
        "tokenizer.pkl",
        "vocab.pt",
        "extra.safetensors",
        "training_args.bin",
        "conf.py",
        "setup.py",
        "tokenizer.py",
        "notes.txt",
        "model.onnx",
        "tokenizer.bin",
    ]
    for name in carried + left:
        (root / name).write_text("{}")
    (root / "tokenizer_dir").mkdir()
    assert open_source(str(root)).companions == tuple(sorted(carried))


def test_a_companion_that_is_an_lfs_pointer_is_named(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    (root / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(DamagedCheckpoint, "tokenizer.json", "git lfs pull", spec=root)


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ("{", DamagedCheckpoint, ("config.json", "JSON")),
        ("[]", DamagedCheckpoint, ("config.json", "JSON object")),
        ('{"model_type": "llama", "model_type": "gpt2"}', DamagedCheckpoint, ("config.json", "twice")),
        ("version https://git-lfs.github.com/spec/v1\n", DamagedCheckpoint, ("config.json", "git lfs pull")),
        ({}, SourceError, ("config.json", "model_type")),
        ({"model_type": 3}, SourceError, ("model_type",)),
        ({"model_type": "eab_llama"}, SourceError, ("already converted", "eab_llama")),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            SourceError,
            ("quantization_config", "gptq", "quantised from"),
        ),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, config: dict | str, kind: type[SurgeryError], words: tuple[str, ...]
) -> None:
    refused(kind, *words, spec=checkpoint(tmp_path / "model", config))


def test_a_manifest_means_already_converted(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    (root / "surgery.json").write_text("{}")
    refused(SourceError, "already converted", spec=root)


def test_incomplete_directories(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model", weights=False)
    refused(SourceError, "no weights", spec=root)
    (root / "pytorch_model.bin").write_bytes(b"\x80")
    refused(SourceError, "pickle", "pytorch_model.bin", spec=root)
    (root / "config.json").unlink()
    refused(SourceError, "config.json", "complete", spec=root)
    (root / "x.gguf").write_bytes(b"GGUF")
    refused(SourceError, "config.json", "x.gguf", spec=root)


def test_damaged_weights_are_damage(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    with (root / SINGLE).open("ab") as file:
        file.write(b"\0")
    refused(DamagedCheckpoint, SINGLE, "trailing", spec=root)
    (root / SINGLE).unlink()
    (root / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}')
    refused(DamagedCheckpoint, INDEX, "plain file name", spec=root)


def test_specs_that_name_nothing(tmp_path: Path) -> None:
    refused(SourceError, "does not exist", "owner/name", spec=tmp_path / "nowhere")
    refused(SourceError, "owner/name", spec="just-a-name")
    refused(SourceError, "does not exist", spec="~nobody-of-this-name/model")
    refused(SourceError, "does not exist", spec="n" * 100_000)
    refused(SourceError, "cannot be read", "gone.gguf", spec=tmp_path / "gone.gguf")
    (tmp_path / "file.bin").write_bytes(b"")
    refused(SourceError, "not a .gguf", spec=tmp_path / "file.bin")


def test_options_that_do_not_fit_the_source(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    refused(SourceError, "dtype", ".gguf", spec=root, dtype="bfloat16")
    refused(SourceError, "dtype", spec="owner/name", dtype="bfloat16")
    refused(SourceError, "revision", "hub id", spec=root, revision="main")
    refused(SourceError, "revision", spec=tmp_path / "x.gguf", revision="main")
