"""Tuning on tiny models: every objective lowers its loss; runs repeat, resume and divide exactly; NaN ends well."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_model
from peft import PeftModel

from surgery.errors import SourceError
from surgery.live.graft import Fold, Norms, at_gate, fold, grafted, normed
from surgery.live.model import Live
from surgery.operations.attention_bias import AttentionBias, Folded
from surgery.operations.head_norm import HeadNorm
from surgery.progress import Advance, unseen
from surgery.tuning import loop as loop_module
from surgery.tuning.adapted import Adapted
from surgery.tuning.corpus import Corpus, make_corpus
from surgery.tuning.loop import Record, rate
from surgery.tuning.operation import Tune
from surgery.tuning.store import NAME, Store
from surgery.tuning.tune import Training, moved, require_shares, tune

PREFIX, CHUNK = (5, 7), 64
WHOSE = {"tune": {"steps": 6}, "text": "a"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def settings_of(**changes) -> Tune:
    small = {"steps": 6, "length": 32, "held_out": 2, "evaluate_every": 3, "warmup": 0}
    return Tune.model_validate({**small, **changes})


def text(count: int = 4000) -> list[int]:
    """A first-order chain, so that there is something to learn: every token is followed by one of three."""
    source = torch.Generator().manual_seed(0)
    ids, steps = [3], torch.randint(3, (count,), generator=source).tolist()
    for step in steps:
        ids.append(3 + (ids[-1] * 5 + step) % 94)
    return ids


@dataclass(frozen=True)
class Trained:
    """What came of a tuning: slots and norms as operations find them in the model, and what `tune` returned."""

    slots: Mapping[str, torch.Tensor]
    norms: Norms
    weights: dict[str, torch.Tensor]
    record: Record


def trained(
    live: Live, folded: Fold, training: Training, settings: Tune, gate: float = 0.0, advance: Advance = unseen
) -> Trained:
    found = tune(live, settings, training, gate, advance)
    slots = AttentionBias().held(live, Folded(folded)).fold.tensors
    sites = {site.name: {} for site in live.anatomy.sites if hasattr(live.trunk.get_submodule(site.name), "head_norm")}
    return Trained(slots, HeadNorm().held(live, sites), found.weights, found.record)


def tuned(model, settings: Tune, ids=None, advance: Advance = unseen, **options) -> tuple[Trained, Fold]:
    live = live_of(model)
    folded = fold(live, PREFIX, "as_prefix")
    training = Training(make_corpus(ids or text(), settings, CHUNK), **options)
    with grafted(live, folded):
        return trained(live, folded, training, settings, advance=advance), folded


def same(a: Trained, b: Trained, tolerance: float = 0.0) -> None:
    for name, mine in a.slots.items():
        torch.testing.assert_close(mine, b.slots[name], rtol=tolerance, atol=tolerance)
    for name, weight in a.weights.items():
        torch.testing.assert_close(weight, b.weights[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "objectives",
    [
        {"kl": 1.0},
        *(pytest.param({"kl": 0.0, one: 1.0}, marks=pytest.mark.slow) for one in ("lm", "hidden", "peak_ratio")),
    ],
    ids=["kl", "lm", "hidden", "peak_ratio"],
)
def test_every_objective_lowers_its_own_loss(objectives) -> None:
    """Against a teacher that differs from the start: activations are rounded coarsely, where it reads one."""
    more = {"lora": {"rank": 8, "learning_rate": 1e-2}}
    if objectives.get("kl", 1.0) or "hidden" in objectives:
        more["quantised"] = "w4a4_static"
    repeated = text(600)  # one batch of all training text, so that steps compare
    settings = settings_of(steps=40, batch=14, objectives=objectives, learning_rate=5e-3, evaluate_every=40, **more)
    losses = [entry["loss"] for entry in tuned(tiny_model("llama"), settings, repeated)[0].record.losses]
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])


def test_the_massive_penalty_takes_a_massive_activation_away() -> None:
    """A unit of the last MLP writes a spike wherever the attention of that block feeds it; LoRA can take that away."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] *= 2e5
    settings = settings_of(
        steps=40, batch=4, objectives={"kl": 0.0, "massive": 1.0}, learning_rate=3e-2, evaluate_every=40,
        lora={"rank": 2, "learning_rate": 3e-2},
    )  # fmt: skip
    losses = [entry["loss"] for entry in tuned(model, settings)[0].record.losses]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # no norm in float32 inside, whose rounding would drown them
