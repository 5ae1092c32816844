"""The whole survey of a live model: one pass over text with every observer, then what only all layers together show."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..live.likelihood import Likelihood
from ..live.model import Live
from ..live.places import normed_sites, slot_count
from ..live.port import Images, Sound, Words
from ..live.stream import Observer, stream
from ..progress import Advance, unseen
from .across import AutoMassive, across
from .attention import AttentionStatistics, Selection, ValueVariance
from .lens import POSITIONS, LogitLens
from .massive import MassiveActivations
from .neurons import SuperNeurons
from .patches import Kinds, NormMaps
from .pictures import AttentionMaps, Landscape
from .spectrum import Spectrum
from .states import States

Names = Callable[[Sequence[int]], list[str]]  # what tokens are called

# What is asked of the first token alone, which in an encoder is CLS.
OF_FIRST = ("sink_score", "slot_score", "sink_rate", "dominance", "value_variance_first", "p1_bound", "entropy_bound")
SHARE = 1 / 16  # of a pass that spectra may take, and as much the lens
SPECTRUM = 31  # one of rank r takes as long as so many times r^3 operations of the pass (CPU, r = 512 and 576)


class FullSurvey:
    """Every observer there is, on chunks of `length` tokens, and what they found.

    To add a metric, write an observer with `rows()` and name it here.
    """

    def __init__(self, live: Live, length: int, heads: Sequence[tuple[int, int]] = ()) -> None:
        every, positions = affordable(live, length)
        often = min(every, 4)  # rows of attention cost little, but not nothing
        self._massive, self._port = MassiveActivations(), live.port
        self._per_layer: list[Observer] = [
            self._massive, AutoMassive(), Spectrum(every), AttentionStatistics(every=often), ValueVariance(),
            Selection(every=often), States(every=often),
        ]  # fmt: skip
        self._likelihood = Likelihood() if live.port.predicts else None
        self.norms: NormMaps | None = None
        if isinstance(live.port, Images):
            self._per_layer.append(Kinds(live.port))
            self.norms = None if isinstance(live.port, (Sound, Words)) else NormMaps(live.port)
        else:
            self._per_layer.append(LogitLens(live, positions))
        self._neurons, self._landscape, self._maps = SuperNeurons(live), Landscape(), AttentionMaps(heads)
        self._about = {
            "model_type": live.anatomy.model_type,
            "n_slots": slot_count(live),
            "normed_sites": normed_sites(live),
            "parameters": live.parameters,
        }

    @property
    def observers(self) -> list[Observer]:
        others = [self._neurons, self._landscape, self._maps, self._likelihood, self.norms]
        return [*self._per_layer, *(observer for observer in others if observer is not None)]

    def to_dict(self, tokenizer: PreTrainedTokenizerBase | None) -> dict:
        """Plain data. Each observer defines its own keys; those with `rows()` join into one dict per layer.

        `tokenizer`: of a model that reads text.
        """
        names = functools.partial(self._port.names, tokenizer)
        layers = _merged(self._per_layer, names)
        if isinstance(self._port, Images) and not self._port.begins:  # the first token is a patch like others
            layers = [{key: value for key, value in row.items() if key not in OF_FIRST} for row in layers]
        return {
            **self._about,
            **self._read(),
            "massive_activations": self._massive.summary(),
            "layers": layers,
            "across": across(layers),
            "super_neurons": self._neurons.to_list(),
            "landscape": _named(self._landscape.to_dict(), names),
            "attention_maps": [_named(shown, names) for shown in self._maps.to_list()],
        }

    def _read(self) -> dict[str, Any]:
        """What was read, and of text how well it was predicted."""
        if self._likelihood is not None:
            score = self._likelihood.score
            return {"chunks": len(score.chunks), "chunk_length": score.targets + 1, "perplexity": score.to_dict()}
        assert isinstance(self._port, Images)
        port, read = self._port, "audio" if isinstance(self._port, Sound) else "images"
        grid: dict[str, Any] = {"grid": list(port.grid)}
        if isinstance(port, Sound) and not port.cut:
            grid = {"frames": port.grid[1]}
        if isinstance(port, Words):
            read, grid = "text", {"tokens": port.grid[1], "causal": port.causal}
        return {
            "chunks": self._massive.layers[0].sequences,
            "chunk_length": port.tokens,
            read: {**grid, "special": port.special, "registers": port.registers},
        }


def survey(
    live: Live,
    tokenizer: PreTrainedTokenizerBase,
    chunks: torch.Tensor,
    *,
    heads: Sequence[tuple[int, int]] = (),
    advance: Advance = unseen,
) -> dict:
    """Everything about a model on `chunks` (N, T), in one pass; `heads` (block, head): whose attention is shown."""
    found = FullSurvey(live, chunks.shape[1], heads)
    stream(live, chunks, found.observers, advance=advance, what="survey")
    return found.to_dict(tokenizer)


def affordable(live: Live, length: int) -> tuple[int, int]:
    """One in how many sequences has its spectra taken, and how many positions of each sequence the lens looks at.

    A pass over n tokens takes 2 n operations per parameter. What does not grow with the parameters weighs on small
    models alone: SmolLM2-135M has a spectrum of each 15th sequence of 512 tokens, a model of 7B of each.
    """
    config, parameters = live.model.config.get_text_config(), live.parameters
    vocabulary = getattr(config, "vocab_size", None) or 1  # an encoder has none, and no lens
    layers, width = len(live.anatomy.blocks) + 1, config.hidden_size
    share = SHARE * 2 * parameters * length
    every = math.ceil(SPECTRUM * min(length, width) ** 3 * layers / share)
    positions = int(share / (2 * vocabulary * width * layers))
    return every, min(max(positions, 1), POSITIONS)


def _merged(observers: list[Observer], names: Names) -> list[dict]:
    """One dict per layer, with the keys of every observer: None where a layer has no such thing."""
    layers: dict[int, dict] = {}
    for observer in observers:
        for layer, row in observer.rows().items():
            entry = layers.setdefault(layer, {"layer": layer})
            if repeated := sorted(entry.keys() & row.keys()):
                raise ValueError(f"two observers report {repeated[0]!r} for layer {layer}")
            entry.update(row)
    ids = {found["token"] for entry in layers.values() for found in entry["massive"]}
    ids |= {token for entry in layers.values() for token, _ in entry["tokens"]}
    texts_of = dict(zip(sorted(ids), names(sorted(ids)), strict=True))
    for entry in layers.values():
        for found in entry["massive"]:
            found["token"] = texts_of[found["token"]]
        texts: Counter[str] = Counter()  # several ids may be the same text
        for token, count in entry["tokens"]:
            texts[texts_of[token]] += count
        entry["tokens"] = [list(counted) for counted in texts.most_common()]
    keys = dict.fromkeys(key for entry in layers.values() for key in entry)
    return [{key: layers[layer].get(key) for key in keys} for layer in sorted(layers)]


def _named(shown: dict, names: Names) -> dict:
    """Token ids as text, places of an image by what they are."""
    return {**shown, "tokens": names(shown["tokens"])}
