"""A prompt cache of mlx-lm: its layout, what is refused where mlx-lm cannot be asked, and what it computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.bench import INPUT, Bench, refused
from helpers.exports import InMemory, distance, in_memory, written
from helpers.families import PREFIX, families
from helpers.tiny import build, live_of, tiny_model, tiny_text
from helpers.tiny_checkpoint import edit_json, surgery_command
from safetensors import safe_open

from surgery.checkpoint.source import open_source
from surgery.converted.rope import with_both_spellings
from surgery.delivery.mlx import CACHE, INSTALL, PROVED, Mlx
from surgery.delivery.mlx_file import Kind, held_slots, prompt_cache
from surgery.errors import UnsupportedModel
from surgery.live.graft import grafted

N = len(PREFIX)
THETA = 10000.0  # of the tiny llama


@pytest.fixture
def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mlx, "absent", lambda self: INSTALL)


def exporting(bench: Bench, original: Path, *options: object) -> list:
    return ["export", "mlx", bench.place.converted, bench.out, "--original", original, *options]


def slots(layers: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Key (n, H, D) and value (n, H, E) of each layer, E another than D."""
    source = torch.Generator().manual_seed(0)
    return [(torch.randn(N, 2, 8, generator=source), torch.randn(N, 2, 6, generator=source)) for _ in range(layers)]


# ---- the file


def test_the_layout_is_that_of_save_prompt_cache() -> None:
    """As mlx_lm/models/cache.py of 0.32 flattens [state of each layer], and [told, classes, integers]."""
    (first, second), told = slots(), {"model": "owner/name", "tokenizer_config": "{}"}
    tensors, metadata = prompt_cache([first, second], [Kind(), Kind("RotatingKVCache", 8)], told)
    assert list(tensors) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "1.3", "1.4", "1.5"]
    assert tensors["0.0"].shape == (1, 2, N, 8) and tensors["0.1"].shape == (1, 2, N, 6)
    assert torch.equal(tensors["1.0"][0, 1, 2], second[0][2, 1])  # head 1, place 2
    assert [int(tensors[name]) for name in ("0.2", "1.2", "1.3", "1.4", "1.5")] == [N, N, 0, 8, N]
    assert tensors["0.2"].shape == () and tensors["0.2"].dtype == torch.int32
    assert metadata == {
        "0.model": "owner/name", "0.tokenizer_config": "{}", "1.0": "KVCache", "1.1": "RotatingKVCache", "2.0": "",
        "2.1.0": "0.2", "2.1.1": "scalar", "2.2.0": "1.2", "2.2.1": "scalar", "2.3.0": "1.3", "2.3.1": "scalar",
        "2.4.0": "1.4", "2.4.1": "scalar", "2.5.0": "1.5", "2.5.1": "scalar",
    }  # fmt: skip


def test_a_checkpoint_is_exported_without_mlx(bench: Bench, without_mlx: None) -> None:
    original = bench.configured(rope_theta=THETA)
    ended = surgery_command(*exporting(bench, original))
    assert ended.code == 0, ended.err
    assert "It was not tried in mlx-lm" in (bench.out / "README.md").read_text(encoding="utf-8")
    with (
        safe_open(bench.out / CACHE, framework="pt") as file,
        safe_open(bench.place.converted / "model-00002-of-00002.safetensors", framework="pt") as ours,
    ):
        key = ours.get_tensor("model.layers.1.self_attn.attention_bias.key")
        assert torch.equal(file.get_tensor("1.0"), key.transpose(0, 1)[None])
        assert file.metadata()["0.model"] == "source"
    assert len(held_slots(bench.out / CACHE, 2)) == 2


def test_the_command_line_is_no_way_where_bos_is_folded(bench: Bench, without_mlx: None) -> None:
    surgery_command(*exporting(bench, bench.configured(rope_theta=THETA)))
    card = (bench.out / "README.md").read_text(encoding="utf-8")
    assert "BOS token in front" in card and "--prompt-cache-file" not in card


# ---- what is refused


def test_rope_parameters_alone_are_refused(bench: Bench, without_mlx: None) -> None:
    asked = exporting(bench, bench.place.source)
    refused(bench, asked, INPUT, "does not read the rope_parameters of llama", '"rope_theta": 10000.0', "--original")


def test_without_mlx_nothing_is_measured(bench: Bench, without_mlx: None) -> None:
    original = bench.configured(rope_theta=THETA)
    refused(bench, exporting(bench, original, "--text", bench.place.text), INPUT, "mlx-lm is not installed", INSTALL)


