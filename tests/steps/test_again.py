"""What follows from the source is computed again: what rounding may differ by, and what text decided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tampering import ADDED, KEPT, KEY, TENSOR, at_bit, inside, keys, on_tensors
from helpers.tiny_checkpoint import MEASURED, RECIPE, Place, rehash, surgery_command

from surgery.operations.smoothing import Smoothing
from surgery.steps.again import ROUNDING, _distance
from surgery.steps.again_files import _first_difference

ALL = RECIPE
SMOOTHED = ALL.replace("verify:", "  - smoothing: {}\nverify:")
ROTATED = ALL.replace("verify:", "  - rotation: {}\n  - head_norm: {}\nverify:")


def test_a_difference_is_measured_against_the_largest_of_its_row() -> None:
    wanted = torch.tensor([[1.0, 1000.0], [1e-3, 2e-3]])
    found = wanted + torch.tensor([[0.5, 0.0], [0.0, 1e-6]])
    assert _distance(found, wanted) == pytest.approx(5e-4, rel=1e-3)
    assert _distance(wanted * torch.nan, wanted) == float("inf")
    assert _distance(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_half_precision_may_be_the_next_number_and_no_further() -> None:
    wanted = torch.tensor([[1.0, 3.0]]).bfloat16()
    one_up = (wanted.view(torch.int16) + 1).view(torch.bfloat16)
    assert _distance(one_up, wanted) == 0.0
    assert _distance((wanted.view(torch.int16) + 3).view(torch.bfloat16), wanted) > ROUNDING


@pytest.mark.parametrize(
    ("a", "b", "key"),
    [
        ({"a": 1}, {"a": 1}, ""), ({"a": 1}, {"a": 2}, "a"), ({"a": {"b": [1]}}, {"a": {"b": [2]}}, "a.b"),
        ({"a": 1}, {}, "a"), ({"a": 1}, {"a": True}, "a"), ({"a": 1}, {"a": 1.0}, "a"), ({}, {"b": None}, "b"),
    ],
)  # fmt: skip
def test_the_first_difference_of_two_configurations_is_named(a: dict, b: dict, key: str) -> None:
    assert _first_difference(a, b) == key


def test_smoothing_scales_rows_and_columns_by_powers_of_two() -> None:
    before, made = torch.randn(6, 4), Smoothing().could_make
    rows, columns = torch.tensor([2.0, 1, 0.5, 4, 1, 1])[:, None], torch.tensor([8.0, 1, 1, 0.25])
    for scale in (rows, columns, rows * columns):
        assert made(before, before * scale) and made(before.bfloat16(), before.bfloat16() * scale.bfloat16())
    assert made(before[0], before[0] * columns)
    one = torch.ones(6, 4)
    one[2, 3] = 2.0
    for scale in (1.5 * torch.ones(1), one, -rows):
        assert not made(before, before * scale)


def verified(place: Place, root: Path) -> tuple[int, str]:
    rehash(root)
    ended = surgery_command("verify", root, "--against", place.source)
    return ended.code, ended.out + ended.err


def test_another_version_is_named_where_files_differ(place: Place, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place.converted, tmp_path / "copy"))
    inside("surgery.json", "versions", transformers="4.0")(copy)
    keys("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(copy)
    code, said = verified(place, copy)
    assert code == 3 and "at tokenizer_class" in said and "written with transformers 4.0, and this is" in said


def test_what_a_manifest_claims_is_held_to_the_function(place: Place, tmp_path: Path) -> None:
    """Every tensor alone could be smoothing's work, and together they compute something else."""
    copy = Path(shutil.copytree(place.converted, tmp_path / "copy"))
    manifest = json.loads((copy / "surgery.json").read_text())
    manifest["recipe"]["operations"].append({"smoothing": {}})
    name = "model.layers.0.self_attn.q_proj.weight"
    manifest["tensors"][name]["status"] = "changed"
    (copy / "surgery.json").write_text(json.dumps(manifest))

    def scale(tensors: dict) -> None:
        tensors[name][:, ::2] *= 64

    on_tensors(KEPT, scale)(copy)
    code, said = verified(place, copy)
    assert code == 3 and "function again: llama: on random token ids" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [SMOOTHED, ROTATED])
def test_what_text_decided_is_said_and_the_rest_compared(place: Place, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    out = tmp_path / "out"
    ended = surgery_command("run", tmp_path / "recipe.yaml", place.source, out, "--text", place.text, *MEASURED)
    assert ended.code == 0, ended.err
    code, said = verified(place, out)
    assert code == 0 and "made of text cannot be computed again" in said
    edits = [at_bit(KEY, 30), at_bit(KEY, 1), inside("config.json", "eab", prefix_ids=[7] * 5), at_bit(TENSOR, 30)]
    edits.append(on_tensors(ADDED, lambda tensors: tensors.update({KEY: tensors[KEY] * 1.01})))
    edits.append(on_tensors(KEPT, lambda tensors: tensors.update({TENSOR: tensors[TENSOR] * 1.01})))
    for edit in edits:
        copy = Path(shutil.copytree(out, tmp_path / "copy"))
        edit(copy)
        code, said = verified(place, copy)
        assert code == 3 and "Traceback" not in said, said
        shutil.rmtree(copy)
