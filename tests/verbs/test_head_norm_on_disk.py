"""Checkpoints with head norms: planned, written, loaded by a process without surgery, verified, tampered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import families
from helpers.fresh_process import ask, greedy
from helpers.tiny import build, one_thread, tiny_text
from helpers.tiny_checkpoint import MEASURED, Place, edit_json, rehash, save_tokenizer, surgery_command, write_text
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import surgery
from surgery.anatomy.sites import examine
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.manifest import read_manifest
from surgery.converted.derived import NORM_FILE, RUNTIME_FILES
from surgery.converted.reading import load_converted
from surgery.errors import DamagedCheckpoint, SourceError
from surgery.live.graft import installed, normed
from surgery.live.model import Live
from surgery.live.text import Chunking
from surgery.steps.options import RunOptions, VerifyOptions
from surgery.steps.recipe import parse_recipe

VERIFY = "verify: {perplexity: {max_ratio: %s}, massive_activations: {max: 1000000}}\n"
HEAD = "surgery: 1\noperations:\n"
GATED = HEAD + "  - head_norm: {}\n" + VERIFY % 1.01
BOTH = (
    HEAD + '  - attention_bias: {prefix: ["<s>", "\\n"]}\n  - head_norm: {per_head: true, gate: 1, layers: [1]}\n'
    + VERIFY % 50
)  # fmt: skip
ADDED = "model-00002-of-00002.safetensors"
WEIGHT = "model.layers.1.self_attn.head_norm.weight"
CHUNKS = Chunking(4, 32)
PURE = HEAD + "  - head_norm: {per_head: true, gate: 1}\n"
FAMILIES = ("gpt2", "falcon", "bloom", "gemma3", "deepseek_v3", "gpt_oss", "mixtral")


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def parsed(text: str):
    return parse_recipe(text, "recipe")


@pytest.fixture(scope="module")
def gated(place: Place, tmp_path_factory) -> tuple[Path, dict, str]:
    """Head norms alone, at gate 0: directory, verdict, and what the command line said."""
    root = tmp_path_factory.mktemp("gated")
    (root / "recipe.yaml").write_text(GATED)
    ended = surgery_command(
        "run", root / "recipe.yaml", place.source, root / "out", "--text", place.text, *MEASURED,
        "--json", root / "v.json",
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    return root / "out", json.loads((root / "v.json").read_text()), ended.out + ended.err


@pytest.fixture(scope="module")
def both(place: Place, tmp_path_factory) -> tuple[Path, dict]:
    """Slots, and a pure norm per head in one of two layers."""
    out = tmp_path_factory.mktemp("both") / "out"
    return out, surgery.run(parsed(BOTH), str(place.source), out, RunOptions(text=[place.text], chunking=CHUNKS))


def added(root: Path) -> dict[str, tuple[int, ...]]:
    entries = read_manifest(root).tensors.items()
    return {name: entry.shape for name, entry in entries if entry.status == "added"}


# ---- what is written


def test_norms_alone_at_gate_0(gated, place: Place):
    out, verdict, said = gated
    assert verdict["passed"] and "prefix" not in verdict
    gates = {gate["name"]: gate["value"] for gate in verdict["gates"]}
    assert list(gates) == ["equivalence", "perplexity", "massive_activations"] and gates["equivalence"] < 1e-6
    assert verdict["perplexity"]["control"] == verdict["perplexity"]["bare"]
    assert "original + prefix" not in said and "head_norm at gate 0" in " ".join(said.split())
    layers = (0, 1)
    assert added(out) == {
        **{f"model.layers.{i}.self_attn.head_norm.weight": (8,) for i in layers},
        **{f"model.layers.{i}.self_attn.head_norm.gate": (4,) for i in layers},
    }
    values = load_file(out / ADDED)
    assert all((values[f"model.layers.{i}.self_attn.head_norm.gate"] == 0).all() for i in layers)
    config, source = (json.loads((root / "config.json").read_text()) for root in (out, place.source))
    ours = {"model_type", "architectures", "auto_map", "eab", "head_norm", "rope_theta"}
    assert {k: v for k, v in config.items() if k not in ours} == {k: v for k, v in source.items() if k not in ours}
    assert config["eab"]["n_slots"] == 0 and config["eab"]["prefix_ids"] == []
    assert config["model_type"] == "eab_norm_llama" and config["architectures"] == ["EabNormLlamaForCausalLM"]
    assert config["head_norm"] == {
        "format": 1, "sites": {f"layers.{i}.self_attn": [4, 8] for i in layers}, "per_head": False, "gated": True,
        "eps": 1e-6,
    }  # fmt: skip
    tokenizer = "tokenizer.json"
    assert (out / tokenizer).read_bytes() == (place.source / tokenizer).read_bytes()
    card = (out / "README.md").read_text()
    assert "head-wise RMSNorm" in card and "Its gates are 0" in card
    assert "explicit attention bias" not in card and "the same prefix" not in card and "{" not in card.split("```")[0]


def test_slots_and_a_pure_norm(both, place: Place):
    out, verdict = both
    assert verdict["passed"], verdict["gates"]
    assert [gate["name"] for gate in verdict["gates"]] == ["perplexity", "massive_activations"]
    assert verdict["perplexity"]["control"] != verdict["perplexity"]["bare"]
    assert {name: shape for name, shape in added(out).items() if "head_norm" in name} == {WEIGHT: (4, 8)}
    assert len(added(out)) == 5
    card = (out / "README.md").read_text()
    assert "explicit attention bias and head-wise RMSNorm" in card and "It has no gate." in card
    assert "Without what follows, the model would compute" in card and "In exact arithmetic" not in card
    slots = {name: value for name, value in load_file(out / ADDED).items() if "attention_bias" in name}
    for name, value in load_file(place.converted / ADDED).items():
        np.testing.assert_array_equal(slots[name], value, err_msg="norms must not change the slots")


def test_the_file_of_norms_goes_where_norms_go(gated, both, place: Place):
    for root, carried in ((gated[0], True), (both[0], True), (place.converted, False)):
        names = {path.name for path in root.glob("*.py")}
        assert set(RUNTIME_FILES) < names and (NORM_FILE in names) == carried
        assert f"modeling_eab_{'norm_' if carried else ''}llama.py" in names


@pytest.mark.parametrize("text", [GATED, BOTH], ids=["alone", "behind slots"])
def test_a_run_writes_what_its_plan_lists(text, gated, both, place: Place):
    out = gated[0] if text == GATED else both[0]
    planned = surgery.plan(parsed(text), str(place.source))
    assert {file.name for file in planned.files} == {path.name for path in out.iterdir()}
    for file in planned.files:
        if file.action != "change" and file.bytes is not None:
            assert (out / file.name).stat().st_size == file.bytes, file
    assert planned.tensors == read_manifest(out).to_dict()["tensors"]
    found = {t.name: (t.shard, t.dtype, list(t.shape)) for t in read_layout(out).tensors.values()}
    assert found == {name: (e["shard"], e["dtype"], e["shape"]) for name, e in planned.tensors.items()}


def test_a_plan_says_how_many_sites_are_normed(place: Place, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(BOTH)
    ended = surgery_command("plan", tmp_path / "recipe.yaml", place.source, "--json", tmp_path / "p.json")
    planned = json.loads((tmp_path / "p.json").read_text())
    assert ended.code == 0 and planned["normed_sites"] == 1 and planned["n_slots"] == 2
    assert "norms of the heads in 1 of 2" in " ".join(ended.out.split())


def test_without_text_or_tokenizer_there_is_nothing_to_fit_on(place: Place, tmp_path: Path):
    with pytest.raises(SourceError, match="head_norm is fitted on text: give --calibration FILE"):
        surgery.run(parsed(GATED), str(place.source), tmp_path / "out", RunOptions(verify=False))
    with pytest.raises(SourceError, match="there is no layer 2"):
        surgery.plan(parsed(HEAD + "  - head_norm: {layers: [2]}\n"), str(place.source))
    assert not (tmp_path / "out").exists()


# ---- what is loaded


def live(source: Path, out: Path, use):
    """`use(model)` for the original in float64 with what `out` holds put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    original, config = (json.loads((root / "config.json").read_text()) for root in (source, out))
    anatomy, eab, head_norm = examine(original), config["eab"], config["head_norm"]
    whole = Live(model, anatomy)
    stored = {name.removeprefix(anatomy.lead): tensor for name, tensor in load_tensors(out / ADDED).items()}
    norms = {site: {"weight": stored[f"{site}.head_norm.weight"]} for site in head_norm["sites"]}
    slots = {name: tensor for name, tensor in stored.items() if ".attention_bias." in name}
    with torch.no_grad(), installed(whole, eab, slots), normed(whole, head_norm, norms):
        return use(model)


