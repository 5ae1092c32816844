"""Recordings from files, as the checkpoint's own feature extractor makes them what its encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor

from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..errors import SourceError, UnsupportedModel, brief
from .images import PROCESSORS
from .searched import every_file

SUFFIXES = (".flac", ".ogg", ".wav")  # what a directory is searched for
SHORTEST, LONGEST = 0.1, 10.0  # seconds of a recording: what an encoder can hear, and what is read where any will do
WINDOW = 120.0  # seconds that are read for an extractor that cuts or pads by itself; none is known that takes as many


def every_recording(given: Sequence[Path]) -> list[Path]:
    """The recordings among files and directories, which are searched for them by name, in order."""
    return every_file(given, SUFFIXES, "recordings", "--audio")


def require_readers() -> None:
    """SourceError where a package is missing that reads recordings."""
    try:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: without the library that it wraps
        raise SourceError(
            f"--audio needs soundfile and soxr ({brief(error)}): pip install 'checkpoint-surgery[audio]'."
        ) from error


def seconds_of(path: Path) -> float:
    """How long a recording is. SourceError for a file that is none, or one that is too short."""
    import soundfile

    try:
        found = soundfile.info(str(path))
        seconds = found.frames / found.samplerate
    except Exception as error:  # each of the library's decoders fails in its own way
        raise _unread(path, error) from error
    if not seconds >= SHORTEST:
        raise SourceError(
            f"{path}: is {max(seconds, 0):.3g} seconds of sound, and an encoder hears nothing in less than {SHORTEST}; "
            "give another file."
        )
    return seconds


def read_recording(path: Path, rate: int, seconds: float) -> np.ndarray:
    """The first `seconds` of a recording, its channels mixed, as (samples,) of float32 at `rate` per second."""
    import soundfile
    import soxr

    seconds = min(seconds, seconds_of(path))
    try:
        with soundfile.SoundFile(str(path)) as file:
            own, said = file.samplerate, min(file.frames, int(np.ceil(seconds * file.samplerate)))
            found = file.read(said, dtype="float32", always_2d=True).mean(axis=1)
        sound = np.ascontiguousarray(found if own == rate else soxr.resample(found, own, rate), dtype=np.float32)
    except Exception as error:
        raise _unread(path, error) from error
    if len(found) < said:
        raise SourceError(f"{path}: holds less sound than it says, and ends early; give another file.")
    if not bool(np.isfinite(sound).all()):
        raise SourceError(f"{path}: holds samples that are no finite numbers; give another file.")
    wanted = round(seconds * rate)
    return np.pad(sound[:wanted], (0, max(wanted - len(sound), 0)))  # a resampler may give one sample less


def _unread(path: Path, error: Exception) -> SourceError:
    return SourceError(f"{path}: cannot be read as a recording ({brief(error)}); give another file.")


def load_extractor(directory: Path) -> Any:
    """The feature extractor in `directory`; SourceError if there is none that loads."""
    file = next((directory / name for name in PROCESSORS if (directory / name).is_file()), None)
    if file is None:
        raise SourceError(
            f"{directory} has no {PROCESSORS[0]}, which says what an encoder is given of sound; put the model's own "
            "there."
        )
    try:
        with quiet():
            found = AutoFeatureExtractor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        rate = found.sampling_rate
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        raise SourceError(
            f"{file}: no feature extractor of sound loads from it ({brief(error)}); correct it."
        ) from error
    if type(rate) is not int or not 1_000 <= rate <= 1_000_000:
        raise SourceError(f"{file}: sampling_rate is not as many samples as a second has; correct it.")
    return found


def cuts_by_itself(extractor: Any, anatomy: Anatomy) -> bool:
    """Whether what it makes is of one size, however long a recording is."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * extractor.sampling_rate).astype(np.float32)
    return len({_made(extractor, noise[: len(noise) // n], anatomy, "noise").shape for n in (1, 2)}) == 1


def read_features(extractor: Any, files: Sequence[Path], anatomy: Anatomy, seconds: float) -> torch.Tensor:
    """What the encoder reads of the first `seconds` of the files, (N, ...), each made by itself.

    SourceError for a file that is no recording, UnsupportedModel where the extractor makes something else of one.
    """
    rate = extractor.sampling_rate
    found = [_made(extractor, read_recording(path, rate, seconds), anatomy, path.name) for path in files]
    if len({tuple(one.shape) for one in found}) > 1:
        raise UnsupportedModel(
            f"{anatomy.model_type}: its feature extractor makes several sizes of recordings of one length, which one "
            "pass cannot read"
        )
    return torch.stack(found)


def _made(extractor: Any, sound: np.ndarray, anatomy: Anatomy, name: str) -> torch.Tensor:
    patching = anatomy.patching
    assert patching is not None
    try:
        with quiet(), np.errstate(all="ignore"):  # what is not finite is said below
            given = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        made = given[patching.input]
    except Exception as error:  # of any class, as the settings in its file have it
        raise SourceError(
            f"{name}: the checkpoint's feature extractor cannot read it ({brief(error)}); correct its settings."
        ) from error
    if not isinstance(made, torch.Tensor) or len(made) != 1 or made.ndim != 1 + len(patching.shape):
        raise UnsupportedModel(
            f"{anatomy.model_type}: its feature extractor does not make one recording of {len(patching.shape)} "
            f"dimensions of {name}"
        )
    if not bool(made.isfinite().all()):
        raise SourceError(f"{name}: the checkpoint's feature extractor makes what is not finite of it; give another.")
    features: torch.Tensor = made[0].float()
    return features