def test_gradients_of_a_whole_model_match_finite_differences(family: str) -> None:
    model = tiny_model(family)
    live, tokens = live_of(model), torch.tensor([text(20)[:12]])
    with grafted(live, fold(live, PREFIX, "as_prefix")):
        module = live.trunk.get_submodule(live.anatomy.sites[1].name).attention_bias

        def loss() -> torch.Tensor:
            return model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)[0, :, 3].sum()

        for slot in (module.key, module.value):
            slot.requires_grad_()
            loss().backward()
            slot.requires_grad_(False)
            way = torch.randn(slot.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            slot += 1e-5 * way
            up = loss().item()
            slot -= 2e-5 * way
            down = loss().item()
            slot += 1e-5 * way
            assert (up - down) / 2e-5 == pytest.approx((slot.grad * way).sum().item(), rel=1e-6)


@pytest.mark.parametrize("quantised", [None, "w8a8_static"])
def test_the_model_is_left_as_it_came(quantised: str | None) -> None:
    model = tiny_model("llama", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = settings_of(
        steps=12, learning_rate=1e-2, lora={"rank": 2}, objectives={"lm": 1.0}, quantised=quantised
    )  # fmt: skip
    found, folded = tuned(model, settings)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(not torch.equal(found.slots[name], part) for name, part in folded.tensors.items())


def test_lora_trains_what_it_names_and_gives_back_merged_weights() -> None:
    model = tiny_model("llama", torch.float32)
    found, _ = tuned(model, settings_of(lora={"rank": 2, "targets": ["q_proj", "mlp.down_proj"]}, objectives={"lm": 1}))
    assert {name.split(".", 3)[3] for name in found.weights} == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    assert len(found.weights) == 8
    for name, weight in found.weights.items():
        delta = weight - model.get_parameter(name)
        assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 2
    with pytest.raises(
        SourceError, match="tune.lora.targets: 'qproj' is no linear layer of this model; it has .*q_proj"
    ):
        tuned(model, settings_of(lora={"targets": ["qproj"]}))


@pytest.mark.slow
def test_a_run_repeats_and_micro_batches_do_not_change_it() -> None:
    def run(**changes) -> Trained:
        settings = settings_of(batch=4, quantised="w8a8_static", lora={"rank": 2}, **changes)
        return tuned(tiny_model("llama"), settings)[0]

    same(run(), run())
    same(run(), run(accumulate=2), 1e-9)
    assert any(not torch.equal(run().slots[name], run(seed=1).slots[name]) for name in run().slots)


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path, monkeypatch) -> None:
    options = {"steps": 9, "lora": {"rank": 2}, "quantised": "w8a8_static"}
    model = tiny_model("llama", torch.float32)
    whole, _ = tuned(model, settings_of(**options))
    step = loop_module.Loop._step

    def interrupted(self, number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(loop_module.Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, settings_of(**options), store=Store(tmp_path, WHOSE))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    seen = []
    again, _ = tuned(
        model, settings_of(**options), store=Store(tmp_path, WHOSE), advance=lambda done, what: seen.append(done)
    )
    assert seen[0] == 6 and sum(seen) == 9
    same(again, whole)
    assert again.record == whole.record


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    tuned(model, settings_of(), store=Store(tmp_path, WHOSE))
    for other, key in (({**WHOSE, "text": "b"}, "text"), ({**WHOSE, "tune": {"steps": 7}}, "tune")):
        with pytest.raises(SourceError, match=f"is of another run .its {key} differs.; remove it to begin anew"):
            Store(tmp_path, other).load()
    (tmp_path / NAME).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(SourceError, match="is no tuning checkpoint"):
        Store(tmp_path, WHOSE).load()


@pytest.mark.parametrize("at", [0, 4])
def test_a_loss_that_is_not_a_number_ends_with_the_best_state(at: int, monkeypatch) -> None:
    compute = loop_module.Loop._loss
    calls = []

    def poisoned(self, tokens):
        calls.append(1)
        loss, parts = compute(self, tokens)
        return (loss * float("nan") if len(calls) == at + 1 else loss), parts

    monkeypatch.setattr(loop_module.Loop, "_loss", poisoned)
    found, folded = tuned(tiny_model("llama"), settings_of(objectives={"lm": 1.0}))
    kept = 0 if at == 0 else 3
    assert f"the loss of step {at + 1} is not a number; kept is the state of step {kept}" in found.record.stopped
    assert len(calls) == at + 1
    assert all(part.isfinite().all() for part in found.slots.values())
    changed = any(not torch.equal(found.slots[name], part) for name, part in folded.tensors.items())
    assert changed == (found.record.best["step"] > 0)


def test_what_is_no_better_is_not_kept(monkeypatch) -> None:
    judgements = iter([1.0, 0.9, 0.95, 1.1, 0.91])
    monkeypatch.setattr(loop_module, "held_out_nll", lambda *_: next(judgements))
    options = {"learning_rate": 1e-2, "objectives": {"lm": 1.0}}
    found, _ = tuned(tiny_model("llama"), settings_of(steps=40, patience=3, schedule="constant", **options))
    assert found.record.stopped == "no better on held-out text since step 3"
    assert found.record.best == {"step": 3, "nll": 0.9} and len(found.record.losses) == 12
    monkeypatch.undo()
    same(found, tuned(tiny_model("llama"), settings_of(steps=3, schedule="constant", **options))[0])


def test_the_adapter_loads_with_stock_peft(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    live, tokens = live_of(model), torch.tensor([text(40)])
    model.name_or_path = model.config._name_or_path = "/home/somebody/m"
    settings = settings_of(lora={"rank": 2}, objectives={"lm": 1.0})
    found, folded = tuned(model, settings, adapter=tmp_path, base="owner/name")
    assert model.name_or_path == "/home/somebody/m"
    for name in ("README.md", "adapter_config.json"):
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert "somebody" not in written and "owner/name" in written
    with grafted(live, replace(folded, tensors=found.slots)):
        kept = {name: model.get_parameter(name).data for name in found.weights}
        for name, weight in found.weights.items():
            model.get_parameter(name).data = weight
        wanted = model(input_ids=tokens, use_cache=False).logits
        for name, weight in kept.items():
            model.get_parameter(name).data = weight
    with grafted(live, folded):
        loaded = PeftModel.from_pretrained(model, tmp_path)
        torch.testing.assert_close(loaded(input_ids=tokens, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
        loaded.unload()


def test_the_order_of_text_is_of_seed_and_step_alone() -> None:
    settings = settings_of(batch=5)
    corpus = make_corpus(text(1000), settings, CHUNK)
    count = len(corpus.training)
    read = torch.cat([corpus.batch(step, 5) for step in range(count)])
    for epoch in read.split(count):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, corpus.training.tolist()))
    assert not torch.equal(read[:count], read[count : 2 * count])
    torch.testing.assert_close(corpus.batch(7, 5), make_corpus(text(1000), settings, CHUNK).batch(7, 5))
    held = set(map(tuple, corpus.held_out.view(-1, 32).tolist()))
    assert not held & set(map(tuple, corpus.training.tolist()))
    with pytest.raises(SourceError, match="the calibration text has 101 tokens, and tune needs 288"):
        make_corpus(text(100), settings, CHUNK)


def test_the_learning_rate_rises_falls_and_stays() -> None:
    cosine = [rate(settings_of(steps=100, warmup=10), step) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1) and cosine[9] == 1.0 == cosine[10]
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:], strict=False)) and 0 < cosine[-1] < 1e-3
    assert rate(settings_of(schedule="constant"), 5) == 1.0


