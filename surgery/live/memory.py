"""Where a model computes, how much memory it may take there, and whether it fits or has to come layer by layer."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..anatomy.fit import original_tensors
from ..anatomy.packed import comes_apart
from ..anatomy.sites import Anatomy
from ..checkpoint.layout import Layout
from ..errors import NoSpace, SourceError
from ..words import human
from .by_layers import ByLayers, size_of

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
# What a process takes besides weights: the interpreter with torch and transformers, and what a pass makes (logits of a
# batch in two forms, `port.LOGIT_BYTES`, and activations), which for a small model is less.
PROCESS = 700 * 2**20
PASS, SMALL_PASS, BY_WEIGHTS = 2**30, 64 * 2**20, 4
MOST_ASIDE = 4 * 2**30  # of hidden states that wait in memory
RESERVE = 16  # of what is free, one part in so many is left to others


def parse_memory(text: str) -> int:
    """Bytes of "8GiB", "800 MB" or "123456789"; SourceError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SourceError(f"--memory {text[:40]} is no size; write one such as 8GiB or 800MB.")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


@dataclass(frozen=True)
class Place:
    """A torch device, or "auto" to let accelerate spread the model; and how many bytes this process may take, None for
    as many as are free when a model is opened."""

    device: str = "cpu"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.device == "auto" and self.memory is not None:
            raise SourceError("--device auto places the model by itself, within what is free; leave --memory out.")

    def by_layers(self, anatomy: Anatomy, layout: Layout, dtype: torch.dtype = torch.float32) -> ByLayers | None:
        """How the model comes layer by layer; None where it is resident. NoSpace where neither fits."""
        needs = Needs.of(anatomy, layout, dtype)
        allowed = self._too_little(needs, layout.root)
        if allowed is None:
            return None
        waiting = min((allowed - needs.by_layers) // 2, MOST_ASIDE)
        return ByLayers(anatomy, allowed - PROCESS - needs.work - waiting, waiting + needs.work // 4)

    def comes_by_layers(self, spec: object, needs: Needs, asking: Iterable[Any]) -> bool:
        """Whether the model `spec` has to come layer by layer; NoSpace where an operation or gate of `asking` works on
        all weights."""
        if self._too_little(needs, spec) is None:
            return False
        whole = next((one.name for one in asking if one.whole), None)
        if whole is None:
            return True
        raise NoSpace(
            f"{spec} needs {human(needs.resident)} of memory, since '{whole}' in the recipe works on all weights at "
            f"once, and may take {human(self.allowed or 0)}; leave it out, or give more (--memory)."
        )

    def _too_little(self, needs: Needs, spec: object) -> int | None:
        """Bytes that are given, if they are too few for all weights at once. NoSpace where they do not do at all."""
        allowed = self.allowed
        if allowed is None or needs.resident <= allowed:
            return None
        given = f"{human(allowed)} {'are given (--memory)' if self.memory is not None else 'are free'}"
        if needs.layer is None:
            raise NoSpace(
                f"{spec} comes all at once, as encoders and packed weights of its kind do: that needs "
                f"{human(needs.resident)} of memory, and {given}; give it more, or --device auto."
            )
        if needs.by_layers > allowed:
            raise NoSpace(
                f"{spec} needs {human(needs.by_layers)} of memory even layer by layer, and {given}; give it more."
            )
        return allowed

    def told(self, needs: Needs, layout: Layout, layers: bool) -> dict[str, Any]:
        """`memory` of a plan: what a run takes, by layers or resident, and what each pass over weights reads."""
        return {
            "layer_by_layer": layers,
            "peak": needs.by_layers if layers else needs.resident,
            "allowed": self.allowed,
            "resident": needs.resident,
            "least": needs.by_layers,
            "read_each_pass": sum(tensor.nbytes for tensor in layout.tensors.values()) if layers else 0,
        }

    @property
    def allowed(self) -> int | None:
        """Bytes that this process, or a model on a GPU, may take; None where that is accelerate's business."""
        if self.device == "auto":
            return None
        if torch.device(self.device).type == "cuda" and torch.cuda.is_available():
            free = torch.cuda.mem_get_info(self.device)[0]
            return PROCESS + (free if self.memory is None else min(free, self.memory))
        return free_memory() if self.memory is None else self.memory


HERE = Place()


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that a model needs at the most: all of it resident, and layer by layer.

    `weights`: all of them as they compute; `layer`: the largest part that is there at a time, with what is read ahead,
    None for a model that only comes whole.
    """

    weights: int
    layer: int | None

    @property
    def work(self) -> int:
        """What a pass makes besides."""
        return min(PASS, SMALL_PASS + BY_WEIGHTS * self.weights)

    @property
    def resident(self) -> int:
        return PROCESS + self.work + self.weights

    @property
    def by_layers(self) -> int:
        return PROCESS + self.work + (self.weights if self.layer is None else self.layer)

    @classmethod
    def of(cls, anatomy: Anatomy, layout: Layout, dtype: torch.dtype, packs: bool = False) -> Needs:
        """`packs`: weights are packed in what is made of it, which is read too."""
        blank = anatomy.blank
        weights = size_of([blank], dtype)
        if anatomy.patching is not None or not comes_apart(anatomy.config):
            return cls(weights, None)
        blocks = [size_of([blank.get_submodule(f"{anatomy.lead}{name}")], dtype) for name in anatomy.blocks]
        both = (blank.get_input_embeddings(), blank.get_output_embeddings())
        ends = {id(end.weight): size_of([end], dtype) for end in both if end}  # one where they are tied
        outside = weights - sum(blocks) - sum(ends.values())
        stored = sum(tensor.nbytes for tensor in original_tensors(layout).tensors.values())  # slots are small
        packed = stored / max(1, weights)  # of a byte in memory, so many in the files
        fused = any("experts" in name for name, _ in blank.named_parameters())
        packs |= any(name.endswith("weight_scale") for name in layout.tensors)
        twice = 1 + (fused or packs)  # stacked or unpacked in memory
        loaded = max([twice * max(blocks), *ends.values()])
        ahead = max([*blocks, *ends.values()]) * min(packed, 1.0)
        return cls(weights, int(max(outside, 0) + loaded + ahead))


# ---- what is free


def free_memory() -> int:
    """Bytes that this process may take in all: what it has, and what machine, control groups and limits leave."""
    taken = _own("VmRSS:")
    free = [_field("/proc/meminfo", "MemAvailable:"), *_left_by_groups()]
    for limit, counted in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            free.append(max(0, soft - _own(counted)))
    some = [one for one in free if one is not None]
    return taken + (min(some) * (RESERVE - 1) // RESERVE if some else 2**60)


def _own(name: str) -> int:
    return _field("/proc/self/status", name) or 0


def _field(path: str, name: str) -> int | None:
    """A line such as "MemAvailable: 123 kB", in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def _left_by_groups() -> Iterator[int]:
    """What each control group that this process is in, and those around it, have left; page cache is not counted."""
    for limit, usage, folder in _groups():
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            cache = sum(_in_stat(folder, name) for name in ("inactive_file", "active_file"))
            yield max(0, most - (int((folder / usage).read_text()) - cache))


def _groups() -> Iterator[tuple[str, str, Path]]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = Path("/sys/fs/cgroup/memory" if kinds else "/sys/fs/cgroup")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            folder = root / path.lstrip("/")
            for at in (folder, *folder.parents):
                if at == root.parent:
                    break
                yield (*names, at)


def _in_stat(folder: Path, name: str) -> int:
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    return 0
