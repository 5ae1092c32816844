"""Tiny models served by vLLM: made here, run by the Python of .venv-vllm, compared with the original in float64."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from helpers.families import families, tiny
from helpers.tiny import TINY, build
from helpers.tiny_checkpoint import save_tokenizer, surgery_command, write_text

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "serving" / "in_vllm.py"
PREFIX = [0, 5, 7]  # the BOS among them
VOCAB = 320  # as the tokenizer has
# vLLM's kernels for CPUs have heads of 32 dims at least, and experts of multiples of 32.
HEAD, WIDTH, INNER = 32, 128, 64
WIDE = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["head_dim", "query_pre_attn_scalar"], HEAD),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"], INNER),
    "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    # What vLLM does not do for anybody: Qwen with windows in some layers, GPT-2 with other scales.
    "use_sliding_window": False, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
}  # fmt: skip


def vllm_python() -> str:
    """The Python that has vLLM; skips the test where there is none."""
    python = Path(os.environ.get("SURGERY_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.exists():
        pytest.skip("there is no .venv-vllm (bin/setup --vllm makes it)")
    return str(python)


def wide_model(kind: str) -> PreTrainedModel:
    """A tiny model in float32 with heads that vLLM's kernels know."""
    config, settings = CONFIG_MAPPING[kind], {**families()[kind].settings, **TINY.get(kind, {})}
    known = {*config().to_dict(), *config.attribute_map}
    return build(tiny(kind, {**settings, **{k: v for k, v in WIDE.items() if k in known}})).float()


@dataclass(frozen=True)
class Served:
    """A source, what `surgery run` made of it, and where its export goes."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def converted(self) -> Path:
        return self.root / "converted"

    @property
    def directory(self) -> Path:
        return self.root / "served"

    @property
    def card(self) -> str:
        return (self.directory / "README.md").read_text(encoding="utf-8").replace("\n", " ")

    @cached_property
    def original(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float64).eval()

    @property
    def placeholders(self) -> list[int]:
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        found: list[int] = config["served_slots"]["placeholder_ids"]
        return found

    @torch.inference_mode()
    def logs(self, ids: list[int]) -> list[float]:
        """Log-probability of each of `ids` but the first, by the original after the prefix."""
        found = self.original(torch.tensor([[*PREFIX, *ids]])).logits[0].log_softmax(-1)
        return [found[len(PREFIX) + at - 1, token].item() for at, token in enumerate(ids) if at]

    @torch.inference_mode()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest tokens after `ids`, by the original after the prefix."""
        row = [*PREFIX, *ids]
        for _ in range(count):
            row.append(int(self.original(torch.tensor([row])).logits[0, -1].argmax()))
        return row[len(PREFIX) + len(ids) :]


def make(kind: str, root: Path, *export: object, further: str = "") -> Served:
    """A model of `kind` with its tokenizer, converted and exported with the options `export`.

    `further`: operations after the fold, as lines of a recipe.
    """
    made = Served(root)
    made.source.mkdir(parents=True)
    wide_model(kind).save_pretrained(made.source)
    text = write_text(root / "text.txt", 1500, seed=1)
    save_tokenizer(made.source, text)
    recipe = root / "recipe.yaml"
    fold = f"surgery: 1\noperations:\n  - attention_bias: {{prefix: {PREFIX}}}\n"
    recipe.write_text(fold + further, encoding="utf-8")
    reading = ("--calibration", text, "--chunks", 8, "--chunk-length", 32) if further else ()
    for command in (
        ("run", recipe, made.source, made.converted, "--no-verify", *reading),
        ("export", "vllm", made.converted, made.directory, *export),
    ):
        ended = surgery_command(*command)
        assert ended.code == 0, ended.out + ended.err
    return made


def run_in_vllm(jobs: list[dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """What tests/serving/in_vllm.py finds for `jobs`."""
    request, answer = folder / "jobs.json", folder / "found.json"
    request.write_text(json.dumps(jobs), encoding="utf-8")
    ended = subprocess.run(
        [vllm_python(), str(SCRIPT), str(request), str(answer)], env={**os.environ, **environment}, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return found
