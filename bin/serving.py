"""What the benchmarks in vLLM share: the real model as several checkpoints, each served by a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from in_vllm import ANSWER
from safetensors.torch import load_file, save_file

import surgery
from surgery.anatomy.linears import linears
from surgery.anatomy.sites import examine
from surgery.checkpoint.compressed import config_entry, packed
from surgery.checkpoint.source import open_source
from surgery.live.loading import load_original
from surgery.live.model import Live
from surgery.live.paired import paired
from surgery.live.quantised import activation_ranges
from surgery.live.score import Score
from surgery.live.text import tokenize
from surgery.progress import SILENT
from surgery.steps.original import plain_files
from surgery.words import factor

ROOT = Path(__file__).resolve().parents[1]
MATERIAL, VLLM = ROOT / ".material", ROOT / ".venv-vllm" / "bin" / "python"
GGUF = MATERIAL / "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("wikipedia", "news", "technical")  # of text, each with a file to calibrate on and one to evaluate on
LENGTH = 512
READ = 3_000_000  # characters of a text are tokenised at most


class Served:
    """A checkpoint in vLLM, in a process that waits while it is not asked.

    `eager`: as it is, not compiled, which takes a minute.
    """

    def __init__(self, directory: Path, dtype: str = "float32", eager: bool = False) -> None:
        self.directory = directory
        script = Path(__file__).with_name("in_vllm.py")
        command = [str(VLLM), str(script), str(directory), dtype, str(int(eager))]
        self.log = tempfile.TemporaryFile("w+")  # a full pipe would stop it
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self._answer()

    def ask(self, **request: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def score(self, chunks: torch.Tensor) -> Score:
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            save_file({"ids": chunks.contiguous()}, file.name)
            return Score(tuple(self.ask(score=file.name)), chunks.shape[1] - 1)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self.log.seek(0)
        raise SystemExit(f"vLLM stopped on {self.directory}:\n{self.log.read()[-2000:]}")


def chunks_of(tokenizer: Any, path: Path, count: int) -> torch.Tensor:
    """(count, 512) token ids that a text begins with."""
    ids = tokenize(tokenizer, path.read_text(encoding="utf-8")[:READ])
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@contextlib.contextmanager
def original() -> Iterator[Path]:
    """The unmodified original in float32, as plain files."""
    with plain_files(open_source(str(GGUF), dtype="float32"), SILENT) as directory:
        assert directory is not None
        yield directory


def rounded_original(original: Path, out: Path, scheme: str, calibration: torch.Tensor) -> Path:
    """The original, its linear layers rounded to nearest by `scheme` and nothing else done, as compressed-tensors."""
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    anatomy = examine(config)
    live = Live(load_original(original), anatomy)
    ranges = activation_ranges(live, calibration)
    out.mkdir()
    for file in original.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy(file, out)
    tensors = {name: tensor for file in original.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in linears(anatomy.blank, anatomy):
        base = f"{anatomy.lead}{name}."
        parts = packed(tensors.pop(f"{base}weight"), ranges[name], scheme, 0)
        tensors |= {base + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = config_entry(scheme, 0, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def converted(out: Path, calibration: list[Path]) -> Path:
    """What `surgery run w8a8-vllm` and `surgery export vllm` make of the original."""
    made = out.with_name(out.name + "-transformers")
    surgery.run("w8a8-vllm", str(GGUF), made, calibration=calibration, verify=False)
    surgery.export("vllm", made, out, engine_python=VLLM)
    return out


def ratio(found: Score, base: Score) -> tuple[float, float]:
    """Perplexity over that of `base`, and the far end of its paired 95% interval."""
    interval = paired(found, base)
    return factor(interval.mean), factor(interval.high)
