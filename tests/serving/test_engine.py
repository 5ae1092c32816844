"""A tiny model in vLLM is the original after its prefix, however vLLM cuts the work, and says no to what is not its.

One process of the Python that has vLLM runs all engines; `bin/setup --vllm` makes it.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import VOCAB, Served, make, run_in_vllm

pytestmark = [pytest.mark.serve, pytest.mark.slow]
NEW, ROUNDING = 8, 1e-3  # float32 after float64, of a model whose bare original is off by several nats
SAMPLING = {"max_tokens": NEW, "prompt_logprobs": 0}
CHAT = [[{"role": "user", "content": "the river"}]]


def texts(count: int) -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(2, VOCAB) for _ in range(chosen.randint(2, 60))] for _ in range(count)]


FEW, MANY = texts(4), texts(32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make("llama", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def found(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name of a job -> what it found."""
    lead = served.placeholders
    few, many = ([[*lead, *ids] for ids in given] for given in (FEW, MANY))
    strays = [[3, *prompt[1:]] for prompt in few]
    scored, repeated = ({"prompts": few, "sampling": sampling} for sampling in (SAMPLING, {"max_tokens": NEW}))
    jobs: dict[str, dict[str, Any]] = {
        "plain": {"calls": [scored, {"prompts": many, "sampling": {"max_tokens": NEW}}], "caching": False},
        "caching": {"calls": [repeated, repeated, scored], "caching": True},
        "chunks": {"calls": [scored], "engine": {"max_num_batched_tokens": 16, "max_num_seqs": 4}},
        "compiled": {"calls": [scored], "engine": {"enforce_eager": False}},
        "text": {"calls": [{"prompts": ["the river", " in"], "sampling": {"max_tokens": NEW}}]},
        "stray": {"calls": [{"prompts": strays[:1], "sampling": SAMPLING}]},
        "empty": {"calls": [{"prompts": [lead], "sampling": SAMPLING}]},
        "unguarded": {
            "calls": [{"prompts": strays, "sampling": SAMPLING}, scored],
            "unguarded": True,
            "caching": False,
        },
    }
    for job in jobs.values():
        settings = {"enable_prefix_caching": job.pop("caching", True), "max_model_len": 128}
        job |= {"directory": str(served.directory), "engine": settings | job.get("engine", {})}
    answers = run_in_vllm([*jobs.values()], tmp_path_factory.mktemp("jobs"))
    return dict(zip(jobs, answers, strict=True))


def worst(served: Served, rows: list[dict]) -> float:
    """The largest |delta log-probability| of a token of FEW to the original after the prefix."""
    lead = len(served.placeholders)
    deltas = [
        abs(a - b)
        for ids, row in zip(FEW, rows, strict=True)
        for a, b in zip(served.logs(ids), row["logs"][lead + 1 :], strict=True)
    ]
    return max(deltas)


@pytest.mark.parametrize(("job", "call"), [("plain", 0), ("caching", 2), ("chunks", 0), ("compiled", 0)])
def test_log_probabilities_are_the_originals(served: Served, found: dict, job: str, call: int) -> None:
    rows = found[job]["calls"][call]
    assert worst(served, rows) < ROUNDING
    assert [row["ids"] for row in rows] == [served.greedy(ids, NEW) for ids in FEW]


def test_a_batch_of_many_lengths_is_exact(served: Served, found: dict) -> None:
    assert [row["ids"] for row in found["plain"]["calls"][1]] == [served.greedy(ids, NEW) for ids in MANY]


def test_what_is_cached_is_the_same(served: Served, found: dict) -> None:
    first, second, _ = found["caching"]["calls"]
    assert first == second
    assert [row["ids"] for row in first] == [served.greedy(ids, NEW) for ids in FEW]


def test_texts_get_placeholders_from_the_tokenizer(served: Served, found: dict) -> None:
    for row in found["text"]["calls"][0]:
        lead = len(served.placeholders)
        assert row["prompt"][:lead] == served.placeholders
        assert row["ids"] == served.greedy(row["prompt"][lead:], NEW)


def test_requests_without_placeholders_are_refused(found: dict) -> None:
    assert "VLLMValidationError: prompts of this model begin with the token ids [0, 5, 7]" in found["stray"]["error"]
    assert "prompt is empty" in found["empty"]["error"]


def test_unguarded_strays_are_noise_and_harm_nobody(served: Served, found: dict) -> None:
    strays, after = found["unguarded"]["calls"]
    assert all(math.isfinite(log) for row in strays for log in row["logs"][1:])
    assert worst(served, strays) > 1
    assert worst(served, after) < ROUNDING, "what a stray left in the cache is seen by no other request"


def test_vllm_without_the_plugin_stops(served: Served, tmp_path: Path) -> None:
    job = {"directory": str(served.directory), "calls": []}
    for implementation in ("auto", "transformers"):
        (found,) = run_in_vllm([{**job, "engine": {"model_impl": implementation}}], tmp_path, VLLM_PLUGINS="")
        assert "SurgeryEabLlamaForCausalLM" in found["error"], found
