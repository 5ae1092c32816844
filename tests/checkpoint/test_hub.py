"""Models on the hub: what an id names, how little a plan moves, downloads that break off, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, main_thread

import pytest
from helpers import ROOT
from helpers.hub import TOKEN, Hub, Refusal, connect, serving
from huggingface_hub import constants

from surgery.checkpoint.hub import HubId, hub_id
from surgery.checkpoint.layout import INDEX, SINGLE, read_layout
from surgery.checkpoint.own_files import in_hub_cache
from surgery.checkpoint.source import materialise, open_source
from surgery.checkpoint.writing import plan_file
from surgery.errors import DamagedCheckpoint, NoSpace, SourceError, SurgeryError

CONFIG = json.dumps({"model_type": "llama"}).encode()


def weights(count: int, name: str = "x", metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of one tensor of so many float32."""
    header, _ = plan_file(SINGLE, [(name, "F32", (count,))], metadata or {"format": "pt"})
    return header + bytes(range(256)) * (count // 64) + bytes(4 * (count % 64))


def sharded(shards: int, count: int) -> dict[str, bytes]:
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(shards)]
    files = {name: weights(count, f"x{number}") for number, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": {f"x{number}": name for number, name in enumerate(names)}}
    return {**files, INDEX: json.dumps(index).encode(), "config.json": CONFIG}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty hub that behaves, and a client with an empty cache."""
    server.clear()
    connect(server, monkeypatch, tmp_path / "home")
    return server


def refusal(spec: str, kind: type[SurgeryError] = SourceError, **options: str) -> str:
    with pytest.raises(kind) as caught:
        materialise(open_source(spec, **options), Path("unused"))
    said = str(caught.value)
    assert type(caught.value) is kind and "\n" not in said and said.endswith(".") and len(said) < 300, said
    return said


# ---- ids


@pytest.mark.parametrize(
    ("spec", "revision", "named"),
    [
        ("owner/name", None, HubId("owner/name")),
        ("owner/name", "v1", HubId("owner/name", "v1")),
        ("owner/name@refs/pr/3", None, HubId("owner/name", "refs/pr/3")),
        ("o.w-n_er/na.m-e_2@step1000-tokens2B", None, HubId("o.w-n_er/na.m-e_2", "step1000-tokens2B")),
        ("owner/name@v1", "v1", HubId("owner/name", "v1")),
        ("name", None, None),
        ("owner/name/more", None, None),
        ("../name", None, None),
        ("/owner/name", None, None),
        ("öwner/name", None, None),
        ("owner/name\n", None, None),
        ("owner/" + "n" * 91, None, None),
    ],
)
def test_an_id_is_owner_name_and_perhaps_a_revision(spec: str, revision: str | None, named: HubId | None) -> None:
    assert hub_id(spec, revision) == named


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a..b", "-x", "/x", "a\x1b[31m", "a@b", "x" * 256])
def test_revisions_that_git_does_not_allow_are_refused(revision: str) -> None:
    with pytest.raises(SourceError, match="no branch, tag or commit") as caught:
        hub_id(f"owner/name@{revision}")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 200


def test_two_revisions_that_differ_are_refused() -> None:
    assert "--revision is another (main)" in refusal("owner/name@v1", revision="main")


def test_what_is_on_this_disk_is_no_hub_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "owner/name@v1"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_bytes(CONFIG)
        (Path(name) / SINGLE).write_bytes(weights(4))
        assert open_source(name).kind == "directory"
    assert hub.asked == []


# ---- headers, and then weights


def test_a_plan_moves_headers_and_small_files_only(hub: Hub, tmp_path: Path) -> None:
    """Of 33 shards of 100 kB, in a listing of several pages; weights come when they are asked for, byte for byte."""
    hub.page = 7
    files = sharded(33, 25_000)
    commit = hub.add("owner/name", {**files, "tokenizer.json": b"{}", "pytorch_model.bin": b"\x80" * 10_000})
    source = open_source("owner/name")
    assert (source.kind, source.spec, source.repo, source.revision) == ("hub", "owner/name", "owner/name", commit)
    assert source.companions == ("tokenizer.json",)
    assert source.missing == {name: len(data) for name, data in files.items() if name.endswith(".safetensors")}
    # What a client does not read may have left the server all the same: sockets hold some.
    moved = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert len(moved) == 33 and max(moved.values()) <= 1 << 16
    told: Counter[str] = Counter()
    root = materialise(source, tmp_path / "unused", lambda count, what: told.update({what: count}))
    assert told == source.layout.sizes and source.missing == {}
    assert read_layout(root) == source.layout
    assert all((root / name).read_bytes() == data for name, data in files.items())
    assert not (root / "pytorch_model.bin").exists() and hub.served["pytorch_model.bin"] == 0
    hub.served.clear()
    assert open_source("owner/name").missing == {} and not hub.served


def test_a_header_longer_than_the_first_request_is_read(hub: Hub) -> None:
    data = weights(1_000_000, metadata={"notes": "n" * 200_000})
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: data})
    source = open_source("owner/name")
    assert list(source.layout.tensors) == ["x"] and source.layout.sizes == {SINGLE: len(data)}
    assert hub.served[SINGLE] < 220_000


@pytest.mark.parametrize("metadata", [{}, {"notes": "n" * 200_000}])
def test_a_server_without_ranges_is_left_after_the_header(hub: Hub, metadata: dict[str, str]) -> None:
    hub.ranges = False
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: (data := weights(4_000_000, metadata=metadata))})
    assert open_source("owner/name").layout.sizes == {SINGLE: len(data)}
    assert hub.served[SINGLE] < len(data) // 2


def test_a_token_is_not_sent_to_another_host(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub sends its readers to another host for large files: headers and weights are read there."""
    hub.elsewhere = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: (data := weights(100_000))})
    source = open_source("owner/name")
    assert hub.served[SINGLE] <= 1 << 16
    assert (materialise(source, tmp_path) / SINGLE).read_bytes() == data
    assert [path for method, path in hub.asked if path.startswith("/elsewhere/")] and not hub.leaked


