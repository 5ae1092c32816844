"""Log-probabilities of token ids in vLLM: `python -m surgery.serving.score DIRECTORY REQUEST RESULT`.

REQUEST is a safetensors file with `ids` (N, T), RESULT one with `logs` (N, T - 1): of each token after those before it.
Run by the Python that vLLM is installed in. Each sequence done is a line on standard output, and
what stopped it the last one on standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .names import ENTRY

DONE, STOPPED = "scored", "stopped by "  # how lines begin: on standard output, and the last on standard error
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
    try:
        save_file({"logs": scored(directory, load_file(request)["ids"])}, result)
    except Exception as error:  # of any class: each of vLLM's models refuses in its own way
        traceback.print_exc()
        sys.exit(f"{STOPPED}{type(error).__name__}: {' '.join(str(error).split())}")


def scored(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """(N, T - 1) log-probabilities, float32, of `ids` (N, T) behind the placeholders, in vLLM without compilation."""
    from vllm import LLM, SamplingParams

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    placeholders = config[ENTRY]["placeholder_ids"]
    packed = (config.get("quantization_config") or {}).get("format") == "pack-quantized"
    dtype = "bfloat16" if packed else "float32"  # the only one that vLLM's kernels of 4 bit weights have on CPUs
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


if __name__ == "__main__":
    main(sys.argv[1:])