def given(kind: str, **changes: object) -> InMemory:
    """A tiny model in memory, and its config as that of the original, spelt as mlx-lm reads it."""
    model = tiny_model(kind)
    config = with_both_spellings({**model.config.to_dict(), **changes})
    source = SimpleNamespace(kind="directory", spec="source", name="source", repo=None, config=config, missing={})
    return replace(in_memory(live_of(model)), original=source)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mistral"])
def test_what_was_not_found_the_same_needs_mlx(kind: str, without_mlx: None) -> None:
    """Mistral's has windows."""
    with pytest.raises(UnsupportedModel, match=rf"{kind} has to be tried in mlx-lm .*checkpoint-surgery\[mlx\]"):
        Mlx().refuse(given(kind))
    Mlx().refuse(given("olmo2"))


def test_a_gguf_is_refused(without_mlx: None) -> None:
    finished = given("llama")
    finished.original = SimpleNamespace(kind="gguf", spec="m.gguf")
    with pytest.raises(UnsupportedModel, match=r"m\.gguf is a GGUF file, which mlx-lm does not load.*--original DIR"):
        Mlx().refuse(finished)


def test_windows_are_refused_for_slots_always_visible(without_mlx: None) -> None:
    finished = replace(given("mistral"), folded=replace(given("mistral").folded, visible="always"))
    with pytest.raises(UnsupportedModel, match="where mlx-lm's cache drops them"):
        Mlx().refuse(finished)


# ---- in mlx-lm, where it is installed


def saved(kind: str, root: Path, windows: bool = True) -> InMemory:
    """A tiny model in float32, as a directory too, spelt as mlx-lm reads it."""
    config = families()[kind].config(**({} if windows or "qwen" not in kind else {"use_sliding_window": False}))
    if not windows and "qwen" not in kind:
        config.sliding_window = None
    model = build(config).float()
    model.save_pretrained(root)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    edit_json(root / "config.json", **with_both_spellings(config))
    return replace(in_memory(live_of(model)), original=open_source(str(root)))


ROTATING = ("afmoe", "cohere2", "laguna")


@pytest.mark.parametrize("kind", [*PROVED, *ROTATING])
@torch.no_grad()
def test_mlx_lm_computes_the_same(kind: str, tmp_path: Path) -> None:
    """At once, in parts and token by token, past windows of 8; the bare model is another function."""
    pytest.importorskip("mlx_lm", reason=INSTALL)
    from surgery.delivery.mlx_running import Running

    finished = saved(kind, tmp_path / "source", windows=kind in ROTATING)
    out, ids = written(Mlx(), finished, tmp_path / "out"), tiny_text()
    model = finished.live.model
    bare = model(input_ids=ids).logits
    with grafted(finished.live, finished.folded):
        expected = model(input_ids=ids).logits
    running = Running(tmp_path / "source", out / CACHE)
    for cuts in ((), (20, 39), tuple(range(1, 40))):
        assert distance(running.log_probabilities(ids, cuts), expected) < 1e-3 < 1e-1 < distance(bare, expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("mistral", "its layers have windows"), ("gpt2", "mlx-lm does not load it"), ("bloom", "not supported")],
)
def test_what_mlx_lm_does_otherwise_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason=INSTALL)
    with pytest.raises(UnsupportedModel, match=words):
        written(Mlx(), saved(kind, tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mlx_lm_measures_what_it_loads(bench: Bench) -> None:
    pytest.importorskip("mlx_lm", reason=INSTALL)
    original, result = bench.configured(rope_theta=THETA), bench.root / "result.json"
    ended = surgery_command(*exporting(bench, original, "--text", bench.place.text, "--json", result))
    assert ended.code == 0, ended.err
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["passed"] and found["delta_log_probability"] < 1e-3
    assert "in mlx-lm" in found["proof"]


def test_mlx_lm_saves_the_file_as_it_was(tmp_path: Path) -> None:
    mlx_cache = pytest.importorskip("mlx_lm.models.cache", reason=INSTALL)
    out = written(Mlx(), saved("cohere2", tmp_path / "source"), tmp_path / "out")
    cache, told = mlx_cache.load_prompt_cache(str(out / CACHE), return_metadata=True)
    mlx_cache.save_prompt_cache(str(tmp_path / "again.safetensors"), cache, told)
    with (
        safe_open(out / CACHE, framework="pt") as ours,
        safe_open(tmp_path / "again.safetensors", framework="pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys()) and ours.metadata() == theirs.metadata()
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())
