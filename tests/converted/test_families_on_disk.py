"""Every exact family of the matrix on disk: converted, loaded by a process without surgery, equal to the control.

The sources differ in turn: one float32 file, float32 shards, bfloat16. `test_on_disk.py` looks closer at a few.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import EXACT, PREFIX, Family, behind, families, in_tiers
from helpers.fresh_process import ask, greedy, load
from helpers.tiny import build, in_dtype, one_thread, tiny_text

from surgery.steps.options import RunOptions
from surgery.steps.recipe import parse_recipe
from surgery.verbs.run import run

RECIPE = f"surgery: 1\noperations:\n  - attention_bias: {{prefix: {PREFIX}}}\n"
LENGTH, PROMPT, NEW_TOKENS = 40, 21, 6  # past every window (8) and chunk (16), and so when generating
FORMS = [(torch.float32, "1GB"), (torch.float32, "40KB"), (torch.bfloat16, "1GB")]

# Slots are folded in float32 and stored so: an error of 1e-7 in each, a few times that in the logits, relative to the
# largest. Everything else is float64 on both sides.
TOLERANCE = 2e-5


def save(family: Family, source: Path, dtype: torch.dtype, shard: str) -> None:
    with family.default_dtype():
        in_dtype(build(family.config()), dtype).save_pretrained(source, max_shard_size=shard)


@torch.no_grad()
def control(family: Family, source: Path) -> dict:
    """Logits of the text behind the prefix, and greedy tokens of the prompt with each cache that the original takes."""
    with family.default_dtype():
        model, _ = load(source, auto=type(build(family.config())), trust_remote_code=False)
        found = {"logits": model(input_ids=behind(text()), use_cache=False).logits[:, len(PREFIX) :]}
        for cache in ("dynamic", "static"):
            try:
                found[cache] = greedy(model, behind(prompt()), NEW_TOKENS, cache_implementation=cache)
            except Exception:  # an original that knows no static cache, in whatever way it fails, is no control
                if cache == "dynamic":
                    raise
        if "static" in found and not torch.equal(found["static"][0], found["dynamic"][0]):
            del found["static"]  # GPT-Neo's window forgets that a static cache is not full
    return found


def text() -> torch.Tensor:
    return tiny_text(2, LENGTH)


def prompt() -> torch.Tensor:
    return tiny_text(2, PROMPT, seed=2)


@pytest.fixture(scope="module")
def everything(request, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """Family -> the control, and what the fresh process found, for those that this run asks for."""
    wanted = {item.callspec.params["kind"] for item in request.session.items if item.fspath == request.fspath}
    root = tmp_path_factory.mktemp("families")
    controls, tasks = {}, {}
    with one_thread():
        for i, kind in enumerate(EXACT):
            if kind not in wanted:
                continue
            family = families()[kind]
            source, out = root / family.model_type, root / f"{family.model_type}-out"
            save(family, source, *FORMS[i % len(FORMS)])
            with family.default_dtype():
                run(parse_recipe(RECIPE, "recipe"), str(source), out, RunOptions(verify=False))
            controls[family.model_type] = found = control(family, source)
            tasks[family.model_type] = {
                "path": str(out), "text": text(), "prompt": prompt(), "new_tokens": NEW_TOKENS,
                "caches": [cache for cache in ("dynamic", "static") if cache in found],
                "default_dtype": getattr(torch, family.runs_in or "float32"),
            }  # fmt: skip
    report = ask(root, {"families": tasks}, timeout=1800)
    assert report["surgery"] == [], "loading needed surgery"
    return {kind: (found, report[kind]) for kind, found in controls.items()}


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_on_disk(everything, kind):
    expected, found = everything[kind]
    if "failed" in found:
        pytest.fail(found["failed"], pytrace=False)
    assert found["problems"] == {}
    size = expected["logits"].abs().max() * (10 if families()[kind].rounds else 1)
    assert (found["logits"] - expected["logits"]).abs().max() < TOLERANCE * size
    for cache in set(expected) - {"logits"}:
        assert torch.equal(found[cache][0], expected[cache][0]), f"other tokens with a {cache} cache"
        assert (found[cache][1] - expected[cache][1]).abs().max() < TOLERANCE * size, cache