@pytest.mark.parametrize(
    ("damaged", "word"),
    [
        (weights(1000)[:-4], "truncated"),
        (weights(1000) + b"\0", "trailing"),
        (b"", "truncated"),
        (b"\xff" * 100, "truncated or not"),
        ((1 << 40).to_bytes(8, "little") + bytes(100), "truncated or not"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
    ids=["short", "long", "empty", "noise", "wild header", "pointer"],
)
def test_headers_from_the_hub_are_judged_as_strictly(hub: Hub, damaged: bytes, word: str) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: damaged})
    assert word in refusal("owner/name", DamagedCheckpoint)


def test_an_index_that_names_what_the_hub_lacks_is_damage(hub: Hub) -> None:
    files = sharded(3, 64)
    del files["model-00001-of-00003.safetensors"]
    hub.add("owner/name", files)
    assert "model-00001-of-00003.safetensors, which is missing" in refusal("owner/name", DamagedCheckpoint)


def test_a_converted_model_is_refused_by_its_id(hub: Hub) -> None:
    hub.add("owner/name", {"config.json": b'{"model_type": "eab_llama"}', SINGLE: weights(8)})
    assert refusal("owner/name").startswith("owner/name is already converted")


def test_an_adapter_beside_the_weights_is_refused_as_on_disk(hub: Hub) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(10), "adapter_config.json": b"{}"})
    with pytest.raises(SourceError, match="PEFT adapter"):
        open_source("owner/name")


def test_revisions_are_branches_tags_and_commits(hub: Hub) -> None:
    commits = {
        name: hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(count)}, name)
        for name, count in (("main", 1), ("step/1000", 2), ("v2.0", 3))
    }
    for name, count in (("main", 1), ("step/1000", 2), ("v2.0", 3), (commits["step/1000"], 2)):
        source = open_source(f"owner/name@{name}")
        assert source.layout.tensors["x"].shape == (count,)
        assert (source.revision, source.spec) == (commits.get(name, name), f"owner/name@{name}")
        assert source.repo == "owner/name"
    assert open_source("owner/name", revision="v2.0").spec == "owner/name@v2.0"


# ---- downloads


def test_a_download_that_broke_off_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: (data := weights(50_000))})
    source = open_source("owner/name")
    hub.served.clear()
    hub.cuts[SINGLE] = 150_000
    assert (materialise(source, tmp_path) / SINGLE).read_bytes() == data
    assert len(data) <= hub.served[SINGLE] < len(data) + 10_000


def test_shards_that_are_complete_are_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", sharded(3, 50_000))
    source = open_source("owner/name")
    last = max(source.missing)
    hub.fails[f"/owner/name/resolve/{source.revision}/{last}"] = Refusal(404)
    with pytest.raises(SourceError, match="404"):
        materialise(source, tmp_path)
    hub.fails.clear()
    hub.served.clear()
    materialise(source, tmp_path)
    assert hub.served[last] > 0 and set(hub.served) <= {last}


