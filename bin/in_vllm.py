"""One model in vLLM, run by the Python of .venv-vllm: in_vllm.py DIRECTORY DTYPE EAGER

Each line of standard input is a request, and each answer a line that begins with ANSWER:
    {"score": FILE}         log-likelihood of the chunks `ids` (N, T) in a safetensors file -> NLL of each chunk
    {"prefill": [B, T]}     a batch of B prompts of T random ids, none seen before -> seconds
    {"decode": [B, T, N]}   the same, and N tokens generated after each -> seconds
vLLM compiles the model as it does for anybody who serves it, unless EAGER is 1. No request finds its prefix in a cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ANSWER = "answer "
LENGTH = 1024  # tokens that a request has at most

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class Served:
    """The model, and the placeholders that its requests begin with."""

    def __init__(self, directory: Path, dtype: str, eager: bool) -> None:
        from vllm import LLM

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.lead = config.get("served_slots", {}).get("placeholder_ids", [])
        self.engine = LLM(
            str(directory), dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=LENGTH,
            max_num_batched_tokens=4096, max_num_seqs=16, max_logprobs=1,
            enforce_eager=eager,
        )  # fmt: skip
        self.random = random.Random(0)

    def generate(self, rows: list[list[int]], **sampling):
        from vllm import SamplingParams

        given = [{"prompt_token_ids": [*self.lead, *row]} for row in rows]
        chosen = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
        return self.engine.generate(given, chosen, use_tqdm=False)

    def score(self, file: str) -> list[float]:
        from safetensors.torch import load_file

        found = []
        for row in load_file(file)["ids"].tolist():
            logs = self.generate([row], max_tokens=1, prompt_logprobs=0)[0].prompt_logprobs[len(self.lead) + 1 :]
            found.append(-sum(entry[token].logprob for entry, token in zip(logs, row[1:], strict=True)))
        return found

    def prefill(self, shape: list[int]) -> float:
        return self.decode([*shape, 1])

    def decode(self, shape: list[int]) -> float:
        batch, length, new = shape
        rows = [[self.random.randrange(5, 40_000) for _ in range(length)] for _ in range(batch)]
        start = time.perf_counter()
        self.generate(rows, max_tokens=new)
        return time.perf_counter() - start


def main(directory: str, dtype: str, eager: str) -> None:
    served = Served(Path(directory), dtype, eager == "1")
    print(ANSWER + "null", flush=True)
    for line in sys.stdin:
        ((what, given),) = json.loads(line).items()
        methods: dict[str, Callable] = {"score": served.score, "prefill": served.prefill, "decode": served.decode}
        print(ANSWER + json.dumps(methods[what](given)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
