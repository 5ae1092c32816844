"""What a checkpoint, its verdict and its report say of how they came to be, and what they must not say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import MEASURED, edit_json, surgery_command

import surgery
from surgery.checkpoint.manifest import read_manifest
from surgery.live.text import Chunking
from surgery.steps.options import RunOptions, VerifyOptions

TUNED = """surgery: 1
operations:
  - attention_bias: {prefix: ["<s>", "\\n"]}
tune: {steps: 1, length: 32, held_out: 2, evaluate_every: 1, objectives: {lm: 1.0}}
verify: {perplexity: {max_ratio: 3.0}, massive_activations: {max: 1000000}}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_manifest_and_verdict_tell_what_was_done(place):
    manifest, verdict = read(place.converted / "surgery.json"), place.verdict
    act = manifest["provenance"]
    text = {"name": "evaluation.txt", "bytes": place.text.stat().st_size, "sha256": hashed(place.text)}
    assert act["texts"] == {"evaluation": [text], "calibration": [], "split": True}
    assert act["chunks"] == {"evaluation": {"count": 4, "length": 32}, "calibration": None}
    assert (act["device"], act["dtype"]) == ("cpu", "float32")
    assert act["versions"].keys() == {"surgery", "torch", "transformers", "safetensors", "python", "platform"}
    assert act["command"][:5] == ["surgery", "run", "recipe.yaml", "source", "converted"]
    source = {key: manifest["source"][key] for key in ("spec", "kind", "revision", "dtype", "sha256")}
    assert verdict["provenance"] == {**act, "source": source, "recipe": manifest["recipe"]}
    assert manifest["source"]["spec"] == "source" and "provenance" not in manifest["verdict"]
    assert manifest["source"]["sha256"]["model.safetensors"] == hashed(place.source / "model.safetensors")


def test_verify_reads_as_much_text_as_run_did(place, tmp_path):
    """Without a word on chunks, the same text gives the same figures; one number alone may be given anew."""
    verdict = surgery.verify(place.converted, VerifyOptions(against=str(place.source), text=[place.text]))
    assert verdict["passed"] and verdict["gates"] == place.verdict["gates"]
    assert verdict["perplexity"] == place.verdict["perplexity"] and verdict["delta_nll"] == place.verdict["delta_nll"]
    assert verdict["provenance"].keys() == place.verdict["provenance"].keys()
    assert verdict["provenance"]["texts"] == place.verdict["provenance"]["texts"]
    result = tmp_path / "v.json"
    ended = surgery_command("verify", place.converted, "--text", place.text, "--chunks", 6, "--json", result)
    assert ended.code == 0, ended.err
    assert read(result)["provenance"]["chunks"]["evaluation"] == {"count": 6, "length": 32}
    assert read(result)["provenance"]["command"][1:3] == ["verify", "converted"]


def test_manifests_of_older_versions_are_read(place, tmp_path):
    root = Path(shutil.copytree(place.converted, tmp_path / "older"))
    edit_json(root / "surgery.json", provenance=None)
    assert read_manifest(root).provenance is None
    verdict = surgery.verify(root, VerifyOptions(text=[place.text], chunking=Chunking(4, 32)))
    assert verdict["passed"] and verdict["provenance"]["source"]["spec"] == "source"
    edit_json(root / "surgery.json", provenance={"date": 5})
    ended = surgery_command("verify", root)
    assert ended.code == 3 and '"provenance" is missing or of the wrong type' in ended.error


@pytest.mark.slow
def test_two_runs_of_one_date_are_equal_to_the_byte(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    found = []
    for folder in ("a", "b"):
        out = tmp_path / folder / "out"
        out.parent.mkdir()
        options = RunOptions(text=[place.text], chunking=Chunking(4, 32))
        assert surgery.run(place.recipe, str(place.source), out, options)["passed"]
        found.append({path.name: hashed(path) for path in out.iterdir()})
    assert found[0] == found[1] and read(out / "surgery.json")["provenance"]["date"] == "2023-11-14T22:13:20Z"


def test_a_date_that_is_none_stops_a_run_before_it_begins(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    ended = surgery_command("run", place.recipe, place.source, tmp_path / "out", "--text", place.text)
    assert ended.code == 2 and "SOURCE_DATE_EPOCH" in ended.error and not (tmp_path / "out").exists()


@pytest.fixture
def somebodys(place, tmp_path) -> Path:
    """A directory in somebody's home, with texts, and with a model that says where it was loaded from."""
    home = tmp_path / "home" / "somebody" / "secret-dir"
    shutil.copytree(place.source, home / "model")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        edit_json(home / "model" / name, **{key: str(home / "model")})
    shutil.copy(place.text, home / "wiki.txt")
    shutil.copy(place.recipe, home / "recipe.yaml")
    return home


def done(*arguments: object, code: int = 0) -> None:
    ended = surgery_command(*arguments)
    assert ended.code == code, ended.err


def names_nobody(home: Path, *expected: str) -> None:
    """Nothing that was written into `home` says where that is."""
    written = [path for path in home.rglob("*") if path.is_file() and (home / "model") not in path.parents]
    assert {*expected} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        found = [word for word in (b"somebody", b"secret-dir", bytes(home.parents[2])) if word in content]
        assert not found, f"{path.name}: {found} in {content[max(content.index(found[0]) - 200, 0) :][:400]!r}"


def test_no_directory_and_no_user_is_named_anywhere(somebodys):
    home, text = somebodys, ("--text", somebodys / "wiki.txt")
    done("run", home / "recipe.yaml", home / "model", home / "out", *text, *MEASURED, "--json", home / "run.json")
    done("verify", home / "out", "--against", home / "model", "--json", home / "v.json", "--junit", home / "v.xml")
    (home / "out" / "config.json").write_text("{}")
    done("verify", home / "out", "--against", home / "model", "--json", home / "damaged.json", code=3)
    names_nobody(home, "surgery.json", "README.md", "run.json", "v.json", "v.xml", "damaged.json")


@pytest.mark.slow
def test_reports_surveys_and_adapters_name_nobody(somebodys):
    home, text = somebodys, ("--text", somebodys / "wiki.txt")
    (home / "recipe.yaml").write_text(TUNED, encoding="utf-8")
    done(
        "run", home / "recipe.yaml", home / "model", home / "out", *text, *MEASURED, "--report", home / "r.html",
        "--adapter", home / "adapter", "--tuning", home / "tuning", "--json", home / "run.json",
    )  # fmt: skip
    before, after = read(home / "run.json")["surveys"]
    assert [(map_["block"], map_["head"]) for map_ in before["attention_maps"]] == [
        (map_["block"], map_["head"]) for map_ in after["attention_maps"]
    ]
    assert before["files"]["bytes"] < after["files"]["bytes"] and before["sample"]["written"]
    few = ("--chunks", 1, "--chunk-length", 32)
    done("scan", home / "model", home / "out", *text, *few, "--json", home / "s.json", "--report", home / "s.html")
    assert read(home / "s.json")["surveys"][0]["provenance"]["texts"]["evaluation"][0]["name"] == "wiki.txt"
    names_nobody(home, "r.html", "adapter_config.json", "tuning.safetensors", "s.json", "s.html")
