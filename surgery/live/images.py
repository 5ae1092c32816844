"""Images from files, as the checkpoint's own image processor makes pixels of them; and the encoder that reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from ..anatomy.encoders import Encoder, parse_encoder, tower_of
from ..anatomy.quiet import quiet
from ..checkpoint.config import CONFIG, read_config, without_choices
from ..errors import SourceError, UnsupportedModel, brief
from .loading import require_fit, require_memory
from .model import Live
from .port import Images

PROCESSOR = "preprocessor_config.json"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a directory is searched for
POOLER = "pooler"  # a head that some classes have and checkpoints of others lack; nothing here reads it


def image_files(given: Sequence[Path], count: int) -> list[Path]:
    """The first `count` images among files and directories, which are searched for images by name, in order.

    SourceError where there are fewer.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES and one.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise SourceError(f"{path}: is neither a file nor a directory; give images with --images.")
    if len(found) < count:
        names = ", ".join(map(str, given))
        raise SourceError(
            f"{names}: {len(found)} images, and {count} are to be read; give more, or ask for fewer (--chunks)."
        )
    return found[:count]


def read_image(path: Path) -> Image.Image:
    """An image in RGB, turned as its camera says; of an animation the first frame, transparent parts over white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image: Image.Image = ImageOps.exif_transpose(opened)
                image.load()
                return _in_colour(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SourceError(f"{path}: is larger than an image should be ({brief(error)}); give a smaller one.") from error
    except Exception as error:  # each of the library's decoders fails in its own way
        raise SourceError(f"{path}: cannot be read as an image ({brief(error)}); give another file.") from error


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a channel, or more: PIL would cut them off
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        most = 255.0 if 0 <= low and high <= 255 else 65535.0 if 0 <= low and high <= 65535 else None
        scaled = values * (255 / most) if most else (values - low) * (255 / max(high - low, 1e-12))
        image = Image.fromarray(scaled.round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_processor(directory: Path) -> Any:
    """The image processor in `directory`; SourceError if there is none that loads."""
    if not (directory / PROCESSOR).is_file():
        raise SourceError(
            f"{directory} has no {PROCESSOR}, which says how images become pixels; put the model's own there."
        )
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        raise SourceError(
            f"{directory / PROCESSOR}: no image processor loads from it ({brief(error)}); correct it."
        ) from error


def read_pixels(processor: Any, files: Sequence[Path], encoder: Encoder) -> torch.Tensor:
    """Pixels (N, C, H, W) of the files, as the checkpoint's processor makes them.

    SourceError for a file that is no image, UnsupportedModel where the processor makes something else of one.
    """
    found = [_pixels(processor, path, encoder) for path in files]
    if len({tuple(pixels.shape) for pixels in found}) > 1:
        raise UnsupportedModel(
            f"{encoder.anatomy.model_type}: its processor makes pixels of several sizes, which one pass cannot "
            f"read; set a size and a crop in {PROCESSOR}"
        )
    return torch.stack(found)


def _pixels(processor: Any, path: Path, encoder: Encoder) -> torch.Tensor:
    image, kind = read_image(path), encoder.anatomy.model_type
    try:
        made = processor(image, return_tensors="pt")["pixel_values"]
    except Exception as error:  # of any class, as the settings in its file have it
        raise SourceError(
            f"{path}: the checkpoint's image processor cannot read it ({brief(error)}); correct its settings."
        ) from error
    if not isinstance(made, torch.Tensor) or made.ndim != 4 or len(made) != 1 or made.shape[1] != encoder.channels:
        raise UnsupportedModel(
            f"{kind}: its processor does not make one image of {encoder.channels} channels of {path.name}"
        )
    pixels: torch.Tensor = made[0]
    return pixels


def port_of(encoder: Encoder, pixels: torch.Tensor) -> Images:
    """What becomes of such pixels."""
    return Images(encoder.grid(*pixels.shape[-2:]), encoder.special, encoder.registers)


def load_encoder(directory: Path, encoder: Encoder, port: Images, device: str = "cpu") -> Live:
    """The encoder in `directory`, in float32, by transformers' own code. Errors as `loading.load_original`."""
    config, kind = parse_encoder(without_choices(read_config(directory), directory / CONFIG))
    try:
        with quiet():
            model, report = kind.from_pretrained(
                directory, config=config, dtype=torch.float32, device_map=None if device == "cpu" else device,
                local_files_only=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        require_memory(directory, error)
        raise SourceError(
            f"{directory}: transformers cannot load it ({brief(error)}); give a complete checkpoint."
        ) from error
    missing = [name for name in report.get("missing_keys", ()) if POOLER not in name]
    require_fit(directory, model, {**report, "missing_keys": missing})
    name = tower_of(model)
    assert name == encoder.tower
    return Live(model.eval().get_submodule(name), encoder.anatomy, port)


def thumbnails(files: Sequence[Path], side: int) -> Iterator[Image.Image]:
    """Small squares of the images, their middles, for people to look at."""
    for path in files:
        yield ImageOps.fit(read_image(path), (side, side))
