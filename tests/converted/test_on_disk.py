"""Converted checkpoints on disk: loaded by a process without surgery, they are the original behind the prefix.

One tiny model of each family is saved, converted and loaded again. The control is computed here, by plain transformers,
from the source directory with the prefix in front of the text. The other side is `fresh_process.py`, run once for all.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.families import PREFIX, behind
from helpers.fresh_process import ask, greedy, load
from helpers.tiny import TINY, one_thread, tiny_config, tiny_model, tiny_text
from helpers.tiny_tokenizer import BOS_FIRST, byte_level
from helpers.tiny_tokenizer import write as write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from surgery.converted.derived import RUNTIME_FILES
from surgery.steps.options import RunOptions
from surgery.steps.recipe import parse_recipe
from surgery.verbs.run import run

pytestmark = pytest.mark.slow

RECIPE = f"surgery: 1\noperations:\n  - attention_bias: {{prefix: {PREFIX}}}\n"
LENGTH = 80  # past every window (8), chunk (16) and Llama 4's first change of temperature (64)
PROMPT, NEW_TOKENS = 21, 12

# Slots are stored as float32, and folded by a model in float32: an error of 1e-7 in each, a few times that in the
# logits. The comparison is in float64 on both sides. A model without its prefix is off by 0.1 and more of the largest
# logit.
TOLERANCE = 1e-5

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"pad_token_id": None},
    "opt": {},
    "gpt_neox": {},
    "mixtral": {},
    "gpt_oss": {},
    "gemma2": {},
    "gemma3_text": {},
    # Its temperature counts padding, in the original too. A run compares padded rows, of up to 56 tokens: below 64.
    "llama4_text": {"floor_scale": 64},
}
SHARDED = {"mistral": "60KB", "mixtral": "60KB", "gpt_oss": "60KB"}
BFLOAT16 = {"qwen2"}
TIED = {"qwen2", "gpt2", "opt", "gemma2", "gemma3_text"}


@dataclass(frozen=True)
class Converted:
    """One family: the directories, the control and what the fresh process found."""

    source: Path
    out: Path
    control: torch.Tensor
    bare: torch.Tensor
    tokens: torch.Tensor
    steps: torch.Tensor
    found: dict


@torch.no_grad()
def control_of(source: Path, text: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits of the text behind the prefix and of the bare text; greedy tokens of the prompt, and their logits."""
    model, _ = load(source, trust_remote_code=False)
    logits = model(input_ids=behind(text), use_cache=False).logits[:, len(PREFIX) :]
    bare = model(input_ids=text, use_cache=False).logits
    return logits, bare, *greedy(model, behind(prompt), NEW_TOKENS)


def convert(root: Path, family: str) -> tuple[Path, Path]:
    source, out = root / family, root / f"{family}-out"
    dtype = torch.bfloat16 if family in BFLOAT16 else torch.float32
    model = tiny_model(family, dtype, config=tiny_config(family, **FAMILIES[family]))
    model.save_pretrained(source, max_shard_size=SHARDED.get(family, "1GB"))
    if family == "llama":
        write_tokenizer(root / "tokenizer", byte_level(BOS_FIRST))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (root / "tokenizer" / name).rename(source / name)
    verdict = run(parse_recipe(RECIPE, "recipe"), str(source), out, RunOptions(verify=False))
    assert verdict["passed"] is None, verdict["integrity"]
    return source, out


