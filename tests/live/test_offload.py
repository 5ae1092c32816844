"""A model larger than memory: its weights stay on disk, and folding, comparing and measuring still work."""

from __future__ import annotations

import pytest
import torch
from helpers.families import families
from helpers.tiny import build, tiny_text
from transformers import AutoModelForCausalLM

from surgery.anatomy.sites import examine
from surgery.live.graft import fold, grafted
from surgery.live.likelihood import Likelihood
from surgery.live.model import Live
from surgery.live.stream import stream
from surgery.survey.massive import MassiveActivations
from surgery.verification.equivalence import compare_random_ids, take_control

PREFIX = (5, 7)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gptj"])  # the latter two need adapters
@pytest.mark.slow
def test_a_model_on_disk_gives_what_it_gives_in_memory(tmp_path, kind):
    whole = build(families()[kind].config()).float()
    whole.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).eval()
    assert offloaded.get_input_embeddings().weight.is_meta, "nothing was offloaded, so nothing would be tested"
    anatomy = examine(whole.config.to_dict())
    found = {}
    for name, model in (("whole", whole), ("offloaded", offloaded)):
        live = Live(model, anatomy)
        folded = fold(live, PREFIX, "as_prefix")
        control, likelihood = take_control(live, PREFIX), Likelihood()
        with grafted(live, folded):
            compare_random_ids(live, control)
            stream(live, tiny_text(3, 12), [likelihood, MassiveActivations()])
        found[name] = likelihood.score.nll
    assert found["offloaded"] == pytest.approx(found["whole"], rel=1e-6)
