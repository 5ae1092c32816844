"""The commands: help without waiting, plans in full, results as JSON, the main job end to end on a tiny model."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers.tiny_checkpoint import (
    MEASURED,
    RECIPE,
    Place,
    edit_json,
    save_model,
    save_tokenizer,
    sha256_of_files,
    surgery_command,
    write_text,
)
from safetensors.numpy import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

import surgery
from surgery.checkpoint.layout import read_layout
from surgery.cli.entry import BUG, INTERRUPTED
from surgery.live.text import Chunking
from surgery.steps.options import VerifyOptions

AUTO = RECIPE.replace('["<s>", "\\n"]', "auto\n      max_slots: 2")
IN_PROCESS = "from surgery.cli import main; main()"


def results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def spiked(place: Place, root: Path, **how: str) -> Path:
    """A source in which the BOS carries a massive activation: there is something for a search to find."""
    source = root / "spiked"
    save_model(source, massive=0, **how)
    save_tokenizer(source, place.text)
    return source


# ---- help


def test_help_needs_neither_torch_nor_patience() -> None:
    """All of it in one process, which must not have imported what takes seconds."""
    script = """
import sys
from surgery import cli
for command in ([], ["plan"], ["run"], ["verify"], ["scan"]):
    sys.argv = ["surgery", *command, "--help"]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 0, ended.code
