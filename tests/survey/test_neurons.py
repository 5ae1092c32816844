"""Super neurons against plain numpy on the same tensors, and models whose units or MLP writes are taken away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.planted import DIM, LAYER, UNITS, kept, planted, planted_text
from helpers.tiny import live_of, one_thread, tiny_config, tiny_model, tiny_text
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.live.edits import TouchedNothing, edit_stream
from surgery.live.stream import Batch, stream
from surgery.survey.edits import silence_units, zero_mlp_write
from surgery.survey.massive import MassiveMeans
from surgery.survey.neurons import SuperNeurons, hoyer


def neurons(live, text, **kwargs) -> list[dict]:
    observer = SuperNeurons(live)
    with one_thread():
        stream(live, text, [observer], **kwargs)
    return observer.to_list()


@pytest.mark.parametrize("together", [True, False])
def test_super_neurons_are_those_that_write_the_spike(together, monkeypatch):
    live = planted()
    text = planted_text()
    if not together:
        monkeypatch.setattr("surgery.live.port.LOGIT_BYTES", 1)  # batches of one
    found = neurons(live, text)
    keep = kept(live, text) if together else None
    assert [(entry["layer"], entry["unit"], entry["dim"]) for entry in found] == [(LAYER, unit, DIM) for unit in UNITS]
    assert all(entry["births"] == 4 for entry in found), "three first tokens, and one later"
    assert found[0]["share"] + found[1]["share"] == pytest.approx(1, abs=1e-3)
    if keep is not None:
        weight = live.model.model.layers[LAYER - 1].mlp.down_proj.weight.detach().numpy()
        activations, written = keep.down[LAYER - 1]
        where = [(0, 0), (0, 9), (1, 0), (2, 0)]
        for entry in found:
            unit = entry["unit"]
            acts = np.array([activations[place][unit] for place in where])
            spikes = np.array([written[place][DIM] for place in where])
            assert entry["share"] == pytest.approx(np.sum(acts * weight[DIM, unit]) / np.sum(spikes))
            assert entry["activation"] == pytest.approx(acts.mean())
            assert entry["column_norm"] == pytest.approx(np.sqrt(np.sum(weight[:, unit] ** 2)))
            reach = [np.abs(activations[place]) * np.sqrt(np.sum(weight**2, axis=0)) for place in where]
            assert entry["reach"] == pytest.approx(np.mean([part[unit] / part.sum() for part in reach]))
            assert entry["sparsity"] == pytest.approx(1), "its column has a single entry"


def test_a_prefix_belongs_to_no_text():
    live = planted()
    assert neurons(live, tiny_text(), prefix=[1]) == []
    assert neurons(live, planted_text(), prefix=[1])[0]["births"] == 4


def test_random_weights_have_no_super_neurons():
    model = tiny_model("llama")
    assert neurons(live_of(model), tiny_text()) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_sums_over_births_of_either_sign(model_type):
    """Tensors handed to the observer, without a pass: births of opposite sign in a dim, one state passed on."""
    model = tiny_model(model_type)
    live = live_of(model)
    projection = {"llama": "layers.1.mlp.down_proj", "gpt2": "h.1.mlp.c_proj", "opt": "decoder.layers.1.fc2"}
    module = model.get_submodule(model.base_model_prefix).get_submodule(projection[model_type])
    weight = module.weight.detach().numpy()
    weight = weight.T if model_type == "gpt2" else weight  # (d, m)
    source = np.random.default_rng(0)
    before, acts = source.normal(size=(1, 20, 32)), source.normal(size=(1, 20, weight.shape[1]))
    acts[0, 4, 6], acts[0, 15, 6] = 3e5, -1e5
    before[0, 8, 12] = 1e5  # massive before the block: not its birth
    written = acts @ weight.T
    after = before + written
    observer = SuperNeurons(live)
    batch = Batch(torch.zeros(1, 20, dtype=torch.long), 0)
    observer.hidden(1, torch.tensor(before), batch)
    observer.units(1, torch.tensor(acts), torch.tensor(written), batch)
    observer.hidden(2, torch.tensor(after), batch)
    found = {entry["dim"]: entry for entry in observer.to_list()}
    magnitude = np.abs(after[0])
    hits = (magnitude >= 1000 * np.sort(magnitude.ravel())[(magnitude.size - 1) // 2]) & (magnitude >= 100)
    dims = {dim for place, dim in np.argwhere(hits) if place in (4, 15)}
    assert set(found) == dims and {entry["unit"] for entry in found.values()} == {6}
    for dim in dims:
        places = [place for place in (4, 15) if hits[place, dim]]
        signs = np.sign(after[0, places, dim])
        share = np.sum(signs * acts[0, places, 6]) * weight[dim, 6] / np.sum(signs * written[0, places, dim])
        assert found[dim]["share"] == pytest.approx(share) == pytest.approx(1, abs=1e-3)
        assert found[dim]["births"] == len(places)


def test_a_block_without_units_is_not_blamed_on_the_one_before():
    """What a block without units writes is not put down to the block before it."""
    model = tiny_model("llama")
    observer, batch = SuperNeurons(live_of(model)), Batch(torch.zeros(1, 20), 0)
    quiet, loud = torch.ones(1, 20, 32), torch.ones(1, 20, 32)
    loud[0, 0, 3] = 1e5
    observer.hidden(0, quiet, batch)
    observer.units(0, torch.eye(20, 48)[None], torch.ones(1, 20, 32), batch)
    observer.hidden(1, quiet, batch)
    observer.hidden(2, loud, batch)
    assert observer.to_list() == []


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=2, max_size=12),
    st.floats(1e-3, 1e3),
)
def test_hoyer_is_the_formula_and_keeps_its_bounds(rows, factor):
    weight = np.array(rows)
    weight[np.abs(weight) < 1e-6] = 0.0
    found = hoyer(torch.tensor(weight)).numpy()
    assert np.all(found >= -1e-9) and np.all(found <= 1 + 1e-9)
    np.testing.assert_allclose(hoyer(torch.tensor(weight * factor)).numpy(), found, atol=1e-9)
    root = np.sqrt(len(weight))
    for column, value in zip(weight.T, found, strict=True):
        if np.any(column):
            ratio = np.sum(np.abs(column)) / np.sqrt(np.sum(column**2))
            assert value == pytest.approx((root - ratio) / (root - 1), abs=1e-9)
        else:
            assert value == 0
    assert hoyer(torch.eye(5)).tolist() == pytest.approx([1] * 5) and hoyer(torch.ones(5, 1)).item() == pytest.approx(0)


def test_silent_units_are_a_model_without_their_columns():
    live = planted()
    text = planted_text()
    with one_thread(), torch.inference_mode():
        before = live.model(text).logits
        with silence_units(live, {LAYER: UNITS, 4: (0,)}) as touched:
            silent = live.model(text).logits
        assert touched.count == text.numel() * 3
        assert torch.equal(live.model(text).logits, before)
        without = planted().model
        without.model.layers[LAYER - 1].mlp.down_proj.weight[:, list(UNITS)] = 0.0
        without.model.layers[3].mlp.down_proj.weight[:, 0] = 0.0
        torch.testing.assert_close(silent, without(text).logits, atol=1e-9, rtol=0)
        assert (silent - before).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_without_the_mlps_write_a_token_keeps_what_it_was(model_type):
    """Without the write of the MLP a token keeps the state from before it."""
    model = tiny_model(model_type)
    live, text = live_of(model), tiny_text()
    plain = kept(live, text)
    with zero_mlp_write(live, 2, position=5) as touched:
        changed = kept(live, text)
    assert touched.count == 2 * 32
    expected = plain.states[2].copy()
    expected[:, 5] -= plain.down[1][1][:, 5]
    np.testing.assert_allclose(changed.states[2], expected, atol=1e-12)
    np.testing.assert_array_equal(changed.states[1], plain.states[1])
    assert not np.allclose(changed.states[4][:, 6:], plain.states[4][:, 6:]), "later tokens attend to it"
    np.testing.assert_array_equal(changed.states[4][:, :5], plain.states[4][:, :5])


def test_without_the_write_nothing_is_born():
    live = planted()
    text = planted_text()
    with zero_mlp_write(live, LAYER):
        found = neurons(live, text)
    assert all(entry["births"] == 1 for entry in found), "only the later token is left"
    with silence_units(live, {LAYER: UNITS}):
        assert neurons(live, text) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda live: zero_mlp_write(live, 2),  # experts, fused
        lambda live: silence_units(live, {2: (0,)}),
        lambda live: silence_units(live, {}),
        lambda live: edit_stream(live, [1], lambda layer, states: ([], 0.0), "no place"),
    ],
)
def test_what_touches_nothing_is_an_error(change):
    model = tiny_model("mixtral")
    live = live_of(model)
    with pytest.raises(TouchedNothing, match="touched nothing on this model and text") as raised:
        with change(live):
            model(tiny_text(1, 8))
    assert isinstance(raised.value, SurgeryError) and raised.value.exit_code == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_is_raised_and_everything_undone():
    live = planted()
    for change in (zero_mlp_write(live, LAYER), silence_units(live, {LAYER: UNITS})):
        with pytest.raises(ZeroDivisionError), change:
            raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in live.model.modules())


def test_a_position_behind_the_text_touches_nothing():
    live = planted()
    with pytest.raises(TouchedNothing), zero_mlp_write(live, LAYER, position=40):
        live.model(planted_text())


def test_means_are_those_of_first_and_later_tokens_apart():
    live = planted()
    text, means = planted_text(), MassiveMeans()
    with one_thread():
        stream(live, text, [means])
    states = kept(live, text).states[LAYER]
    assert means.of(LAYER, 0, DIM, -1.0) == pytest.approx(states[:, 0, DIM].mean())
    assert means.of(LAYER, 30, DIM, -1.0) == pytest.approx(states[0, 9, DIM])
    assert means.of(LAYER, 0, DIM + 1, -1.0) == -1.0 and means.of(1, 0, DIM, -1.0) == -1.0


def test_one_layer():
    model = tiny_model("llama", config=tiny_config("llama", num_hidden_layers=1))
    assert neurons(live_of(model), tiny_text(1, 2)) == []
