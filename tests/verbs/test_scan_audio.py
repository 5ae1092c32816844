"""`--audio`: encoders of sound from files to surveys, and through `run`; what is wrong with files and checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import save_encoder, save_pictures
from helpers.page import Page
from helpers.recordings import (
    BINS,
    BLOCKS,
    HEARING,
    RATE,
    hearing_config,
    hearing_model,
    save_hearing,
    save_recordings,
    sound,
)
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import edit_json, save_model, surgery_command
from safetensors.torch import load_file
from transformers.modeling_outputs import BaseModelOutput

import surgery
from surgery.anatomy.calls import Call, observing
from surgery.anatomy.encoders import examine_encoder
from surgery.converted.described import read_described
from surgery.converted.reading import live_converted
from surgery.errors import SourceError, SurgeryError, UnsupportedModel
from surgery.live.audio import load_extractor, read_recording
from surgery.live.port import port_of
from surgery.survey import patches

soundfile = pytest.importorskip("soundfile")
FEW = surgery.Chunking(4)
HEADS = {
    "whisper": "WhisperForConditionalGeneration", "wav2vec2": "Wav2Vec2ForCTC",
    "hubert": "HubertForSequenceClassification",
}  # fmt: skip
DECODING = {
    "whisper": "WhisperForConditionalGeneration", "speech_to_text": "Speech2TextForConditionalGeneration",
    "moonshine": "MoonshineForConditionalGeneration",
}  # fmt: skip
QUICK = ("whisper", "wav2vec2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    save_recordings(root / "clips", 9, 0.8, 22_050)
    for kind in ("whisper", "wav2vec2", "hubert"):
        save_hearing(root / kind, kind, HEADS[kind])
    return root


def some(kinds) -> list:
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# ---- scan


@pytest.mark.parametrize("kind", some(HEARING))
def test_a_scan_of_each_type(kind: str, ground: Path, tmp_path: Path) -> None:
    source = save_hearing(tmp_path / kind, kind)
    found = surgery.scan(source, audio=ground / "clips", chunking=FEW, interventions=True)
    read = found["audio"]
    if kind == "audio-spectrogram-transformer":
        assert read == {"grid": [3, 7], "special": 2, "registers": 0}
        assert found["layers"][1]["cls_norm"] > 0 and found["interventions"][-1]["name"].startswith("CLS")
    else:
        assert read["special"] == read["registers"] == 0 and found["layers"][1]["cls_norm"] is None
        assert read["frames"] == found["chunk_length"] and "sink_rate" not in found["layers"][1]
        assert found["interventions"][0]["fidelity"]["frames"]["mean"] < 1
    assert found["chunks"] == 4 and found["model_type"] == kind
    assert [row["layer"] for row in found["layers"]] == list(range(BLOCKS + 1)) and "norm_maps" not in found
    assert [file["name"] for file in found["provenance"]["texts"]["evaluation"]] == [
        "00.wav", "01.flac", "02.wav", "03.flac",
    ]  # fmt: skip


def test_what_the_screen_and_the_report_show(ground: Path, tmp_path: Path) -> None:
    ended = surgery_command(
        "scan", ground / "wav2vec2", "--audio", ground / "clips", "--chunks", 4, "--interventions",
        "--report", tmp_path / "r.html", "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    said = " ".join(ended.out.split())
    assert "Tokens layer |frame| longest high norm" in said and "|CLS|" not in said and "image" not in said
    assert "Each recording is 12 frames; high norm: three times as long as the median frame" in said
    assert "of each recording the first 0.8 seconds are read" in " ".join((ended.out + ended.err).split())
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert {"kinds", "depth"} <= {*page.sections} and "norm_maps" not in page.sections
    assert "It was given 4 recordings, each of which becomes 12 frames." in page.text
    assert "mean over recordings" in page.text
    assert json.loads((tmp_path / "s.json").read_text())["audio"]["frames"] == 12


# ---- run and verify


ANY = {"fidelity": {"min_cls": -0.99, "min_patches": -0.99}}
FROM_MASSIVE = {"attention_bias": {"from": "massive_tokens"}}


def recipe(*operations: dict, **verify: object) -> dict:
    return {"surgery": 1, "operations": [*operations], "verify": {**ANY, **verify}}


@pytest.mark.parametrize("kind", some(HEARING))
def test_each_type_attends_to_its_slots(
    kind: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every site of what was written is softmax over slots and keys, by a plain reference in float64."""
    monkeypatch.setattr(patches, "HIGH", 1.02)  # in tiny random encoders few tokens stand out
    source = save_hearing(tmp_path / kind, kind)
    found = surgery.run(recipe(FROM_MASSIVE), source, tmp_path / "out", audio=ground / "clips", chunking=FEW)
    assert found is not None and found["passed"], found
    assert found["estimated"]["recordings"] == 4 and found["estimated"]["n_slots"] == 1
    verified = surgery.verify(tmp_path / "out", against=source, audio=ground / "clips")
    assert verified["passed"] and verified["fidelity"] == found["fidelity"]
    live = tower(tmp_path / "out")
    seen: list[tuple[Call, torch.Tensor]] = []
    given = torch.randn(2, *live.anatomy.patching.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), observing(None, lambda call, output: seen.append((call, output))):
        live.trunk(**{live.port.input: given})
    assert len(seen) == BLOCKS
    for call, output in seen:
        assert torch.allclose(output.double(), reference(call), atol=1e-5)
        assert not torch.allclose(output.double(), reference(call, slots=False), atol=1e-5)


