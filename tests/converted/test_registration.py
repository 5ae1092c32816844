"""After `import surgery`, before or after transformers, the Auto classes load checkpoints without trust_remote_code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.tiny import tiny_model, tiny_text

from surgery.checkpoint.manifest import TYPE_PREFIX
from surgery.converted.derived import RUNTIME_FILES
from surgery.converted.reading import load_converted
from surgery.converted.registration import register
from surgery.steps.options import RunOptions
from surgery.steps.recipe import parse_recipe
from surgery.verbs.run import run

RECIPE = "surgery: 1\noperations:\n  - attention_bias: {prefix: [5, 7]}\n"
FAMILIES = ("llama", "mixtral")  # mixtral: its experts are fused at load, by a mapping the derived type must have

# argv: order, report, then directories. Prints nothing; what it found goes to the report.
CHILD = """
import sys
if sys.argv[1] == "before":
    import surgery
    heavy = [name for name in ("torch", "transformers", "numpy", "safetensors") if name in sys.modules]
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
if sys.argv[1] == "after":
    import surgery
    heavy = []
transformers.logging.set_verbosity_error()

def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def load(path, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model

report, text = {"heavy": heavy}, torch.load(sys.argv[2])
with torch.no_grad():
    for path in sys.argv[3:]:
        model = load(path)
        model.save_pretrained(path + "-" + sys.argv[1])
        report[path] = {
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "config": type(AutoConfig.from_pretrained(path)).__name__,
            "same class": type(load(path)) is type(model),
            "logits": model(text).logits,
            "resaved": load(path + "-" + sys.argv[1])(text).logits,
            "trusted": load(path, trust_remote_code=True)(text).logits,
            "trunk": type(AutoModel.from_pretrained(path)).__name__,
            "without weights": AutoModelForCausalLM.from_config(model.config)(text).logits,
        }
    for unknown in ("eab_", "eab_nothing", "eab_blip_vision_model", "eab_eab_llama", "nothing"):
        report[unknown] = raised(lambda: AutoConfig.for_model(unknown))
    report["untouched"] = type(AutoConfig.for_model("llama")).__name__
torch.save(report, sys.argv[2])
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """{family: (directory, logits of the text)}."""
    root, found = tmp_path_factory.mktemp("registration"), {}
    for family in FAMILIES:
        tiny_model(family, torch.float32).save_pretrained(root / family)
        out = root / f"{family}-out"
        run(parse_recipe(RECIPE, "recipe"), str(root / family), out, RunOptions(verify=False))
        model = load_converted(out)
        if family == "mixtral":
            model.set_experts_implementation("eager")
        with torch.no_grad():
            found[family] = out, model(tiny_text()).logits
    return found


@pytest.fixture(scope="module", params=["before", pytest.param("after", marks=pytest.mark.slow)])
def report(converted, tmp_path_factory, request) -> dict:
    """What a process found that imports surgery before or after transformers, by family."""
    file = tmp_path_factory.mktemp("report") / "report.pt"
    torch.save(tiny_text(), file)
    places = [str(out) for out, _ in converted.values()]
    subprocess.run(
        [sys.executable, "-c", CHILD, request.param, str(file), *places],
        check=True, stdin=subprocess.DEVNULL, timeout=300, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(file.with_name("modules"))},
    )  # fmt: skip
    found = torch.load(file)
    by_family = {family: found[place] for family, place in zip(converted, places, strict=True)}
    return {**found, **by_family, "order": request.param}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_without_the_flag_and_gives_the_same_logits(report, converted, family):
    found, (_, logits) = report[family], converted[family]
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found["trusted"], logits)
    assert found["class"].startswith("surgery_derived_") and ".Eab" in found["class"] and found["same class"]
    assert found["config"].startswith("Eab") and found["trunk"].startswith("Eab")


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_carries_the_code(report, converted, family):
    out, logits = converted[family]
    resaved = Path(f"{out}-{report['order']}")
    for name in (*RUNTIME_FILES, f"modeling_eab_{family}.py"):
        assert (resaved / name).read_bytes() == (out / name).read_bytes()
    assert torch.equal(report[family]["resaved"], logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_computes_nothing_plausible(report, family):
    assert report[family]["without weights"].isnan().all()


def test_importing_surgery_imports_nothing_heavy(report):
    assert report["heavy"] == []


@pytest.mark.parametrize("unknown", ["eab_", "eab_nothing", "eab_blip_vision_model", "eab_eab_llama", "nothing"])
def test_unknown_types_still_raise(report, unknown):
    assert report[unknown].startswith("ValueError") and unknown in report[unknown]
    assert report["untouched"] == "LlamaConfig"


def test_registering_twice_changes_nothing():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register()
    first = CONFIG_MAPPING._extra_content
    register()
    assert CONFIG_MAPPING._extra_content is first
    assert f"{TYPE_PREFIX}llama" in CONFIG_MAPPING and f"{TYPE_PREFIX}blip_vision_model" not in CONFIG_MAPPING
    with pytest.raises(KeyError):
        CONFIG_MAPPING[f"{TYPE_PREFIX}nothing"]
