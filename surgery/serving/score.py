"""Log-probabilities of token ids in vLLM: `python -m surgery.serving.score DIRECTORY REQUEST RESULT`.

REQUEST is a safetensors file with `ids` (N, T), RESULT one with `logs` (N, T - 1): of each token after those before it.
Run by the Python that vLLM is installed in. Each sequence done is a line on standard output, and
what stopped it the last one on standard error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .names import ENTRY

# How lines begin: on standard output, and the last on standard error.
DONE, STOPPED, UNFIT = "scored", "stopped by ", "not run: "
# In one process, quiet, in a cache that any machine has (GiB); what is set already stays.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a text may take all positions: no token is read after it
}


def main(arguments: list[str]) -> None:
    directory, request, result = map(Path, arguments)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available() and (why := unfit(_format(_config(directory)))):
        sys.exit(f"{UNFIT}{why}; export on another machine")
    try:
        save_file({"logs": scored(directory, load_file(request)["ids"])}, result)
    except Exception as error:  # of any class: each of vLLM's models refuses in its own way
        traceback.print_exc()
        sys.exit(f"{STOPPED}{type(error).__name__}: {' '.join(str(error).split())}")


def unfit(form: str | None) -> str | None:
    """Why vLLM on this machine's processor does not compute what a checkpoint of the compressed-tensors format `form`
    says; None where it does."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    bf16, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    if form == "int-quantized" and amx:
        return "this processor has AMX, where vLLM's int8 kernel takes no float32"
    if form == "int-quantized" and not torch.cpu._is_vnni_supported():
        # Pairs of products are summed in 16 bits (oneDNN, "Nuances of int8 computations").
        return "this processor has no AVX512-VNNI, and oneDNN's int8 products saturate there"
    if form == "pack-quantized" and not bf16 and not amx:
        return "this processor has no AVX512-BF16, and vLLM's kernels of 4 bit weights compute in bfloat16"
    return None


def scored(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """(N, T - 1) log-probabilities, float32, of `ids` (N, T) behind the placeholders, in vLLM without compilation."""
    from vllm import LLM, SamplingParams

    config = _config(directory)
    placeholders = config[ENTRY]["placeholder_ids"]
    # The only one that vLLM's kernels of 4 bit weights have on CPUs.
    dtype = "bfloat16" if _format(config) == "pack-quantized" else "float32"
    length = len(placeholders) + ids.shape[1] + 1
    engine = LLM(
        str(directory), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
        max_model_len=length, max_num_batched_tokens=max(2048, length), max_num_seqs=8,
    )  # fmt: skip
    # One token is generated, since vLLM gives none without; it is not looked at.
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    rows = []
    for row in ids.tolist():
        prompt = {"prompt_token_ids": [*placeholders, *row]}
        found = engine.generate([prompt], sampling, use_tqdm=False)[0].prompt_logprobs
        after = found[len(placeholders) + 1 :]
        rows.append([entry[token].logprob for entry, token in zip(after, row[1:], strict=True)])
        print(DONE, flush=True)
    return torch.tensor(rows, dtype=torch.float32)


def _config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def _format(config: dict[str, Any]) -> str | None:
    return (config.get("quantization_config") or {}).get("format")


if __name__ == "__main__":
    main(sys.argv[1:])