def test_an_interrupted_download_ends_at_once(hub: Hub, tmp_path: Path) -> None:
    """And leaves no part of a file in the cache, which could not be gone on with."""
    hub.add("owner/name", sharded(2, 1_000_000))
    source = open_source("owner/name")

    def interrupt() -> None:
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        Event().wait(0.3)

    hub.during[source.layout.shards[0]] = interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            materialise(source, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert source.layout.shards[0] in source.missing
    assert not [*(tmp_path / "home").rglob("*.incomplete")]


def test_a_disk_that_is_too_full_stops_before_any_weight(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(500_000)})
    source = open_source("owner/name")
    hub.served.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(NoSpace, match="needs 2.0 MB"):
        materialise(source, Path("unused"))
    assert not hub.served


def test_weights_that_changed_since_the_plan_are_damage(hub: Hub) -> None:
    commit = hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(1000)})
    source = open_source("owner/name")
    hub.repos["owner/name"].commits[commit][SINGLE] = weights(1000, "y")
    with pytest.raises(DamagedCheckpoint, match="not what the hub showed"):
        materialise(source, Path("unused"))


def test_a_cache_that_is_complete_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(1000)})
    hub.add("owner/planned", {"config.json": CONFIG, SINGLE: weights(1000)})
    root = materialise(open_source("owner/name"), Path("unused"))
    open_source("owner/planned")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert materialise(open_source("owner/name"), Path("unused")) == root
    assert "HF_HUB_OFFLINE" in refusal("owner/planned")


def test_links_of_the_hubs_cache_are_told_from_others(tmp_path: Path) -> None:
    """Into the blobs of the repository, or through them into those that all repositories share."""
    cache = tmp_path / "hub"
    root, blobs, shared = cache / "models--o--n/snapshots/0123", cache / "models--o--n/blobs", cache / "blobs/ab"
    for folder in (root, blobs, shared, tmp_path / "ab"):
        folder.mkdir(parents=True)
    for file in (blobs / "own", shared / "abcd", tmp_path / "ab/abcd", cache / "secret"):
        file.touch()
    (blobs / "etag").symlink_to(shared / "abcd")
    for name, target in {
        "a": blobs / "own",
        "b": blobs / "etag",
        "c": tmp_path / "ab/abcd",
        "d": cache / "secret",
    }.items():
        (root / name).symlink_to(target)
    assert [name for name in "abcd" if in_hub_cache(root, root / name)] == ["a", "b"]


# ---- refusals


@pytest.mark.parametrize(
    ("spec", "answer", "words"),
    [
        ("owner/missing", None, ("neither a directory here nor a model on the hub", "hf auth login")),
        ("owner/name@v9", None, ("no revision v9 of owner/name",)),
        ("owner/gated", None, ("gated", "accept its terms")),
        ("owner/a--b", None, ("neither a directory here nor a name that the hub allows",)),
        ("owner/pickles", None, ("no safetensors weights on the hub", "pickles")),
        ("owner/name", Refusal(500), ("out of order (500)",)),
        ("owner/name", Refusal(503), ("out of order (503)",)),
        ("owner/name", Refusal(429), ("too many requests", "wait")),
        ("owner/name", Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), ("token",)),
        ("owner/name", Refusal(403, {"X-Error-Message": "no"}), ("token does not allow it",)),
        ("owner/name", Refusal(451), ("451",)),
        ("owner/name", Refusal(200), ("owner/name could not be downloaded",)),  # a captive portal
    ],
)
def test_refusals_of_the_hub_are_one_sentence_each(hub: Hub, spec: str, answer: Refusal | None, words) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(10)})
    hub.add("owner/pickles", {"config.json": CONFIG, "pytorch_model.bin": b"\x80"})
    hub.add("owner/gated", {"config.json": CONFIG, SINGLE: weights(10)})
    hub.repos["owner/gated"].gated = True
    if answer is not None:
        hub.fails["/api/models/owner/name"] = answer
    said = refusal(spec)
    for word in words:
        assert word in said


def test_a_token_that_is_wrong_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(10)})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refusal("owner/name")
    assert "does not accept the token" in said and "hf_wrong" not in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_source("owner/name").missing


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense", "http://["])
def test_a_hub_that_cannot_be_reached_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    said = refusal("owner/name")
    assert "owner/name" in said and ("cannot be reached" in said or "could not be downloaded" in said)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_process_of_its_own_reads_the_environment(hub: Hub, tmp_path: Path, offline: str) -> None:
    """The client as users start it, by HF_ENDPOINT and HF_HUB_OFFLINE alone."""
    hub.add("owner/name", {"config.json": CONFIG, SINGLE: weights(10)})
    code = (
        "from surgery.checkpoint.source import open_source\nfrom surgery.errors import SourceError\n"
        "try: print(open_source('owner/name').missing)\nexcept SourceError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1
    assert ("HF_HUB_OFFLINE" if offline == "1" else f"{{'{SINGLE}': {len(weights(10))}}}") in done.stdout
