"""`surgery export` refuses what it cannot do in one sentence, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import typing
from pathlib import Path

import pytest
import torch
from helpers.bench import DAMAGED, INPUT, Bench, refused
from helpers.tiny_checkpoint import RECIPE, Place, save_model, save_tokenizer, sha256_of_files, surgery_command

import surgery
from surgery import results
from surgery.checkpoint import stage
from surgery.delivery import ENGINES
from surgery.delivery.peft import Peft
from surgery.delivery.reading import ROUNDED, Expected

GATE = 1


def exporting(bench: Bench, *options: object, engine: str = "peft", checkpoint: Path | None = None) -> list:
    return ["export", engine, checkpoint or bench.place.converted, bench.out, *options]


def copied(bench: Bench) -> Path:
    return Path(shutil.copytree(bench.place.converted, bench.root / "converted"))


# ---- the checkpoint


@pytest.mark.parametrize("engine", [engine.name for engine in ENGINES])
def test_a_damaged_checkpoint_is_never_exported(bench: Bench, engine: str) -> None:
    root = copied(bench)
    shard = sorted(root.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    refused(bench, exporting(bench, engine=engine, checkpoint=root), DAMAGED, "was not exported", "files", shard.name)


def test_what_is_not_converted_is_refused(bench: Bench) -> None:
    refused(bench, exporting(bench, checkpoint=bench.place.source), INPUT, "not a converted checkpoint")
    refused(bench, exporting(bench, checkpoint=bench.root / "none"), INPUT, "not a directory")


def test_a_checkpoint_that_failed_is_refused(bench: Bench) -> None:
    root = copied(bench)
    manifest = json.loads((root / "surgery.json").read_text(encoding="utf-8"))
    manifest |= {"status": "unverified", "verdict": {**manifest["verdict"], "passed": False}}
    (root / "surgery.json").write_text(json.dumps(manifest), encoding="utf-8")
    refused(bench, exporting(bench, checkpoint=root), INPUT, "failed its gates")


@pytest.mark.parametrize("engine", [engine.name for engine in ENGINES if engine.name in ("peft", "mlx")])
@pytest.mark.parametrize(
    ("operation", "words"),
    [("smoothing: {}", ("changed", "tensors", "smoothing")), ("head_norm: {}", ("norms its heads", "head_norm"))],
)
def test_more_than_slots_is_refused_by_name(bench: Bench, engine: str, operation: str, words: tuple[str, ...]) -> None:
    recipe = RECIPE.replace("verify:", f"  - {operation}\nverify:")
    ended = surgery_command(*bench.run(None, recipe))
    assert ended.code == 0, ended.err
    converted = bench.out.rename(bench.root / "converted")
    asked = exporting(bench, "--original", bench.place.source, engine=engine, checkpoint=converted)
    refused(bench, asked, INPUT, "keys and values alone", "attention_bias only", *words)


def test_a_file_that_changes_meanwhile_is_not_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    root, write = copied(bench), Peft.write
    tokenizer = root / "tokenizer.json"

    def late(self, finished, into):
        tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
        write(self, finished, into)

    monkeypatch.setattr(Peft, "write", late)
    ended = surgery_command(*exporting(bench, checkpoint=root))
    assert ended.code == DAMAGED and "tokenizer.json changed while it was exported" in ended.error
    assert not bench.out.exists()


# ---- the original


def test_the_original_is_asked_for_where_it_is_needed(bench: Bench) -> None:
    refused(bench, exporting(bench, "--text", bench.place.text), INPUT, "'source'", "--original SRC")
    refused(bench, exporting(bench, engine="mlx"), INPUT, "'source'", "--original SRC")


def test_another_original_is_refused(bench: Bench) -> None:
    other = bench.root / "other"
    save_model(other, seed=1)
    save_tokenizer(other, bench.place.text)
    refused(bench, exporting(bench, "--original", other), INPUT, "byte-identical", "other", "give what")
    refused(bench, exporting(bench, "--original", bench.place.converted), INPUT, "already converted")


def test_the_same_weights_in_other_files_will_do(bench: Bench) -> None:
    ended = surgery_command(*exporting(bench, "--original", bench.place.sharded))
    assert ended.code == 0, ended.err


def test_other_settings_of_the_same_weights_will_not_do(bench: Bench) -> None:
    root = bench.configured(rms_norm_eps=0.5)
    refused(bench, exporting(bench, "--original", root), INPUT, "config.json is not the file that was converted")


# ---- the output


def test_an_output_that_exists_is_refused_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.out.mkdir()
    refused(bench, exporting(bench), INPUT, "exists already")


def test_an_output_inside_the_checkpoint_is_refused(bench: Bench) -> None:
    root = copied(bench)
    refused(bench, ["export", "peft", root, root / "out"], INPUT, "lies inside")


def test_an_output_inside_the_original_is_refused(bench: Bench) -> None:
    source = Path(shutil.copytree(bench.place.source, bench.root / "source"))
    asked = ["export", "peft", bench.place.converted, source / "out", "--original", source]
    refused(bench, asked, INPUT, "lies inside the source")
    assert not (source / "out").exists()


def test_an_output_that_is_a_dangling_link_is_refused(bench: Bench) -> None:
    link = bench.root / "link"
    link.symlink_to(bench.root / "nowhere")
    refused(bench, ["export", "peft", bench.place.converted, link], INPUT, "exists already")
    assert link.is_symlink() and not (bench.root / "nowhere").exists()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_full_disk_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    create, created = stage._create, []

    def failing(path: Path):
        created.append(path)
        if len(created) == nth:
            create(path).close()
            raise OSError(errno.ENOSPC, "no luck", str(path))
        return create(path)

    monkeypatch.setattr(stage, "_create", failing)
    refused(bench, exporting(bench), INPUT, "filled up", "free some space")
    assert len(created) == nth


def test_without_hard_links_files_are_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(stage.os, "link", none)
    assert surgery_command(*exporting(bench)).code == 0
    assert (bench.out / "tokenizer.json").stat().st_nlink == 1
    assert (bench.out / "tokenizer.json").read_bytes() == (bench.place.converted / "tokenizer.json").read_bytes()


# ---- the engine


def test_an_unknown_engine_is_named_with_those_there_are(bench: Bench) -> None:
    names = [engine.name for engine in ENGINES]
    refused(bench, exporting(bench, engine="gguf"), INPUT, "'gguf'", *names)


def test_an_engine_that_is_not_installed_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peft, "absent", lambda self: "pip install peft")
    refused(
        bench, exporting(bench, "--text", bench.place.text), INPUT, "PEFT is not installed here", "pip install peft"
    )
    assert surgery_command(*exporting(bench)).code == 0  # nothing is measured without text


def test_a_python_that_is_named_has_to_have_the_engine(bench: Bench) -> None:
    for python, said in (("/nonexistent/python", "does not run"), ("/bin/ls", "has no vLLM")):
        refused(bench, exporting(bench, "--engine-python", python, engine="vllm"), INPUT, "to try the export", said)


def test_what_rounding_explains_is_less_than_what_slots_do() -> None:
    logs = torch.zeros(4)
    assert Expected(logs).rounding == Expected(logs, logs + 9).rounding == ROUNDED
    assert Expected(logs, logs + 0.3).rounding == pytest.approx(0.2)


def test_an_export_that_measures_otherwise_is_not_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peft, "log_probabilities", lambda *arguments: arguments[4][:, 1:] * 0.0 - 1.0)
    options = ("--original", bench.place.source, "--text", bench.place.text)
    ended = refused(bench, exporting(bench, *options), GATE, "log_probability", "was not written")
    assert ended.out.splitlines()[-1] == f"failed: {bench.out} was not written"


def test_an_adapter_of_another_function_is_never_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stage.Stage.add_tensors
    monkeypatch.setattr(
        stage.Stage, "add_tensors",
        lambda self, name, tensors, metadata: write(self, name, {k: -v for k, v in tensors.items()}, metadata),
    )  # fmt: skip
    refused(bench, exporting(bench), INPUT, "on random ids", "not the same function")


# ---- from Python


def test_export_as_a_function(place: Place, tmp_path: Path) -> None:
    before = sha256_of_files(place.converted)
    found = surgery.export("peft", place.converted, tmp_path / "adapter")
    hints = typing.get_type_hints(results.Export)
    assert found.keys() <= hints.keys() and results.Export.__required_keys__ <= found.keys()
    assert found["passed"] is None and "perplexity" not in found and found["gates"] == []
    assert {name: file["sha256"] for name, file in found["files"].items()} == sha256_of_files(tmp_path / "adapter")
    assert sha256_of_files(place.converted) == before
    with pytest.raises(TypeError, match=r"export\(\) has no option 'txt'; did you mean 'text'\?"):
        surgery.export("peft", place.converted, tmp_path / "other", txt="a")  # type: ignore[call-arg]


def test_quiet_shows_the_last_line_alone(bench: Bench) -> None:
    ended = surgery_command(*exporting(bench, "-q"))
    assert ended.out.startswith(f"wrote {bench.out} for peft: 6 files, ") and len(ended.out.splitlines()) == 1
    assert ended.out.rstrip().endswith("not measured on text") and ended.err == ""
