"""Layouts are read from headers alone, and nothing inconsistent gets past them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_numpy

from surgery.checkpoint.header import BITS
from surgery.checkpoint.layout import INDEX, SINGLE, iter_tensor_chunks, read_layout, read_tensor_bytes
from surgery.checkpoint.writing import index_json, plan_file
from surgery.errors import DamagedCheckpoint, SourceError, SurgeryError

METADATA = (5, [], "pt", True, {"format": 5}, {"format": {"a": "pt"}}, {"format": None})  # all of them wrong
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345678\n"


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def sharded(root: Path, shards: dict[str, dict[str, int]], weight_map: dict[str, str] | None = None) -> Path:
    """A checkpoint with the given F32 vectors (name to length) in each shard; `weight_map` overrides the honest one."""
    honest = {}
    for shard, tensors in shards.items():
        header, infos = plan_file(shard, [(name, "F32", (n,)) for name, n in tensors.items()])
        (root / shard).write_bytes(header + bytes(sum(info.nbytes for info in infos.values())))
        honest |= dict.fromkeys(tensors, shard)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": honest if weight_map is None else weight_map}))
    return root


def refused(root: Path, kind: type[SurgeryError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        read_layout(root)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert len(message) < 500 + 3 * len(str(root))
    for word in words:
        assert word in message


@st.composite
def files(draw: st.DrawFn) -> tuple[list[tuple[str, str, tuple[int, ...]]], bytes]:
    """Entries of a safetensors file and the bytes of its tensors."""
    names = draw(
        st.lists(
            st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
            min_size=1,
            max_size=5,
            unique=True,
        ).filter(lambda names: all(_utf8(name) for name in names))
    )
    whole = sorted(code for code, bits in BITS.items() if bits >= 8)
    entries = [
        (name, draw(st.sampled_from(whole)), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))) for name in names
    ]
    size = sum(info.nbytes for info in plan_file("x", entries)[1].values())
    return entries, draw(st.binary(min_size=size, max_size=size))


def _utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(content=files(), metadata=st.none() | st.just({"format": "pt"}))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, content, metadata) -> None:
    entries, data = content
    root = tmp_path_factory.mktemp("round")
    header, infos = plan_file(SINGLE, entries, metadata)
    (root / SINGLE).write_bytes(header + data)
    layout = read_layout(root)
    assert layout.tensors == infos
    assert layout.shards == (SINGLE,) and layout.total_bytes == len(header) + len(data)
    position = 0
    for name, _, shape in entries:
        nbytes = layout.tensors[name].nbytes
        assert layout.tensors[name].shape == shape
        assert bytes(read_tensor_bytes(layout, name)) == data[position : position + nbytes]
        assert b"".join(iter_tensor_chunks(layout, name, size=3)) == data[position : position + nbytes]
        position += nbytes


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4))
def test_the_safetensors_library_reads_what_we_plan(shapes) -> None:
    entries = [(f"t{i}", ("F32", "F16", "I64")[i % 3], shape) for i, shape in enumerate(shapes)]
    header, infos = plan_file("x", entries, {"format": "pt"})
    arrays = load_numpy(header + bytes(sum(info.nbytes for info in infos.values())))
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, _, shape in entries}


@settings(max_examples=80, deadline=None)
@given(content=files(), fraction=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_damage(tmp_path_factory: pytest.TempPathFactory, content, fraction) -> None:
    entries, data = content
    whole = plan_file(SINGLE, entries)[0] + data
    root = tmp_path_factory.mktemp("cut")
    (root / SINGLE).write_bytes(whole[: int(len(whole) * fraction)])
    refused(root, DamagedCheckpoint, SINGLE)


@settings(max_examples=40, deadline=None)
@given(content=files(), extra=st.binary(min_size=1, max_size=40))
def test_any_extension_is_damage(tmp_path_factory: pytest.TempPathFactory, content, extra) -> None:
    entries, data = content
    root = tmp_path_factory.mktemp("long")
    (root / SINGLE).write_bytes(plan_file(SINGLE, entries)[0] + data + extra)
    refused(root, DamagedCheckpoint, SINGLE, "trailing")


@settings(max_examples=150, deadline=None)
@given(content=files(), where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_wrong_header_byte_never_breaks_the_reader(
    tmp_path_factory: pytest.TempPathFactory, content, where, value
) -> None:
    entries, data = content
    header = bytearray(plan_file(SINGLE, entries)[0])
    header[int(len(header) * where)] = value
    root = tmp_path_factory.mktemp("flip")
    (root / SINGLE).write_bytes(bytes(header) + data)
    try:
        layout = read_layout(root)
    except DamagedCheckpoint:
        return
    assert layout.total_bytes == len(header) + len(data)  # whatever the names now are, every byte is accounted for


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("truncated",)),
        (b"\x10\0\0", ("truncated",)),
        (raw_file({"a": entry()}, bytes(4)), ("truncated", "instead of")),
        (raw_file({"a": entry()}, bytes(9)), ("trailing bytes",)),
        ((1 << 60).to_bytes(8, "little") + b"{}", ("header",)),
        (LFS_POINTER, ("Git-LFS pointer", "git lfs pull")),
        (raw_file(b"[]"), ("not JSON",)),
        (raw_file(b'{"a": '), ("JSON",)),
        (raw_file(b'{"a": ' + b"[" * 100_000), ("JSON",)),
        (raw_file(b'{"a": 1, "a": 2}'), ("JSON", "twice")),
        (raw_file(b'{"\\ud800": 1}'), ("JSON",)),
        (raw_file({"a": 3}), ('"a"', "dtype, shape and data_offsets")),
        (raw_file({"a": entry("F33")}, bytes(8)), ('"a"', "unknown dtype", "F33")),
        (raw_file({"a": entry(shape=(3,))}, bytes(8)), ('"a"', "8 bytes", "shape")),
        (raw_file({"a": entry(shape=(-2,))}, bytes(8)), ('"a"', "shape")),
        (raw_file({"a": {**entry(), "shape": [True, 2]}}, bytes(8)), ('"a"', "shape")),
        (raw_file({"a": {**entry(), "data_offsets": [0]}}, bytes(8)), ('"a"', "data_offsets")),
        (raw_file({"a": entry(), "b": entry()}, bytes(8)), ("gap or overlaps",)),
        (raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), ('"b"', "gap or overlaps")),
        (raw_file({"__metadata__": {"format": "pt"}}), ("no tensors",)),
        (raw_file({"__metadata__": {str(i): "" for i in range(20_000)}, "a": entry()}, bytes(8)), ("20,000 entries",)),
        *((raw_file({"__metadata__": value, "a": entry()}, bytes(8)), ("__metadata__",)) for value in METADATA),
        (raw_file({"a": {**entry(), "shape": [10**30, 0]}}), ('"a"', "shape")),
        (raw_file({"a": entry(shape=(2**62, 2**62, 0))}), ('"a"', "shape")),
        (raw_file({"a": entry(shape=(2**40, 2**40))}, bytes(8)), ('"a"', "shape")),
        (raw_file({"a": entry(shape=(1,) * 10**5)}, bytes(8)), ('"a"', "dimensions")),
        (raw_file({"a": entry(shape=(10**4000,) * 300)}, bytes(8)), ('"a"', "shape")),
        (raw_file({"a": entry(offsets=(0, 10**4299))}, bytes(8)), ('"a"', "data_offsets")),
        (raw_file({"a": entry("F" * 10**6)}, bytes(8)), ('"a"', "dtype")),
        (raw_file({"a\n" * 10**5: entry("x")}, bytes(8)), ("dtype", "\\n")),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    refused(tmp_path, DamagedCheckpoint, SINGLE, *words)


def test_metadata_may_be_null_or_absent(tmp_path: Path) -> None:
    for extra in ({}, {"__metadata__": None}, {"__metadata__": {}}, {"__metadata__": {"format": "pt"}}):
        (tmp_path / SINGLE).write_bytes(raw_file({**extra, "a": entry()}, bytes(8)))
        assert list(read_layout(tmp_path).tensors) == ["a"]


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    root = sharded(tmp_path, {"a.safetensors": {"x": 2, "y": 3}, "b.safetensors": {"z": 4}})
    layout = read_layout(root)
    assert layout.shards == ("a.safetensors", "b.safetensors")
    assert {name: info.shard for name, info in layout.tensors.items()} == index_json(layout.tensors)["weight_map"]
    assert index_json(layout.tensors)["metadata"]["total_size"] == 36
    assert layout.total_bytes == sum((root / shard).stat().st_size for shard in layout.shards)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    root = sharded(tmp_path / "snapshot", {"a.safetensors": {"x": 2}})
    (root / "a.safetensors").rename(tmp_path / "blob")
    (root / "a.safetensors").symlink_to("../blob")
    assert list(read_layout(root).tensors) == ["x"]
    (tmp_path / "blob").unlink()
    refused(root, DamagedCheckpoint, "a.safetensors", "missing")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "a\0b", "a\\b", 3, None]
)
def test_an_index_cannot_leave_the_directory(tmp_path: Path, shard: object) -> None:
    sharded(tmp_path, {"a.safetensors": {"x": 2}}, {"x": "a.safetensors", "y": shard})
    refused(tmp_path, DamagedCheckpoint, INDEX, "not a plain file name")


def test_index_disagreements_are_named(tmp_path: Path) -> None:
    cases = [
        ({"a.safetensors": {"x": 2}}, {"x": "a.safetensors", "y": "gone.safetensors"}, ("gone.safetensors", "missing")),
        ({"a.safetensors": {"x": 2}}, {"x": "a.bin"}, ("a.bin", "not a .safetensors")),
        ({"a.safetensors": {"x": 2}}, {"x": "a.safetensors", "y": "a.safetensors"}, ('"y"', "lacks it")),
        ({"a.safetensors": {"x": 2, "y": 1}}, {"x": "a.safetensors"}, ('"y"', "does not name")),
        (
            {"a.safetensors": {"x": 2}, "b.safetensors": {"x": 2, "y": 1}},
            {"x": "a.safetensors", "y": "b.safetensors"},
            ('"x"', "two shards", "a.safetensors", "b.safetensors"),
        ),
        (
            {"a.safetensors": {"x": 2}, "b.safetensors": {"y": 1}},
            {"y": "a.safetensors", "x": "b.safetensors"},
            ("lacks it",),
        ),
    ]
    for number, (shards, weight_map, words) in enumerate(cases):
        root = tmp_path / str(number)
        root.mkdir()
        refused(sharded(root, shards, weight_map), DamagedCheckpoint, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', ("twice", "'x'")),
        ('{"weight_map": {}}', ("weight_map",)),
        ('{"metadata": {}}', ("weight_map",)),
        ("[]", ("not a JSON object",)),
        ("{", ("not valid JSON",)),
        (LFS_POINTER.decode(), ("git lfs pull",)),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    sharded(tmp_path, {"a.safetensors": {"x": 2}})
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, DamagedCheckpoint, INDEX, *words)


def test_a_single_file_beside_an_index_must_belong_to_it(tmp_path: Path) -> None:
    root = sharded(tmp_path, {SINGLE: {"x": 2}, "more.safetensors": {"y": 1}})
    assert set(read_layout(root).tensors) == {"x", "y"}
    sharded(root, {"more.safetensors": {"y": 1}})
    refused(root, DamagedCheckpoint, SINGLE, INDEX, "stale")


def test_where_there_are_no_weights_the_way_out_is_said(tmp_path: Path) -> None:
    refused(tmp_path, SourceError, "no weights", SINGLE)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path, SourceError, "GGUF", "model.gguf")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(tmp_path, SourceError, "pickle", "pytorch_model.bin", "save_pretrained")
    refused(tmp_path / "nowhere", SourceError, "not a directory")


def test_headers_are_read_without_torch() -> None:
    code = "import sys, surgery.checkpoint.layout, surgery.checkpoint.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
