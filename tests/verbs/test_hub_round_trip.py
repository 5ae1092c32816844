"""From the hub and back to it: ids as sources and as checkpoints, and what `run --push` and `push` send."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import OWNER, TOKEN, Hub, Refusal, connect, serving
from helpers.tiny_checkpoint import MEASURED, RECIPE, Ended, Place, surgery_command
from huggingface_hub import constants

from surgery.steps import operate

MINE = f"{OWNER}/converted"
REFUSED = Refusal(403, {"X-Error-Message": "no"})


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place) -> Hub:
    """A hub with the source of `place` in shards, and a client that may write."""
    server.clear()
    connect(server, monkeypatch, tmp_path / "home", TOKEN)
    server.add("meta/source", place.sharded)
    return server


@pytest.fixture
def out(place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.converted, tmp_path / "out"))


def run(place: Place, source: object, out: Path, *options: object) -> Ended:
    return surgery_command("run", place.recipe, source, out, "--text", place.text, *MEASURED, *options)


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.err
    for word in words:
        assert word in ended.error


# ---- ids as input


def test_what_was_pushed_is_downloaded_and_verified(hub: Hub, place: Place, tmp_path: Path) -> None:
    """The whole way: a source on the hub, converted, pushed, and verified by its id against the source's id."""
    ended = run(place, "meta/source@main", tmp_path / "out", "--push", MINE)
    assert ended.code == 0, ended.err
    commit = hub.repos[MINE].refs["main"]
    assert f"{hub.endpoint}/{MINE}/tree/{commit} (private" in ended.out and f"surgery verify {MINE}" in ended.out
    held = hub.files(MINE)
    assert held.pop(".gitattributes")
    assert held == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repos[MINE].private and len(hub.repos[MINE].commits) == 2
    assert (
        hub.repos[MINE].messages[commit].startswith("surgery 0") and ": verified\n" in hub.repos[MINE].messages[commit]
    )
    source = json.loads(held["surgery.json"])["source"]
    assert (source["spec"], source["revision"]) == ("meta/source@main", hub.repos["meta/source"].refs["main"])
    assert b"base_model: meta/source\n" in held["README.md"]
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "home")
    verified = surgery_command("verify", MINE, "--against", "meta/source", "--text", place.text, *MEASURED)
    assert verified.code == 0, verified.out + verified.err
    hub.repos[MINE].commits[commit]["eab_masks.py"] += b"#"
    shutil.rmtree(tmp_path / "home")
    damaged = surgery_command("verify", f"{MINE}@{commit}")
    assert damaged.code == 3 and "eab_masks.py" in damaged.error and f"do not use {MINE}@{commit}" in damaged.error


@pytest.mark.slow
def test_an_export_finds_the_original_that_is_named(hub: Hub, place: Place, tmp_path: Path) -> None:
    """By its id and commit in the manifest; of what was pushed, too."""
    assert run(place, "meta/source", tmp_path / "out", "--push", MINE).code == 0
    adapter, commit = tmp_path / "adapter", hub.repos["meta/source"].refs["main"]
    ended = surgery_command("export", "peft", MINE, adapter, "--text", place.text)
    assert ended.code == 0, ended.err
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("meta/source", commit)
    card = (adapter / "README.md").read_text()
    assert f'from_pretrained("meta/source", revision="{commit}")' in card and "base_model:\n- meta/source\n" in card
    hub.add("meta/source", place.source, "step2")
    other = surgery_command("export", "peft", MINE, tmp_path / "other", "--original", "meta/source@step2")
    assert other.code == 0, other.err  # the same tensors in one file


def test_a_plan_says_what_a_run_would_download(hub: Hub, place: Place, tmp_path: Path) -> None:
    result = tmp_path / "plan.json"
    ended = surgery_command("plan", place.recipe, "meta/source", "--json", result)
    assert ended.code == 0, ended.err
    weights = sum(path.stat().st_size for path in place.sharded.glob("*.safetensors"))
    plan = json.loads(result.read_text())
    assert plan["download"] == weights and f"Download: {weights / 1000:.1f} kB of weights" in ended.out
    local = surgery_command("plan", place.recipe, place.sharded, "--json", result)
    assert json.loads(result.read_text())["tensors"] == plan["tensors"] and "Download" not in local.out


@pytest.mark.slow
def test_a_training_series_is_scanned_in_one_command(hub: Hub, place: Place, tmp_path: Path) -> None:
    hub.add("meta/source", place.source, "step2")
    hub.add(MINE, place.converted)
    result = tmp_path / "scan.json"
    sources = ["meta/source@main", "meta/source@step2", MINE]
    ended = surgery_command("scan", *sources, "--text", place.text, *MEASURED, "--json", result)
    assert ended.code == 0, ended.err
    surveys = json.loads(result.read_text())["surveys"]
    assert [survey["source"] for survey in surveys] == sources
    assert surveys[0]["perplexity"] == surveys[1]["perplexity"] != surveys[2]["perplexity"]


