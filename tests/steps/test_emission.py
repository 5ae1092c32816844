"""What a run writes: exactly what its plan lists, the config's limits, the shards' names, the manifest."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.families import in_tiers
from helpers.tiny import TINY, tiny_config, tiny_model
from helpers.tiny_tokenizer import BOS_FIRST, ONCE, byte_level
from helpers.tiny_tokenizer import write as write_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from surgery.anatomy.parsed import parse_config
from surgery.anatomy.sites import examine
from surgery.checkpoint.layout import SINGLE, Layout
from surgery.checkpoint.manifest import MANIFEST, read_manifest
from surgery.checkpoint.writing import plan_file
from surgery.converted.derived import RUNTIME_FILES, derive
from surgery.converted.described import read_described
from surgery.converted.files import converted_config, lowered_limits, shard_names
from surgery.errors import OutputError, SourceError
from surgery.live.graft import eab_config
from surgery.steps.options import RunOptions
from surgery.steps.recipe import Recipe, parse_recipe
from surgery.verbs.plan import plan
from surgery.verbs.run import run

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def raw(model_type: str, **changes) -> dict:
    """A config.json as save_pretrained writes it."""
    return json.loads(tiny_config(model_type, **changes).to_json_string())


def recipe(*prefix: int) -> Recipe:
    return parse_recipe(f"surgery: 1\noperations:\n  - attention_bias: {{prefix: {list(prefix)}}}\n", "recipe")


# ---- config.json


def test_config_keeps_what_it_had_and_says_what_was_added():
    config = {**raw("llama"), "something_of_theirs": [1, {"a": 2}], "auto_map": {"AutoConfig": "theirs.Config"}}
    before = copy.deepcopy(config)
    anatomy, derived = examine(raw("llama")), derive("llama")
    eab = eab_config(anatomy, [1, 5, 7], "as_prefix")
    emitted = converted_config(config, derived, anatomy.model_class, {"eab": eab}, {"max_position_embeddings": 253})
    assert config == before
    assert emitted["rope_theta"] == config["rope_parameters"]["rope_theta"]  # the older spelling beside the newer
    ours = {"model_type", "architectures", "auto_map", "eab", "max_position_embeddings", "rope_theta"}
    assert {k: v for k, v in emitted.items() if k not in ours} == {k: v for k, v in config.items() if k not in ours}
    assert emitted["model_type"] == "eab_llama" and emitted["architectures"] == ["EabLlamaForCausalLM"]
    assert emitted["max_position_embeddings"] == 253
    assert emitted["auto_map"] == {
        "AutoConfig": "modeling_eab_llama.EabLlamaConfig",
        "AutoModel": "modeling_eab_llama.EabLlamaModel",
        **{
            f"AutoModel{head}": f"modeling_eab_llama.EabLlama{head}"
            for head in ("ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
        },
    }
    assert emitted["eab"] == {
        "format": 1, "n_slots": 3, "slots_visible": "as_prefix", "prefix_ids": [1, 5, 7],
        "trunk": "LlamaModel", "sites": {f"layers.{i}.self_attn": [2, 8, 8] for i in range(4)},
    }  # fmt: skip
    json.dumps(emitted)


@pytest.mark.parametrize(
    ("model_type", "changes", "lowered"),
    [
        ("llama", {}, True),
        ("llama", {"rope_parameters": LINEAR}, True),
        ("llama", {"rope_parameters": LLAMA3}, True),
        ("gpt_neox", {}, True),
        ("gemma3_text", {}, True),  # one rotary setting for each layer type
        ("llama", {"rope_parameters": YARN}, False),  # computes with the limit
        ("gpt_oss", {}, False),  # YaRN by default
        ("gpt2", {}, False),  # learned tables are as long as the limit says
        ("opt", {}, False),
    ],
)
def test_the_limit_is_lowered_where_it_is_only_a_limit(model_type, changes, lowered):
    config = raw(model_type, **changes)
    expected = {"max_position_embeddings": 253} if lowered else {}
    assert lowered_limits(config, examine(config), 3) == expected


def test_a_rotary_setting_that_is_taken_from_the_limit_keeps_it():
    """Llama 3's scaling without its original length takes the limit for it, so lowering one would change the other."""
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = {**raw("llama"), "rope_parameters": rope}
    assert parse_config(copy.deepcopy(config)).rope_parameters["original_max_position_embeddings"] == 256
    assert lowered_limits(config, examine(copy.deepcopy(config)), 3) == {}
    assert config["rope_parameters"] == rope


