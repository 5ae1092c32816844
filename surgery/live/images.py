"""Images from files, as the checkpoint's own image processor makes pixels of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from ..anatomy.patching import Patching
from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..errors import SourceError, UnsupportedModel, brief
from .searched import every_file, first_files

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the latter is what newer versions write
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a directory is searched for


def every_image(given: Sequence[Path]) -> list[Path]:
    """The images among files and directories, which are searched for images by name, in order."""
    return every_file(given, SUFFIXES, "images", "--images")


def image_files(given: Sequence[Path], count: int) -> list[Path]:
    """The first `count` of them; SourceError where there are fewer."""
    return first_files(given, every_image(given), count, "images")


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
    if image.mode.startswith("I;16"):  # 16 bits a channel, which PIL would cut off
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):  # of no known range: from the darkest to the brightest
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_processor(directory: Path) -> Any:
    """The image processor in `directory`; SourceError if there is none that loads."""
    file = next((directory / name for name in PROCESSORS if (directory / name).is_file()), None)
    if file is None:
        raise SourceError(
            f"{directory} has no {PROCESSORS[0]}, which says how images become pixels; put the model's own there."
        )
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise SourceError(f"{file}: this image processor needs torchvision; pip install torchvision.") from error
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        raise SourceError(f"{file}: no image processor loads from it ({brief(error)}); correct it.") from error


def read_pixels(processor: Any, files: Sequence[Path], anatomy: Anatomy) -> torch.Tensor:
    """Pixels (N, C, H, W) of the files, as the checkpoint's processor makes them.

    SourceError for a file that is no image, UnsupportedModel where the processor makes something else of one.
    """
    found = [_pixels(processor, path, anatomy) for path in files]
    if len({tuple(pixels.shape) for pixels in found}) > 1:
        raise UnsupportedModel(
            f"{anatomy.model_type}: its processor makes pixels of several sizes, which one pass cannot "
            f"read; set a size and a crop in {PROCESSORS[0]}"
        )
    return torch.stack(found)


def _pixels(processor: Any, path: Path, anatomy: Anatomy) -> torch.Tensor:
    assert anatomy.patching is not None
    image, channels, packed = read_image(path), anatomy.patching.shape[0], anatomy.patching.handed == "packed"
    try:
        if packed:  # patches of one grid for all: that of the square in the middle
            image = ImageOps.fit(image, (min(image.size),) * 2)
        found = processor(image, return_tensors="pt")
        made = _uncut(found, anatomy.patching) if packed else found["pixel_values"]
    except Exception as error:  # of any class, as the settings in its file have it
        raise SourceError(
            f"{path}: the checkpoint's image processor cannot read it ({brief(error)}); correct its settings."
        ) from error
    if not isinstance(made, torch.Tensor) or made.ndim != 4 or len(made) != 1 or made.shape[1] != channels:
        raise UnsupportedModel(
            f"{anatomy.model_type}: its processor does not make one image of {channels} channels of {path.name}"
        )
    pixels: torch.Tensor = made[0]
    return pixels


def _uncut(found: Any, patching: Patching) -> torch.Tensor:
    """Pixels (1, C, H, W) of patches that a processor has cut already, as `tower.given_to` cuts them."""
    assert patching.patch is not None
    (rows, columns), (high, wide) = found["spatial_shapes"][0].tolist(), patching.patch
    cut = found["pixel_values"][:, : rows * columns].reshape(1, rows, columns, high, wide, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(1, -1, rows * high, columns * wide)


def picture_of(pixels: torch.Tensor, side: int) -> Image.Image:
    """Pixels (C, H, W) as the encoder is given them, for people to look at: from the darkest to the brightest."""
    low, high = pixels.amin(), pixels.amax()
    values = ((pixels - low) * (255 / (high - low).clamp(min=1e-12))).round().byte()
    image = Image.fromarray(values.permute(1, 2, 0)[..., [0, -1, -1] if len(values) < 3 else [0, 1, 2]].cpu().numpy())
    image.thumbnail((side, side))
    return image
