"""Quantised verification against plain numpy: what is rounded, to what, and that the model is left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import surgery_command
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from surgery.anatomy.calls import observing
from surgery.errors import UnsupportedModel
from surgery.live.graft import fold, grafted
from surgery.live.likelihood import Likelihood
from surgery.live.quantised import (
    SCHEMES,
    Scheme,
    activation_ranges,
    linears,
    quantised,
    rounded_cache,
    rounded_weight,
)
from surgery.live.stream import stream
from surgery.progress import unseen
from surgery.verification.gates.quantised import Quantised

MATRICES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False),
)


def by_integers(values: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """What an integer kernel would store, and give back."""
    most = 2 ** (bits - 1) - 1
    integers = np.clip(np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)), -most, most)
    return integers.astype(np.int64) * scale


@given(MATRICES, st.integers(2, 8), st.one_of(st.none(), st.integers(1, 10)))
def test_weights_have_a_scale_per_output_channel_or_group_of_it(
    weight: np.ndarray, bits: int, group: int | None
) -> None:
    found = rounded_weight(torch.from_numpy(weight), bits, group).numpy()
    size = group or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        scale = np.abs(part).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        np.testing.assert_array_equal(
            found[:, start : start + size], by_integers(part, np.broadcast_to(scale, part.shape), bits)
        )
        assert np.all(np.abs(found[:, start : start + size] - part) <= scale / 2 * (1 + 1e-9))


@given(MATRICES, st.integers(1, 8))
def test_the_cache_lies_between_least_and_largest_of_a_token(states: np.ndarray, bits: int) -> None:
    found = rounded_cache(torch.from_numpy(states)[None, None], bits)[0, 0].numpy()
    low, high = states.min(axis=1, keepdims=True), states.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    assert np.all(np.abs(found - states) <= step / 2 + 1e-9 * np.abs(states).max())
    for row in found:
        assert len(np.unique(row)) <= 2**bits


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # Linear, and Conv1D with its weight transposed
@pytest.mark.parametrize("ranges", ["static", "dynamic", "per_token", "named"])
def test_a_layer_computes_what_integers_would(model_type: str, ranges: str) -> None:
    model, text = tiny_model(model_type), tiny_text()
    live = live_of(model)
    name, layer = list(linears(model, live.anatomy).items())[-1]
    named = ranges == "named"
    ranges = "per_token" if named else ranges
    scheme = Scheme(8, 4, per_token=(name.rpartition(".")[2],)) if named else Scheme(8, 4, ranges=ranges)
    seen = {}

    def keep(module, args, output):
        seen["in"], seen["out"] = args[0].detach().numpy(), output.detach().numpy()

    with one_thread(), torch.no_grad():
        peaks = activation_ranges(live, tiny_text(seed=5), unseen)
        handle = layer.register_forward_pre_hook(lambda _, args: seen.update(raw=args[0].detach().numpy()))
        with quantised(live, scheme, peaks), layer.register_forward_hook(keep):
            model(text)
        handle.remove()
    raw = seen["raw"]
    scale = {
        "static": np.array(peaks[name].item()),
        "dynamic": np.abs(raw).max(),
        "per_token": np.abs(raw).max(axis=-1, keepdims=True),
    }[ranges] / 7
    expected_in = by_integers(raw, np.broadcast_to(scale, raw.shape), 4)
    np.testing.assert_allclose(seen["in"], expected_in, rtol=1e-12)
    weight = layer.weight.detach().numpy()
    weight = weight.T if model_type == "gpt2" else weight
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    expected = expected_in @ by_integers(weight, np.broadcast_to(scale, weight.shape), 8).T
    expected = expected + (0 if layer.bias is None else layer.bias.detach().numpy())
    np.testing.assert_allclose(seen["out"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon"])
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_change_the_model_while_they_last_only(model_type: str, name: str) -> None:
    """Every scheme changes the model while it lasts, and not after."""
    model, text = any_model(model_type), tiny_text()
    live, scheme = live_of(model), SCHEMES[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with one_thread(), torch.no_grad():
        before = model(text).logits
        peaks = activation_ranges(live, text, unseen) if scheme.calibrated else None
        with pytest.raises(KeyboardInterrupt), quantised(live, scheme, peaks):
            assert (model(text).logits - before).abs().max() > 1e-3
            raise KeyboardInterrupt
        assert torch.equal(model(text).logits, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_embeddings_output_layer_and_slots_are_left_alone() -> None:
    model, text = tiny_model("llama"), tiny_text()
    live = live_of(model)
    assert not {"embed_tokens", "lm_head"} & {name.split(".")[-1] for name in linears(model, live.anatomy)}
    keys = {}
    with one_thread(), torch.no_grad(), grafted(live, fold(live, [1, 5], "as_prefix")):
        slots = [p.clone() for name, p in model.named_parameters() if "attention_bias" in name]
        scheme = SCHEMES["kv2"]
        with quantised(live, scheme), observing(lambda call: keys.setdefault(call.module, call.key)):
            model(text)
        after = [p for name, p in model.named_parameters() if "attention_bias" in name]
        with quantised(live, SCHEMES["w4a4_static"], activation_ranges(live, text, unseen)):
            inside = [p for name, p in model.named_parameters() if "attention_bias" in name]
            assert all(torch.equal(a, b) for a, b in zip(slots, inside, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(slots, after, strict=True)) and slots
    for key in keys.values():
        assert len(torch.unique(key[0, 0, 3])) <= 4, "what observes sees what is computed"


def test_static_scales_come_from_calibration_alone() -> None:
    model, text = tiny_model("llama"), tiny_text()
    live = live_of(model)
    with pytest.raises(ValueError, match="calibration"), quantised(live, SCHEMES["w8a8_static"]):
        pass
    losses = []
    with one_thread():
        for seed in (1, 9):  # the evaluation text itself, and another one
            peaks = activation_ranges(live, tiny_text(seed=seed), unseen)
            likelihood = Likelihood()
            with quantised(live, Scheme(activations=4), peaks):
                stream(live, text, [likelihood])
            losses.append(likelihood.score.nll)
    assert losses[0] != losses[1]


def test_weights_out_of_reach_are_refused() -> None:
    model = tiny_model("mixtral")  # experts in one tensor
    live = live_of(model)
    with pytest.raises(UnsupportedModel, match="no linear layer"), quantised(live, SCHEMES["w4"]):
        pass


def test_what_cannot_be_quantised_is_refused_at_plan(tmp_path: Path) -> None:
    tiny_model("mixtral", torch.float32).save_pretrained(tmp_path / "source")
    recipe = tmp_path / "q.yaml"
    plain = "surgery: 1\noperations: [attention_bias: {prefix: [5]}]\n"
    recipe.write_text(plain + "verify: {quantised: {w8a8_static: {max_ratio: 2}, kv4: {max_ratio: 2}}}")
    refused = surgery_command("plan", recipe, tmp_path / "source")
    assert refused.code == 2 and "no linear layer" in refused.error
    recipe.write_text(plain + "verify: {quantised: {kv4: {max_ratio: 2}}}")  # the cache alone is no matter of layers
    assert surgery_command("plan", recipe, tmp_path / "source").code == 0


def test_a_recipe_can_gate_every_scheme_and_no_other() -> None:
    assert set(Quantised.model_fields) == {*SCHEMES, "calibrations"}