def test_no_limit_or_one_below_the_slots_is_left_alone():
    config = raw("llama")
    anatomy = examine(config)
    assert lowered_limits({**config, "max_position_embeddings": 3}, anatomy, 3) == {}
    assert lowered_limits({k: v for k, v in config.items() if k != "max_position_embeddings"}, anatomy, 3) == {}


@pytest.mark.parametrize("model_type", in_tiers(TINY))
def test_a_lowered_limit_changes_no_number_of_the_model(model_type):
    """Shapes of parameters and values of buffers (rotary frequencies) are those of the source's config."""
    config = raw(model_type)
    changed = {**config, **lowered_limits(config, examine(config), 3)}
    source, emitted = (AutoModelForCausalLM.from_config(parse_config(c)) for c in (config, changed))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (source, emitted)]
    assert shapes[0] == shapes[1]
    for (name, a), (other, b) in zip(source.named_buffers(), emitted.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b), name


ROPES = [LINEAR, LLAMA3, YARN, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}]


@pytest.mark.parametrize(
    ("model_type", "changes"), [*((kind, {}) for kind in TINY), *(("llama", {"rope_parameters": r}) for r in ROPES)]
)
def test_a_converted_config_tells_all_of_the_model_that_it_was(model_type, changes, tmp_path: Path):
    """Positions too, whether or not their limit was lowered."""
    config = raw(model_type, **changes)
    anatomy = examine(config)
    entries = {"eab": eab_config(anatomy, [1, 5, 7], "as_prefix")}
    lowered = lowered_limits(config, anatomy, 3)
    emitted = converted_config(config, derive(model_type), anatomy.model_class, entries, lowered)
    (tmp_path / "config.json").write_text(json.dumps(emitted))
    named = [(name, "F32", tuple(tensor.shape)) for name, tensor in anatomy.blank.state_dict().items()]
    header, infos = plan_file(SINGLE, named)
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(header)
        file.truncate(max(info.stop for info in infos.values()))
    assert read_described(tmp_path).anatomy == anatomy


# ---- shards


def layout(*shards: str) -> Layout:
    return Layout(Path("somewhere"), {}, shards, dict.fromkeys(shards, 0))


def test_a_lone_shard_is_renamed():
    """Under its old name loaders would take it for the whole model and ignore the index."""
    assert shard_names(layout("model.safetensors")) == (
        {"model.safetensors": "model-00001-of-00002.safetensors"},
        "model-00002-of-00002.safetensors",
    )


def test_several_shards_keep_their_names():
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    kept, slots = shard_names(layout(*names))
    assert kept == dict(zip(names, names, strict=True)) and slots not in names and slots.endswith(".safetensors")
    with pytest.raises(SourceError, match=slots):
        shard_names(layout(*names, slots))
    # A single shard under any other name is listed by an index already, and needs no new name.
    assert shard_names(layout("weights.safetensors"))[0] == {"weights.safetensors": "weights.safetensors"}