@pytest.fixture(scope="module")
def report(place: Place, gated, both, tmp_path_factory) -> tuple[dict, dict, dict]:
    """What a fresh process found in every directory, and the live figures of the families."""
    root = tmp_path_factory.mktemp("fresh")
    text = write_text(root / "text.txt", 1500, seed=3)
    prompt, ids, expected = tiny_text(2, 21, seed=2), tiny_text(2, 40), {}
    tasks = {
        name: {"path": str(out), "text": ids, "prompt": prompt, "new_tokens": 4, "scratch": str(root / name)}
        for name, out in (("gated", gated[0]), ("both", both[0]))
    }
    for i, kind in enumerate(FAMILIES):
        source, out, vocabulary = root / kind / "source", root / kind / "out", {"vocab_size": 320}
        config = families()[kind].config(**(vocabulary | ({"text_config": vocabulary} if kind == "gemma3" else {})))
        build(config).to(torch.bfloat16 if i % 2 else torch.float32).save_pretrained(source)
        save_tokenizer(source, text)
        surgery.run(parsed(PURE), str(source), out, RunOptions(calibration=[text], verify=False, chunking=CHUNKS))
        expected[kind] = live(
            source, out, lambda m: (m(input_ids=ids, use_cache=False).logits, greedy(m, prompt, 4)[1])
        )  # fmt: skip
        tasks[kind] = {
            "path": str(out), "text": ids, "prompt": prompt, "new_tokens": 4, "caches": ["dynamic"],
            "default_dtype": torch.float32,
        }  # fmt: skip
    found = ask(root, {"families": tasks}, timeout=600)
    assert found["surgery"] == [], "loading needed surgery"
    return found, expected, tasks


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.slow
def test_families_load_with_their_norms(report, kind):
    found, expected = report[0][kind], report[1][kind]
    assert "failed" not in found, found["failed"]
    assert found["problems"] == {}
    size = expected[0].abs().max()
    assert (found["logits"] - expected[0]).abs().max() < 1e-5 * size
    assert (found["dynamic"][1] - expected[1]).abs().max() < 1e-5 * size