def damaged_copies(root: Path, out: Path) -> dict[str, Path]:
    """Copies of a checkpoint whose slot shard lost a tensor, the index knowing or not; and one whose slot is NaN."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    lost = next(name for name in index["weight_map"] if name.endswith("1.self_attn.attention_bias.value"))
    shard, copies = index["weight_map"][lost], {}
    for what in ("lost", "lost, index too", "NaN"):
        copies[what] = root / f"damaged {what}"
        copies[what].mkdir()
        tensors = load_file(out / shard)
        if what == "NaN":
            tensors[lost][0, 0, 0] = float("nan")
        else:
            del tensors[lost]
        for path in out.iterdir():
            if path.name != shard:
                os.link(path, copies[what] / path.name)
        save_file(tensors, copies[what] / shard, {"format": "pt"})
    listed = {name: at for name, at in index["weight_map"].items() if name != lost}
    (copies["lost, index too"] / "model.safetensors.index.json").unlink()
    (copies["lost, index too"] / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": listed}))
    return copies


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def everything(_one_thread, tmp_path_factory) -> tuple[dict[str, Converted], dict]:
    """All families converted, and the report of the process without surgery."""
    root = tmp_path_factory.mktemp("on-disk")
    text, prompt = tiny_text(2, LENGTH), tiny_text(2, PROMPT, seed=2)
    places = {family: convert(root, family) for family in FAMILIES}
    tasks = {
        "families": {
            family: {
                "path": str(out), "scratch": str(root / f"{family}-scratch"),
                "text": text, "prompt": prompt, "new_tokens": NEW_TOKENS,
            }
            for family, (_, out) in places.items()
        },
        "damaged": {name: str(path) for name, path in damaged_copies(root, places["llama"][1]).items()},
        "tokenizer": str(places["llama"][1]),
        "words": "a cab",
    }  # fmt: skip
    report = ask(root, tasks, timeout=600)
    families = {
        family: Converted(source, out, *control_of(source, text, prompt), report[family])
        for family, (source, out) in places.items()
    }
    return families, report


@pytest.fixture(params=FAMILIES)
def converted(everything, request) -> Converted:
    found = everything[0][request.param]
    if "failed" in found.found:
        pytest.fail(found.found["failed"], pytrace=False)
    return found


@pytest.fixture
def family(request) -> str:
    return request.node.callspec.params["converted"]


def distance(found: torch.Tensor, control: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    return ((found - control).abs().max() / control.abs().max()).item()


def header(shard: Path) -> tuple[dict, bytes]:
    """A safetensors file, read by hand: {tensor: (dtype, shape, offsets)} and the data."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__", None)
    return {name: (e["dtype"], e["shape"], e["data_offsets"]) for name, e in entries.items()}, raw[8 + length :]


