"""`surgery verify` names what was changed in a converted checkpoint, also where the manifest was changed with it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_checkpoint import (
    BOS,
    MEASURED,
    Ended,
    Place,
    edit_json,
    rehash,
    save_model,
    save_tokenizer,
    sha256_of_files,
    surgery_command,
)
from safetensors.numpy import load_file, save_file

from surgery.checkpoint.layout import INDEX, SINGLE, read_layout
from surgery.checkpoint.manifest import Manifest, build_manifest
from surgery.checkpoint.source import Source
from surgery.checkpoint.writing import index_json
from surgery.verification.against import same_source

DAMAGED = 3
KEPT, SLOTS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SLOT = "model.layers.1.self_attn.attention_bias.key"
TENSOR = "model.layers.0.mlp.up_proj.weight"
CODE = "modeling_eab_llama.py"

Tamper = Callable[[Path], None]


@pytest.fixture
def copy(place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.converted, tmp_path / "converted"))


def flip(root: Path, tensor: str, shift: int = 0) -> None:
    """Change one bit of a tensor, in place."""
    info = read_layout(root).tensors[tensor]
    with (root / info.shard).open("r+b") as file:
        file.seek(info.start + shift)
        byte = file.read(1)[0]
        file.seek(info.start + shift)
        file.write(bytes([byte ^ 1]))


def change_tensor(root: Path, shard: str, tensor: str, change: Callable[[np.ndarray], object]) -> None:
    tensors = load_file(root / shard)
    change(tensors[tensor])
    save_file(tensors, root / shard, {"format": "pt"})


def zero(root: Path) -> None:
    change_tensor(root, SLOTS, SLOT, lambda values: values.fill(0))


def put_nan(root: Path) -> None:
    change_tensor(root, SLOTS, SLOT, lambda values: values.put(5, np.nan))


def lose_slot(root: Path) -> None:
    """Take a slot out of shard, index and manifest, as if it had never been."""
    tensors = load_file(root / SLOTS)
    del tensors[SLOT]
    save_file(tensors, root / SLOTS, {"format": "pt"})
    index = json.loads((root / INDEX).read_text())
    del index["weight_map"][SLOT]
    (root / INDEX).write_text(json.dumps(index))
    manifest = json.loads((root / "surgery.json").read_text())
    del manifest["tensors"][SLOT]
    (root / "surgery.json").write_text(json.dumps(manifest))


def duplicate(root: Path) -> None:
    tensors = load_file(root / SLOTS)
    tensors[TENSOR] = load_file(root / KEPT)[TENSOR] + 1
    save_file(tensors, root / SLOTS, {"format": "pt"})


def add_bos_again(root: Path) -> None:
    tokenizer = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
    }  # fmt: skip
    (root / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def hide_bos(root: Path) -> None:
    """BOS is put before a text, and the settings no longer say that it is one."""
    add_bos_again(root)
    edit_json(root / "tokenizer_config.json", bos_token=None)


def forget_slots(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    edit_json(root / "config.json", eab={**config["eab"], "n_slots": 1, "prefix_ids": config["eab"]["prefix_ids"][:1]})


def describe(**changes: object) -> Tamper:
    """Other entries of `eab` in config.json."""

    def tamper(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        edit_json(root / "config.json", eab={**config["eab"], **changes})

    return tamper


def rename_site(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    sites = {name.replace("layers.1", "layers.2"): dims for name, dims in config["eab"]["sites"].items()}
    edit_json(root / "config.json", eab={**config["eab"], "sites": sites})


def lose_tensor(root: Path) -> None:
    """Take a tensor of the source out of shard, index and manifest."""
    tensors = load_file(root / KEPT)
    del tensors[TENSOR]
    save_file(tensors, root / KEPT, {"format": "pt"})
    found = {}
    for shard in (KEPT, SLOTS):  # the index of what is left
        (root / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(root / shard), shard)}))
        found |= read_layout(root).tensors
    (root / INDEX).write_text(json.dumps(index_json(found)))
    manifest = json.loads((root / "surgery.json").read_text())
    del manifest["tensors"][TENSOR]
    (root / "surgery.json").write_text(json.dumps(manifest))


# ---- changes that the hashes show


def overwrite_end(path: Path) -> None:
    """Change the last byte, which means nothing: only a hash can tell."""
    path.write_bytes(path.read_bytes()[:-1] + b" ")


def replace(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def configured(**changes: object) -> Tamper:
    return lambda root: edit_json(root / "config.json", **changes)


def link_file(root: Path) -> None:
    shutil.move(root / SLOTS, root.parent / "slots")
    (root / SLOTS).symlink_to(root.parent / "slots")


PLAIN: dict[str, tuple[Tamper, str, str]] = {
    "a bit of a kept tensor": (lambda root: flip(root, TENSOR), "files", KEPT),
    "a bit of a slot": (lambda root: flip(root, SLOT), "files", SLOTS),
    "a byte of config.json": (lambda root: overwrite_end(root / "config.json"), "files", "config.json"),
    "config.json cut": (lambda root: os.truncate(root / "config.json", 100), "files", "config.json"),
    "a deleted file": (lambda root: (root / "generation_config.json").unlink(), "files", "generation_config.json"),
    "config.json deleted": (lambda root: (root / "config.json").unlink(), "files", "config.json"),
    "the slots deleted": (lambda root: (root / SLOTS).unlink(), "files", SLOTS),
    "generation settings beyond reason": (
        lambda root: os.truncate(root / "generation_config.json", 10**9),
        "code",
        "larger than any such file",
    ),
    "an added file": (lambda root: (root / "notes.json").write_text("{}"), "files", "notes.json"),
    "a file added below": (lambda root: save_model(root / "more"), "files", "more/config.json"),
    "a link in place of a file": (link_file, "files", SLOTS),
    "a link to a directory": (lambda root: (root / "more").symlink_to(root.parent), "files", "more"),
    "a pipe": (lambda root: os.mkfifo(root / "pipe"), "files", "pipe"),
    "a pipe for code": (lambda root: os.mkfifo(root / "more.py"), "files", "more.py"),
    "a device for a tokenizer": (lambda root: replace(root / "tokenizer.json", "/dev/zero"), "files", "tokenizer.json"),
    "a device for weights": (lambda root: replace(root / KEPT, "/dev/zero"), "files", KEPT),
    "a file cut short": (lambda root: os.truncate(root / SLOTS, 100), "files", SLOTS),
    "the tokenizer": (add_bos_again, "files", "tokenizer.json"),
    "the code": (lambda root: (root / CODE).write_text("# nothing\n"), "files", CODE),
    "a licence": (lambda root: (root / "LICENSE").write_text("Trust me.\n"), "files", "LICENSE"),
}

# ---- changes after which every hash in the manifest was computed anew

REHASHED: dict[str, tuple[Tamper, str, str]] = {
    "slots zeroed": (zero, "slots", SLOT),
    "NaN in a slot": (put_nan, "slots", SLOT),
    "a slot taken out": (lose_slot, "slots", "layers.1.self_attn.attention_bias.key"),
    "fewer slots in config.json": (forget_slots, "slots", "attention_bias"),
    "a bound on lengths in config.json": (describe(max_length=8), "config", "eab.max_length"),
    "a mask that is not the model's": (describe(whole_mask=None), "config", "eab.whole_mask"),
    "another trunk": (describe(trunk="LlamaForCausalLM"), "config", "eab.trunk"),
    "another format": (describe(format=2), "config", "eab.format"),
    "a site renamed": (rename_site, "config", "eab.sites"),
    "an adapter": (lambda root: (root / "adapter_config.json").write_text("{}"), "files", "adapter_config.json"),
    "no eab in config.json": (lambda root: edit_json(root / "config.json", eab=None), "config", "config.json"),
    "the original's model type": (
        lambda root: edit_json(root / "config.json", model_type="llama"), "config", "model_type 'llama'"
    ),
    "a model type that is no text": (
        lambda root: edit_json(root / "config.json", model_type=7), "config", "model_type 7"
    ),
    "a kernel of the hub": (configured(_attn_implementation="owner/repo"), "config", "_attn_implementation"),
    "a kernel by another key": (configured(attn_implementation="flash_attention_2"), "config", "attn_implementation"),
    "a kernel for experts": (configured(experts_implementation="a/b"), "config", "experts_implementation"),
    "a kernel for a part": (
        configured(text_config={"_attn_implementation": "a/b"}), "config", "text_config._attn_implementation"
    ),
    "code for a part": (configured(text_config={"auto_map": {"AutoModel": "a/b--c.D"}}), "config", "auto_map"),
    "other weights": (configured(transformers_weights="x.safetensors"), "config", "transformers_weights"),
    "a quantiser": (configured(quantization_config={"quant_method": "gptq"}), "config", "quantization_config"),
    "layers without end": (configured(num_hidden_layers=100_000), "config", "num_hidden_layers is 100,000"),
    "a layer more": (configured(num_hidden_layers=3), "config", "model.layers.2."),
    "a layer less": (configured(num_hidden_layers=1), "config", "model.layers.1."),
    "a larger vocabulary": (configured(vocab_size=30_000_000), "config", "(30000000, 32)"),
    "a number beyond floats": (configured(rope_theta=10**400), "config", "rope_theta"),
    "a tensor in two shards": (duplicate, "tensors", TENSOR),
    "BOS added again": (add_bos_again, "tokenizer", repr(BOS)),
    "BOS added again, in disguise": (hide_bos, "tokenizer", repr(BOS)),
    "a broken tokenizer": (lambda root: (root / "tokenizer.json").write_text("{}"), "tokenizer", "tokenizer"),
    "the code": (lambda root: (root / "eab_kernel.py").write_text("# nothing\n"), "code", "eab_kernel.py"),
    "code deleted": (lambda root: (root / "eab_kernel.py").unlink(), "code", "eab_kernel.py"),
    "code added": (lambda root: (root / "sitecustomize.py").write_text("pass\n"), "code", "sitecustomize.py"),
    "a class that leaves slots out": (configured(architectures=["LlamaForCausalLM"]), "code", "architectures"),
    "a prefix beyond the vocabulary": (
        lambda root: edit_json(root / "config.json", eab={**described(root), "prefix_ids": [0, 320]}),
        "config",
        "eab.prefix_ids",
    ),
    "code for images, behind what is deep": (
        lambda root: (root / "preprocessor_config.json").write_text(
            '{"auto_map": {"AutoImageProcessor": "a/b--t.T"}, "deep": ' + "[" * 982 + "]" * 982 + "}"
        ),
        "code",
        "preprocessor_config.json",
    ),
    "code for the tokenizer": (
        lambda root: edit_json(root / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--t.T", None]}),
        "code",
        "tokenizer_config.json",
    ),
}  # fmt: skip


def described(root: Path) -> dict:
    return json.loads((root / "config.json").read_text())["eab"]


def failed(ended: Ended, check: str, culprit: str) -> None:
    assert ended.code == DAMAGED, ended.out + ended.err
    assert ended.error.startswith(f"{check}: ") and culprit in ended.error
    assert "✗ failed" in ended.out and "Traceback" not in ended.err


@pytest.mark.parametrize("case", PLAIN)
def test_a_change_is_named(copy: Path, case: str) -> None:
    tamper, check, culprit = PLAIN[case]
    tamper(copy)
    failed(surgery_command("verify", copy), check, culprit)


@pytest.mark.parametrize("case", REHASHED)
def test_a_change_is_named_although_the_manifest_changed_too(copy: Path, case: str) -> None:
    tamper, check, culprit = REHASHED[case]
    tamper(copy)
    rehash(copy)
    failed(surgery_command("verify", copy), check, culprit)


def test_an_untouched_checkpoint_passes_offline_and_stays_so(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("verify went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = sha256_of_files(place.root)
    result = tmp_path / "v.json"
    measured = ("--text", place.text, *MEASURED)
    for options in ((), ("--against", place.source), measured, ("--against", place.source, *measured)):
        ended = surgery_command("verify", place.converted, *options, "--json", result)
        assert ended.code == 0, ended.err
        verdict = json.loads(result.read_text())
        assert verdict["passed"] is True
        names = {check["name"] for check in verdict["integrity"]["checks"]}
        assert {"files", "config", "tensors", "slots", "code", "tokenizer"} <= names
        assert ({"source", "kept tensors"} <= names) == ("--against" in options)
        gates = {gate["name"] for gate in verdict["gates"]}
        expected = {"massive_activations"} if "--text" in options else set()
        assert gates == expected | ({"equivalence", "perplexity"} if len(options) > 6 else set())
    assert sha256_of_files(place.root) == before


# ---- against the source


def test_a_changed_kept_tensor_is_found_against_the_source(place: Place, copy: Path) -> None:
    flip(copy, TENSOR, shift=40)
    rehash(copy)
    assert surgery_command("verify", copy).code == 0  # nothing in the directory itself can tell
    failed(surgery_command("verify", copy, "--against", place.source), "kept tensors", TENSOR)


@pytest.mark.parametrize("status", ["changed", "added"])
def test_a_changed_tensor_cannot_be_declared_away(place: Place, copy: Path, status: str) -> None:
    flip(copy, TENSOR)
    manifest = json.loads((copy / "surgery.json").read_text())
    manifest["tensors"][TENSOR]["status"] = status
    (copy / "surgery.json").write_text(json.dumps(manifest))
    rehash(copy)
    ended = surgery_command("verify", copy, "--against", place.source)
    failed(ended, "slots" if status == "added" else "kept tensors", TENSOR)


def test_a_tensor_of_the_source_that_is_gone_is_named(place: Place, copy: Path) -> None:
    lose_tensor(copy)
    rehash(copy)
    failed(surgery_command("verify", copy, "--against", place.source), "config", f"{TENSOR} is missing")


def test_without_the_source_a_missing_tensor_is_found_too(place: Place, copy: Path) -> None:
    lose_tensor(copy)
    rehash(copy)
    for verb in ("verify", "scan"):
        ended = surgery_command(verb, copy, "--text", place.text, *MEASURED)
        assert ended.code == DAMAGED and TENSOR in ended.error and "missing" in ended.error


def test_a_model_that_predicts_nothing_finite_does_not_pass(place: Place, copy: Path, tmp_path: Path) -> None:
    change_tensor(copy, KEPT, TENSOR, lambda values: values.put(5, np.nan))
    rehash(copy)
    ended = surgery_command("verify", copy, "--text", place.text, *MEASURED, "--json", tmp_path / "v.json")
    assert ended.code == 1 and "massive_activations" in ended.error and "nan" in ended.error
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is False


def test_what_was_kept_though_it_failed_is_said_to_have(copy: Path) -> None:
    assert "kept though" not in surgery_command("verify", copy).err
    manifest = json.loads((copy / "surgery.json").read_text())
    edit_json(copy / "surgery.json", verdict={**manifest["verdict"], "passed": False}, status="unverified")
    ended = surgery_command("verify", copy)
    assert ended.code == 0 and "kept though it failed" in ended.err


def test_another_source_is_refused(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(other, seed=1)
    save_tokenizer(other, place.text)
    failed(surgery_command("verify", place.converted, "--against", other), "source", SINGLE)
    # The same tensors in other files are not what was converted either.
    failed(surgery_command("verify", place.converted, "--against", place.sharded), "source", "model-00001-of-00004")


def test_a_tokenizer_that_cuts_otherwise_is_found(place: Place, copy: Path) -> None:
    """A tokenizer that cuts text otherwise than the source's is found."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rehash(copy)
    assert surgery_command("verify", copy).code == 0
    ended = surgery_command("verify", copy, "--against", place.source, "--text", place.text, *MEASURED)
    failed(ended, "tokenizer", "token ")


