"""The whole survey and every intervention on every family that surgery takes, and on odd sizes of model and text.

Random weights have nothing to intervene on: a spike is put in behind the first block, and the survey is told of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from helpers.families import EXACT, any_model, families, in_tiers
from helpers.tiny import build, live_of, one_thread, tiny_config, tiny_model, tiny_text
from transformers import AutoModelForCausalLM

from surgery.anatomy.sites import examine
from surgery.live.model import Live
from surgery.live.places import down_projections
from surgery.survey.full import affordable, survey
from surgery.survey.interventions import audit, plan_interventions, run_interventions
from surgery.verification.verdict import plain_json

SPIKE = {"layers": [{"layer": 1, "dims": [[3, 2]]}], "across": {"born": 1}, "super_neurons": [{"layer": 2, "unit": 1}]}


@contextlib.contextmanager
def spiked(live: Live) -> Iterator[None]:
    """The first token of every text has 1e6 in dim 3 behind the first block."""

    block = live.trunk.get_submodule(live.anatomy.blocks[0])
    forward = block.forward

    def with_spike(*args, **kwargs):
        output = forward(*args, **kwargs)
        states = output[0] if isinstance(output, (tuple, list)) else output
        states[..., 0, 3] = 1e6
        return output

    block.forward = with_spike
    try:
        yield
    finally:
        del block.forward


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


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_any_family(kind: str) -> None:
    with families()[kind].default_dtype(), one_thread():
        model, text = any_model(kind), tiny_text(2, 24)
        live = live_of(model)
        found = survey(live, Spelled(), text)
        with spiked(live):
            planned = plan_interventions(live, 24, {**found, **SPIKE})
            rows = run_interventions(live, text, planned)
        projected = {block + 1 for block in down_projections(live)}
    width = model.config.get_text_config().hidden_size
    assert [row["layer"] for row in found["layers"]] == list(range(len(live.anatomy.blocks) + 1))
    assert all(math.isfinite(number) for number in numbers(found["layers"]))
    attending = {site.block + 1 for site in live.anatomy.sites}
    for row in found["layers"][1:]:
        for key in ("sink_score", "value_variance_first"):
            assert (row[key] is not None) == (row["layer"] in attending)
        assert row["entropy_bits"] > 0
    assert found["across"]["born"] is None and found["across"]["phases"] is None, "random weights have neither"
    failed = [row["name"] for row in rows if row.get("error")]
    if kind == "hy_v4":  # an MLP writes to four streams at once, each in its own measure
        assert set(failed) == {"MLP's write to token 0 removed", "super neurons silenced"}
        return
    assert failed == ([] if 2 in projected else ["super neurons silenced"])
    zero, mean, random, medians = [row for row in rows if row["where"] == "layer 1" and "activations" in row["name"]]
    assert rows[0]["massive"] >= 2 * len(live.anatomy.blocks) // 4 and zero["touched"] == mean["touched"] == 2
    assert random["touched"] == medians["touched"] == 2 and zero["ppl"] != rows[0]["ppl"]
    written = [row["touched"] for row in rows if row["name"] == "MLP's write to token 0 removed"]
    assert written == [2 * width] * len(projected & {1, 2})
    silenced = [row["touched"] for row in rows if row["name"] == "super neurons silenced"]
    assert silenced == ([text.numel()] if 2 in projected else [None])


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v2"])
def test_a_shared_expert_is_not_the_whole_of_an_mlp(kind: str) -> None:
    """However wide it is: what routed experts write beside it would be missing."""
    wide = {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 64, "n_shared_experts": 1}
    config = families()[kind].config()
    config.update({name: size for name, size in wide.items() if hasattr(config, name)})
    model = build(config)
    assert not set(down_projections(Live(model, examine(config.to_dict())))) & {2, 3}, "layers with experts"


@pytest.mark.parametrize("size", [(1, 24), (2, 2), (3, 9)], ids=["one sequence", "two tokens", "few tokens"])
def test_little_text(size: tuple[int, int]) -> None:
    model, text = tiny_model("llama"), tiny_text(*size)
    live = live_of(model)
    with one_thread():
        found = survey(live, Spelled(), text)
        rows = run_interventions(live, text, plan_interventions(live, size[1], found))
        audit(live, text, found, most=4)
    assert (found["chunks"], found["chunk_length"]) == size
    assert all(math.isfinite(number) for number in numbers(found["layers"]))
    assert rows[0]["delta_nll"]["mean"] == 0
    plain_json(found)


def test_one_layer() -> None:
    model = tiny_model("llama", config=tiny_config("llama", num_hidden_layers=1))
    with one_thread():
        found = survey(live_of(model), Spelled(), tiny_text())
    assert len(found["layers"]) == 2 and found["across"]["phases"] is None and found["across"]["born"] is None
    assert len(found["attention_maps"]) == 4, "all heads of the one block"


def test_spectra_and_lens_take_their_share_of_the_pass() -> None:
    """A wider model affords more spectra and more of the lens; a tiny one always affords some."""
    with torch.device("meta"):
        narrow, wide = (
            AutoModelForCausalLM.from_config(tiny_config("llama", hidden_size=width)) for width in (32, 4096)
        )
    looks = [affordable(live_of(model), 64) for model in (narrow, wide)]
    assert looks[0][0] > looks[1][0] == 1
    assert 1 <= looks[0][1] < looks[1][1] == 16
