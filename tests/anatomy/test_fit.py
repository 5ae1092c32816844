"""Headers are held against config.json before a model is built, and what does not fit is damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.families import EXACT, families, in_tiers
from helpers.tiny import build, one_thread, tiny_config
from helpers.tiny_checkpoint import edit_json
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgery.anatomy.fit import Fit, examine_stored
from surgery.anatomy.parsed import parse_config
from surgery.anatomy.sites import examine
from surgery.checkpoint.allowance import Allowance, within
from surgery.checkpoint.layout import SINGLE, read_layout
from surgery.checkpoint.regular import read_json
from surgery.errors import DamagedCheckpoint, SourceError


def saved(root: Path, kind: str = "llama", **changes: object) -> Path:
    build(tiny_config(kind)).float().save_pretrained(root)
    edit_json(root / "config.json", **changes)
    return root


def fitted(root: Path) -> Fit:
    return examine_stored(read_json(root / "config.json"), read_layout(root))[1]


def with_tensors(root: Path, **shapes: tuple[int, ...]) -> Path:
    """Add tensors, named with __ for dots."""
    tensors = load_file(root / SINGLE)
    tensors |= {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, root / SINGLE, {"format": "pt"})
    return root


def refused(root: Path, *words: str) -> None:
    with pytest.raises(DamagedCheckpoint) as caught:
        fitted(root)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 300 + len(str(root))
    for word in words:
        assert word in message


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_what_a_family_saves_fits_its_config(kind: str, tmp_path: Path) -> None:
    family = families()[kind]
    with one_thread(), family.default_dtype():
        build(family.config()).float().save_pretrained(tmp_path)
        assert fitted(tmp_path).tied == ()


UNFIT = {
    "one layer less": ({"num_hidden_layers": 3}, "model.layers.3.", "has no place"),
    "one layer more": ({"num_hidden_layers": 5}, "model.layers.4.", "is missing"),
    "a larger vocabulary": ({"vocab_size": 30_000_000}, "(97, 32)", "(30000000, 32)"),
    "wider": ({"hidden_size": 64}, "(97, 32)", "(97, 64)"),
    "other heads": ({"num_key_value_heads": 4}, "k_proj", "(16, 32)"),
    "biases": ({"attention_bias": True}, "k_proj.bias", "is missing"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_config_of_another_model_is_damage(case: str, tmp_path: Path) -> None:
    changes, *words = UNFIT[case]
    refused(saved(tmp_path, **changes), *words)


ENDLESS = {
    "layers": {"num_hidden_layers": 100_000},
    "no layers": {"num_hidden_layers": 0},
    "layers beyond memory": {"num_hidden_layers": 10**15},
    "nested layers": {"text_config": {"num_hidden_layers": 10**9}},
    "labels": {"num_labels": 10**10},
    "heads": {"num_attention_heads": 10**12},
}


@pytest.mark.parametrize("case", ENDLESS)
def test_no_model_is_begun_for_counts_beyond_reason(case: str, tmp_path: Path, monkeypatch) -> None:
    root = saved(tmp_path, **ENDLESS[case])
    monkeypatch.setattr(PreTrainedModel, "_from_config", lambda *_, **__: pytest.fail("a model was built"))
    refused(root, "config.json")


def test_a_model_that_grows_beyond_its_tensors_is_ended(monkeypatch) -> None:
    """Whatever the key is called: here layers, with no look at the config before."""
    made: list[int] = []
    init = nn.Linear.__init__
    monkeypatch.setattr(nn.Linear, "__init__", lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1])
    config = tiny_config("llama").to_dict() | {"num_hidden_layers": 5000}
    with pytest.raises(DamagedCheckpoint, match="far more parameters"):
        examine(config, tensors=39)
    assert len(made) < 1000
    assert len(examine(config | {"num_hidden_layers": 4}, tensors=39).sites) == 4


def test_operations_and_modules_are_counted_too() -> None:
    with pytest.raises(DamagedCheckpoint, match="operations"), within(Allowance(1, 9, 9, 5)):
        for _ in range(9):
            torch.zeros(2, device="meta").add(1)
    with pytest.raises(DamagedCheckpoint, match="modules"), within(Allowance(1, 9, 3, 9)):
        nn.Sequential(*(nn.Identity() for _ in range(9)))
    with within(Allowance(1, 2, 0, 9)):
        nn.Linear(1, 1, device="meta")
    nn.Sequential(*(nn.Identity() for _ in range(9)))  # afterwards nothing is counted


def test_tables_larger_than_all_tensors_are_damage(tmp_path: Path) -> None:
    family = families()["gptj"]
    with one_thread():
        build(family.config()).float().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", n_positions=10**9)
    refused(tmp_path, "tables")


def test_tensors_of_no_part_are_unused_and_named(tmp_path: Path) -> None:
    root = with_tensors(saved(tmp_path), mtp__fc__weight=(4, 4), mtp__layers__0__mlp__up_proj__weight=(48, 32))
    anatomy, fit = examine_stored(read_json(root / "config.json"), read_layout(root))
    assert fit.unused == ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight")
    assert "mtp.fc.weight" in fit.notes(anatomy)[0] and "2 tensors" in fit.notes(anatomy)[0]


@pytest.mark.parametrize("name", ["model__layers__4__mlp__up_proj__weight", "model__layers__0__mlp__up_proj__bias"])
def test_tensors_of_the_models_own_parts_are_damage(name: str, tmp_path: Path) -> None:
    refused(with_tensors(saved(tmp_path), **{name: (48,)}), name.replace("__", "."), "has no place")


def test_a_layer_that_predicts_ahead_is_unused(tmp_path: Path) -> None:
    root = with_tensors(saved(tmp_path, num_nextn_predict_layers=1), model__layers__4__mlp__up_proj__weight=(48, 32))
    assert fitted(root).unused == ("model.layers.4.mlp.up_proj.weight",)


def test_tied_in_config_and_stored_twice_is_noted(tmp_path: Path) -> None:
    anatomy, fit = examine_stored(
        read_json(saved(tmp_path, tie_word_embeddings=True) / "config.json"), read_layout(tmp_path)
    )
    assert fit.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert "lm_head.weight counts as it is stored" in fit.notes(anatomy)[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # which is what transformers makes of it
    stored = load_file(tmp_path / SINGLE)
    assert torch.equal(loaded.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(loaded.get_input_embeddings().weight, stored["model.embed_tokens.weight"])


def test_names_of_another_format_are_said(tmp_path: Path) -> None:
    root = saved(tmp_path)
    tensors = {f"net.{name}": value for name, value in load_file(root / SINGLE).items()}
    save_file(tensors, root / SINGLE, {"format": "pt"})
    refused(root, "none has a name that LlamaForCausalLM knows", "net.")


@pytest.mark.parametrize("kind", ["bamba", "falcon_h1", "granitemoehybrid"])
def test_special_floats_are_read_as_transformers_does(kind: str, tmp_path: Path) -> None:
    config = families()[kind].config()
    config.time_step_limit = (0.0, float("inf"))
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert list(parse_config(raw).time_step_limit) == [0.0, float("inf")]
    assert raw["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_a_key_that_hides_a_method_is_refused() -> None:
    for config in ({"to_dict": 1}, {"get_text_config": None}):
        with pytest.raises(SourceError, match="hides a method"):
            parse_config(tiny_config("llama").to_dict() | config)