slow = {"torch", "transformers", "numpy", "pydantic", "safetensors"} & set(sys.modules)
assert not slow, slow
"""
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - start < 5  # 0.3 s on an idle machine
    for option in ("--text", "--no-verify", "--keep-failed", "--against", "--junit", "--json", "--chunk-length"):
        assert option in ended.stdout


def test_version() -> None:
    ended = surgery_command("--version")
    assert ended.code == 0 and surgery.__version__ in ended.out


def test_no_command_is_wrong_use() -> None:
    assert surgery_command().code == 2


# ---- plan


def test_a_plan_names_what_is_added_and_what_it_takes(place: Place, tmp_path: Path) -> None:
    before = sha256_of_files(place.root)
    ended = surgery_command("plan", place.recipe, place.source, "--json", tmp_path / "p.json")
    assert ended.code == 0 and not ended.err
    planned = results(tmp_path / "p.json")
    assert planned == surgery.plan(place.recipe, str(place.source)).to_dict() | {
        part: planned[part] for part in ("disk", "memory")
    }
    added = {name: entry for name, entry in planned["tensors"].items() if entry["status"] == "added"}
    assert set(added) == {
        f"model.layers.{i}.self_attn.attention_bias.{part}" for i in (0, 1) for part in ("key", "value")
    }
    assert all(entry["shape"] == [2, 2, 8] and entry["dtype"] == "F32" for entry in added.values())
    assert planned["prefix_ids"][0] == 0 and planned["n_slots"] == 2
    assert planned["config"]["lowered"] == {"max_position_embeddings": 254}
    assert planned["disk"]["needed"] > (place.source / "model.safetensors").stat().st_size
    for shown in ("llama", "eab_llama", next(iter(added)), "2 x 2 x 8", "needed", "free", "model-00002-of-00002"):
        assert shown in ended.out
    assert sha256_of_files(place.root) == before


def test_what_was_planned_is_what_is_written(place: Place) -> None:
    planned = surgery.plan(place.recipe, str(place.source)).to_dict()
    written = {path.name: path.stat().st_size for path in place.converted.iterdir()}
    assert {file["name"] for file in planned["files"]} == set(written)
    for file in planned["files"]:
        if file["action"] in ("copy", "link") or file["name"].endswith(".safetensors"):
            assert written[file["name"]] == file["bytes"]
    layout = read_layout(place.converted)
    assert {name: (t["shard"], t["dtype"], tuple(t["shape"])) for name, t in planned["tensors"].items()} == {
        t.name: (t.shard, t.dtype, t.shape) for t in layout.tensors.values()
    }
    shards = {file["name"]: file["bytes"] for file in planned["files"] if file["name"].endswith(".safetensors")}
    assert shards == layout.sizes


def test_a_plan_for_a_search_says_how_many_slots_there_can_be(place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "auto.yaml"
    recipe.write_text(AUTO)
    ended = surgery_command("plan", recipe, place.source, "--json", tmp_path / "p.json")
    assert ended.code == 0 and "up to 2" in ended.out
    planned = results(tmp_path / "p.json")
    assert planned["prefix_ids"] is None and planned["n_slots"] == {"max": 2}


def test_a_tensor_whose_name_looks_like_markup_is_shown_as_it_is(place: Place, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place.source, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "[/x]": tensors["model.norm.weight"]}, source / "model.safetensors", {"format": "pt"})
    ended = surgery_command("plan", place.recipe, source)
    assert ended.code == 0 and "[/x]" in ended.out


# ---- run and verify


def test_a_run_leaves_the_source_alone_and_keeps_its_bytes(place: Place) -> None:
    verdict = place.verdict
    assert verdict["passed"] is True
    original, converted = read_layout(place.source), read_layout(place.converted)
    assert set(original.tensors) < set(converted.tensors)
    kept = "model-00001-of-00002.safetensors"
    assert (place.converted / kept).read_bytes() == (place.source / "model.safetensors").read_bytes()
    assert not [path for path in place.root.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_searched_prefix_and_a_sharded_source_with_links(place: Place, tmp_path: Path) -> None:
    recipe, out, found = tmp_path / "auto.yaml", tmp_path / "out", tmp_path / "v.json"
    recipe.write_text(AUTO)
    source = spiked(place, tmp_path, shard_size="40KB")
    calibration = write_text(tmp_path / "calibration.txt", 1500, seed=2)
    ended = surgery_command(
        "run", recipe, source, out, "--text", place.text, "--calibration", calibration, *MEASURED, "--link",
        "--json", found,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    verdict = results(found)
    assert 1 <= len(verdict["prefix"]["ids"]) <= 2 and verdict["prefix_search"]["tried"]
    assert verdict["prefix"]["ids"] == verdict["prefix_search"]["tried"][0]["prefix_ids"]
    assert len(shards := read_layout(source).shards) > 1
    for shard in shards:
        assert os.path.samefile(out / shard, source / shard)
    assert str(out) in ended.out and "trust_remote_code=True" in ended.out
    checked = surgery_command("verify", out, "--against", source, "--text", place.text, *MEASURED)
    assert checked.code == 0, checked.err


def apart_from_the_act(result: dict) -> dict:
    """Without when it was found, and by which command line: two finds of the same are otherwise equal."""
    act = {key: value for key, value in result["provenance"].items() if key not in ("date", "command")}
    assert result["provenance"].keys() - act.keys() == {"date", "command"}
    return {**result, "provenance": act}


def test_json_is_what_the_verbs_return(place: Place, tmp_path: Path) -> None:
    options = ("--against", place.source, "--text", place.text, *MEASURED)
    assert surgery_command("verify", place.converted, *options, "--json", tmp_path / "v.json").code == 0
    returned = surgery.verify(
        place.converted, VerifyOptions(against=str(place.source), text=[place.text], chunking=Chunking(4, 32))
    )
    assert apart_from_the_act(results(tmp_path / "v.json")) == apart_from_the_act(returned)


def test_without_a_tokenizer_that_loads_ids_do(place: Place, tmp_path: Path) -> None:
    """What the message of a broken tokenizer advises: it is left out, and the result is whole without."""
    source, out, recipe = (
        Path(shutil.copytree(place.source, tmp_path / "source")),
        tmp_path / "out",
        tmp_path / "r.yaml",
    )
    (source / "tokenizer.json").write_text("{")
    recipe.write_text(RECIPE.replace('["<s>", "\\n"]', "[0, 5]"))
    refused = surgery_command("run", recipe, source, out, "--text", place.text, *MEASURED)
    assert refused.code == 2 and "list the prefix as ids and run --no-verify" in refused.err
    commands = (
        ("plan", recipe, source),
        ("run", recipe, source, out, "--no-verify"),
        ("verify", out, "--against", source),
    )
    for command in commands:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            ended = surgery_command(*command)
        assert ended.code == 0 and "its files are left out" in ended.err, ended.err
    assert not [path.name for path in out.iterdir() if path.name.startswith("tokenizer")]


def test_code_and_odd_settings_of_a_source_do_not_come_along(place: Place, tmp_path: Path) -> None:
    """A source with its own Python files, as many on the hub, becomes a checkpoint with none but ours."""
    source, out = Path(shutil.copytree(place.source, tmp_path / "source")), tmp_path / "out"
    (source / "modeling_llama.py").write_text("raise RuntimeError\n")
    edit_json(
        source / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_llama.Model"},
        _attn_implementation="flash_attention_2",
    )
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_llama.Tokenizer", None]})
    ended = surgery_command("run", place.recipe, source, out, "--text", place.text, *MEASURED)
    assert ended.code == 0, ended.err
    assert not (out / "modeling_llama.py").exists()
    assert "auto_map" not in results(out / "tokenizer_config.json")
    assert "_attn_implementation" not in results(out / "config.json")
    assert all("eab" in value for value in results(out / "config.json")["auto_map"].values())
    assert surgery_command("verify", out, "--against", source).code == 0


@pytest.mark.slow
def test_gates_on_quantised_models(place: Place, tmp_path: Path) -> None:
    recipe, out, found = tmp_path / "q.yaml", tmp_path / "out", tmp_path / "v.json"
    recipe.write_text(
        place.recipe.read_text().rstrip() + "\n  quantised: {w8a8_static: {max_ratio: 3.0}, kv4: {max_ratio: 3.0}}\n"
    )
    texts = ("--text", place.text, *MEASURED)
    assert surgery_command("run", recipe, place.source, out, *texts, "--json", found).code == 0
    verdict = results(found)
    gates = {gate["name"]: gate for gate in verdict["gates"]}
    assert list(verdict["quantised"]) == ["w8a8_static", "kv4"]
    for name, entry in verdict["quantised"].items():
        assert gates[f"quantised.{name}"]["value"] == pytest.approx(math.exp(entry["delta_nll"]["converted"]["high"]))
        assert entry["original"]["ppl"] != verdict["perplexity"]["bare"]["ppl"] != entry["converted"]["ppl"]
    ended = surgery_command("verify", out, "--against", place.source, *texts, "--json", found)
    assert (
        ended.code == 0
        and "8 bit, static scales" in ended.out
        and "cache only, 4 bit" in ended.out
        and "note" not in ended.err
    )
    again = results(found)
    assert again["quantised"] == verdict["quantised"] and again["perplexity"] == verdict["perplexity"]
    leaking = surgery_command("verify", out, *texts, "--calibration", place.text, "--json", found)
    assert leaking.code == 0 and f"{place.text} is both --text and --calibration" in leaking.err
    assert results(found)["perplexity"]["converted"] != verdict["perplexity"]["converted"]  # all of the text
    recipe.write_text(recipe.read_text().replace("kv4: {max_ratio: 3.0}", "kv4: {max_ratio: 0.01}"))
    failed = surgery_command("run", recipe, place.source, tmp_path / "failed", *texts)
    assert failed.code == 1 and "quantised.kv4" in failed.error and not (tmp_path / "failed").exists()


@pytest.mark.slow
def test_scales_that_come_from_no_text_want_none(place: Place, tmp_path: Path) -> None:
    recipe, out = tmp_path / "q.yaml", tmp_path / "out"
    recipe.write_text(place.recipe.read_text().rstrip() + "\n  quantised: {kv4: {max_ratio: 3.0}}\n")
    (short := tmp_path / "short.txt").write_text("A bridge.\n")
    texts = ("--text", place.text, "--calibration", short, *MEASURED)
    for command in (("run", recipe, place.source, out), ("verify", out, "--against", place.source)):
        ended = surgery_command(*command, *texts)
        assert ended.code == 0 and "cache only, 4 bit" in ended.out, ended.err


@pytest.mark.slow
def test_text_beyond_the_positions_is_cut_alike(place: Place, tmp_path: Path) -> None:
    """By `run`, whose search may end with fewer slots than it made room for, and `verify`; `scan` has more room."""
    recipe, out, found = tmp_path / "auto.yaml", tmp_path / "out", tmp_path / "v.json"
    recipe.write_text(AUTO)
    source = spiked(place, tmp_path)
    texts = ("--text", place.text, "--chunks", "2", "--chunk-length", "4000", "--json", found)
    ended = surgery_command("run", recipe, source, out, *texts)
    assert ended.code == 0 and "chunks of 254 tokens" in ended.err, ended.err
    verdict = results(found)
    assert verdict["perplexity"]["converted"]["tokens"] == 2 * 253
    assert surgery_command("verify", out, "--against", source, *texts).code == 0
    assert results(found)["perplexity"] == verdict["perplexity"]
    assert surgery_command("scan", out, *texts).code == 0
    assert results(found)["chunk_length"] == 256 - len(verdict["prefix"]["ids"])


@pytest.mark.slow
def test_slots_seen_beyond_a_window_need_not_equal_a_prefix(place: Place, tmp_path: Path) -> None:
    """Slots that are seen beyond a window are not asked to equal a prefix."""
    recipe, source, found = tmp_path / "r.yaml", tmp_path / "source", tmp_path / "v.json"
    torch.manual_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, bos_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(source)  # fmt: skip
    save_tokenizer(source, place.text)
    for visible, asked in (("always", False), ("as_prefix", True)):
        recipe.write_text(RECIPE.replace("verify:", f"      slots_visible: {visible}\nverify:"))
        out, texts = tmp_path / visible, ("--text", place.text, *MEASURED, "--json", found)
        for command in (("run", recipe, source, out), ("verify", out, "--against", source)):
            ended = surgery_command(*command, *texts)
            assert ended.code == 0, ended.err
            assert ("equivalence" in {gate["name"] for gate in results(found)["gates"]}) is asked


@pytest.mark.slow
def test_a_gate_on_streaming(place: Place, tmp_path: Path) -> None:
    recipe, out, found = tmp_path / "q.yaml", tmp_path / "out", tmp_path / "v.json"
    plain = place.recipe.read_text().rstrip()
    recipe.write_text(plain + "\n  streaming: {window: 8, max_ratio: 3.0}\n")
    texts = ("--text", place.text, *MEASURED)
    ended = surgery_command("run", recipe, place.source, out, *texts, "--json", found)
    assert ended.code == 0 and "keeping none" in ended.out
    verdict = results(found)
    gate = next(gate for gate in verdict["gates"] if gate["name"] == "streaming")
    streamed = verdict["streaming"]
    assert gate["value"] == pytest.approx(math.exp(streamed["delta_nll"]["converted_vs_kept"]["high"]))
    assert streamed["original_kept"]["tokens_kept"] == 4 and streamed["original"] != streamed["converted"]
    assert surgery_command("verify", out, "--against", place.source, *texts, "--json", found).code == 0
    assert results(found)["streaming"] == streamed
    recipe.write_text(plain + "\n  streaming: {window: 8, max_ratio: 0.01}\n")
    assert surgery_command("run", recipe, place.source, tmp_path / "failed", *texts).code == 1
    recipe.write_text(plain + "\n  streaming: {window: 999, max_ratio: 3.0}\n")
    refused = surgery_command("run", recipe, place.source, tmp_path / "refused", *texts)
    assert refused.code == 2 and "--chunk-length" in refused.error


# ---- scan


@pytest.mark.parametrize("which", ["source", "converted"])
def test_a_scan_has_every_layer_and_key(place: Place, tmp_path: Path, which: str) -> None:
    found = tmp_path / "s.json"
    ended = surgery_command("scan", getattr(place, which), "--text", place.text, *MEASURED, "--json", found)
    assert ended.code == 0, ended.err
    survey = results(found)
    returned = surgery.scan(str(getattr(place, which)), text=[place.text], chunking=Chunking(4, 32))
    assert apart_from_the_act(survey) == apart_from_the_act(returned)
    assert [row["layer"] for row in survey["layers"]] == [0, 1, 2]
    keys = {
        "max", "median", "ratio", "massive", "first_norm", "rest_norm", "p1", "entropy_bits", "entropy_normalised",
        "dominance", "sink_score", "sink_rate", "mixing", "lens_ppl",
    }  # fmt: skip
    assert all(keys <= set(row) for row in survey["layers"])
    assert survey["layers"][0]["sink_score"] is None and len(survey["layers"][1]["sink_score"]) == 4
    slots = [0] * 4 if which == "source" else [2] * 4
    assert [len(scores) for scores in survey["layers"][1]["slot_score"]] == slots
    assert survey["perplexity"]["tokens"] == 4 * 31 and survey["model_type"] == "llama"


def test_a_scan_reads_no_more_of_the_text_than_positions_allow(place: Place, tmp_path: Path) -> None:
    found = tmp_path / "s.json"
    options = ("--chunks", "2", "--chunk-length", "4000", "--json", found)
    assert surgery_command("scan", place.source, "--text", place.text, *options).code == 0
    assert results(found)["chunk_length"] == 256


@pytest.mark.slow
def test_a_scan_of_two_models_makes_a_report_and_plots(place: Place, tmp_path: Path) -> None:
    found, report, plots = tmp_path / "s.json", tmp_path / "r.html", tmp_path / "plots"
    ended = surgery_command(
        "scan", place.source, place.converted, "--text", place.text, *MEASURED, "--interventions", "--json", found,
        "--report", report, "--plots", plots,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    surveys = results(found)["surveys"]
    assert [survey["source"] for survey in surveys] == ["source", "converted"]
    assert [survey["n_slots"] for survey in surveys] == [0, 2]
    untouched = surveys[0]["interventions"][0]
    assert untouched["touched"] == 0 and untouched["ppl"] == surveys[0]["perplexity"]["ppl"]
    assert "<svg" in report.read_text(encoding="utf-8")
    assert {path.suffix for path in plots.iterdir()} == {".png", ".svg"}


@pytest.mark.slow
def test_a_scan_of_one_chunk_bounds_nothing_and_says_so(place: Place, tmp_path: Path) -> None:
    found, report = tmp_path / "s.json", tmp_path / "r.html"
    options = ("--chunks", "1", "--chunk-length", "32", "--interventions", "--json", found, "--report", report)
    ended = surgery_command("scan", place.source, "--text", place.text, *options)
    assert ended.code == 0, ended.err
    survey = results(found)
    assert survey["chunks"] == 1 and survey["interventions"][1]["delta_nll"]["high"] == "inf"
    assert "0 to inf" in ended.out and "Audit: " in ended.out
    assert "Too few chunks to tell" in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_shows_before_and_after_in_a_report(place: Place, tmp_path: Path) -> None:
    out, report, found = tmp_path / "out", tmp_path / "r.html", tmp_path / "v.json"
    options = ("--text", place.text, *MEASURED, "--report", report, "--json", found)
    assert surgery_command("run", place.recipe, place.source, out, *options).code == 0
    page, verdict = report.read_text(encoding="utf-8"), results(found)
    for shown in ("source", "out", *(f"{verdict['perplexity'][name]['ppl']:.1f}" for name in ("bare", "converted"))):
        assert shown in page
    assert not (out / "r.html").exists()


@pytest.mark.slow
def test_what_failed_has_a_report_too(place: Place, tmp_path: Path) -> None:
    recipe, out, report = tmp_path / "r.yaml", tmp_path / "out", tmp_path / "r.html"
    recipe.write_text(place.recipe.read_text().replace("max_ratio: 2.0", "max_ratio: 0.01"))
    ended = surgery_command("run", recipe, place.source, out, "--text", place.text, *MEASURED, "--report", report)
    assert ended.code == 1 and not out.exists() and "<svg" in report.read_text(encoding="utf-8")


# ---- how it ends


def test_an_interrupt_is_not_a_failed_gate(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.verbs.plan.plan", interrupted)
    ended = surgery_command("plan", place.recipe, place.source)
    assert ended.code == INTERRUPTED and ended.error.startswith("interrupted")


def test_a_bug_keeps_its_traceback_and_has_its_own_exit_code(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **options):
        raise AssertionError("two plus two")

    monkeypatch.setattr("surgery.verbs.plan.plan", broken)
    ended = surgery_command("plan", place.recipe, place.source)
    assert ended.code == BUG and "two plus two" in ended.err and "Traceback" in ended.err
    assert "report it" in ended.error


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 EB"


@pytest.mark.parametrize(
    "error", [RuntimeError(NO_MEMORY), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_memory_that_runs_out_is_no_bug(place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def large(*arguments, **options):
        raise error

    verifying = ("verify", place.converted, "--text", place.text, *MEASURED)
    monkeypatch.setattr("surgery.steps.measure.read", large)
    ended = surgery_command(*verifying)
    assert ended.code == 2 and "Traceback" not in ended.err and "--chunk-length" in ended.error
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, where, *arguments, **options):
        return load(cls, where, *arguments, **options) if where is None else large()  # None: headers alone

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    for command in (verifying, ("scan", place.source, "--text", place.text, *MEASURED)):
        ended = surgery_command(*command)
        assert ended.code == 2 and "does not fit into memory" in ended.error


@pytest.mark.slow
def test_a_reader_that_goes_away_changes_nothing(place: Place, tmp_path: Path) -> None:
    """As in `surgery verify ... | head -1`: the result is written and the exit code is the verdict's."""
    found = tmp_path / "v.json"
    process = subprocess.Popen(
        [sys.executable, "-c", IN_PROCESS, "verify", str(place.converted), "--json", str(found)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert results(found)["passed"] is True


def test_results_may_go_to_a_device(place: Place) -> None:
    assert surgery_command("plan", place.recipe, place.source, "--json", "/dev/null").code == 0
    assert Path("/dev/null").is_char_device()


def test_a_terminal_without_the_characters_is_no_obstacle(place: Place, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place.source, tmp_path / "模型"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    ended = surgery_command("plan", place.recipe, source, stdout=terminal)
    terminal.flush()
    assert ended.code == 0 and b"eab_llama" in terminal.buffer.getvalue()
