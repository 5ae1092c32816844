"""`surgery scan --images`: from files to the survey and its report; and what is wrong with files and checkpoints."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import (
    BLOCKS,
    ELSEWHERE,
    ENCODERS,
    GRID,
    SIDE,
    config_of,
    encoder_model,
    picture,
    save_encoder,
    save_pictures,
)
from helpers.page import Page
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import edit_json, save_model, surgery_command
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig

import surgery
from surgery.errors import SourceError, SurgeryError, UnsupportedModel
from surgery.live.images import image_files, read_image

FEW = surgery.Chunking(4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    save_encoder(root / "dinov2", "dinov2")
    save_pictures(root / "pictures", 5)
    return root


@pytest.mark.parametrize(
    "kind", ["dinov2", *(pytest.param(k, marks=pytest.mark.slow) for k in ENCODERS if k not in ("dinov2", "dpt"))]
)
def test_a_scan_of_each_type(kind: str, ground: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / kind, kind)
    found = surgery.scan(source, images=ground / "pictures", chunking=FEW)
    _, special, registers = ENCODERS[kind]
    assert found["images"] == {"grid": [GRID, GRID], "special": special, "registers": registers}
    assert found["chunks"] == 4 and found["model_type"] == config_of(kind)["model_type"]
    assert [row["layer"] for row in found["layers"]] == list(range(BLOCKS + 1))
    assert [image["name"] for image in found["norm_maps"]["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert len(found["provenance"]["texts"]["evaluation"]) == 4


@pytest.mark.slow
def test_what_the_screen_and_the_report_show(ground: Path, tmp_path: Path) -> None:
    ended = surgery_command(
        "scan", ground / "dinov2", "--images", ground / "pictures", "--chunks", 4, "--interventions",
        "--report", tmp_path / "r.html", "--plots", tmp_path / "plots", "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    said = " ".join(ended.out.split())
    assert "Tokens layer |CLS| |patch| longest high norm to CLS" in said and "register|" not in said
    assert "Each image is CLS and 4 x 4 patches; high norm:" in said and "perplexity" not in said
    assert "cosine with the untouched features" in said and "largest activation to its mean layer" in said
    assert f"scanned {ground / 'dinov2'}" in said or "scanned dinov2" in said
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert {"norm_maps", "kinds", "depth", "sinks"} <= {*page.sections} and "lens" not in page.sections
    assert "Cosine of features with those of the untouched encoder" in page.text
    assert "4 images, each of which becomes CLS and 4 × 4 patches" in page.text
    assert (tmp_path / "plots" / "norm_maps.png").stat().st_size > 5000
    assert json.loads((tmp_path / "s.json").read_text())["images"]["special"] == 1


def test_a_checkpoint_of_a_classifier_has_an_encoder_too(ground: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in config_of("vit").items() if key != "model_type"}
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(ViTConfig(**settings, num_labels=7)).save_pretrained(tmp_path / "vit")
    shutil.copy(ground / "dinov2" / "preprocessor_config.json", tmp_path / "vit")
    found = surgery.scan(tmp_path / "vit", images=ground / "pictures", chunking=FEW)
    assert found["images"]["special"] == 1 and found["layers"][-1]["cls_norm"] > 0


# ---- images


def test_images_are_taken_in_their_order(ground: Path, tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "more", 3)
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.png").write_text("what some systems leave beside files")
    files = image_files([folder, ground / "pictures" / "0.png"], 4)
    assert [path.name for path in files] == ["0.png", "1.png", "2.png", "0.png"]
    with pytest.raises(SourceError, match=r"more, .*: 3 images, and 9 are to be read|: 4 images, and 9"):
        image_files([folder, ground / "pictures" / "0.png"], 9)
    with pytest.raises(SourceError, match="is neither a file nor a directory"):
        image_files([tmp_path / "nowhere"], 1)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_colour(mode: str, tmp_path: Path) -> None:
    plain = picture(3)
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(plain.convert("L"), dtype=np.float64)
        if mode != "I;16":  # of no known range: it is stretched
            grey = (grey - grey.min()) * 255 / (grey.max() - grey.min())
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image, wanted = (
            Image.fromarray((grey * 257).astype(kind)),
            Image.fromarray(grey.astype(np.uint8)).convert("RGB"),
        )
    else:
        image = plain.convert(mode)
        wanted = image.convert("RGB")
    suffix = "tif" if mode in ("CMYK", "I", "F", "YCbCr") else "png"
    image.save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}")
    assert found.mode == "RGB" and found.size == plain.size
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 2


def test_animations_cameras_and_glass(tmp_path: Path) -> None:
    first, second = picture(1), picture(2)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.gif") as opened:
        assert opened.n_frames == 2 and np.array_equal(read_image(tmp_path / "a.gif"), opened.convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    first.save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").size == first.size[::-1]
    glass = first.convert("RGBA")
    glass.putalpha(0)
    glass.save(tmp_path / "c.png")
    assert np.asarray(read_image(tmp_path / "c.png")).min() == 255


def damaged(what: str, path: Path) -> None:
    written = io.BytesIO()
    picture(0, size=(300, 300)).save(written, "jpeg")
    if what == "cut off":
        path.write_bytes(written.getvalue()[:900])
    elif what == "text":
        path.write_text("not an image at all")
    elif what == "empty":
        path.touch()
    else:  # a bomb: few bytes that say they are 60,000 x 60,000
        Image.new("1", (60000, 60000)).save(path, "png")


@pytest.mark.parametrize("what", ["cut off", "text", "empty", pytest.param("bomb", marks=pytest.mark.slow)])
def test_a_file_that_is_no_image_is_named(what: str, ground: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    damaged(what, bad)
    ended = surgery_command("scan", ground / "dinov2", "--images", bad, "--chunks", 1)
    assert ended.code == 2 and "bad.png: " in ended.error and "Traceback" not in ended.out + ended.err
    assert ("larger than an image should be" if what == "bomb" else "cannot be read as an image") in ended.error


# ---- checkpoints


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_tokens_that_stand_elsewhere_are_noticed(kind: str, ground: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / kind, kind)
    with pytest.raises(UnsupportedModel) as caught:
        surgery.scan(source, images=ground / "pictures", chunking=FEW)
    assert ELSEWHERE[kind][1] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [SIDE * 2, 6])
def test_images_of_a_size_that_the_encoder_does_not_take(size: int, ground: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "vit", "vit")
    edit_json(source / "preprocessor_config.json", size={"height": size, "width": size})
    with pytest.raises(UnsupportedModel, match=f"does not take images of {size} x {size}.*says {SIDE} x {SIDE}"):
        surgery.scan(source, images=ground / "pictures", chunking=FEW)


def test_another_size_is_another_grid(ground: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "dinov2", "dinov2")  # which makes places for any size
    edit_json(source / "preprocessor_config.json", size={"height": SIDE, "width": 2 * SIDE})
    found = surgery.scan(source, images=ground / "pictures", chunking=FEW)
    assert found["images"]["grid"] == [GRID, 2 * GRID]
    shown = found["norm_maps"]["images"][0]
    assert np.shape(shown["norms"][0]) == (GRID, 2 * GRID)
    with Image.open(io.BytesIO(base64.b64decode(shown["png"]))) as picture_:
        assert picture_.size == (64, 32)


def test_what_newer_versions_write_beside_weights_will_do(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "dinov2", tmp_path / "new")
    settings = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    (tmp_path / "new" / "preprocessor_config.json").unlink()
    (tmp_path / "new" / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert surgery.scan(tmp_path / "new", images=ground / "pictures", chunking=FEW)["images"]["special"] == 1


def test_a_language_model_reads_text_and_an_encoder_images(ground: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "llama")
    with pytest.raises(UnsupportedModel, match="no part of it reads images alone; give --text for a model of text"):
        surgery.scan(tmp_path / "llama", images=ground / "pictures", chunking=FEW)
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    with pytest.raises(SurgeryError, match="is an encoder of images, which reads no text; give --images") as caught:
        surgery.scan(ground / "dinov2", text=text)
    assert "\n" not in str(caught.value)
    for other in ({"text": text}, {"memory": 10**9}, {"dtype": "bfloat16"}):
        with pytest.raises(SourceError, match="--images surveys an encoder, for which there is no --"):
            surgery.scan(ground / "dinov2", images=ground / "pictures", **other)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no processor", "has no preprocessor_config.json"),
        ("no such processor", "no image processor loads from it"),
        ("another size", "its processor makes pixels of several sizes|cannot read"),
        ("other channels", "does not make one image of 1 channels"),
        ("a block is missing", "its tensors do not fit its config.json"),
        ("NaN", "is not finite"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(what: str, words: str, ground: Path, tmp_path: Path) -> None:
    root = tmp_path / "encoder"
    shutil.copytree(ground / "dinov2", root)
    settings = root / "preprocessor_config.json"
    if what == "no processor":
        settings.unlink()
    elif what == "no such processor":
        edit_json(settings, image_processor_type="NoSuchProcessor")
    elif what == "another size":
        edit_json(settings, do_resize=False)
    elif what == "other channels":
        edit_json(root / "config.json", num_channels=1)
    elif what == "a block is missing":
        edit_json(root / "config.json", num_hidden_layers=BLOCKS + 1)
    else:
        model = encoder_model("dinov2")
        model.encoder.layer[1].mlp.fc1.weight.data[0, 0] = float("nan")
        model.save_pretrained(root)
    pictures = save_pictures(tmp_path / "pictures", 3)
    picture(9, size=(SIDE * 2, SIDE)).save(pictures / "1.png")
    with pytest.raises(SurgeryError, match=words) as caught:
        surgery.scan(root, images=pictures, chunking=surgery.Chunking(3))
    assert "\n" not in str(caught.value)
