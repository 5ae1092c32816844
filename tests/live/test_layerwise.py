"""A model that comes layer by layer is the resident one, to the bit; it reads its weights once a pass, and has few."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from helpers.families import EXACT, families
from helpers.planted import planted, planted_text
from helpers.tiny import VOCAB, build, in_dtype, live_of, one_thread, tiny_config, tiny_text

from surgery.anatomy.fit import examine_stored
from surgery.checkpoint.config import read_config
from surgery.checkpoint.layout import read_layout
from surgery.errors import DamagedCheckpoint
from surgery.live import port
from surgery.live.by_layers import ByLayers
from surgery.live.graft import fold, folds, grafted
from surgery.live.likelihood import Likelihood, scored
from surgery.live.loading import load_original
from surgery.live.model import Live
from surgery.live.quantised import SCHEMES, activation_ranges, quantised
from surgery.live.stream import Observer, Reading, read, stream
from surgery.live.together import together
from surgery.survey.full import FullSurvey
from surgery.survey.massive import MassiveActivations
from surgery.verification.equivalence import compare_random_ids, take_control

KINDS = ("llama", "gpt2", "mixtral", "gpt_oss", "gemma2", "opt", "gpt_neox", "llama4_text")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Several batches of each text: two sequences of 40 tokens in one."""
    monkeypatch.setattr(port, "LOGIT_BYTES", 4 * VOCAB * 100)


def opened(root: Path, room: int = 0, aside: int = 0, *, layers: bool = True) -> Live:
    anatomy, _ = examine_stored(read_config(root), read_layout(root))
    return Live(load_original(root, by_layers=ByLayers(anatomy, room, aside) if layers else None), anatomy)


def saved(root: Path, kind: str = "llama", **changes) -> Path:
    build(tiny_config(kind, **changes)).to(torch.bfloat16).save_pretrained(root, max_shard_size="40KB")
    return root