def tensors_on_disk(root: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """{tensor: (shard, dtype, shape, bytes)} of every *.safetensors file; a name in two of them is an error."""
    found: dict = {}
    for shard in sorted(root.glob("*.safetensors")):
        entries, data = header(shard)
        for name, (dtype, shape, (start, stop)) in entries.items():
            assert name not in found, f"{name} is in {found[name][0]} and in {shard.name}"
            found[name] = (shard.name, dtype, shape, data[start:stop])
    return found


# ---- what the fresh process found


def test_logits_are_those_of_the_original_behind_the_prefix(converted):
    assert converted.found["logits"].dtype == torch.float64
    assert distance(converted.found["logits"], converted.control) < TOLERANCE
    assert distance(converted.bare, converted.control) > 0.1, "the prefix hardly matters here, so nothing was tested"


def test_greedy_tokens_are_the_same_with_either_cache(converted):
    for cache in ("dynamic", "static"):
        tokens, steps = converted.found[cache]
        assert torch.equal(tokens, converted.tokens), cache
        assert distance(steps, converted.steps) < TOLERANCE, cache


def test_every_tensor_finds_its_place(converted):
    assert converted.found["problems"] == {}
    assert converted.found["resaved problems"] == {}


def test_resaved_and_reloaded_is_equal(converted, family):
    """save_pretrained undoes the renames and fusions of loading, and carries the code."""
    assert torch.equal(converted.found["resaved logits"], converted.found["logits"])
    files = set(converted.found["resaved files"])
    assert {*RUNTIME_FILES, f"modeling_eab_{family}.py", "config.json"} <= files
    assert "ValueError" in converted.found["resaved without the flag"]


def test_without_the_flag_nothing_loads(converted):
    error = converted.found["without the flag"]
    assert error.startswith("ValueError") and "trust_remote_code" in error


def test_tied_embeddings_stay_tied(converted, family):
    assert converted.found["tied"] == (family in TIED)


def test_auto_model_loads_where_it_is_named(converted, family):
    named = json.loads((converted.out / "config.json").read_text())["auto_map"]
    assert ("AutoModel" in named) == ("trunk" in converted.found)
    assert "AutoModel" in named or family == "llama4_text"
    if "AutoModel" in named:
        found, states = converted.found["trunk"]
        assert set(found) <= {"unexpected_keys"}
        assert all(key.startswith(("lm_head", "embed_out")) for key in found.get("unexpected_keys", []))
        assert torch.equal(states, converted.found["inner trunk"])


def test_dtypes_on_load(converted, family):
    """The dtype on disk is what loading gives, and slots stay float32 in a half-precision model."""
    weights = "torch.bfloat16" if family in BFLOAT16 else "torch.float32"
    dtypes = converted.found["dtypes"]
    slots = {name: dtype for name, dtype in dtypes.items() if "attention_bias" in name}
    assert len(slots) == 8 and set(slots.values()) == {"torch.float32"}
    assert weights in dtypes.values() and len(dtypes) > len(slots)


def test_nothing_of_surgery_was_needed(everything):
    assert everything[1]["surgery"] == []


@pytest.mark.parametrize("what", ["lost", "lost, index too", "NaN"])
def test_a_lost_slot_raises(everything, what):
    error = everything[1]["damaged"][what]
    assert error is not None and "attention_bias.value" in error


def test_offloaded_to_disk(everything):
    families, report = everything
    assert {"cpu", "disk"} <= set(report["offloaded"]["map"].values())
    assert distance(report["offloaded"]["logits"], families["llama"].control) < 1e-4  # computed in float32


def test_the_tokenizer_adds_no_folded_bos(everything):
    source = AutoTokenizer.from_pretrained(everything[0]["llama"].source)("a cab")["input_ids"]
    assert source[0] == PREFIX[0] and everything[1]["tokenizer"] == source[1:]


def test_a_tokenizer_needs_no_code_and_asks_for_none(everything):
    """As the card loads it, with `trust_remote_code=False`: without, transformers asks because of config.json."""
    report = everything[1]
    assert not report["asked"] and report["processor"] == report["tokenizer"]


# ---- what lies on disk


def test_kept_tensors_keep_name_dtype_and_bytes(converted):
    before, after = tensors_on_disk(converted.source), tensors_on_disk(converted.out)
    added = set(after) - set(before)
    assert set(before) <= set(after)
    assert all(name.endswith(("attention_bias.key", "attention_bias.value")) for name in added) and len(added) == 8
    for name, (_, *rest) in before.items():
        assert after[name][1:] == tuple(rest), name


def test_unchanged_shards_are_the_same_files(converted, family):
    before = sorted(converted.source.glob("*.safetensors"))
    assert (len(before) > 1) == (family in SHARDED)
    contents = {path.read_bytes() for path in converted.out.glob("*.safetensors")}
    assert all(path.read_bytes() in contents for path in before)
    assert len(contents) == len(before) + 1


def test_slots_lie_in_one_small_shard_of_their_own(converted):
    on_disk = tensors_on_disk(converted.out)
    index = json.loads((converted.out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry[0] for name, entry in on_disk.items()}
    assert index["metadata"]["total_size"] == sum(len(entry[3]) for entry in on_disk.values())
    slots = {name: entry for name, entry in on_disk.items() if "attention_bias" in name}
    (shard,) = {entry[0] for entry in slots.values()}
    assert {name for name, entry in on_disk.items() if entry[0] == shard} == set(slots)
    assert {(entry[1], entry[2][0]) for entry in slots.values()} == {("F32", len(PREFIX))}
    assert (converted.out / shard).stat().st_size < 20_000


def test_the_families_are_those_promised():
    assert set(FAMILIES) <= set(TINY) and len(FAMILIES) == 11
