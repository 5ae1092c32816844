"""Bad input, through the command line: exit code, one sentence that names the culprit, nothing written or touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.bench import AUTO, DAMAGED, IDS, INPUT, Bench, refused
from helpers.tiny_checkpoint import (
    MEASURED,
    RECIPE,
    Ended,
    edit_json,
    rehash,
    save_model,
    surgery_command,
)
from safetensors.numpy import load_file, save_file

import surgery
from surgery.checkpoint.layout import INDEX, SINGLE
from surgery.errors import SurgeryError

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345678\n"


# ---- sources


def edited(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Bench], list]:
    """`run` on a source one of whose files was changed."""

    def build(bench: Bench) -> list:
        path = bench.source() / name
        path.write_bytes(edit(path.read_bytes()))
        return bench.run(path.parent)

    return build


def configured(**changes: object) -> Callable[[Bench], list]:
    return lambda bench: bench.run(bench.configured(**changes))


def indexed(edit: Callable[[dict, Path], None]) -> Callable[[Bench], list]:
    """`run` on a sharded source whose index was changed."""

    def build(bench: Bench) -> list:
        root = bench.source("sharded")
        index = json.loads((root / INDEX).read_text())
        edit(index["weight_map"], root)
        (root / INDEX).write_text(json.dumps(index))
        return bench.run(root)

    return build


def without(*names: str) -> Callable[[Bench], list]:
    def build(bench: Bench) -> list:
        root = bench.source()
        for name in names:
            (root / name).unlink()
        return bench.run(root)

    return build


def pickled(bench: Bench) -> list:
    root = bench.source()
    (root / SINGLE).unlink()
    (root / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return bench.run(root)


def linked(bench: Bench) -> list:
    root = bench.source()
    (root / "LICENSE").symlink_to(bench.file("id_rsa", "private"))
    return bench.run(root)


def piped(bench: Bench) -> list:
    os.mkfifo((root := bench.source()) / "NOTICE")
    return bench.run(root)


def pipe(bench: Bench) -> Path:
    os.mkfifo(bench.root / "pipe")
    return bench.root / "pipe"


def with_nan(bench: Bench) -> list:
    return bench.run(nan_in(bench, "model.layers.1.mlp.up_proj.weight"))


def nan_in(bench: Bench, name: str) -> Path:
    root = bench.source()
    tensors = load_file(root / SINGLE)
    tensors[name].flat[3] = np.nan
    save_file(tensors, root / SINGLE, {"format": "pt"})
    return root


def leave_directory(weight_map: dict, root: Path) -> None:
    shutil.copy(root / weight_map["model.norm.weight"], root.parent / "x.safetensors")
    weight_map["model.norm.weight"] = "../x.safetensors"


def put_twice(weight_map: dict, root: Path) -> None:
    first, second = sorted(set(weight_map.values()))[:2]
    shutil.copy(root / first, root / second)


def misplace(weight_map: dict, root: Path) -> None:
    weight_map["model.norm.weight"] = weight_map["lm_head.weight"] = "model-00009-of-00009.safetensors"


def stale_single(weight_map: dict, root: Path) -> None:
    save_model(root / "again")
    shutil.move(root / "again" / SINGLE, root / SINGLE)
    shutil.rmtree(root / "again")


def tokenizing(**changes: object) -> Callable[[Bench], list]:
    """`run` on a source with other settings of its tokenizer."""

    def build(bench: Bench) -> list:
        root = bench.source()
        edit_json(root / "tokenizer_config.json", **changes)
        return bench.run(root)

    return build


def settings(text: str) -> Callable[[Bench], list]:
    return edited("generation_config.json", lambda raw: text.encode())


def misnamed(bench: Bench) -> list:
    root = bench.source()
    (root / "tokenizer.json").rename(root / "tokenizer\udcff.json")
    return bench.run(root)


def larger_tokenizer(bench: Bench) -> list:
    root = bench.source()
    edit_json(root / "config.json", vocab_size=100, eos_token_id=2)
    tensors = load_file(root / SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].copy()
    save_file(tensors, root / SINGLE, {"format": "pt"})
    return bench.run(root, IDS)


def with_adapter(bench: Bench) -> Path:
    root = bench.source()
    (root / "adapter_config.json").write_text("{}")
    return root


def as_gguf(content: bytes) -> Callable[[Bench], list]:
    return lambda bench: bench.run(bench.file("model.gguf", content))


SOURCES = {
    "truncated shard": (edited(SINGLE, lambda raw: raw[:-100]), DAMAGED, SINGLE, "truncated"),
    "trailing bytes": (edited(SINGLE, lambda raw: raw + b"\0"), DAMAGED, SINGLE, "trailing bytes"),
    "Git-LFS pointer": (edited(SINGLE, lambda raw: LFS_POINTER.encode()), DAMAGED, SINGLE, "git lfs pull"),
    "empty shard": (edited(SINGLE, lambda raw: b""), DAMAGED, SINGLE),
    "a config of more layers": (configured(num_hidden_layers=100_000), DAMAGED, "num_hidden_layers", "of 2"),
    "a config of a larger model": (configured(vocab_size=30_000_000), DAMAGED, "lm_head.weight", "(320, 32)"),
    "an empty quantization_config": (configured(quantization_config={}), INPUT, "quantization_config"),
    "a link that leaves": (linked, INPUT, "LICENSE is a link to", "id_rsa"),
    "a pipe in the source": (piped, INPUT, "NOTICE is a pipe"),
    "pickle weights": (pickled, INPUT, "pytorch_model.bin", "save_pretrained"),
    "no weights": (without(SINGLE), INPUT, SINGLE),
    "index names ../x": (indexed(leave_directory), DAMAGED, "../x.safetensors", INDEX),
    "index names a missing shard": (indexed(misplace), DAMAGED, "model-00009-of-00009.safetensors", "missing"),
    "a tensor in two shards": (indexed(put_twice), DAMAGED, "is in two shards"),
    "a stale single file beside an index": (indexed(stale_single), DAMAGED, SINGLE, INDEX),
    "NaN among the weights": (with_nan, DAMAGED, "model.layers.1.mlp.up_proj.weight", "NaN"),
    "a config that makes keys NaN": (
        configured(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        DAMAGED,
        "layers.0.self_attn",
        "NaN",
    ),
    "config.json missing": (without("config.json"), INPUT, "config.json"),
    "config.json not JSON": (edited("config.json", lambda raw: raw[:-4]), DAMAGED, "config.json"),
    "config.json a list": (edited("config.json", lambda raw: b"[]"), DAMAGED, "config.json"),
    "no model_type": (configured(model_type=None), INPUT, "model_type"),
    "unknown architecture": (configured(model_type="llamma"), INPUT, "llamma"),
    "encoder-decoder": (configured(model_type="t5"), INPUT, "t5"),
    "bidirectional": (configured(model_type="bert"), INPUT, "not for an encoder"),
    "off the seam": (configured(model_type="cpmant"), INPUT, "cpmant", "AttentionInterface"),
    "config value of the wrong type": (configured(hidden_size="many"), INPUT, "config.json", "hidden_size"),
    "no attention heads": (configured(num_attention_heads=0), INPUT, "config.json"),
    "no room for slots": (configured(max_position_embeddings=3), INPUT, "max_position_embeddings"),
    "quantized source": (configured(quantization_config={"quant_method": "gptq"}), INPUT, "gptq"),
    "tensor shapes other than the config's": (configured(intermediate_size=64), DAMAGED, "down_proj", "(32, 64)"),
    "tensors missing": (configured(num_hidden_layers=3), DAMAGED, "model.layers.2", "missing"),
    "tensors left over": (configured(num_hidden_layers=1), DAMAGED, "model.layers.1", "has no place"),
    "an adapter beside the weights": (
        lambda bench: bench.run(with_adapter(bench)),
        INPUT,
        "adapter_config.json",
        "merge",
    ),
    "already converted": (lambda bench: bench.run(bench.place.converted), INPUT, "already converted"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), INPUT, "no tokenizer", "--no-verify"),
    "broken tokenizer": (edited("tokenizer.json", lambda raw: b"{}"), INPUT, "no tokenizer", "--no-verify"),
    "tokenizer with a limit that is no number": (tokenizing(model_max_length="x"), INPUT, "no tokenizer that loads"),
    "chat template that divides by zero": (tokenizing(chat_template="{{ 1/0 }}"), INPUT, "template", "division by"),
    "chat template that takes all memory": (tokenizing(chat_template="{{ 'a' * 10**10 }}"), INPUT, "1 GiB of memory"),
    "chat template that is a number": (tokenizing(chat_template=5), INPUT, "template is no text but int"),
    "generation settings that are a list": (settings("[]"), DAMAGED, "generation_config.json", "object"),
    "generation settings that no model takes": (settings('{"early_stopping": 7}'), INPUT, "early_stopping", "remove"),
    "a token that is a word in the settings": (settings('{"eos_token_id": [1, "x"]}'), INPUT, "eos_token_id", "mend"),
    "a name that is not UTF-8": (misnamed, INPUT, "tokenizer\\udcff.json", "rename"),
    "tokenizer of another model": (larger_tokenizer, INPUT, "vocabulary has 100"),
    "no such path": (lambda bench: bench.run(bench.root / "nowhere"), INPUT, "nowhere"),
    "a file that is no GGUF": (lambda bench: bench.run(bench.place.text), INPUT, "evaluation.txt"),
    "hub id while offline": (lambda bench: bench.run("owner/name"), INPUT, "owner/name", "HF_HUB_OFFLINE"),
    "GGUF missing": (lambda bench: bench.run(bench.root / "model.gguf"), INPUT, "model.gguf"),
    "GGUF that is none": (as_gguf(b"safetensors" * 9), DAMAGED, "model.gguf", "not a GGUF"),
    "GGUF truncated": (as_gguf(b"GGUF\3\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2 + b"\x09\0"), DAMAGED, "model.gguf"),
    "GGUF with a wild count": (as_gguf(b"GGUF\3\0\0\0" + b"\xff" * 40), DAMAGED, "model.gguf"),
    "--dtype on a directory": (lambda bench: bench.run(None, RECIPE, "--dtype", "float16"), INPUT, "float16", ".gguf"),
    "--revision on a directory": (lambda bench: bench.run(None, RECIPE, "--revision", "main"), INPUT, "hub id"),
    "--device unknown": (lambda bench: bench.run(None, RECIPE, "--device", "abacus"), INPUT, "--device abacus"),
    "--device that computes nothing": (lambda bench: bench.run(None, RECIPE, "--device", "meta"), INPUT, "meta"),
}


# ---- recipes


def recipe(text: str, *words: str) -> tuple:
    return (lambda bench: bench.run(None, text), INPUT, "recipe.yaml", *words)


def prefix(tokens: str, *words: str) -> tuple:
    return (lambda bench: bench.run(None, RECIPE.replace('["<s>", "\\n"]', tokens)), INPUT, *words)


RECIPES = {
    "unknown key": recipe(RECIPE.replace("prefix:", "prefixx:"), "line 4", "prefixx", "did you mean 'prefix'"),
    "unknown operation": recipe(RECIPE.replace("attention_bias", "attention_bais"), "line 3", "attention_bais"),
    "duplicate key": recipe(RECIPE + "verify: {}\n", "verify", "twice"),
    "wrong type": recipe(RECIPE.replace('["<s>", "\\n"]', "7"), "line 4", "prefix is 7"),
    "max_slots 0": recipe(AUTO.replace("auto", "auto\n      max_slots: 0"), "line 5", "max_slots is 0"),
    "gate that is not a number": recipe(RECIPE.replace("2.0", "twice"), "line 7", "max_ratio", "not a number"),
    "gate that is NaN": recipe(RECIPE.replace("2.0", ".nan"), "line 7", "max_ratio"),
    "another format": recipe(RECIPE.replace("surgery: 1", "surgery: 2"), "line 1", "surgery"),
    "not YAML": recipe(RECIPE + "verify: [", "not valid YAML"),
    "empty recipe": recipe("", "empty"),
    "recipe not UTF-8": (
        lambda bench: bench.run(None, bench.file("latin.yaml", b"surgery: 1\n# \xe9\n")), INPUT, "latin.yaml", "UTF-8"
    ),
    "recipe missing": (lambda bench: bench.run(None, bench.root / "no.yaml"), INPUT, "no.yaml"),
    "recipe a directory": (lambda bench: bench.run(None, bench.root), INPUT, "directory"),
    "text that is not one token": prefix('["bridge river"]', "attention_bias.prefix", "'bridge river'"),
    "token id beyond the vocabulary": prefix("[320]", "attention_bias.prefix", "320"),
    "no text to search the prefix on": (
        lambda bench: bench.run(None, AUTO, "--no-verify", text=False), INPUT, "prefix: auto", "--calibration"
    ),
}  # fmt: skip


# ---- texts and outputs


def existing(bench: Bench) -> list:
    bench.out.mkdir()
    return bench.run()


def inside_source(bench: Bench) -> list:
    root = bench.source()
    return ["run", bench.place.recipe, root, root / "out", "--text", bench.place.text, *MEASURED]


def with_option(option: str, where: Callable[[Bench], Path]) -> Callable[[Bench], list]:
    return lambda bench: bench.run(None, RECIPE, option, where(bench))


TEXTS = {
    "neither --text nor --no-verify": (lambda bench: bench.run(text=False), INPUT, "--text", "--no-verify"),
    "empty text": (lambda bench: bench.run(text=bench.file("t.txt", " \n\n")), INPUT, "t.txt"),
    "too short text": (lambda bench: bench.run(text=bench.file("t.txt", "A bridge. " * 9)), INPUT, "--chunks"),
    "text not UTF-8": (lambda bench: bench.run(text=bench.file("t.txt", b"caf\xe9 " * 999)), INPUT, "t.txt", "UTF-8"),
    "text missing": (lambda bench: bench.run(text=bench.root / "t.txt"), INPUT, "t.txt"),
    "text a directory": (lambda bench: bench.run(text=bench.root), INPUT, "directory"),
    "too short calibration text": (
        lambda bench: bench.run(None, AUTO, "--calibration", bench.file("c.txt", "A bridge.")), INPUT, "calibration"
    ),
    "scan without text": (lambda bench: ["scan", bench.place.source], INPUT, "--text"),
    "scan of a pipe": (lambda bench: ["scan", bench.place.source, "--text", pipe(bench)], INPUT, "not a regular file"),
    "scan of a device": (lambda bench: ["scan", bench.place.source, "--text", "/dev/zero"], INPUT, "/dev/zero"),
    "a recipe that is a pipe": (lambda bench: bench.run(recipe=pipe(bench)), INPUT, "not a regular file"),
    "a GGUF that is a pipe": (lambda bench: bench.run(pipe(bench).rename(bench.root / "x.gguf")), INPUT, "x.gguf"),
    "scan of too short a text": (
        lambda bench: ["scan", bench.place.source, "--text", bench.file("t.txt", "A bridge.")], INPUT, "--chunk-length"
    ),
    "scan of weights that are NaN": (
        lambda bench: ["scan", nan_in(bench, "model.layers.0.mlp.up_proj.weight"), "--text", bench.place.text],
        DAMAGED, "layer 1", "not finite",
    ),
    "scan of an output layer that is NaN": (
        lambda bench: ["scan", nan_in(bench, "lm_head.weight"), "--text", bench.place.text, *MEASURED],
        DAMAGED, "predicts", "not finite",
    ),
    "scan with --dtype of a converted checkpoint": (
        lambda bench: ["scan", bench.place.converted, "--text", bench.place.text, "--dtype", "float16"], INPUT, "dtype"
    ),
}  # fmt: skip

OUTPUTS = {
    "existing OUT": (existing, INPUT, "out exists already"),
    "OUT inside the source": (inside_source, INPUT, "inside the source"),
    "OUT in no directory": (
        lambda bench: ["plan", bench.place.recipe, bench.place.source, "--out", bench.root / "a" / "b"], INPUT, "create"
    ),
    "existing --keep-failed": (with_option("--keep-failed", lambda bench: bench.root), INPUT, "exists already"),
    "--keep-failed at OUT": (with_option("--keep-failed", lambda bench: bench.out), INPUT, "--keep-failed"),
    "--keep-failed inside the source": (
        with_option("--keep-failed", lambda bench: bench.place.source / "failed"), INPUT, "inside the source"
    ),
    "--json is a directory": (with_option("--json", lambda bench: bench.root), INPUT, "--json"),
    "--json in no directory": (with_option("--json", lambda bench: bench.root / "a" / "b"), INPUT, "--json"),
    "--json inside the source": (with_option("--json", lambda bench: bench.place.source / "v"), INPUT, "--json"),
    "--json inside OUT": (with_option("--json", lambda bench: bench.out / "v.json"), INPUT, "--json"),
    "--json is a pipe": (with_option("--json", pipe), INPUT, "pipe", "--json"),
    "--json is a device": (with_option("--json", lambda bench: Path("/dev/zero")), INPUT, "device", "--json"),
    "--report is a pipe": (with_option("--report", pipe), INPUT, "pipe", "--report"),
    "--json over the recipe": (with_option("--json", lambda bench: bench.root / "recipe.yaml"), INPUT, "--json"),
    "--json over the text": (with_option("--json", lambda bench: bench.place.text), INPUT, "--json"),
    "--report over the text": (with_option("--report", lambda bench: bench.place.text), INPUT, "--report"),
    "--report inside OUT": (with_option("--report", lambda bench: bench.out / "r.html"), INPUT, "--report"),
    "--report without text": (
        lambda bench: [*bench.run(text=False), "--no-verify", "--report", bench.root / "r.html"], INPUT, "--no-verify"
    ),
    "--plots is a file": (
        lambda bench: [
            "scan", bench.place.source, "--text", bench.place.text, "--plots", bench.file("plots", "a file"),
        ], INPUT, "--plots"
    ),
    "--plots inside a source": (
        lambda bench: [
            "scan", bench.place.converted, "--text", bench.place.text, "--plots", bench.place.converted / "figures",
        ], INPUT, "--plots"
    ),
    "--plots in no directory": (
        lambda bench: [
            "scan", bench.place.source, "--text", bench.place.text, "--plots", bench.root / "a" / "b",
        ], INPUT, "--plots"
    ),
    "--json on a system file": (with_option("--json", lambda bench: Path("/proc/v.json")), INPUT, "--json"),
    "--junit inside the checkpoint": (
        lambda bench: ["verify", bench.place.converted, "--junit", bench.place.converted / "j.xml"], INPUT, "--junit"
    ),
}  # fmt: skip


# ---- verify


def without_manifest(bench: Bench) -> list:
    root = bench.source("converted")
    (root / "surgery.json").unlink()
    return ["verify", root]


def with_recipe(bench: Bench) -> list:
    root = bench.source("converted")
    edit_json(root / "surgery.json", recipe={"surgery": 1})
    return ["verify", root, "--text", bench.place.text, *MEASURED]


def converted_without_tokenizer(bench: Bench) -> list:
    root = bench.source("converted")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / name).unlink()
    rehash(root)
    return ["verify", root, "--text", bench.place.text]


VERIFY = {
    "verify of what was never converted": (lambda bench: ["verify", bench.place.source], INPUT, "not a converted"),
    "verify of no directory": (lambda bench: ["verify", bench.place.text], INPUT, "not a directory"),
    "verify without surgery.json": (without_manifest, DAMAGED, "surgery.json", "missing"),
    "verify with a recipe that does not parse": (with_recipe, DAMAGED, "surgery.json", "operations"),
    "verify with text but no tokenizer": (converted_without_tokenizer, INPUT, "tokenizer"),
    "verify against nothing": (
        lambda bench: ["verify", bench.place.converted, "--against", bench.root / "x"], INPUT, "does not exist"
    ),
    "verify against the converted": (
        lambda bench: ["verify", bench.place.converted, "--against", bench.place.converted], INPUT, "already converted"
    ),
    "verify with --revision alone": (
        lambda bench: ["verify", bench.place.converted, "--revision", "main"], INPUT, "--against"
    ),
    "verify with --calibration alone": (
        lambda bench: ["verify", bench.place.converted, "--calibration", bench.place.text], INPUT, "--text"
    ),
    "verify with --tasks and no source": (
        lambda bench: ["verify", bench.place.converted, "--text", bench.place.text, "--tasks", bench.root],
        INPUT, "--tasks", "--against",
    ),
    "verify with --tasks and no text": (
        lambda bench: ["verify", bench.place.converted, "--against", bench.place.source, "--tasks", bench.root],
        INPUT, "--tasks", "--text",
    ),
    "--tasks without proof": (
        lambda bench: [*bench.run(text=False), "--no-verify", "--tasks", bench.root], INPUT, "--tasks", "--no-verify"
    ),
    "verify with too short a text": (
        lambda bench: ["verify", bench.place.converted, "--text", bench.file("t.txt", "A bridge.")], INPUT, "--chunks"
    ),
}  # fmt: skip

CASES = {**SOURCES, **RECIPES, **TEXTS, **OUTPUTS, **VERIFY}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_leaves_no_trace(bench: Bench, case: str) -> None:
    build, code, *words = CASES[case]
    refused(bench, build(bench), code, *words)


USAGES = [["run"], ["run", "a", "b", "c", "--chunks", "1"], ["fold"], ["scan", "x", "--all"]]


@pytest.mark.parametrize("arguments", USAGES)
def test_wrong_usage_exits_2_with_the_way_to_help(arguments: list[str]) -> None:
    ended = surgery_command(*arguments)
    assert ended.code == INPUT
    assert "Error: " in ended.err and "--help" in ended.err and "Traceback" not in ended.err


@pytest.mark.slow
def test_in_a_process_of_its_own_it_is_the_same(bench: Bench) -> None:
    """Once for real: what the shell sees."""
    broken = bench.source()
    (broken / SINGLE).write_bytes((broken / SINGLE).read_bytes()[:-1])
    command = [sys.executable, "-c", "from surgery.cli import main; main()", *map(str, bench.run(broken))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == DAMAGED
    assert Ended(ended.returncode, ended.stdout, ended.stderr).error.count(SINGLE) == 1
    assert not ended.stdout and not bench.out.exists()


def test_a_path_that_looks_like_markup_is_printed_as_it_is(bench: Bench) -> None:
    ended = refused(bench, bench.run(bench.root / "[red]x[/y]"), INPUT, "[red]x[/y]")
    assert ended.error.startswith(str(bench.root / "[red]x[/y]"))


def test_the_python_verbs_raise_what_the_command_prints(bench: Bench) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.plan(bench.place.recipe, str(bench.root / "nowhere"))
    assert caught.value.exit_code == INPUT and "nowhere" in str(caught.value)
