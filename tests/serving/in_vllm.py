"""Runs in the Python of vLLM: `in_vllm.py JOBS.json FOUND.json`, one engine after another in this process.

A job is {"directory", "engine": settings of LLM, "unguarded", "calls": [{"prompts", "sampling"}]}. A prompt is a list
of token ids, a text, or a list of messages (a chat). FOUND has for each job {"error"} or {"calls": [[row]]}, a row
being {"prompt": ids, "ids": generated, "logs": of each prompt token}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

# One process and one thread, which share the machine with other tests: threads that wait for each other spin.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def main(jobs_file: str, found_file: str) -> None:
    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    found = []
    for job in jobs:
        try:
            found.append({"calls": ran(job)})
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    with open(found_file, "w", encoding="utf-8") as file:
        json.dump(found, file)


def ran(job: dict) -> list[list[dict]]:
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 512, "max_logprobs": -1}
    engine = LLM(job["directory"], **(settings | job.get("engine", {})))
    try:
        with unguarded() if job.get("unguarded") else contextlib.nullcontext():
            return [called(engine, **call) for call in job["calls"]]
    finally:
        engine.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def unguarded():
    """Requests as they come, not looked at by the plugin."""
    from vllm.v1.engine.input_processor import InputProcessor

    guarded = InputProcessor.process_inputs
    InputProcessor.process_inputs = guarded.__wrapped__
    try:
        yield
    finally:
        InputProcessor.process_inputs = guarded


def called(engine, prompts: list, sampling: dict) -> list[dict]:
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
    if isinstance(prompts[0], list) and isinstance(prompts[0][0], dict):
        outputs = engine.chat(prompts, sampling, use_tqdm=False)
    else:
        given = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(given, sampling, use_tqdm=False)
    return [row(output) for output in outputs]


def row(output) -> dict:
    ids, logs = output.prompt_token_ids, output.prompt_logprobs
    scored = logs and [None if entry is None else entry[token].logprob for entry, token in zip(logs, ids, strict=True)]
    return {"prompt": list(ids), "ids": list(output.outputs[0].token_ids), "logs": scored}


if __name__ == "__main__":
    main(*sys.argv[1:])
