"""The whole survey of a live model: one pass over text with every observer, then what only all layers together show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..anatomy.sites import Anatomy
from .across import AutoMassive, across
from .attention import AttentionStatistics, Selection, ValueVariance
from .lens import LogitLens
from .likelihood import Likelihood
from .massive import MassiveActivations
from .neurons import SuperNeurons
from .pictures import AttentionMaps, Landscape
from .spectrum import Spectrum
from .stream import Observer, stream


def survey(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    chunks: torch.Tensor,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Everything about `model` on `chunks` (N, T), as plain data; DESIGN names the keys, each observer defines its own.

    To add a metric, write an observer with `rows()` and name it here: its keys join those of the layers.
    """
    massive, likelihood = MassiveActivations(), Likelihood()
    per_layer: list[Observer] = [
        massive, AutoMassive(), Spectrum(), AttentionStatistics(), ValueVariance(), Selection(),
        LogitLens(model, anatomy),
    ]  # fmt: skip
    neurons, landscape, maps = SuperNeurons(model, anatomy), Landscape(), AttentionMaps()
    stream(model, anatomy, chunks, [*per_layer, neurons, landscape, maps, likelihood], progress=progress)
    layers = _merged(per_layer, tokenizer)
    return {
        "model_type": anatomy.model_type,
        "chunks": chunks.shape[0],
        "chunk_length": chunks.shape[1],
        "n_slots": _slots(model, anatomy),
        "perplexity": likelihood.score.to_dict(),
        "massive_activations": massive.summary(),
        "layers": layers,
        "across": across(layers),
        "super_neurons": neurons.to_list(),
        "landscape": _named(landscape.to_dict(), tokenizer),
        "attention_maps": [_named(shown, tokenizer) for shown in maps.to_list()],
    }


def _merged(observers: list[Observer], tokenizer) -> list[dict]:
    """One dict per layer, with the keys of every observer: None where a layer has no such thing."""
    layers: dict[int, dict] = {}
    for observer in observers:
        for layer, row in observer.rows().items():
            entry = layers.setdefault(layer, {"layer": layer})
            if repeated := sorted(entry.keys() & row.keys()):
                raise ValueError(f"two observers report {repeated[0]!r} for layer {layer}")
            entry.update(row)
    for entry in layers.values():
        for found in entry["massive"]:
            found["token"] = tokenizer.decode([found["token"]])
    keys = dict.fromkeys(key for entry in layers.values() for key in entry)
    return [{key: layers[layer].get(key) for key in keys} for layer in sorted(layers)]


def _named(shown: dict, tokenizer) -> dict:
    """Token ids as text."""
    return {**shown, "tokens": [tokenizer.decode([token]) for token in shown["tokens"]]}


def _slots(model: PreTrainedModel, anatomy: Anatomy) -> int:
    return (getattr(model.get_submodule(anatomy.trunk).config, "eab", None) or {}).get("n_slots", 0)
