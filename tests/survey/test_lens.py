"""The logit lens against plain numpy, and where it has nothing to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny import live_of, one_thread, tiny_config, tiny_model, tiny_text
from torch import nn

from surgery.live import port as port_module
from surgery.live.stream import Batch, Observer, stream
from surgery.survey import lens
from surgery.survey.attention import spaced
from surgery.survey.lens import LogitLens, final_norm

EPS = 1e-5


class Keep(Observer):
    def __init__(self) -> None:
        self.states: dict[int, list[np.ndarray]] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        self.states.setdefault(layer, []).extend(states.double().numpy())


def rms(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.variance_epsilon) * norm.weight.detach().numpy()


def standard(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + norm.eps)
    return x * norm.weight.detach().numpy() + norm.bias.detach().numpy()


@pytest.mark.parametrize("size", [1, 3])  # sequences in a batch: each batch is read at other places
@pytest.mark.parametrize("length", [5, 40])  # fewer places to predict from than are asked for, and more
@pytest.mark.parametrize(("model_type", "normed"), [("llama", rms), ("gpt2", standard)])
def test_layers_predict_through_final_norm_and_output_layer(
    model_type, normed, length, size, monkeypatch
) -> None:  # fmt: skip
    """Each layer predicts through the final norm and the output layer."""
    model, text, prefix = tiny_model(model_type), tiny_text(3, length), [1, 5]
    live, keep = live_of(model), Keep()
    monkeypatch.setattr(port_module, "LOGIT_BYTES", 4 * 97 * (length + 2) * size)
    with one_thread():
        found = LogitLens(live)
        stream(live, text, [keep, found], prefix=prefix)
    norm, head = final_norm(live), model.get_output_embeddings().weight.detach().numpy()
    rows = found.rows()
    assert sorted(rows) == [0, 1, 2, 3, 4]
    turns = [spaced(range(2, 2 + length - 1), lens.POSITIONS, turn).numpy() for turn in range(3 // size)]
    assert length == 5 or len({tuple(places) for places in turns}) == len(turns)
    for layer, row in rows.items():
        losses = []
        for at, (tokens, states) in enumerate(zip(text.numpy(), keep.states[layer], strict=True)):
            places = turns[at // size]  # all tokens but the last have a target
            logits = normed(states[places], norm) @ head.T
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(places)), tokens[places - 2 + 1]]
            losses += (np.log(np.exp(logits).sum(axis=1)) - chosen).tolist()
        assert math.log(row["lens_ppl"]) == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_rows_of_many_layers_go_to_the_output_layer_in_parts() -> None:
    model, text = tiny_model("llama"), tiny_text(2, 12)
    live, sizes = live_of(model), []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].numel() // args[0].shape[-1])
    )
    with one_thread():
        found = LogitLens(live)
        stream(live, text, [found])
    assert sizes[1:] and max(sizes[1:]) <= text.numel(), "no more logits at a time than the pass itself has"
    assert len(found.rows()) == 5


@pytest.mark.parametrize("model_type", ["granite", "gemma2"])  # logits are scaled, and capped
def test_no_lens_where_the_output_layer_is_not_the_prediction(model_type: str) -> None:
    """The lens is silent where the output layer's logits are not yet the prediction."""
    changes = {"logits_scaling": 8.0} if model_type == "granite" else {"final_logit_softcapping": 5.0}
    model = tiny_model(model_type, config=tiny_config(model_type, **changes))
    live = live_of(model)
    with one_thread():
        found = LogitLens(live)
        stream(live, tiny_text(), [found])
    assert found.rows() == {}