# ---- a whole run against its plan


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A sharded checkpoint with everything that goes along, and things that must not."""
    root = tmp_path_factory.mktemp("emission") / "source"
    tiny_model("mistral", torch.float32).save_pretrained(root, max_shard_size="60KB")
    write_tokenizer(root.with_name("tokenizer"), byte_level(BOS_FIRST), ONCE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root.with_name("tokenizer") / name).rename(root / name)
    (root / "chat_template.jinja").write_text(ONCE)
    (root / "LICENSE").write_text("free\n")
    (root / "README.md").write_text("theirs")
    (root / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "modeling_theirs.py").write_text("raise RuntimeError")
    return root


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_in(root: Path) -> dict[str, dict]:
    found = {}
    for shard in root.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                found[name] = {"shard": shard.name, "dtype": tensor.get_dtype(), "shape": tensor.get_shape()}
    return found


def emitted(source: Path, out: Path, prefix: tuple[int, ...], link: bool = False) -> dict:
    """Run, compare what was written with what the plan lists, and return the manifest."""
    before = {path.name: (digest(path), path.stat().st_mtime_ns) for path in source.iterdir()}
    planned = plan(recipe(*prefix), str(source), out=out, link=link)
    assert not out.exists()
    run(recipe(*prefix), str(source), out, RunOptions(verify=False, link=link))
    assert {path.name: (digest(path), path.stat().st_mtime_ns) for path in source.iterdir()} == before

    assert len({file.name for file in planned.files}) == len(planned.files)
    assert {file.name for file in planned.files} == {path.name for path in out.iterdir()}
    for file in planned.files:
        written = out / file.name
        if file.action in ("copy", "link"):
            assert written.read_bytes() == (source / file.source).read_bytes(), file
            assert written.samefile(source / file.source) == (file.action == "link"), file
        elif file.action == "change":
            assert written.read_bytes() != (source / file.source).read_bytes(), file
        else:
            assert file.action == "add" and file.source is None, file
        if file.action != "change" and file.bytes is not None:
            assert written.stat().st_size == file.bytes, file
    assert all(file.bytes is not None for file in planned.files if file.name.endswith((".safetensors", ".py")))

    manifest = read_manifest(out).to_dict()
    assert manifest["tensors"] == {name: entry for name, entry in planned.tensors.items()}
    found = tensors_in(out)
    assert found == {name: {k: v for k, v in e.items() if k != "status"} for name, e in manifest["tensors"].items()}
    assert set(found) - set(tensors_in(source)) == {n for n, e in manifest["tensors"].items() if e["status"] == "added"}
    written = {path.name: {"sha256": digest(path), "bytes": path.stat().st_size} for path in out.iterdir()}
    assert written.pop(MANIFEST) and manifest["files"] == written
    config, original = (json.loads((root / "config.json").read_text()) for root in (out, source))
    ours = {"model_type", "architectures", "auto_map", "eab", "rope_theta"}
    assert {k: v for k, v in config.items() if k not in ours} == {
        **{k: v for k, v in original.items() if k not in ours},
        **planned.lowered,
    }
    return manifest


@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
def test_a_run_writes_what_its_plan_lists(source, tmp_path, link):
    manifest = emitted(source, tmp_path / "out", (5, 7), link)
    names = set(manifest["files"])
    assert {"LICENSE", "generation_config.json", "tokenizer.json", "README.md", *RUNTIME_FILES} <= names
    assert not names & {"pytorch_model.bin", "modeling_theirs.py"}
    assert (tmp_path / "out" / "README.md").read_text() != "theirs"
    assert manifest["status"] == "unverified" and manifest["verdict"]["passed"] is None
    assert manifest["recipe"] == recipe(5, 7).to_dict()
    assert manifest["source"]["sha256"]["config.json"] == digest(source / "config.json")
    assert set(manifest["source"]["sha256"]) == {"config.json", *(p.name for p in source.glob("*.safetensors"))}


def test_a_run_that_folds_the_bos_writes_what_its_plan_lists(source, tmp_path):
    emitted(source, tmp_path / "out", (1, 7))


def test_a_lone_shard_without_tokenizer(tmp_path):
    tiny_model("gpt_neox", torch.float32).save_pretrained(tmp_path / "source")
    manifest = emitted(tmp_path / "source", tmp_path / "out", (5,))
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert not any(name.startswith("tokenizer") for name in manifest["files"])


def test_an_older_config_keeps_its_keys(tmp_path):
    """Before transformers 5, rotary settings were two keys; what reads the emitted config may know only those."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    emitted(tmp_path / "source", tmp_path / "out", (5,))


@pytest.mark.slow
def test_links_need_one_filesystem(source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(OutputError, match="hard link"):
        run(recipe(5), str(source), tmp_path / "out", RunOptions(verify=False, link=True))
    assert list(tmp_path.iterdir()) == []
