"""A survey as `surgery scan` gives it, made up."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

TOKENS = ["The", " cat", "\n", " sat", " on", "."]


def make_provenance() -> dict:
    """As `steps.act.told` gives it."""
    text = {"name": "wiki.txt", "bytes": 1234, "sha256": "ab" * 32}
    return {
        "date": "2023-11-14T22:13:20Z", "command": ["surgery", "scan", "tiny"], "device": "cpu", "dtype": "float32",
        "versions": {"surgery": "0.1.0", "python": "3.11.7"},
        "texts": {"evaluation": [text], "calibration": [], "split": False},
        "chunks": {"evaluation": {"count": 8, "length": 64}, "calibration": None},
        "source": {"spec": "tiny", "kind": "directory", "revision": None, "dtype": None,
                   "sha256": {"a.bin": "cd" * 32}},
        "recipe": None,
    }  # fmt: skip


def _png() -> str:
    written = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(written, "png")
    return base64.b64encode(written.getvalue()).decode("ascii")


def make_survey(source: str = "models/tiny", *, slots: int = 0, spike: float = 5000.0) -> dict:
    """A survey of 5 layers, 3 heads and 6 tokens; `spike` stands at layers 2 and 3 in dimension 7 of token 0."""
    layers = []
    for layer in range(5):
        massive = layer in (2, 3) and spike >= 1000
        top, p1 = (spike, 0.98) if massive else (4.0 + layer, 0.4)
        row = {
            "layer": layer, "count": 2 if massive else 0, "max": top, "median": 0.5, "ratio": 2 * top,
            "top3": [top, top / 2, top / 4], "first_norm": 1.1 * top, "rest_norm": 6.0, "p1": p1, "p1_bound": p1 - 0.01,
            "massive": [{"dim": 7, "position": 0, "token": "The", "value": -top}] if massive else [],
            "entropy_bits": 0.25 if massive else 3.5 + layer / 10, "entropy_normalised": 0.5, "dominance": top,
            "entropy_bound": 0.3 if massive else 4.0, "lens_ppl": 4000.0 / (layer + 1),
            "cls_norm": 2.0, "register_norm": 3.0, "patch_norm": 4.0, "patch_norm_max": 9.0, "high_norm": 0.01,
        }  # fmt: skip
        if layer:
            row |= {
                "sink_score": [0.1 * layer, 0.2 * layer, 0.05],
                "slot_score": [[0.3 / slots] * slots] * 3 if slots else [[]] * 3,
                "sink_rate": 2 / 3 if massive else 0.0, "mixing": 0.4, "attention_entropy": [1.0, 2.0, 3.0],
                "effective_tokens": [2.5, 7.5, 20.0], "value_variance_first": [0.01, 0.02, 0.03],
                "value_variance_rest": [0.1, 0.2, 0.3], "attended_share": [0.1, 0.2, 0.3], "separability": [0.5] * 3,
                "gradient_sensitivity": [0.01, 0.02, 0.02], "gradient_bound": 0.03,
                "attended_by_length": {"length": [2, 4, 6], "tokens": [1.5, 2.0, 2.5]},
                "to_cls": 0.2, "to_registers": 0.1, "to_high": 0.3,
                "mixer": "Mamba", "state_first": 2.0, "state_rest": 3.0, "lead_near": 0.4, "lead_far": 0.001 * layer,
            }  # fmt: skip
        layers.append(row)
    size = np.full((6, 4), 0.5)
    size[0, 2] = spike
    weights = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    weights = np.concatenate([np.full((6, slots), 0.2), weights * (1 - 0.2 * slots)], axis=1)
    delta = {"mean": math.log(50), "low": math.log(40), "high": math.log(60)}
    kept = {"mean": 0.001, "low": -0.002, "high": 0.004}
    planted = {"position": 5, "sink_rate": 0.5, "untouched": 0.125}
    names = ("name", "where", "touched", "ppl", "delta_nll", "sink_rate", "entropy_bits", "massive")
    rows = [
        ("untouched", "", 0, 10.0, dict.fromkeys(kept, 0.0), 0.6, 0.25, 4),
        ("MLP to zero", "layer 2", 4, 500.0, delta, 0.0, 3.0, 0),
        ("to their mean", "layer 2", 4, 10.0, kept, 0.6, 0.25, 4),
        ("none there", "layer 9", None, None, None, None, None, None),
    ]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    rows[2]["planted"], rows[3]["error"] = planted, "it touched nothing."
    found = {"count": 4, "worst_ratio": 2 * spike, "dims": [7], "layers": [2, 3], "token_ids": [5]}
    nothing = {"count": 0, "worst_ratio": 0.0, "dims": [], "layers": [], "token_ids": []}
    big = spike >= 1000
    return {
        "source": source, "model_type": "llama", "chunks": 8, "chunk_length": 64, "n_slots": slots, "normed_sites": 0,
        "parameters": 134_515_008, "files": {"bytes": 538_000_000, "kind": "safetensors"},
        "speed": {"tokens": 64, "seconds": 0.05}, "sample": {"prompt": "The cat", "written": " sat\non it."},
        "provenance": make_provenance(),
        "perplexity": {"ppl": 20.003, "nll": 2.996, "tokens": 504}, "massive_activations": found if big else nothing,
        "layers": layers,
        "across": {
            "born": 2 if big else None, "died": 4 if big else None, "dims": [7], "tokens": ["The"],
            "auto": {"born": 1, "died": 4, "spans": [[1, 3]]},
            "phases": {"mix": [0, 1], "compress": [2, 3], "refine": [4, 4]} if big else None,
            "correlations": {"first_norm_entropy": -0.914, "first_norm_sink_rate": None},
        },
        "super_neurons": [{"layer": 2, "unit": 31, "dim": 7, "share": 0.7, "activation": 2944.2, "column_norm": 5.95}],
        "landscape": {"layer": 2, "tokens": TOKENS, "dims": [0, 3, 7, 9], "values": size.tolist()},
        "attention_maps": [{"block": 2, "head": 1, "slots": slots, "tokens": TOKENS, "weights": weights.tolist()}],
        "interventions": rows if big else None,
        "norm_maps": {"layers": [1, 4], "images": [{"name": "a.png", "png": _png(), "norms": [[[1.0, 2.0]] * 2] * 2}]},
        "audit": {"layer": 2, "scalars": 3, "of": 4096, "tried": {"0": 10.0, "3": 101.0}} if big else None,
    }  # fmt: skip
