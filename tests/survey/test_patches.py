"""CLS, registers and patches against plain numpy, on the tensors of a pass; attention where every token sees all."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from helpers.encoders import BLOCKS, ENCODERS, GRID, live_encoder, picture
from helpers.tiny import one_thread
from PIL import Image

from surgery.anatomy.calls import Call
from surgery.live import port as port_module
from surgery.live.port import Batch, Images
from surgery.live.stream import Observer, stream
from surgery.survey.attention import AttentionStatistics, Selection
from surgery.survey.full import FullSurvey
from surgery.survey.patches import HIGH, Kinds, NormMaps


class Keep(Observer):
    def __init__(self) -> None:
        self.states: dict[int, list[np.ndarray]] = {}
        self.weights: dict[int, list[np.ndarray]] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        self.states.setdefault(layer, []).extend(states.double().numpy())

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        query, key = (part.double().numpy() for part in (call.query, call.key))
        logits = query @ key.swapaxes(2, 3) * call.scale
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        self.weights.setdefault(block, []).extend(weights / weights.sum(axis=-1, keepdims=True))


def pixels(count: int = 5, loud: bool = True) -> torch.Tensor:
    """Noise; in every other image one patch is much louder than the rest."""
    made = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    if loud:
        made[::2, :, 8:16, 16:24] *= 60
    return made


def passed(kind: str, *observers: Observer, count: int = 5) -> tuple[Keep, Images]:
    live = live_encoder(kind)
    keep = Keep()
    with one_thread():
        stream(live, pixels(count), [keep, *observers])
    assert isinstance(live.port, Images)
    return keep, live.port


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "deit", "siglip_vision_model", "llava"])
def test_norms_and_looks_by_kind_of_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, special, registers = ENCODERS[kind]
    monkeypatch.setattr(port_module, "IMAGE_BYTES", 4 * 32 * (special + GRID * GRID) * 2)  # two images at a time
    kinds = Kinds(Images((GRID, GRID), special, registers))
    keep, _ = passed(kind, kinds)
    rows, some_high = kinds.rows(), False
    for layer in range(BLOCKS + 1):
        norms = np.linalg.norm(np.stack(keep.states[layer]), axis=-1)  # (N, T)
        patches = norms[:, special:]
        high = patches >= HIGH * np.sort(patches, axis=1)[:, [(patches.shape[1] - 1) // 2]]
        wanted = {
            "cls_norm": norms[:, 0].mean() if special else None,
            "register_norm": norms[:, 1 : 1 + registers].mean() if registers else None,
            "special_norm": norms[:, 1 + registers : special].mean() if special > 1 + registers else None,
            "patch_norm": patches.mean(),
            "patch_norm_max": patches.max(axis=1).mean(),
            "high_norm": high.mean(),
        }
        for name, value in wanted.items():
            assert rows[layer][name] == (None if value is None else pytest.approx(value, rel=1e-5)), (layer, name)
        if layer < BLOCKS:
            looks = np.stack(keep.weights[layer]).mean(axis=1)[:, special:].mean(axis=1)  # (N, T)
            to_high = [look[special:][of].sum() for look, of in zip(looks, high, strict=True) if of.any()]
            found, some_high = rows[layer + 1], some_high or bool(to_high)
            assert found["to_cls"] == (pytest.approx(looks[:, 0].mean(), rel=1e-4) if special else None)
            to_registers = pytest.approx(looks[:, 1 : 1 + registers].sum(axis=1).mean(), rel=1e-4)
            assert found["to_registers"] == (to_registers if registers else None)
            assert found["to_high"] == (pytest.approx(np.mean(to_high), rel=1e-4) if to_high else None)
    assert (some_high or kind == "llava") and "to_cls" not in rows[0]  # CLIP norms what enters its blocks


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "siglip_vision_model"])
def test_every_token_sees_every_other(kind: str) -> None:
    """Rows from the kernel and rows written out, of all queries and of a few."""
    for rows in (10**6, 5):
        statistics, selection = AttentionStatistics(rows=rows), Selection(rows=rows)
        keep, port = passed(kind, statistics, selection)
        for block, weights in keep.weights.items():
            table = np.stack(weights)
            row = statistics.rows()[block + 1]
            assert np.allclose(row["sink_score"], table[..., 0].mean(axis=(0, 2)), atol=1e-6)
            if rows > port.tokens:
                entropy = -(table * np.log(np.maximum(table, 1e-300))).sum(axis=-1)
                assert np.allclose(row["attention_entropy"], entropy.mean(axis=(0, 2)), atol=1e-4)
                assert row["mixing"] == pytest.approx(entropy.mean() / np.log(port.tokens), abs=1e-4)
            assert {*selection.rows()[block + 1]["attended_by_length"]["length"]} == {port.tokens}


def test_norm_maps_lie_as_the_image_does() -> None:
    live = live_encoder("dinov2")
    port = live.port
    assert isinstance(port, Images)
    maps, keep = NormMaps(port), Keep()
    with one_thread():
        stream(live, pixels(6), [maps, keep])
    shown = maps.to_dict([f"{i}.png" for i in range(6)], [picture(i, size=(20, 20)) for i in range(6)])
    assert [image["name"] for image in shown["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert shown["layers"] == sorted({*shown["layers"]}) and {1, BLOCKS} <= {*shown["layers"]}
    for at, image in enumerate(shown["images"]):
        assert Image.open(io.BytesIO(base64.b64decode(image["png"]))).size == (20, 20)
        for layer, norms in zip(shown["layers"], image["norms"], strict=True):
            wanted = np.linalg.norm(keep.states[layer][at][port.special :], axis=-1).reshape(GRID, GRID)
            assert np.allclose(norms, wanted, atol=1e-3)
        if at % 2 == 0:  # the loud patch is in the second row, in the third column
            assert np.unravel_index(np.argmax(image["norms"][0]), (GRID, GRID)) == (1, 2)


def test_a_survey_of_images_has_what_has_a_meaning() -> None:
    live = live_encoder("dinov2_with_registers")
    port = live.port
    assert isinstance(port, Images)
    survey = FullSurvey(live, port.tokens)
    with one_thread():
        stream(live, pixels(3), survey.observers)
    found = survey.to_dict(None)
    assert found["chunks"] == 3 and found["chunk_length"] == port.tokens == 5 + GRID * GRID
    assert found["images"] == {"grid": [GRID, GRID], "special": 5, "registers": 4} and "perplexity" not in found
    assert "lens_ppl" not in found["layers"][1] and found["layers"][1]["register_norm"] > 0
    assert found["landscape"]["tokens"][:6] == ["CLS", *(f"register {i}" for i in range(1, 5)), "patch 1,1"]
