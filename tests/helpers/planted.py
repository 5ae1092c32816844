"""A model with a massive activation planted in it: known tokens, units and dimension."""

from __future__ import annotations

import numpy as np
import torch

from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from surgery.live.model import Live
from surgery.live.stream import Observer, stream

SPECIAL = {1: 30.0, 2: 20.0}  # tokens that the planted model makes massive, and what marks them
LAYER, UNITS, DIM, MARK = (
    2,
    (3, 11),
    7,
    5,
)  # where it does so, with which units, in which dim; what tells them the token


def planted() -> Live:
    """A tiny llama whose block 1 writes 1e5 and more to dim 7 of special tokens, through units 3 and 11 and no others.

    Dim 5 of the stream marks these tokens, is zero in all others, and is what units 3 and 11 read.
    """
    model = tiny_model("llama")
    layers = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, MARK] = 0.0
        for token, mark in SPECIAL.items():
            model.model.embed_tokens.weight[token, MARK] = mark
        for layer in layers:
            layer.self_attn.o_proj.weight[MARK] = 0.0
            layer.mlp.down_proj.weight[MARK] = 0.0
        mlp = layers[LAYER - 1].mlp
        for unit, size in zip(UNITS, (30.0, 20.0), strict=True):
            for part in (mlp.gate_proj, mlp.up_proj):
                part.weight[unit] = 0.0
                part.weight[unit, MARK] = size
            mlp.down_proj.weight[:, unit] = 0.0
            mlp.down_proj.weight[DIM, unit] = 20.0
    return live_of(model)


def planted_text(rows: int = 3) -> torch.Tensor:
    """Texts that begin with a special token; the first has it once more."""
    text = tiny_text(rows)
    text[:, 0], text[1, 0], text[0, 9] = 1, 2, 1
    return text


class Keep(Observer):
    """All states by layer (N, T, d), and what went through each down projection."""

    def __init__(self) -> None:
        self.states: dict[int, np.ndarray] = {}
        self.down: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def hidden(self, layer, states, batch):
        self.states[layer] = states.double().numpy().copy()

    def units(self, block, activations, written, batch):
        self.down[block] = activations.double().numpy().copy(), written.double().numpy().copy()


def kept(live, text) -> Keep:
    keep = Keep()
    with one_thread():
        stream(live, text, [keep])
    return keep
