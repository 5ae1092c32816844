"""What the report's pictures show is what the model computes on the first sequence."""

from __future__ import annotations

import numpy as np
import torch
from helpers.planted import DIM, LAYER, Keep, planted, planted_text
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text

from surgery.live.graft import fold, grafted
from surgery.live.stream import stream
from surgery.survey.pictures import HEADS, AttentionMaps, Landscape


def test_the_landscape_is_of_the_layer_of_the_largest_activation() -> None:
    live = planted()
    text = planted_text()
    with one_thread(), torch.inference_mode():
        found = Landscape()
        keep = Keep()
        stream(live, text, [found, keep], prefix=[4])
    shown = found.to_dict()
    first = {layer: np.abs(states[0, 1:]) for layer, states in keep.states.items()}  # of the first sequence
    assert shown["layer"] == max(first, key=lambda layer: first[layer].max()) > LAYER - 1
    assert shown["tokens"] == text[0].tolist() and DIM in shown["dims"]
    np.testing.assert_allclose(shown["values"], first[shown["layer"]][:, shown["dims"]], rtol=1e-6)


def test_maps_are_eager_attention_weights_strongest_sink_first() -> None:
    """Maps are the weights of eager attention, from the strongest sink to the weakest."""
    model = tiny_model("llama")
    live, text = live_of(model), tiny_text()
    with one_thread(), torch.inference_mode():
        found = AttentionMaps()
        stream(live, text, [found])
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
    live, text = live_of(model), tiny_text()
    with one_thread(), torch.inference_mode():
        found, behind = AttentionMaps(), AttentionMaps()
        folded = fold(live, [1, 5], "as_prefix")
        stream(live, text, [behind], prefix=[1, 5])
        with grafted(live, folded):
            stream(live, text, [found])
    for entry in found.to_list():
        assert entry["slots"] == 2
        block, head = entry["block"], entry["head"]
        expected = behind._weights[block][head, 2:].float().numpy()  # the prefix's own rows are no rows of the fold
        np.testing.assert_allclose(entry["weights"], expected, atol=1e-3)


def test_heads_that_are_asked_for_are_shown_if_all_are_there() -> None:
    live, text = live_of(tiny_model("llama")), tiny_text()
    asked, absent, chosen = AttentionMaps([(1, 2), (0, 0)]), AttentionMaps([(1, 2), (9, 0)]), AttentionMaps()
    with one_thread(), torch.inference_mode():
        stream(live, text, [asked, absent, chosen])
    heads = [[(entry["block"], entry["head"]) for entry in found.to_list()] for found in (asked, absent, chosen)]
    assert heads[0] == [(1, 2), (0, 0)] and heads[1] == heads[2] and len(heads[2]) == HEADS