@pytest.fixture
def llama(tmp_path):
    return saved(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_itself_to_the_bit(kind, tmp_path):
    root, text = saved(tmp_path, kind), tiny_text(6)
    ours, theirs = opened(root), opened(root, layers=False)
    assert not any(_there(ours.layers, home) for unit in ours.layers.units if unit.gates for home in unit.homes)
    assert scored(ours, text) == scored(theirs, text)
    mine, other = fold(ours, [1, 5], "as_prefix"), fold(theirs, [1, 5], "as_prefix")
    assert mine.tensors.keys() == other.tensors.keys()
    for name, part in other.tensors.items():
        assert torch.equal(mine.tensors[name], part), name
    with grafted(ours, mine), grafted(theirs, other):
        assert scored(ours, text) == scored(theirs, text)
    controls = [take_control(live, [1, 5]) for live in (ours, theirs)]
    for part in dataclasses.fields(controls[0]):
        a, b = (getattr(control, part.name) for control in controls)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part.name
    with grafted(ours, mine), grafted(theirs, other):
        assert compare_random_ids(ours, controls[0]) == compare_random_ids(theirs, controls[1])


@pytest.mark.matrix
@pytest.mark.parametrize("kind", EXACT)
def test_every_exact_type_reads_text_to_the_bit(kind, tmp_path):
    family = families()[kind]
    with family.default_dtype():
        in_dtype(build(family.config()), torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    text = tiny_text(4, 24)
    assert scored(opened(tmp_path), text) == scored(opened(tmp_path, layers=False), text)


def test_a_survey_says_the_same(tmp_path):
    """All observers at once, on a model with massive activations, of which several are born in each batch."""
    planted().model.save_pretrained(tmp_path)
    text, found = planted_text(7), []
    for layers in (True, False):
        live = opened(tmp_path, layers=layers)
        survey = FullSurvey(live, text.shape[1])
        stream(live, text, survey.observers)
        found.append([{layer: observer.rows() for layer, observer in enumerate(survey._per_layer)},
                      survey._neurons.to_list(), survey._landscape.to_dict(), survey._maps.to_list()])  # fmt: skip
        assert found[-1][1] and survey._massive.count
    assert repr(found[0]) == repr(found[1])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_read_once_a_pass(tied, tmp_path):
    """However many batches, prefixes and variants ride in it; a tied embedding is read at both ends."""
    root = saved(tmp_path, tie_word_embeddings=tied)
    live = opened(root, aside=10**9)
    text, once = tiny_text(6), sum(unit.stored * len(unit.gates) for unit in live.layers.units)
    before = live.layers.bytes_read
    found = folds(live, [[1], [1, 5], [7]], "as_prefix")
    assert live.layers.bytes_read - before == once
    likelihoods = [Likelihood() for _ in range(5)]
    readings = [Reading(text, [likelihoods[i]], graft=functools.partial(grafted, fold=found[i])) for i in range(3)]
    readings += [Reading(text, [likelihoods[3]]), Reading(text, [likelihoods[4]], prefix=[1, 5])]
    read(live, readings)
    assert live.layers.bytes_read - before == 2 * once
    theirs = opened(root, layers=False)
    for i, prefix in enumerate([[1], [1, 5], [7]]):
        with grafted(theirs, fold(theirs, prefix, "as_prefix")):
            assert likelihoods[i].score == scored(theirs, text)
    assert likelihoods[3].score == scored(theirs, text)
    assert likelihoods[4].score == scored(theirs, text, prefix=[1, 5])


class Loaded(Observer):
    """At each layer, how many units are in memory that are not pinned."""

    def __init__(self, layers) -> None:
        self.layers, self.most = layers, 0

    def hidden(self, layer, states, batch):
        there = [u for u in self.layers.units if all(_there(self.layers, home) for home in u.homes)]
        self.most = max(self.most, len([unit for unit in there if unit not in self.layers.pinned]))


def _there(layers, home) -> bool:
    """Whether a parameter has its values, and not what stands in for it."""
    return getattr(layers.model.get_submodule(home[0]), home[1]) is not home[2]


def test_one_unit_is_there_at_a_time_and_none_at_the_end(llama):
    live = opened(llama)
    watching = Loaded(live.layers)
    stream(live, tiny_text(6), [watching])
    assert watching.most == 1
    for unit in live.layers.units:
        assert all(_there(live.layers, home) != bool(unit.gates) for home in unit.homes)


def test_with_room_some_units_stay(llama):
    live = opened(llama)
    sizes = {unit: unit.loaded for unit in live.layers.units}
    room = max(sizes.values()) + max(unit.stored for unit in sizes) + sum(sizes.values()) // 2
    roomy, text = opened(llama, room), tiny_text(6)
    stays = [unit for unit in roomy.layers.pinned if unit.gates]
    assert stays and len(stays) < len(roomy.layers.units) - 1
    assert scored(roomy, text) == scored(live, text)
    again = roomy.layers.bytes_read
    assert scored(roomy, text) == scored(live, text)
    assert roomy.layers.bytes_read - again == sum(u.stored for u in roomy.layers.units if u not in roomy.layers.pinned)


def test_hidden_states_wait_on_disk_where_memory_ends(llama, monkeypatch):
    text = tiny_text(6)
    wanted = scored(opened(llama, layers=False), text)
    for aside in (0, 2 * 40 * 32 * 4 + 1):  # none, and one of three batches
        assert scored(opened(llama, aside=aside), text) == wanted


@pytest.mark.parametrize("scheme", ["w8a8_static", "w4", "kv4"])
def test_quantised_it_is_the_same(scheme, llama):
    text, found = tiny_text(6), []
    for layers in (True, False):
        live = opened(llama, layers=layers)
        ranges = activation_ranges(live, text[:3])
        with quantised(live, SCHEMES[scheme], ranges):
            rounded = scored(live, text)
        found.append((rounded, scored(live, text)))
        assert rounded != found[-1][1], "nothing was rounded"
    assert found[0] == found[1]


def test_any_call_of_the_model_is_right(llama):
    ours, theirs, text = opened(llama), opened(llama, layers=False), tiny_text(1, 12)
    with torch.inference_mode():
        assert torch.equal(ours.model(text).logits, theirs.model(text).logits)
        wanted = theirs.model.generate(text, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours.model.generate(text, max_new_tokens=6, do_sample=False), wanted)


def test_a_pass_that_ends_early_leaves_later_layers_alone(llama):
    live, seen = opened(llama), MassiveActivations()
    read(live, [Reading(tiny_text(6), [seen], depth=2)])
    assert sorted(seen.layers) == [0, 1, 2]
    head = next(unit for unit in live.layers.units if unit.gates == ("lm_head",))
    assert not _there(live.layers, head.homes[0]) and live.layers.bytes_read < sum(
        unit.stored for unit in live.layers.units
    )


def test_an_error_in_one_job_ends_all_and_the_model_goes_on(llama):
    live, text = opened(llama), tiny_text(2)
    ended = []

    def broken():
        live.model(text)
        raise ZeroDivisionError

    def other():
        try:
            for _ in range(5):
                live.model(text)
        finally:
            ended.append(True)

    with pytest.raises(ZeroDivisionError), torch.inference_mode():
        together(live.layers, [broken, other])
    assert ended == [True]
    assert scored(live, text) == scored(opened(llama, layers=False), text)


def test_damage_is_named(llama):
    weights = dict(live_of(build(tiny_config("llama"))).model.named_parameters())
    assert "model.layers.1.mlp.up_proj.weight" in weights
    layout = read_layout(llama)
    info = layout.tensors["model.layers.1.mlp.up_proj.weight"]
    live, shard = opened(llama), llama / info.shard
    with shard.open("r+b") as file:
        file.seek(info.start)
        file.write(b"\xc0\x7f")  # NaN
    with pytest.raises(DamagedCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight .*NaN or Inf"):
        scored(live, tiny_text(2))
    with shard.open("r+b") as file:
        file.truncate(info.start + 2)
    with pytest.raises(DamagedCheckpoint, match=rf"{info.shard} was truncated while it was read"):
        scored(opened_before(live), tiny_text(2))


def opened_before(live: Live) -> Live:
    """The same model, all of whose units come from their files again."""
    live.layers.release()
    return live
