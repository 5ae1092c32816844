"""What the report's pictures show is what the model computes on the first sequence."""

from __future__ import annotations

import numpy as np
import torch
from test_neurons import DIM, LAYER, Keep, planted, planted_text
from tiny import one_thread, tiny_model, tiny_text

from surgery.anatomy.sites import examine
from surgery.live.stream import stream
from surgery.operations.attention_bias import fold, grafted
from surgery.survey.pictures import HEADS, AttentionMaps, Landscape


def test_the_landscape_is_that_of_the_layer_with_the_largest_activation() -> None:
    model, anatomy = planted()
    text = planted_text()
    with one_thread(), torch.inference_mode():
        found = Landscape()
        keep = Keep()
        stream(model, anatomy, text, [found, keep], prefix=[4])
    shown = found.to_dict()
    first = {layer: np.abs(states[0, 1:]) for layer, states in keep.states.items()}  # of the first sequence
    assert shown["layer"] == max(first, key=lambda layer: first[layer].max()) > LAYER - 1
    assert shown["tokens"] == text[0].tolist() and DIM in shown["dims"]
    np.testing.assert_allclose(shown["values"], first[shown["layer"]][:, shown["dims"]], rtol=1e-6)


def test_maps_are_the_weights_of_eager_attention_from_the_strongest_sink_to_the_weakest() -> None:
    model = tiny_model("llama")
    anatomy, text = examine(model.config.to_dict()), tiny_text()
    with one_thread(), torch.inference_mode():
        found = AttentionMaps()
        stream(model, anatomy, text, [found])
        model.set_attn_implementation("eager")
        weights = torch.stack(model(text[:1], output_attentions=True).attentions)[:, 0].numpy()  # (blocks, heads, T, T)
    shown = found.to_list()
    sinks = weights[..., 0].mean(axis=-1)
    assert len(shown) == HEADS and all(entry["tokens"] == text[0].tolist() for entry in shown)
    for entry in shown:
        np.testing.assert_allclose(entry["weights"], weights[entry["block"], entry["head"]], atol=1e-3)
    scores = [sinks[entry["block"], entry["head"]] for entry in shown]
    assert scores[0] == sinks.max() and scores[-1] == sinks.min() and scores == sorted(scores, reverse=True)


def test_slots_stand_in_front_of_a_map() -> None:
    model = tiny_model("llama")
    anatomy, text = examine(model.config.to_dict()), tiny_text()
    with one_thread(), torch.inference_mode():
        found, behind = AttentionMaps(), AttentionMaps()
        slots = fold(model, anatomy, [1, 5])
        stream(model, anatomy, text, [behind], prefix=[1, 5])
        with grafted(model, anatomy, [1, 5], slots, "as_prefix"):
            stream(model, anatomy, text, [found])
    for entry in found.to_list():
        assert entry["slots"] == 2
        block, head = entry["block"], entry["head"]
        expected = behind._weights[block][head, 2:].float().numpy()  # the prefix's own rows are no rows of the fold
        np.testing.assert_allclose(entry["weights"], expected, atol=1e-3)