@pytest.mark.slow
def test_at_gate_0_a_stranger_computes_the_original(report, place: Place):
    found, ids = report[0]["gated"], report[2]["gated"]["text"]
    assert "failed" not in found, found["failed"]
    assert found["problems"] == {} == found["resaved problems"]
    model = AutoModelForCausalLM.from_pretrained(place.source, dtype=torch.float64)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for logits in (found["logits"], found["resaved logits"]):
        assert (logits - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.slow
def test_a_stranger_loads_slots_and_norms_and_saves_them_again(report, both, place: Place):
    found, task = report[0]["both"], report[2]["both"]
    assert "failed" not in found, found["failed"]
    assert found["problems"] == {} == found["resaved problems"]
    assert all(found[how] is not None for how in ("without the flag", "resaved without the flag"))
    expected = live(place.source, both[0], lambda model: model(input_ids=task["text"], use_cache=False).logits)
    for logits in (found["logits"], found["resaved logits"]):
        assert (logits - expected).abs().max() < 1e-12 * expected.abs().max()
    assert {NORM_FILE, "modeling_eab_norm_llama.py", *RUNTIME_FILES} <= set(found["resaved files"])
    assert found["dtypes"][WEIGHT] == "torch.float32"


def test_norms_stay_float32_and_load_without_the_flag(both):
    """Norms stay float32 in half precision. After `import surgery` they load without trust_remote_code."""
    model = load_converted(both[0], dtype=torch.bfloat16)
    assert type(model).__name__ == "EabNormLlamaForCausalLM"
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds[WEIGHT] == torch.float32 and kinds["model.layers.1.self_attn.q_proj.weight"] == torch.bfloat16
    assert bool(model(input_ids=tiny_text(1, 9)).logits.isfinite().all())
    assert not hasattr(model.model.layers[0].self_attn, "head_norm")
    with pytest.raises(ValueError, match="leave out|no version with slots"):
        model.set_attn_implementation("flash_attention_2")


def test_peft_trains_norms_and_gates(gated):
    import peft

    model = load_converted(gated[0])
    before = model(input_ids=tiny_text(1, 9)).logits
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["head_norm"], r=2)
    )  # fmt: skip
    assert torch.equal(model(input_ids=tiny_text(1, 9)).logits, before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "head_norm" in name}
    assert len(trained) == 4
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    loss = model(input_ids=tiny_text(1, 9), labels=tiny_text(1, 9)).loss
    loss.backward()
    assert all(bool(parameter.grad.abs().max() > 0) for parameter in trained.values())
    assert not torch.equal(model(input_ids=tiny_text(1, 9)).logits, before)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(both):
    model, ids = load_converted(both[0]), tiny_text(2, 17)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- what is verified


