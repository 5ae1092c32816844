"""`surgery seal`, and what `verify` says of documents, seals and status."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers.bench import DAMAGED, IDS, INPUT, Bench, snapshot
from helpers.keys import key_pair
from helpers.tiny_checkpoint import Place, edit_json, surgery_command

from surgery.checkpoint.signature import Signer, manifest_digest


@pytest.fixture
def copy(place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.converted, tmp_path / "converted"))


def verified(root: Path, *options: object) -> tuple[int, dict, str]:
    """(exit code, verdict, what was said)."""
    result = root.parent / "v.json"
    ended = surgery_command("verify", root, *options, "--json", result)
    return ended.code, json.loads(result.read_text()), ended.out + ended.err


def edit(root: Path) -> None:
    with (root / "README.md").open("a") as card:
        card.write("Seen.\n")
    (root / "NOTES.md").write_text("Mine.\n")
    edit_json(root / "generation_config.json", eos_token_id=7)


NOTES = ["README.md was edited since", "generation_config.json was edited since", "NOTES.md was added since"]


def test_edited_documents_are_a_note_and_sealing_takes_them_up(place: Place, copy: Path) -> None:
    assert "notes" not in verified(copy)[1]
    edit(copy)
    code, verdict, said = verified(copy)
    assert code == 0 and verdict["notes"] == NOTES and "Note: README.md was edited since." in said
    kept = json.loads((copy / "surgery.json").read_text())
    ended = surgery_command("seal", copy, "--json", copy.parent / "s.json")
    sealed = json.loads((copy.parent / "s.json").read_text())
    assert ended.code == 0 and sealed["digest"] == manifest_digest(copy) and sealed["digest"] in ended.out
    assert sealed["changed"] == {"NOTES.md": "added", "README.md": "edited", "generation_config.json": "edited"}
    code, verdict, said = verified(copy, "--digest", sealed["digest"])
    assert code == 0 and "notes" not in verdict
    assert verdict["sealed"] == {"signature": None, "digest": sealed["digest"]} and "Sealed: by the digest" in said
    now = json.loads((copy / "surgery.json").read_text())
    assert {**now, "files": None} == {**kept, "files": None}  # nothing but hashes is another


def test_a_document_that_is_gone_is_a_note(copy: Path) -> None:
    (copy / "README.md").unlink()
    assert verified(copy)[:2][1]["notes"] == ["README.md was removed since"]
    assert surgery_command("seal", copy).code == 0 and "notes" not in verified(copy)[1]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "eab_kernel.py", "model-00001-of-00002.safetensors", "vocab.txt"]
)
def test_nothing_is_sealed_where_anything_else_differs(copy: Path, name: str) -> None:
    edit(copy)
    with (copy / name).open("ab") as file:
        file.write(b" ")
    before = snapshot(copy)
    ended = surgery_command("seal", copy)
    assert ended.code == DAMAGED and name in ended.error and snapshot(copy) == before


def test_generation_settings_that_are_none_are_refused(copy: Path) -> None:
    (copy / "generation_config.json").write_text("[]")
    for verb in ("verify", "seal"):
        ended = surgery_command(verb, copy)
        assert ended.code == DAMAGED and "generation_config.json is not a JSON object" in ended.error


def test_a_checkpoint_of_links_is_not_sealed_in_place(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    cached = tmp_path / "snapshots" / "0123"
    cached.mkdir(parents=True)
    for path in copy.iterdir():
        shutil.copyfile(path, tmp_path / "blobs" / path.name)
        (cached / path.name).symlink_to(tmp_path / "blobs" / path.name)
    ended = surgery_command("seal", cached)
    assert ended.code == INPUT and "seal a copy" in ended.error


def test_a_signature_is_checked_and_an_edit_breaks_it(copy: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    code, _, said = verified(copy, "--public-key", public)
    assert code == DAMAGED and "not signed" in said
    fingerprint = Signer(private).sign(copy)
    code, verdict, said = verified(copy)
    assert code == 0 and "signature not checked" in said and verdict["sealed"]["signature"] is None
    code, verdict, said = verified(copy, "--public-key", public)
    assert code == 0 and verdict["sealed"]["signature"] == fingerprint and f"Sealed: by the key {fingerprint}" in said
    edit(copy)
    code, verdict, said = verified(copy, "--public-key", public)
    assert code == DAMAGED and "surgery seal OUT --sign KEY" in said and verdict["sealed"]["signature"] is None
    ended = surgery_command("seal", copy)  # it would no longer be signed
    assert ended.code == INPUT and "--sign" in ended.error
    assert surgery_command("seal", copy, "--sign", private).code == 0
    assert verified(copy, "--public-key", public)[0] == 0


@pytest.mark.slow
def test_the_manifest_is_sealed_by_digest_and_by_signature(place: Place, copy: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    Signer(private).sign(copy)
    digest = place.verdict["digest"]
    seals = ("--digest", digest), ("--digest", digest.removeprefix("sha256:").upper()), ("--public-key", public)
    assert [verified(copy, *seal)[0] for seal in seals] == [0, 0, 0]
    verdict = json.loads((copy / "surgery.json").read_text())["verdict"]
    edit_json(copy / "surgery.json", verdict={**verdict, "perplexity": {}})
    assert verified(copy)[0] == 0 and "Not sealed" in verified(copy)[2]
    assert [verified(copy, *seal)[0] for seal in seals] == [DAMAGED] * 3


def test_what_was_written_without_proof_is_said_to_be_unverified(place: Place, bench: Bench) -> None:
    private, public = key_pair(bench.root)
    result, source = bench.root / "run.json", bench.configured(custom_pipelines={"x": {"impl": "a/b--c.C"}})
    processor = {"auto_map": {"AutoProcessor": "theirs.Processor"}, "size": 3}  # loads without, and so it is emitted
    (source / "processor_config.json").write_text(json.dumps(processor))
    ended = surgery_command(*bench.run(source, IDS, "--no-verify", "--sign", private, "--json", result, text=False))
    assert ended.code == 0, ended.err
    assert json.loads((bench.out / "processor_config.json").read_text()) == {"size": 3}
    written = json.loads(result.read_text())
    assert written["digest"] == manifest_digest(bench.out) and written["digest"] in ended.out
    xml = bench.root / "j.xml"
    code, verdict, said = verified(bench.out, "--public-key", public, "--junit", xml)
    assert code == 0 and verdict["status"] == "unverified" and "unverified" in said
    assert verdict["sealed"]["signature"] == written["sealed"]["signature"]
    properties = {p.get("name"): p.get("value") for p in ElementTree.parse(xml).getroot().iter("property")}
    assert properties["status"] == "unverified" and properties["digest"] == written["digest"]
    code, verdict, said = verified(bench.out, "--require", "verified", "--junit", xml)
    assert code == 1 and verdict["passed"] is False and verdict["integrity"]["passed"] is True
    assert "Failed: status" in said and ElementTree.parse(xml).getroot().get("failures") == "1"
    code, verdict, _ = verified(place.converted, "--require", "verified")
    assert code == 0 and verdict["status"] == "verified"


@pytest.mark.parametrize("options", [("--digest", "x"), ("--public-key", "nowhere"), ("--require", "perfect")])
def test_seals_that_are_none_are_refused(place: Place, options: tuple[str, str]) -> None:
    ended = surgery_command("verify", place.converted, *options)
    assert ended.code == INPUT and options[0] in ended.err and "Traceback" not in ended.err


def test_a_key_that_signs_nothing_is_refused_before_the_work(bench: Bench) -> None:
    ended = surgery_command(*bench.run(None, IDS, "--sign", bench.place.text))
    assert ended.code == INPUT and "--sign" in ended.error and not bench.out.exists()