TWO = """
import json, sys
import torch
sys.path[:0] = {tests!r}
import test_tuning as t
torch.set_num_threads(1)
found, _ = t.tuned(t.tiny_model("llama"), t.settings_of(batch=4, lora={{"rank": 2}}, quantised="w8a8_static"))
from accelerate import PartialState
state = PartialState()
assert state.num_processes == 2, state
if state.is_main_process:
    torch.save({{"slots": found.slots, "weights": found.weights, "losses": found.record.losses}}, {out!r})
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Sums over a batch are taken in another order, and nothing else differs: float64, 1e-9."""
    script, out = tmp_path / "two.py", tmp_path / "out.pt"
    places = [str(place) for place in (Path(__file__).parent, ROOT / "tests", ROOT)]
    script.write_text(TWO.format(tests=places, out=str(out)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(out)
    one, _ = tuned(tiny_model("llama"), settings_of(batch=4, lora={"rank": 2}, quantised="w8a8_static"))
    same(Trained(two["slots"], {}, two["weights"], one.record), one, 1e-9)
    assert json.dumps([round(e["loss"], 9) for e in two["losses"]]) == json.dumps(
        [round(e["loss"], 9) for e in one.record.losses]
    )


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide the batch of 3"):
        settings_of(batch=3, accumulate=2)
    require_shares(settings_of(batch=6, accumulate=3), 2)
    with pytest.raises(SourceError, match="tune.batch is 6 sequences, which 4 processes with 3 micro-batches"):
        require_shares(settings_of(batch=6, accumulate=3), 4)


def trained_norms(monkeypatch, gate: float, **changes) -> tuple[Trained, list[float]]:
    """What a model with head norms becomes, and the gate at each step."""
    model, seen = tiny_model("llama"), []
    live = live_of(model)
    head_norm = HeadNorm(gate=gate).described(live.anatomy)
    norms = {
        site.name: {
            "weight": torch.full((site.value_dim,), 0.1, dtype=torch.float64),
            "gate": torch.zeros(site.heads, dtype=torch.float64),
        }
        for site in live.anatomy.sites
    }
    compute = loop_module.Loop._loss

    def watched(self, tokens):
        seen.append(self.adapted.gates[0].detach().mean().item())
        return compute(self, tokens)

    monkeypatch.setattr(loop_module.Loop, "_loss", watched)
    settings = settings_of(objectives={"lm": 1.0}, learning_rate=1e-2, **changes)
    with (
        grafted(live, Fold((), {}, "as_prefix")),
        normed(live, *at_gate(head_norm, norms, 0.0)),
    ):
        training = Training(make_corpus(text(), settings, CHUNK))
        return trained(live, Fold((), {}, "as_prefix"), training, settings, gate), seen


def test_gates_rise_over_their_share_of_the_steps(monkeypatch) -> None:
    found, seen = trained_norms(monkeypatch, 0.8, steps=8, anneal=0.5, evaluate_every=8)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
    assert all(torch.equal(norm["gate"], torch.full_like(norm["gate"], 0.8)) for norm in found.norms.values())


def test_a_gate_of_zero_is_learned(monkeypatch) -> None:
    found, seen = trained_norms(monkeypatch, 0.0, steps=8, schedule="constant")
    assert seen[0] == 0.0 and seen[-1] != 0.0
    assert found.record.best["step"] == 8
    assert len({value for norm in found.norms.values() for value in norm["gate"].tolist()}) > 1


@pytest.mark.slow
def test_half_precision_multiplies_so_and_trains_float32() -> None:
    model = tiny_model("llama", torch.float32)
    options = {"steps": 12, "learning_rate": 1e-2, "lora": {"rank": 2}, "objectives": {"lm": 1.0}}
    half, _ = tuned(model, settings_of(precision="bfloat16", **options))
    full, _ = tuned(model, settings_of(**options))
    assert half.record.best["nll"] == pytest.approx(full.record.best["nll"], rel=0.01)
    assert half.record.losses != full.record.losses
    assert {part.dtype for part in half.slots.values()} == {torch.float32}


def test_what_is_judged_is_what_will_be_stored() -> None:
    """A checkpoint that stores so few bits that LoRA changes nothing is judged to be the one that it was."""
    model = tiny_model("llama", torch.float32)
    options = {"steps": 3, "lora": {"rank": 2}, "learning_rate": 1e-30, "objectives": {"lm": 1.0}}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = []

    def stored(name: str, weight: torch.Tensor) -> torch.Tensor:
        names.append(name)
        return before[name]

    found, _ = tuned(model, settings_of(**options), stored=stored)
    assert found.record.judged[0]["nll"] == pytest.approx(found.record.judged[-1]["nll"], abs=1e-12)
    assert set(names) == set(found.weights) and all(torch.equal(found.weights[name], before[name]) for name in names)
    assert tuned(model, settings_of(**options))[0].record.judged[-1]["nll"] != found.record.judged[-1]["nll"]


def test_a_corpus_is_told_by_its_tokens() -> None:
    one = Corpus(torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3), 0)
    other = Corpus(torch.ones(2, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3), 0)
    assert one.sha256 != other.sha256


def test_parts_move_to_a_device_whatever_holds_them() -> None:
    """Slots in a dataclass, norms in a dict, and what a function is bound to."""
    folded = Folded(Fold((5,), {"a.key": torch.ones(2), "a.value": torch.ones(3)}, "as_prefix"))
    parts = {"slots": folded, "norms": {"a": {"weight": torch.ones(1)}}, "turn": functools.partial(sum, torch.ones(4))}
    there = moved(parts, "meta")
    found = [*there["slots"].fold.tensors.values(), there["norms"]["a"]["weight"], *there["turn"].args]
    assert all(part.is_meta for part in found) and [len(part) for part in found] == [2, 3, 1, 4]
    assert there["slots"].fold.prefix == (5,) and there["turn"].func is sum


@pytest.mark.parametrize("kind", ["lfm2", "deepseek_v32"])
def test_mixers_are_trained_and_indexers_are_not(kind: str) -> None:
    """An indexer chooses without a gradient."""
    live = live_of(any_model(kind))
    folded = fold(live, PREFIX, "as_prefix")
    with grafted(live, folded):
        adapted = Adapted(live, settings_of(), 0.0)
        trained = {name.rpartition("base_model.model.")[2] for name in adapted.trained}
        adapted.close()
    expected = {name for name in folded.tensors if ".index_keys." not in name}
    assert len(trained) == len(expected)
    for name in expected:
        module, _, part = name.rpartition(".")
        assert any(f"{module}." in one and one.endswith(f".{part}") for one in trained), name
