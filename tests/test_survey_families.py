"""The whole survey and every intervention on every family that surgery takes, and on odd sizes of model and text."""

from __future__ import annotations

import math

import pytest
import torch
from families import any_model, families
from tiny import one_thread, tiny_config, tiny_model, tiny_text
from transformers import AutoModelForCausalLM

from surgery.anatomy.sites import examine
from surgery.survey.full import affordable, survey
from surgery.survey.interventions import audit, plan_interventions, run_interventions
from surgery.verification.verdict import plain_json

EXACT = [kind for kind, family in families().items() if family.outcome == "exact"]
SINKS_STAY = {  # what is hidden by masks: these make masks of their own
    "openai-gpt": ["attention to token 0 masked", "token 6 isolated"],
}


class Spelled:
    """Enough of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def numbers(found) -> list[float]:
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers(value)]
    if isinstance(found, list):
        return [number for value in found for number in numbers(value)]
    return [found] if isinstance(found, float) else []


@pytest.mark.parametrize("kind", EXACT)
def test_any_family(kind: str) -> None:
    with families()[kind].default_dtype(), one_thread():
        model, text = any_model(kind), tiny_text(2, 24)
        anatomy = examine(model.config.to_dict())
        found = survey(model, anatomy, Spelled(), text)
        rows = run_interventions(model, anatomy, text, plan_interventions(model, anatomy, 24, found))
    assert [row["layer"] for row in found["layers"]] == list(range(len(anatomy.blocks) + 1))
    assert all(math.isfinite(number) for number in numbers(found["layers"]))
    for row in found["layers"][1:]:
        assert row["sink_score"] is not None and row["entropy_bits"] > 0 and row["value_variance_first"] is not None
    assert found["across"]["born"] is None and found["across"]["phases"] is None, "random weights have neither"
    assert rows[0]["ppl"] == pytest.approx(found["perplexity"]["ppl"]) and len(rows) == 4
    assert [row["name"] for row in rows if row.get("error")] == SINKS_STAY.get(kind, [])


@pytest.mark.parametrize("size", [(1, 24), (2, 2), (3, 9)], ids=["one sequence", "two tokens", "few tokens"])
def test_little_text(size: tuple[int, int]) -> None:
    model, text = tiny_model("llama"), tiny_text(*size)
    anatomy = examine(model.config.to_dict())
    with one_thread():
        found = survey(model, anatomy, Spelled(), text)
        rows = run_interventions(model, anatomy, text, plan_interventions(model, anatomy, size[1], found))
        audit(model, anatomy, text, found, most=4)
    assert (found["chunks"], found["chunk_length"]) == size
    assert all(math.isfinite(number) for number in numbers(found["layers"]))
    assert rows[0]["delta_nll"]["mean"] == 0
    plain_json(found)


def test_one_layer() -> None:
    model = tiny_model("llama", config=tiny_config("llama", num_hidden_layers=1))
    with one_thread():
        found = survey(model, examine(model.config.to_dict()), Spelled(), tiny_text())
    assert len(found["layers"]) == 2 and found["across"]["phases"] is None and found["across"]["born"] is None
    assert len(found["attention_maps"]) == 4, "all heads of the one block"


def test_spectra_and_lens_take_their_share_of_the_pass() -> None:
    """A wider model affords more spectra and more of the lens; a tiny one always affords some."""
    with torch.device("meta"):
        narrow, wide = (
            AutoModelForCausalLM.from_config(tiny_config("llama", hidden_size=width)) for width in (32, 4096)
        )
    looks = [affordable(model, examine(model.config.to_dict()), 64) for model in (narrow, wide)]
    assert looks[0][0] > looks[1][0] == 1
    assert 1 <= looks[0][1] < looks[1][1] == 16
