"""Tuning of encoders: slots come nearer to the original, which as the teacher keeps its registers; files; refusals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import SIDE, config_of, encoder_model, picture, save_encoder, save_pictures
from helpers.recordings import save_hearing, save_recordings
from helpers.tiny import one_thread
from safetensors.torch import load_file

import surgery
from surgery.anatomy.encoders import examine_encoder
from surgery.errors import RecipeError, SourceError
from surgery.live.as_it_came import as_it_came, reversibly
from surgery.live.features import Features
from surgery.live.graft import Fold
from surgery.live.model import Live
from surgery.live.port import port_of
from surgery.live.stream import stream
from surgery.operations.base import Fitting
from surgery.operations.estimated_bias import Estimated, EstimatedBias
from surgery.progress import SILENT
from surgery.runtime.eab_registers import install_registers, install_silence
from surgery.tuning import loop as loop_module
from surgery.tuning import objectives
from surgery.tuning.adapted import Adapted
from surgery.tuning.corpus import make_image_corpus, require_images
from surgery.tuning.loop import Record
from surgery.tuning.objectives import Pass
from surgery.tuning.operation import Tune
from surgery.tuning.store import NAME, Store
from surgery.tuning.tune import Training, tune
from surgery.tuning.words import tuned, tuning_sentence, tuning_table

WITH_REGISTERS = ["dinov2_with_registers", "dinov3_vit"]
FEW = surgery.Chunking(8)
# Of gates only what a run of an encoder has to say, which random weights cannot pass.
ANY = {"fidelity": {"min_cls": -0.99, "min_patches": -0.99}, "neighbours": {"min_share": 0.01}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def settings_of(**changes: Any) -> Tune:
    small = {"steps": 6, "held_out": 4, "evaluate_every": 3, "warmup": 0, "batch": 4}
    return Tune.model_validate({**small, **changes}).of("images")


def images(count: int, first: int = 0) -> torch.Tensor:
    """Pixels (count, 3, H, W)."""
    pictures = (np.asarray(picture(index, size=(SIDE, SIDE))) for index in range(first, first + count))
    return torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1) / 127.5 - 1 for one in pictures])


def live_of(kind: str) -> Live:
    anatomy = examine_encoder(config_of(kind))
    return Live(encoder_model(kind), anatomy, port_of(anatomy))


def features_of(live: Live, pixels: torch.Tensor) -> Features:
    found = Features(live)
    stream(live, pixels, [found])
    return found


@dataclass(frozen=True)
class Tuned:
    """What came of it: the record, slots before and after, and with each how far other images are."""

    record: Record
    weights: dict[str, torch.Tensor]
    before: Estimated
    after: Estimated
    distances: tuple[float, float]


def tuned_encoder(kind: str, settings: Tune, count: int = 24, others: int = 8, **options: Any) -> Tuned:
    live, pixels, other = live_of(kind), images(count), images(others, 1000)
    operation = EstimatedBias.model_validate({"from": "registers"})
    original = features_of(live, other)
    parts = operation.fit(live, Fitting(None, None, pixels[:16], SILENT))
    with operation.graft(live, parts):
        start = features_of(live, other).distance(original)
        found = tune(live, settings, Training(make_image_corpus(pixels, settings), **options))
        end, after = features_of(live, other).distance(original), operation.held(live, parts)
    return Tuned(found.record, found.weights, parts, after, (start, end))


def differ(a: Estimated, b: Estimated) -> bool:
    return any(not torch.equal(part, b.fold.tensors[name]) for name, part in a.fold.tensors.items())


# ---- what training does


@pytest.mark.parametrize("kind", WITH_REGISTERS)
@pytest.mark.parametrize("lowered", ["features", "hidden"])
def test_tuned_slots_are_nearer_on_other_images(kind: str, lowered: str) -> None:
    others = {"features": 0.0, "hidden": 0.0}
    settings = settings_of(steps=60, batch=8, held_out=32, evaluate_every=20, objectives={**others, lowered: 1.0})
    found = tuned_encoder(kind, settings, count=160, others=96)
    start, best = found.record.judged[0], found.record.best
    assert best["step"] > 0 and best["distance"] < 0.99 * start["distance"]
    assert found.distances[1] < 0.99 * found.distances[0]
    assert differ(found.before, found.after)


@pytest.mark.parametrize("kind", [*WITH_REGISTERS, "clip"])
def test_the_teacher_is_the_original_to_the_bit(kind: str) -> None:
    """After training as well, and in the midst of it: with all registers, and without slots."""
    live, pixels = live_of(kind), images(6)
    wanted = live.trunk(pixel_values=pixels)[0].detach()
    seen = []

    def look() -> None:
        seen.append(live.trunk(pixel_values=pixels)[0].detach())

    operation = EstimatedBias.model_validate({"from": "registers" if live.port.registers else "massive_tokens"})
    shapes = live.anatomy.eab(2, "always")["sites"]
    slots = {f"{site}.attention_bias.{part}": torch.randn(2, heads, dim) for site, (heads, *dims) in shapes.items()
             for part, dim in zip(("key", "value"), dims, strict=True)}  # fmt: skip
    parts = Estimated(Fold((), slots, "always"), 1, 1.0)
    with operation.graft(live, parts):
        look()
        adapted = Adapted(live, settings_of(lora={"rank": 2}), 0.0)
        with torch.no_grad():
            for parameter in adapted.trained.values():
                parameter.add_(0.1)
        look()
        with torch.no_grad(), adapted.teaching():
            look()
        look()
        adapted.close()
    assert torch.equal(seen[2], wanted)
    assert torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
    if live.port.registers:
        assert seen[0].shape[1] == wanted.shape[1] - live.port.registers


@pytest.mark.parametrize("what", ["registers", "silence"])
def test_what_stands_at_units_is_taken_away_too(what: str) -> None:
    live, pixels = live_of("dinov2"), images(3)
    units = {f"{block}.mlp.fc2": [0, 5] for block in live.anatomy.blocks}
    entry = {"at": 1, "blocks": [*live.anatomy.blocks], "units": units}

    def install() -> contextlib.ExitStack:
        return install_registers(live.trunk, entry) if what == "registers" else install_silence(live.trunk, units)

    def look() -> torch.Tensor:
        found: torch.Tensor = live.trunk(pixel_values=pixels)[0].detach()
        return found

    wanted = look()
    with reversibly(live, install):
        changed = look()
        with as_it_came(live):
            assert torch.equal(look(), wanted)
        assert torch.equal(look(), changed) and not torch.equal(changed, wanted)
    assert torch.equal(look(), wanted)


def test_training_leaves_the_encoder_as_it_came_and_repeats() -> None:
    live = live_of("dinov3_vit")
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    operation = EstimatedBias.model_validate({"from": "registers"})
    settings = settings_of(lora={"rank": 2}, quantised="w8a8_static")
    pixels, weights = images(16), []
    for _ in range(2):
        with operation.graft(live, operation.fit(live, Fitting(None, None, pixels, SILENT))):
            weights.append(tune(live, settings, Training(make_image_corpus(pixels, settings))).weights)
        after = live.model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert weights[0] and all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}], ids=["slots", "lora"])
@pytest.mark.parametrize("quantised", ["w8a8_static", pytest.param("w8a8_per_token", marks=pytest.mark.slow)])
def test_rounding_in_training_lowers_the_rounded_loss(quantised: str, options: dict) -> None:
    settings = settings_of(steps=40, batch=12, evaluate_every=40, quantised=quantised, learning_rate=1e-2, **options)
    found = tuned_encoder("dinov2_with_registers", settings, count=16)  # one batch of all images, so steps compare
    losses = [entry["loss"] for entry in found.record.losses]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert len(found.weights) == (18 if options else 0)
    plain = tuned_encoder("dinov2_with_registers", settings_of(steps=1), count=16)
    assert plain.record.judged[0]["distance"] != found.record.judged[0]["distance"]


@pytest.mark.parametrize("lowered", ["massive", "peak_ratio"])
def test_penalties_are_lowered_beside_it(lowered: str) -> None:
    settings = settings_of(steps=20, batch=12, evaluate_every=20, objectives={lowered: 0.1}, learning_rate=1e-2)
    found = tuned_encoder("dinov2_with_registers", settings, count=16)
    assert {*found.record.losses[0]} == {"step", "loss", "features", "hidden", lowered}
    if lowered == "peak_ratio":
        assert found.record.losses[-1][lowered] < found.record.losses[0][lowered]


@pytest.mark.slow
def test_half_precision_multiplies_so_and_trains_float32() -> None:
    half, full = (tuned_encoder("dinov3_vit", settings_of(precision=name)) for name in ("bfloat16", "float32"))
    assert half.record.losses != full.record.losses
    assert half.record.best["distance"] == pytest.approx(full.record.best["distance"], rel=0.05)
    assert {part.dtype for part in half.after.fold.tensors.values()} == {torch.float32}


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(steps=9, quantised="w8a8_static")
    whole = tuned_encoder("dinov3_vit", settings)
    step = loop_module.Loop._step

    def interrupted(self: loop_module.Loop, number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(loop_module.Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned_encoder("dinov3_vit", settings, store=Store(tmp_path, {"tune": "a"}))
    monkeypatch.undo()
    again = tuned_encoder("dinov3_vit", settings, store=Store(tmp_path, {"tune": "a"}))
    assert again.record == whole.record and not differ(again.after, whole.after)


# ---- objectives


def a_pass(seed: int, tokens: int, cls: bool = True, patches: int = 4) -> Pass:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    features = [draw(2, 1, 3), draw(2, patches, 3)] if cls else [draw(2, patches, 3)]
    return Pass(draw(2, 3, 4, 4), None, [draw(2, tokens, 3) for _ in range(3)], features)


@pytest.mark.parametrize("cls", [True, False])
def test_features_are_half_cls_and_half_patches(cls: bool) -> None:
    student, teacher = a_pass(0, 5, cls), a_pass(1, 5, cls)
    far = []
    for ours, theirs in zip(student.features, teacher.features, strict=True):
        x, y = ours.numpy(), theirs.numpy()
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        far.append((1 - cosine).mean())
    assert objectives.features(student, teacher).item() == pytest.approx(np.mean(far), rel=1e-12)
    assert objectives.features(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("fewer", ["student", "teacher", None])
def test_hidden_compares_the_tokens_that_both_have(fewer: str | None) -> None:
    """CLS among them, which text leaves out; registers of one of them stand behind it."""
    student, teacher = (a_pass(seed, 5 if fewer in (None, whose) else 7) for seed, whose in
                        ((0, "student"), (1, "teacher")))  # fmt: skip
    wanted = []
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        x, y = (part[:, [0, *range(part.shape[1] - 4, part.shape[1])]] for part in (ours, theirs))
        wanted.append(((x - y).square().sum(-1) / y.square().sum(-1)).mean())
    assert objectives.hidden(student, teacher).item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-12)


def test_what_is_lowered_is_what_the_model_has() -> None:
    assert settings_of().objectives.weights() == {"features": 1.0, "hidden": 1.0}
    assert settings_of(objectives={"hidden": 0.5}).objectives.weights() == {"features": 1.0, "hidden": 0.5}
    assert settings_of(objectives={"features": 0.0, "hidden": 1.0}).objectives.weights() == {"hidden": 1.0}
    assert Tune(steps=1).of("text").objectives.weights() == {"kl": 1.0}
    again = Tune.model_validate(settings_of().model_dump(mode="json", exclude_none=True))
    assert again.of("images").objectives == settings_of().objectives


@pytest.mark.parametrize(
    ("given", "port", "said"),
    [
        ({"objectives": {"kl": 1.0}}, "images", "tune.objectives.kl, which compares logits"),
        ({"objectives": {"lm": 0.5, "kl": 0.0}}, "images", "tune.objectives.lm, which compares logits"),
        ({"objectives": {"features": 1.0}}, "text", "tune.objectives.features, which compares an encoder's features"),
        ({"objectives": {"features": 0.0, "hidden": 0.0}}, "images", "nothing to lower; write 'features: 1.0'"),
        ({"dataset": {"name": "a/b"}}, "images", "tune.dataset, which is text for a language model"),
    ],
)
def test_what_is_of_the_other_kind_is_refused(given: dict, port: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Tune.model_validate({"steps": 1, **given}).of(port)


# ---- what is read


def test_the_last_images_are_held_out_and_all_others_are_read() -> None:
    pixels, settings = images(14), settings_of(batch=5)
    corpus = make_image_corpus(pixels, settings)
    assert torch.equal(corpus.held_out, pixels[10:]) and torch.equal(corpus.scaling, pixels[:10])
    read = torch.cat([corpus.batch(step, 5) for step in range(2)])
    assert {one.numpy().tobytes() for one in read} == {one.numpy().tobytes() for one in pixels[:10]}
    assert corpus.sha256 != make_image_corpus(images(14, 1), settings).sha256
    require_images(9, settings, "--calibration")
    with pytest.raises(SourceError, match="--calibration gives 8 images, and tune needs 9 .4 that are held out, and 5"):
        require_images(8, settings, "--calibration")


# ---- from files to files


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    save_encoder(root / "source", "dinov3_vit")
    save_pictures(root / "pictures", 16)
    save_pictures(root / "calibration", 40)
    return root


def recipe_of(**tuning: Any) -> dict[str, Any]:
    small = {"steps": 6, "held_out": 4, "evaluate_every": 3, "batch": 8, "warmup": 0}
    return {
        "surgery": 1, "operations": [{"attention_bias": {"from": "registers"}}], "tune": {**small, **tuning},
        "verify": ANY,
    }  # fmt: skip


def run(ground: Path, out: Path, recipe: dict[str, Any], **options: Any) -> dict[str, Any]:
    given = {"images": ground / "pictures", "calibration": ground / "calibration", "chunking": FEW, **options}
    found: Any = surgery.run(recipe, ground / "source", out, **given)
    return found


def test_tuned_slots_are_what_is_written(ground: Path, tmp_path: Path) -> None:
    found = run(ground, tmp_path / "out", recipe_of(), tuning=tmp_path / "state")
    tuning = found["tuning"]
    assert found["passed"] and tuning["best_step"] > 0 and [entry["step"] for entry in tuning["held_out"]] == [0, 3, 6]
    assert {*tuning["held_out"][0]} == {"step", "distance"}
    kept = load_file(tmp_path / "state" / NAME)
    written = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in
               load_file(file).items() if ".attention_bias." in name}  # fmt: skip
    best = {name: tensor for name, tensor in kept.items() if name.startswith("best.")}
    assert len(written) == len(best) == 6
    for name, tensor in written.items():
        module, _, part = name.rpartition(".")
        assert torch.equal(tensor, next(one for key, one in best.items() if f"{module}." in key and key.endswith(part)))
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["tune"]["objectives"]["kl"] == 0.0
    assert manifest["recipe"]["tune"]["objectives"]["features"] == 1.0
    assert len(manifest["provenance"]["texts"]["calibration"]) == 40
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    said = " ".join(card.split())
    assert "Tuning has trained the slots for 6 steps." in said and "distance of features from the original's" in said
    again = run(ground, tmp_path / "again", recipe_of(), tuning=tmp_path / "state")
    assert again["tuning"] == tuning and again["fidelity"] == found["fidelity"]


@pytest.mark.slow
def test_lora_and_its_adapter(ground: Path, tmp_path: Path) -> None:
    recipe = recipe_of(lora={"rank": 2, "targets": ["q_proj", "down_proj"]}, quantised="w8a8_static")
    found = run(ground, tmp_path / "out", recipe, adapter=tmp_path / "adapter")
    assert found["passed"] and (tmp_path / "adapter" / "adapter_config.json").is_file()
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text(encoding="utf-8"))
    changed = [name for name, entry in manifest["tensors"].items() if entry["status"] == "changed"]
    assert len(changed) == 6 and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        (recipe_of(held_out=38), {}, "--calibration gives 40 images, and tune needs 46 .38 that are held out"),
        (recipe_of(held_out=6), {"calibration": ()}, "every other one of --images gives 8 images, and tune needs 14"),
        (recipe_of(dataset={"name": "a/b"}), {}, "tune.dataset, which is text"),
        (recipe_of(objectives={"kl": 1.0}), {}, "tune.objectives.kl, which compares logits"),
        (recipe_of(lora={"targets": ["qproj"]}), {}, "tune.lora.targets: 'qproj' is no linear layer of this model"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(ground: Path, tmp_path: Path, recipe: dict, options: dict, said: str):
    with pytest.raises((SourceError, RecipeError), match=said):
        run(ground, tmp_path / "out", recipe, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({}, "tune has nothing to train, as no operation of the recipe adds what can learn"),
        ({"lora": {}}, "tune.lora cannot learn in layers whose inputs 'registers' changes"),
    ],
)
def test_registers_that_are_added_do_not_learn(ground: Path, tmp_path: Path, tuning: dict, said: str) -> None:
    save_encoder(tmp_path / "plain", "dinov2")
    recipe = {**recipe_of(**tuning), "operations": [{"registers": {}}]}
    with pytest.raises(SourceError, match=said):
        surgery.run(recipe, tmp_path / "plain", tmp_path / "out", images=ground / "calibration", chunking=FEW)


def test_an_encoder_is_tuned_by_one_process(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SourceError, match="2 processes were started, and an encoder is tuned by one alone"):
        run(ground, tmp_path / "out", recipe_of(), device="cpu")


# ---- in words


def test_what_it_came_to_is_said_of_images() -> None:
    found = {
        "best_step": 20, "stopped": None, "losses": [{"step": step, "loss": 1 / step} for step in range(1, 31)],
        "held_out": [{"step": 0, "distance": 0.02}, {"step": 20, "distance": 0.005}, {"step": 30, "distance": 0.01}],
    }  # fmt: skip
    table = tuning_table(found)
    assert table is not None and table.head == ("", "step", "held-out distance", "times the start")
    assert table.rows[1] == ("kept", "20", "0.005", "0.250")
    assert "perplexity" not in table.text and "on inputs that are never trained on" in table.text
    assert tuning_sentence(found) == (
        "Tuning: kept is the state after step 20, where the distance of features from the original's on held-out "
        "inputs had gone from 0.02 to 0.005."
    )
    settings = settings_of(quantised="w8a8_static")
    assert tuned(settings, ["the slots"], 0, found).endswith(
        "the distance of features from the original's on held-out inputs, quantised (w8a8_static), went from 0.02 to "
        "0.005."
    )
    untuned = {**found, "best_step": 0}
    assert "no step was better on held-out inputs than the start" in (tuning_sentence(untuned) or "")
    assert "None was better on held-out inputs" in tuned(settings, ["the slots"], 0, untuned)


@pytest.mark.parametrize("kind", ["wav2vec2", pytest.param("whisper", marks=pytest.mark.slow)])
def test_encoders_of_sound_are_tuned(kind: str, tmp_path: Path) -> None:
    """On recordings of several lengths, which are all cut to the shortest of those that are read."""
    source = save_hearing(tmp_path / "source", kind)
    calibration = save_recordings(tmp_path / "calibration", 11)
    save_recordings(tmp_path / "short", 1, seconds=0.4)
    next((tmp_path / "short").iterdir()).rename(calibration / "zz.wav")
    tuning = {"steps": 4, "held_out": 4, "evaluate_every": 2, "batch": 4, "warmup": 0, "lora": {"rank": 2}}
    recipe = {
        "surgery": 1, "operations": [{"head_norm": {}}], "tune": {**tuning, "quantised": "w8a8_static"}, "verify": ANY
    }  # fmt: skip
    found: Any = surgery.run(
        recipe, source, tmp_path / "out", audio=save_recordings(tmp_path / "evaluation", 4), calibration=calibration,
        chunking=surgery.Chunking(4),
    )  # fmt: skip
    assert found["passed"] and [entry["step"] for entry in found["tuning"]["held_out"]] == [0, 2, 4]
    assert len(found["provenance"]["texts"]["calibration"]) == 12