def tower(root: Path):
    anatomy = read_described(root).anatomy
    return live_converted(root, anatomy, port=port_of(anatomy))


def reference(call: Call, slots: bool = True) -> torch.Tensor:
    query, key, value = (states.double() for states in (call.query, call.key, call.value))
    if slots:
        own = [part.double().transpose(0, 1).expand(len(key), -1, -1, -1) for part in call.module.attention_bias()]
        key, value = torch.cat([own[0], key], dim=2), torch.cat([own[1], value], dim=2)
    assert call.mask is None
    return ((query @ key.transpose(2, 3) * call.scale).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.slow
def test_a_whisper_is_one_still(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder has slots, and its decoder, which shares the config, is what it was: loaded by a stranger."""
    monkeypatch.setattr(patches, "HIGH", 1.02)
    found = surgery.run(
        recipe(FROM_MASSIVE, neighbours={"min_share": 0.01}, quantised_features={"w8a8_static": {"min_cosine": -0.9}}),
        ground / "whisper", tmp_path / "out", audio=ground / "clips", chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"] and found["neighbours"]["recordings"] == 4
    assert {*found["quantised_features"]["w8a8_static"]["original"]} == {"frames"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["EabWhisperForConditionalGeneration"]
    assert config["eab"]["trunk"] == "WhisperEncoder" and len(config["eab"]["sites"]) == BLOCKS
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert (
        "AutoFeatureExtractor" in card and "automatic-speech-recognition" in card and "calibration recordings" in card
    )
    features = torch.randn(1, BINS, 100, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 5, 7, 9]])
    torch.save({"features": features, "ids": ids}, tmp_path / "given.pt")
    told = in_a_fresh_process(
        tmp_path, "from transformers import AutoModel, AutoModelForSpeechSeq2Seq as A, AutoFeatureExtractor\n"
        "given = torch.load(sys.argv[2])\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "AutoFeatureExtractor.from_pretrained(sys.argv[1])\n"
        "states = model.model.encoder(given['features'])\n"
        "out = [model(encoder_outputs=states, decoder_input_ids=given['ids']).logits]\n"
        "tokens = model.generate(given['features'], max_new_tokens=6, do_sample=False)\n"
        "model.set_attn_implementation('eager')\n"
        "eager = model(given['features'], decoder_input_ids=given['ids'], output_attentions=True)\n"
        "trunk = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "out += [eager.logits, eager.decoder_attentions[0], trunk.encoder(given['features'])[0], states[0], tokens]\n"
        "torch.save(out, sys.argv[3])\n",
    )  # fmt: skip
    logits, eager, weights, of_trunk, states, tokens = told
    ours = tower(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(ours.trunk(features)[0], states, atol=1e-5) and torch.allclose(
            of_trunk, states, atol=1e-5
        )
        plain = hearing_model("whisper", HEADS["whisper"])  # of the same weights: its decoder on what the encoder said
        wanted = plain(encoder_outputs=(states,), decoder_input_ids=ids).logits
        assert not torch.allclose(plain.model.encoder(features)[0], states, atol=1e-4)
    assert torch.allclose(logits, wanted, atol=1e-5) and torch.allclose(eager, wanted, atol=1e-4)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 4)) and not weights.triu(1).any()
    assert tokens.shape[0] == 1 and tokens.shape[1] > 1
    own, new = (load_file(root) for root in (ground / "whisper" / "model.safetensors", first_shard(tmp_path / "out")))
    assert {*own} == {*new} and all(torch.equal(own[name], new[name]) for name in own)


def first_shard(root: Path) -> Path:
    return sorted(root.glob("model-*.safetensors"))[0]


def in_a_fresh_process(root: Path, program: str) -> list[torch.Tensor]:
    head = "import sys, torch\ntorch.set_grad_enabled(False)\n"
    tail = "assert 'surgery' not in sys.modules\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"}
    arguments = [str(root / name) for name in ("out", "given.pt", "told.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", head + program + tail, *arguments], env=environment, cwd=root,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(root / "told.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), DECODING.items())
def test_a_decoder_beside_the_encoder_is_what_it_was(
    kind: str, name: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.02)
    source = save_hearing(tmp_path / kind, kind, name)
    found = surgery.run(recipe(FROM_MASSIVE), source, tmp_path / "out", audio=ground / "clips", chunking=FEW)
    assert found is not None and found["passed"]
    live, ids = tower(tmp_path / "out"), torch.tensor([[1, 5, 7, 9], [1, 4, 6, 8]])
    given = {live.port.input: torch.randn(2, *HEARING[kind][1], generator=torch.Generator().manual_seed(6))}
    with torch.no_grad():
        got = live.model(**given, decoder_input_ids=ids)
        states = BaseModelOutput(last_hidden_state=got.encoder_last_hidden_state)
        states.attention_mask = None  # which Moonshine's own output has
        wanted = hearing_model(kind, name)(encoder_outputs=states, decoder_input_ids=ids).logits
        step = live.model(encoder_outputs=states, decoder_input_ids=ids[:, :3], use_cache=True)
        last = live.model(
            encoder_outputs=states, decoder_input_ids=ids[:, 3:], past_key_values=step.past_key_values
        ).logits
    assert torch.allclose(got.logits, wanted, atol=1e-4) and torch.allclose(last, wanted[:, 3:], atol=1e-4)


@pytest.mark.slow
def test_padding_is_masked_and_slots_are_not(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.02)
    found = surgery.run(recipe(FROM_MASSIVE), ground / "hubert", tmp_path / "out", audio=ground / "clips", chunking=FEW)
    assert found is not None and found["passed"]
    model, source = tower(tmp_path / "out").trunk, torch.Generator().manual_seed(7)
    short, long = torch.randn(1, 8000, generator=source), torch.randn(1, 12_000, generator=source)
    both = torch.cat([torch.cat([short, torch.zeros(1, 4000)], dim=1), long])
    mask = torch.ones(2, 12_000, dtype=torch.long)
    mask[0, 8000:] = 0
    with torch.no_grad():
        alone, batched = model(short)[0], model(both, attention_mask=mask)[0]
    assert torch.allclose(batched[:1, : alone.shape[1]], alone, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [False, True])
def test_a_test_time_register_stands_among_frames(
    slots: bool, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.02)
    then = [{"attention_bias": {"from": "registers"}}] if slots else []
    found = surgery.run(
        recipe({"registers": {"neurons": 2}}, *then), ground / "hubert", tmp_path / "out", audio=ground / "clips",
        chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"] and found["register_neurons"]["frames"] > 0
    assert surgery.verify(tmp_path / "out", against=ground / "hubert", audio=ground / "clips")["passed"]
    survey = surgery.scan(tmp_path / "out", audio=ground / "clips", chunking=FEW)
    assert survey["audio"]["registers"] == survey["audio"]["special"] == (0 if slots else 1)
    assert survey["n_slots"] == (1 if slots else 0)


@pytest.mark.slow
def test_heads_of_raw_waves_load(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.02)
    for kind, auto, top in (("wav2vec2", "AutoModelForCTC", {}), ("hubert", "AutoModelForAudioClassification", None)):
        gates = {} if top is not None else {"top1": {"min_share": 0.01}}
        root = tmp_path / kind
        root.mkdir()
        found = surgery.run(
            recipe(FROM_MASSIVE, **gates), ground / kind, root / "out", audio=ground / "clips", chunking=FEW
        )
        assert found is not None and found["passed"]
        if gates:
            assert found["top1"]["recordings"] == 4
        waves = torch.randn(1, RATE, generator=torch.Generator().manual_seed(5))
        torch.save(waves, root / "given.pt")
        (logits,) = in_a_fresh_process(
            root, f"from transformers import {auto} as A\n"
            "model = A.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
            "torch.save([model(torch.load(sys.argv[2])).logits], sys.argv[3])\n",
        )  # fmt: skip
        with torch.no_grad():
            assert torch.allclose(tower(root / "out").model(waves).logits, logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", pytest.param("hubert", marks=pytest.mark.slow)])
def test_smoothing_and_norms_leave_an_encoder_what_it_was(kind: str, ground: Path, tmp_path: Path) -> None:
    operations = recipe({"smoothing": {}}, {"head_norm": {}}, fidelity={"min_patches": 0.9999})
    found = surgery.run(operations, ground / kind, tmp_path / "out", audio=ground / "clips", chunking=FEW)
    assert found is not None and found["passed"] and found["fidelity"]["frames"]["mean"] > 0.99999
    assert surgery.verify(tmp_path / "out", against=ground / kind, audio=ground / "clips")["passed"]
    with pytest.raises(UnsupportedModel, match="no channel can be scaled exactly"):  # its norms are the stream itself
        surgery.run(operations, ground / "wav2vec2", tmp_path / "no", audio=ground / "clips", chunking=FEW)


# ---- recordings


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(RATE, 1, "wav"), (44_100, 2, "flac"), (8_000, 2, "ogg")])
def test_every_kind_of_file_is_mixed_and_resampled(rate: int, channels: int, suffix: str, tmp_path: Path) -> None:
    time = np.arange(rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    sides = np.stack([tone * 2 * (side == 0) if channels == 2 else tone for side in range(channels)], axis=1)
    soundfile.write(tmp_path / f"a.{suffix}", sides * 0.9, rate)
    found = read_recording(tmp_path / f"a.{suffix}", RATE, 0.5)
    wanted = 0.45 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)
    assert found.dtype == np.float32 and found.shape == (RATE // 2,)
    assert np.abs(found - wanted)[200:-200].max() < (0.05 if suffix == "ogg" else 1e-3)


def test_recordings_are_cut_to_the_shortest(ground: Path, tmp_path: Path) -> None:
    clips = save_recordings(tmp_path / "clips", 3, 1.5)
    (clips / "notes.txt").write_text("no recording")
    soundfile.write(clips / "02.wav", sound(7, 0.51234), RATE)
    found = surgery.scan(ground / "wav2vec2", audio=clips, chunking=surgery.Chunking(3))
    assert found["audio"]["frames"] == 8  # of 0.51 seconds, at 16 a second
    whole = surgery.scan(ground / "wav2vec2", audio=clips, chunking=surgery.Chunking(2))
    assert whole["audio"]["frames"] == 24
    with pytest.raises(SourceError, match=r"clips: 3 recordings, and 9 are to be read"):
        surgery.scan(ground / "wav2vec2", audio=clips, chunking=surgery.Chunking(9))
    with pytest.raises(SourceError, match="is neither a file nor a directory; give recordings with --audio"):
        surgery.scan(ground / "wav2vec2", audio=tmp_path / "nowhere")


def bad_recording(what: str, path: Path) -> None:
    values = sound(0)
    if what == "text":
        path.write_text("not a recording at all")
    elif what == "empty":
        path.touch()
    elif what == "no samples":
        soundfile.write(path, values[:0], RATE)
    elif what == "too short":
        soundfile.write(path, values[:500], RATE)
    elif what == "NaN":
        values[100] = np.nan
        soundfile.write(path, values, RATE, subtype="FLOAT")
    else:
        soundfile.write(path, values, RATE, format="FLAC")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("text", "cannot be read as a recording"), ("empty", "cannot be read as a recording"),
        ("no samples", "is 0 seconds of sound"), ("too short", "is 0.0312 seconds of sound"),
        ("NaN", "holds samples that are no finite numbers"), ("cut off", "bad.wav: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", QUICK)
def test_a_file_that_is_no_recording_is_named(what: str, words: str, kind: str, ground: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad_recording(what, bad)
    ended = surgery_command("scan", ground / kind, "--audio", bad, "--chunks", 1)
    assert ended.code == 2 and "bad.wav: " in ended.error and words in ended.error
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_package_that_is_missing_is_named(package: str, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=r"pip install 'checkpoint-surgery\[audio\]'"):
        surgery.scan(ground / "wav2vec2", audio=ground / "clips", chunking=FEW)
    with pytest.raises(SourceError, match=r"pip install 'checkpoint-surgery\[audio\]'"):
        surgery.run(recipe(FROM_MASSIVE), ground / "wav2vec2", ground / "never", audio=ground / "clips")


# ---- checkpoints


@pytest.mark.parametrize(
    ("kind", "what", "words"),
    [
        ("whisper", "no extractor", "has no preprocessor_config.json"),
        ("whisper", "no such extractor", "no feature extractor of sound loads from it"),
        ("wav2vec2", "no rate", "sampling_rate is not as many samples as a second has"),
        (
            "whisper",
            "another length",
            "does not take recordings of 8 x 200 numbers.*expects the mel input features.*8 x 100",
        ),
        ("wav2vec2", "another shape", "does not make one recording of 1 dimensions|cannot read it"),
        ("wav2vec2", "a block is missing", "its tensors do not fit its config.json"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(
    kind: str, what: str, words: str, ground: Path, tmp_path: Path
) -> None:
    root = tmp_path / "encoder"
    shutil.copytree(ground / kind, root)
    settings = root / "preprocessor_config.json"
    if what == "no extractor":
        settings.unlink()
    elif what == "no such extractor":
        edit_json(settings, feature_extractor_type="NoSuchExtractor")
    elif what == "no rate":
        edit_json(settings, sampling_rate=16)
    elif what == "another length":
        edit_json(settings, chunk_length=2, n_samples=2 * RATE)
    elif what == "another shape":
        shutil.copy(ground / "whisper" / "preprocessor_config.json", settings)
    else:
        edit_json(root / "config.json", num_hidden_layers=BLOCKS + 1)
    with pytest.raises(SurgeryError, match=words) as caught:
        surgery.scan(root, audio=ground / "clips", chunking=FEW)
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_one_sentence(ground: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "llama")
    save_encoder(tmp_path / "vit", "vit")
    save_pictures(tmp_path / "pictures", 4)
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    clips, pictures = {"audio": ground / "clips", "chunking": FEW}, {"images": tmp_path / "pictures", "chunking": FEW}
    cases: list[tuple[Path, dict, str]] = [
        (tmp_path / "llama", clips, "no part of it reads sound alone"),
        (tmp_path / "vit", clips, "no part of it reads sound alone; give --images for an encoder of images"),
        (ground / "whisper", pictures, "no part of it reads images alone"),
        (ground / "wav2vec2", {"text": text}, "is an encoder of sound, which reads no text; give --audio"),
        (ground / "wav2vec2", {**clips, "text": text}, "--audio surveys an encoder, for which there is no --text"),
        (ground / "wav2vec2", {**clips, **pictures}, "there is no --audio; take one of them away"),
    ]
    for source, given, words in cases:
        with pytest.raises(SurgeryError) as caught:
            surgery.scan(source, **given)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    runs: list[tuple[Path, dict, str]] = [
        (ground / "whisper", pictures, "is an encoder of sound, which reads no --images; give --audio"),
        (ground / "whisper", {"text": text}, "is an encoder of sound, which reads no text; give --audio"),
        (tmp_path / "vit", clips, "is an encoder of images, which reads no --audio; give --images"),
        (ground / "whisper", {}, "verification needs recordings: give --audio DIR"),
        (
            ground / "whisper",
            {"verify": False},
            "takes its means over recordings: give --audio DIR, and others with --calibration",
        ),
        (ground / "whisper", {"audio": ground / "clips"}, "4 recordings, and 64 are to be read"),
        (ground / "whisper", {**clips, **pictures}, "--images is for encoders, and --audio for encoders of sound"),
    ]
    for source, given, words in runs:
        with pytest.raises(SurgeryError) as caught:
            surgery.run(recipe(FROM_MASSIVE), source, tmp_path / "out", **given)
        assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModel, match="has no registers by its config"):
        surgery.run(recipe({"attention_bias": {"from": "registers"}}), ground / "whisper", tmp_path / "out", **clips)


def test_places_have_names() -> None:
    config = hearing_config("audio-spectrogram-transformer")
    port = port_of(examine_encoder(config))
    assert port.names(None, [0, 1, 2, 9]) == ["CLS", "special 2", "patch 1,1", "patch 2,1"]
    port = port_of(examine_encoder(hearing_config("wav2vec2")), torch.zeros(1, 8000))
    assert port.names(None, [0, 7]) == ["frame 1", "frame 8"] and port.tokens == 8


def test_an_extractor_says_at_what_rate(ground: Path) -> None:
    assert load_extractor(ground / "whisper").sampling_rate == RATE