def test_a_gguf_is_known_by_its_content_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(b"GGUF")
    source = Source(str(path), "gguf", path, None, {}, None, ())
    digest = sha256_of_files(tmp_path)["renamed.gguf"]

    def recorded(hashes: dict) -> Manifest:
        parts = {"recipe": {}, "versions": {}, "tensors": {}, "files": {}, "verdict": None}
        return build_manifest(source={"sha256": hashes}, **parts)

    assert same_source(source, recorded({"model.gguf": digest}))[0]
    assert not same_source(source, recorded({"renamed.gguf": "0" * 64}))[0]
    assert not same_source(source, recorded({"renamed.gguf": []}))[0]


def test_a_manifest_whose_dtype_is_nonsense_opens_no_gguf(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "surgery.json", source={"sha256": {"a": []}, "dtype": []})
    (gguf := tmp_path / "model.gguf").write_bytes(b"GGUF")
    ended = surgery_command("verify", copy, "--against", gguf)
    assert ended.code == DAMAGED and "model.gguf" in ended.error and "Traceback" not in ended.err


# ---- published, and fetched again


def in_hub_cache(root: Path, cache: Path) -> Path:
    """The snapshot of `root` as the hub's client keeps it: links to files that are named by their content."""
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, digest in sha256_of_files(root).items():
        shutil.copyfile(root / name, blobs / digest)
        (snapshot / name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def test_a_snapshot_in_the_hub_cache_verifies(place: Place, tmp_path: Path) -> None:
    snapshot = in_hub_cache(place.converted, tmp_path / "models--owner--name")
    (snapshot / ".gitattributes").symlink_to(snapshot / "config.json")
    ended = surgery_command("verify", snapshot, "--against", place.source, "--text", place.text, *MEASURED)
    assert ended.code == 0, ended.err
    flip(snapshot, SLOT)
    failed(surgery_command("verify", snapshot), "files", SLOTS)


@pytest.mark.parametrize("target", ["elsewhere", "blobs/../elsewhere", "blobs/below/elsewhere"])
def test_a_link_out_of_the_hub_cache_is_refused(place: Place, tmp_path: Path, target: str) -> None:
    snapshot = in_hub_cache(place.converted, tmp_path)
    (tmp_path / "blobs" / "below").mkdir()
    shutil.copyfile(snapshot / SLOTS, tmp_path / target)
    (snapshot / SLOTS).unlink()
    (snapshot / SLOTS).symlink_to(tmp_path / target)
    failed(surgery_command("verify", snapshot), "files", SLOTS)


def test_files_of_git_and_the_hub_are_not_of_the_checkpoint(copy: Path) -> None:
    """What git and the hub leave in the folder is no part of the checkpoint."""
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for name in (".git/HEAD", ".cache/huggingface/download/config.json.metadata"):
        (copy / name).parent.mkdir(parents=True)
        (copy / name).write_text("x")
    assert surgery_command("verify", copy).code == 0
    (copy / "more").mkdir()
    (copy / "more" / ".gitattributes").write_text("x")
    failed(surgery_command("verify", copy), "files", "more/.gitattributes")


# ---- the manifest itself


@pytest.mark.parametrize("name", ["../recipe.yaml", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_names_files_elsewhere_is_refused_unread(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "surgery.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (copy / "surgery.json").write_text(json.dumps(manifest))
    failed(surgery_command("verify", copy), "manifest", f'"{name}"')


WRONG = [{"tensors": None}, {"files": []}, {"format": 2}, {"source": None}, {"status": "perfect"}, {"verdict": 7}]


@pytest.mark.parametrize("changes", WRONG)
def test_a_manifest_of_another_shape_is_refused(copy: Path, changes: dict) -> None:
    edit_json(copy / "surgery.json", **changes)
    failed(surgery_command("verify", copy), "manifest", "surgery.json")


def test_a_manifest_whose_source_is_nonsense_matches_nothing(place: Place, copy: Path) -> None:
    edit_json(copy / "surgery.json", source={"sha256": ["x"], "dtype": 4})
    failed(surgery_command("verify", copy, "--against", place.source), "source", "config.json")


# ---- code from strangers


def plant(path: Path, marker: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"open({str(marker)!r}, 'w').close()\n" + text, encoding="utf-8")


@pytest.mark.parametrize("name", [CODE, "eab_runtime.py", "extra.py"])
def test_code_that_is_not_ours_is_refused_and_never_run(place: Place, copy: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "it ran"
    plant(copy / name, marker)
    rehash(copy)
    measured = ("--text", place.text, *MEASURED)
    failed(surgery_command("verify", copy, "--against", place.source, *measured), "code", name)
    assert surgery_command("scan", copy, *measured).code == 0  # by the installed runtime
    assert not marker.exists()


def test_code_elsewhere_that_config_json_names_is_never_run(place: Place, copy: Path, tmp_path: Path) -> None:
    marker, evil = tmp_path / "it ran", tmp_path / "evil"
    evil.mkdir()
    plant(evil / CODE, marker)
    auto_map = json.loads((copy / "config.json").read_text())["auto_map"]
    edit_json(copy / "config.json", auto_map={key: f"{evil}--{value}" for key, value in auto_map.items()})
    rehash(copy)
    failed(surgery_command("verify", copy, "--text", place.text, *MEASURED), "code", "auto_map")
    assert not marker.exists()


# ---- for CI servers


def test_junit_counts_what_failed(place: Place, copy: Path, tmp_path: Path) -> None:
    xml = tmp_path / "j.xml"
    assert surgery_command("verify", copy, "--text", place.text, *MEASURED, "--junit", xml).code == 0
    suite = ElementTree.parse(xml).getroot()
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert suite.get("tests") == str(len(cases)) and suite.get("failures") == "0"
    assert {"gate.massive_activations", "integrity.files", "integrity.slots"} <= set(cases)

    zero(copy)
    assert surgery_command("verify", copy, "--junit", xml).code == DAMAGED
    suite = ElementTree.parse(xml).getroot()
    messages = {
        case.get("name"): case.find("failure").get("message")
        for case in suite.iter("testcase")
        if case.find("failure") is not None
    }
    assert set(messages) == {"integrity.files", "integrity.slots"} and suite.get("failures") == "2"
    assert SLOTS in messages["integrity.files"] and SLOT in messages["integrity.slots"]


def test_json_and_junit_are_written_for_an_unreadable_manifest(copy: Path, tmp_path: Path) -> None:
    (copy / "surgery.json").write_text("{")
    result, xml = tmp_path / "v.json", tmp_path / "j.xml"
    assert surgery_command("verify", copy, "--json", result, "--junit", xml).code == DAMAGED
    assert json.loads(result.read_text())["passed"] is False
    assert ElementTree.parse(xml).getroot().get("failures") == "1"