def test_verify_against_the_source_with_text(gated, both, place: Place):
    for out, text, names in (
        (gated[0], GATED, ["equivalence", "perplexity", "massive_activations"]),
        (both[0], BOTH, ["perplexity", "massive_activations"]),
    ):
        verdict = surgery.verify(out, VerifyOptions(against=str(place.source), text=[place.text], chunking=CHUNKS))
        assert verdict["passed"], verdict
        assert [gate["name"] for gate in verdict["gates"]] == names
        checks = {check["name"] for check in verdict["integrity"]["checks"]}
        assert checks >= {"norms", "kept tensors", "code"} and ("slots" in checks) == (text == BOTH)


@pytest.mark.slow
def test_texts_leave_room_for_the_bos_of_the_original(place: Place, tmp_path: Path):
    """Without slots nothing else does, and a learned table ends."""
    source, out = tmp_path / "source", tmp_path / "out"
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).save_pretrained(source)
    save_tokenizer(source, place.text)
    texts = {"text": [place.text], "chunking": Chunking(4, 64)}
    verdict = surgery.run(parsed(GATED), str(source), out, RunOptions(**texts))
    assert verdict["passed"] and verdict["perplexity"]["bos"]["tokens"] == 4 * 62
    again = surgery.verify(out, VerifyOptions(against=str(source), **texts))
    assert again["passed"] and again["perplexity"] == verdict["perplexity"]


def test_a_gate_on_perplexity_decides_where_norms_act(place: Place, tmp_path: Path):
    recipe = parsed(PURE + "verify: {massive_activations: {max: 1000000}, perplexity: {max_ratio: 1.0001}}\n")
    verdict = surgery.run(recipe, str(place.source), tmp_path / "out", RunOptions(text=[place.text], chunking=CHUNKS))
    assert verdict["passed"] is False and not (tmp_path / "out").exists()
    assert [gate["name"] for gate in verdict["gates"] if not gate["passed"]] == ["perplexity"]


