"""Interventions on encoders against the same done by hand, and what is left of features."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from helpers.encoders import live_encoder
from helpers.tiny import one_thread
from torch import nn

from surgery.live.model import Live
from surgery.live.stream import stream
from surgery.survey.fidelity import passes_on_images, run_on_images
from surgery.survey.full import FullSurvey


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def surveyed(live: Live, pixels: torch.Tensor) -> dict:
    survey = FullSurvey(live, live.port.tokens)
    stream(live, pixels, survey.observers)
    return survey.to_dict(None)


@torch.no_grad()
def features(model: nn.Module, pixels: torch.Tensor) -> np.ndarray:
    return model(pixel_values=pixels).last_hidden_state.double().numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)  # (N, T)


def test_the_largest_entry_of_each_image_to_zero_or_to_its_mean() -> None:
    live, pixels = live_encoder("dinov2"), images()
    model, survey = live.model, surveyed(live, pixels)
    told: list[tuple[int, str]] = []
    rows = {row["name"]: row for row in run_on_images(live, pixels, survey, lambda n, what: told.append((n, what)))}
    assert sum(n for n, _ in told) == passes_on_images(live) * len(pixels) == (1 + len(rows)) * len(pixels)
    layer = max(survey["layers"][1:-1], key=lambda row: row["auto_ratio"])["layer"]
    untouched, seen = features(model, pixels), {}

    def edited(value_of) -> np.ndarray:
        def leaving(block: nn.Module, args: tuple, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            for row in states:
                place = int(row.abs().argmax())
                seen.setdefault(place % 32, []).append(float(row.flatten()[place]))
                row.view(-1)[place] = value_of(place % 32)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        hook = model.encoder.layer[layer - 1].register_forward_hook(leaving)
        try:
            return features(model, pixels)
        finally:
            hook.remove()

    zero = cosines(edited(lambda dim: 0.0), untouched)
    means = {dim: float(np.mean(values)) for dim, values in seen.items()}
    mean = cosines(edited(means.__getitem__), untouched)
    for name, wanted in (("largest activation to zero", zero), ("largest activation to its mean", mean)):
        found = rows[name]["fidelity"]
        assert rows[name]["touched"] == len(pixels) and rows[name]["where"].startswith(f"layer {layer}, dim")
        assert found["cls"]["mean"] == pytest.approx(wanted[:, 0].mean(), abs=1e-5)
        assert found["patches"]["mean"] == pytest.approx(wanted[:, 1:].mean(), abs=1e-5)
        assert found["cls"]["low"] < found["cls"]["mean"] <= found["cls"]["high"] <= 1 + 1e-12
    assert zero.mean() < 0.9999 and np.array_equal(features(model, pixels), untouched), "nothing is left behind"


def _give_mask(mask: torch.Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "attention_mask": mask}


def test_registers_and_cls_are_hidden_from_others_alone() -> None:
    """As if the attention of all other tokens had no such keys."""
    live, pixels = live_encoder("dinov2_with_registers"), images()
    rows = {row["name"]: row for row in run_on_images(live, pixels, surveyed(live, pixels))}
    untouched = features(live.model, pixels)
    for name, start, stop in (("registers hidden from all others", 1, 5), ("CLS hidden from all others", 0, 1)):
        outside = [at for at in range(live.port.tokens) if not start <= at < stop]
        mask = torch.zeros(live.port.tokens, live.port.tokens)
        mask[outside, start:stop] = float("-inf")
        give = functools.partial(_give_mask, mask[None, None])
        hooks = [
            layer.attention.register_forward_pre_hook(give, with_kwargs=True) for layer in live.model.encoder.layer
        ]
        wanted = cosines(features(live.model, pixels), untouched)
        for hook in hooks:
            hook.remove()
        assert rows[name]["fidelity"]["patches"]["mean"] == pytest.approx(wanted[:, 5:].mean(), abs=1e-5)
        assert rows[name]["touched"] == len(outside) * (stop - start) * 3 * len(pixels)


def test_an_encoder_without_cls() -> None:
    live, pixels = live_encoder("siglip_vision_model"), images()
    rows = run_on_images(live, pixels, surveyed(live, pixels))
    assert len(rows) == 4 and all(row["fidelity"]["cls"] is None for row in rows)
    assert all(row["fidelity"]["patches"]["mean"] <= 1 + 1e-6 for row in rows)