def test_a_converted_id_verifies_offline_once_it_is_cached(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(MINE, place.converted)
    refused(surgery_command("verify", "meta/source"), "not a converted checkpoint")
    assert surgery_command("verify", MINE).code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert surgery_command("verify", MINE).code == 0
    refused(surgery_command("verify", "owner/other"), "owner/other", "HF_HUB_OFFLINE")


def test_the_revision_of_a_checkpoint_is_written_beside_it(hub: Hub, place: Place) -> None:
    hub.add(MINE, place.converted, "v1")
    refused(surgery_command("verify", f"{MINE}@v1", "--revision", "v1"), "owner/name@v1")
    assert surgery_command("verify", f"{MINE}@v1").code == 0


# ---- pushing


@pytest.mark.parametrize(
    ("to", "account", "words"),
    [
        ("name", {}, ("owner/name",)),
        (f"{MINE}@{'0' * 40}", {}, ("is no branch",)),
        (f"{MINE}@refs/pr/1", {}, ("is no branch",)),
        ("owner/a--b", {}, ("does not allow that name",)),
        ("stranger/name", {}, ("stranger/name", "only under owner, lab")),
        (MINE, {"role": "read"}, ("the token may only read", "hf auth login")),
        ("lab/name", {"orgs": [{"name": "lab", "roleInOrg": "read"}]}, ("lab/name", "only under owner")),
        ("meta/source", {}, ("meta/source", "403")),
        ("owner/model", {}, ("owner/model", "model.safetensors", "another name")),
    ],
)
def test_pushes_are_refused_before_any_work(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, account: dict, words
) -> None:
    monkeypatch.setattr(operate, "live_original", None)  # not reached
    hub.add("owner/model", {"model.safetensors": b"", "README.md": b""})
    hub.account |= account
    refused(run(place, place.source, tmp_path / "out", "--push", to), *words)
    refused(surgery_command("push", place.converted, to), *words)
    assert not (tmp_path / "out").exists() and not [path for method, path in hub.asked if method != "GET"]


def test_a_push_needs_a_token_that_the_hub_knows(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token, word in (("hf_wrong", "does not accept the token"), (None, "there is no token")):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        refused(run(place, place.source, tmp_path / "out", "--push", MINE), MINE, word, "hf auth login")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(run(place, place.source, tmp_path / "out", "--push", MINE), MINE, "HF_HUB_OFFLINE")


def test_what_did_not_pass_is_not_pushed(hub: Hub, place: Place, tmp_path: Path, out: Path) -> None:
    """Nor without proof, nor what failed its gates and was kept, nor what was changed since."""
    failing = tmp_path / "failing.yaml"
    failing.write_text(RECIPE.replace("max_ratio: 2.0", "max_ratio: 0.01"))
    kept = ("--keep-failed", tmp_path / "kept")
    arguments = ["run", failing, place.source, tmp_path / "new", "--text", place.text, *MEASURED]
    assert surgery_command(*arguments, "--push", MINE, *kept).code == 1
    refused(surgery_command("push", tmp_path / "kept", MINE), "failed its gates")
    refused(run(place, place.source, tmp_path / "new", "--push", MINE, "--no-verify"), "--no-verify")
    refused(surgery_command("push", place.source, MINE), "not a converted checkpoint")
    (out / "eab_masks.py").write_text("")
    changed = surgery_command("push", out, MINE)
    assert changed.code == 3 and "eab_masks.py" in changed.error
    assert MINE not in hub.repos


@pytest.mark.slow
def test_a_push_that_fails_keeps_the_output_and_says_where(hub: Hub, place: Place, tmp_path: Path) -> None:
    """The result is written all the same, and the push can be made up for."""
    hub.fails["/lfs"] = REFUSED
    out, result = tmp_path / "out", tmp_path / "verdict.json"
    ended = run(place, place.source, out, "--push", MINE, "--json", result)
    refused(ended, f"{out} is complete, but was not pushed to {MINE}@main", "403", f"surgery push {out} {MINE}@main")
    assert json.loads(result.read_text())["passed"] is True
    hub.fails.clear()
    assert surgery_command("push", out, MINE).code == 0
    assert surgery_command("verify", MINE).code == 0


@pytest.mark.parametrize("answer", [REFUSED, Refusal(413), Refusal(200)])
@pytest.mark.parametrize("path", ["repos/create", f"models/{MINE}/preupload", f"models/{MINE}/commit"])
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub: Hub, place: Place, path: str, answer: Refusal) -> None:
    """At whatever request, and whatever is answered: a status, or nonsense."""
    hub.fails[f"/api/{path}"] = answer
    refused(surgery_command("push", place.converted, MINE), "was not pushed")
    assert MINE not in hub.repos or set(hub.files(MINE)) == {".gitattributes"}


@pytest.mark.slow
def test_an_earlier_output_is_replaced_in_one_commit(hub: Hub, out: Path) -> None:
    """What is no longer there is deleted, so that the newest commit verifies; a branch leaves main alone."""
    hub.add(MINE, {"surgery.json": b"{}", "model-old.safetensors": b"x", "README.md": b"old", ".gitattributes": b"a"})
    before = hub.repos[MINE].refs["main"]
    hub.add("owner/model", {"config.json": b"{}", "model.safetensors": b"x"})
    for to, commits in ((MINE, 2), ("owner/model@eab", 2)):
        assert surgery_command("push", out, to).code == 0
        assert len(hub.repos[to.partition("@")[0]].commits) == commits
        assert surgery_command("verify", to).code == 0
    assert "model-old.safetensors" not in hub.files(MINE) and hub.files(MINE)[".gitattributes"] == b"a"
    assert hub.repos[MINE].commits[before]["README.md"] == b"old"
    assert set(hub.files("owner/model")) == {"config.json", "model.safetensors"}


def test_a_file_that_the_hub_would_not_take_is_named(hub: Hub, out: Path) -> None:
    hub.add(MINE, {"surgery.json": b"{}", ".gitignore": b"eab_masks.py\n"})
    refused(surgery_command("push", out, MINE), "does not hold eab_masks.py", ".gitignore")
