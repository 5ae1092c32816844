"""What a stranger's config.json may not do: choose code, count without end, or hide that weights are packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.checkpoint.config import code_choices, read_config, stack_size, without_choices
from surgery.checkpoint.layout import SINGLE
from surgery.checkpoint.source import open_source
from surgery.checkpoint.writing import plan_file
from surgery.errors import DamagedCheckpoint, SourceError

CHOOSING = {
    "_attn_implementation": "owner/repo",
    "attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "owner/repo",
    "experts_implementation": "owner/repo",
    "_experts_implementation": "x",
    "fusion_config": {"patch_embeddings": True},
    "kernel_config": {},
    "use_kernels": True,
}


def written(root: Path, config: dict, entries: list[tuple[str, str, tuple[int, ...]]] | None = None) -> Path:
    (root / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    header, infos = plan_file(SINGLE, entries or [("x", "F32", (2,))], {"format": "pt"})
    (root / SINGLE).write_bytes(header + bytes(sum(info.nbytes for info in infos.values())))
    return root


@pytest.mark.parametrize("key", CHOOSING)
def test_what_chooses_code_is_left_out_at_any_depth(key: str, tmp_path: Path) -> None:
    choice = {key: CHOOSING[key]}
    config = {**choice, "text_config": {**choice, "hidden_size": 8, "deeper": [{**choice, "a": 1}]}}
    assert code_choices(config)[0] == key and f"text_config.{key}" in code_choices(config)
    found = open_source(str(written(tmp_path, config))).config
    assert found == {"model_type": "llama", "text_config": {"hidden_size": 8, "deeper": [{"a": 1}]}}
    assert code_choices(found) == []


def test_nested_code_is_a_choice_too(tmp_path: Path) -> None:
    config = {"auto_map": {"AutoModel": "a.B"}, "text_config": {"auto_map": {"AutoModel": "x/y--a.B"}}}
    assert code_choices(config) == ["text_config.auto_map"]
    assert without_choices(config, tmp_path) == {"auto_map": {"AutoModel": "a.B"}, "text_config": {}}


@pytest.mark.parametrize("key", ["transformers_weights", "backbone"])
def test_weights_from_elsewhere_are_refused(key: str, tmp_path: Path) -> None:
    for config in ({key: "../x.safetensors"}, {"vision_config": {key: "owner/name"}}):
        with pytest.raises(SourceError, match=key):
            open_source(str(written(tmp_path, config)))


def test_numbers_and_files_beyond_reason_are_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="rope_parameters.factor is a number of 401 digits"):
        read_config(written(tmp_path, {"rope_parameters": {"factor": 10**400}}))
    with pytest.raises(DamagedCheckpoint, match="larger than 16 MB"):
        read_config(written(tmp_path, {"layer_types": ["full_attention"] * 10**6}))
    with pytest.raises(DamagedCheckpoint, match="more than 131,072 values"):
        read_config(written(tmp_path, {"rope_parameters": {"long_factor": [1.0] * 200_000}}))


def test_the_stack_is_as_high_as_names_say() -> None:
    names = ["model.layers.11.mlp.experts.200.w", "model.layers.3.x", "lm_head.weight", "v2.x"]
    assert stack_size(names) == 12
    assert stack_size(["x", "lm_head.weight"]) == 0
    assert stack_size(["blk.3.attn_q.weight"]) == 4