@pytest.mark.slow
def test_a_scan_counts_the_sites_and_reads_the_model(both, gated, place: Place, tmp_path: Path):
    ended = surgery_command(
        "scan", place.source, both[0], "--text", place.text, *MEASURED, "--json", tmp_path / "s.json",
        "--report", tmp_path / "r.html",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    original, converted = json.loads((tmp_path / "s.json").read_text())["surveys"]
    assert (original["normed_sites"], converted["normed_sites"], converted["n_slots"]) == (0, 1, 2)
    assert original["layers"][2]["value_variance_first"] != converted["layers"][2]["value_variance_first"]
    page = (tmp_path / "r.html").read_text()
    assert "sites with a head norm" in page and "variance of a head, first token" in page


def rewrite(root: Path, change) -> None:
    tensors = {name: value.copy() for name, value in load_file(root / ADDED).items()}
    change(tensors)
    save_file(tensors, root / ADDED, {"format": "pt"})


def take_out(root: Path) -> None:
    rewrite(root, lambda tensors: tensors.pop(WEIGHT))
    index = json.loads((root / "model.safetensors.index.json").read_text())
    del index["weight_map"][WEIGHT]
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_manifest(root).to_dict()["tensors"]
    edit_json(root / "surgery.json", tensors={name: entry for name, entry in tensors.items() if name != WEIGHT})


def said(root: Path, **changes) -> None:
    described = json.loads((root / "config.json").read_text())["head_norm"]
    edit_json(root / "config.json", head_norm={**described, **changes})


TAMPERED = {
    "a norm taken out": (take_out, "norms", "layers.1.self_attn.head_norm.weight is missing"),
    "NaN in a norm": (
        lambda root: rewrite(root, lambda tensors: tensors[WEIGHT].put(3, np.nan)), "norms", f"{WEIGHT} holds NaN"
    ),
    "a norm zeroed": (lambda root: rewrite(root, lambda t: t[WEIGHT].fill(0)), "norms", f"{WEIGHT} is all zeros"),
    "norms not described": (lambda root: edit_json(root / "config.json", head_norm=None), "config", "no head_norm"),
    "described as gated": (lambda root: said(root, gated=True), "norms", "head_norm.gate is missing"),
    "described as shared": (lambda root: said(root, per_head=False), "norms", "(4, 8)"),
    "a site that does not attend": (lambda root: said(root, sites={"layers.1": [4, 8]}), "config", "layers.1 is not"),
    "a site of other heads": (
        lambda root: said(root, sites={"layers.1.self_attn": [8, 8]}), "config", "head_norm.sites.layers.1.self_attn"
    ),
    "an eps of zero": (lambda root: said(root, eps=0.0), "config", "head_norm.eps"),
    "the type of slots alone": (
        lambda root: edit_json(root / "config.json", model_type="eab_llama"), "config", "does not go with a head_norm"
    ),
    "code": (lambda root: (root / NORM_FILE).write_text("# nothing\n"), "code", NORM_FILE),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_change_is_named_though_every_hash_was_computed_anew(both, tmp_path: Path, case: str):
    root = Path(shutil.copytree(both[0], tmp_path / "out"))
    tamper, check, culprit = TAMPERED[case]
    tamper(root)
    rehash(root)
    verdict = surgery.verify(root)
    assert verdict["passed"] is False
    failures = {c["name"]: c["detail"] for c in verdict["integrity"]["checks"] if not c["passed"]}
    assert check in failures and culprit in failures[check], failures


@pytest.mark.parametrize("case", ["a norm taken out", "NaN in a norm"])
def test_a_lost_norm_does_not_load(both, tmp_path: Path, case: str):
    root = Path(shutil.copytree(both[0], tmp_path / "out"))
    TAMPERED[case][0](root)
    with pytest.raises(DamagedCheckpoint, match=r"layers\.1\.self_attn\.head_norm\.weight is missing from the check"):
        load_converted(root)
