"""A model larger than memory: its weights stay on disk, and folding, comparing and measuring still work."""

from __future__ import annotations

import pytest
import torch
from families import families
from tiny import build, tiny_text
from transformers import AutoModelForCausalLM

from surgery.anatomy.sites import examine
from surgery.live.likelihood import Likelihood
from surgery.live.stream import stream
from surgery.operations.attention_bias import fold, grafted
from surgery.survey.massive import MassiveActivations
from surgery.verification.equivalence import compare_random_ids

PREFIX = (5, 7)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gptj"])  # the latter two need adapters
def test_a_model_on_disk_gives_what_the_same_model_in_memory_gives(tmp_path, kind):
    whole = build(families()[kind].config()).float()
    whole.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).eval()
    assert offloaded.get_input_embeddings().weight.is_meta, "nothing was offloaded, so nothing would be tested"
    anatomy = examine(whole.config.to_dict())
    found = {}
    for name, model in (("whole", whole), ("offloaded", offloaded)):
        slots = fold(model, anatomy, PREFIX)
        compare_random_ids(model, anatomy, PREFIX, slots, "as_prefix")
        likelihood = Likelihood()
        with grafted(model, anatomy, PREFIX, slots, "as_prefix"):
            stream(model, anatomy, tiny_text(3, 12), [likelihood, MassiveActivations()])
        found[name] = likelihood.score.nll
    assert found["offloaded"] == pytest.approx(found["whole"], rel=1e-6)
