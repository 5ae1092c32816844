"""Speed and memory of attention with slots, as ratios to the plain thing measured side by side in one run.

Each figure is the median over rounds; the rounds of the variants alternate, so that a slow moment of the machine hits
all of them.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import surgery
from surgery.anatomy.encoders import examine_encoder
from surgery.anatomy.sites import examine
from surgery.live.graft import Fold, fold, grafted
from surgery.live.model import Live
from surgery.live.port import port_of
from surgery.operations.estimated_bias import Estimated, EstimatedBias
from surgery.parts import every_shape
from surgery.runtime import eab_kernel
from surgery.steps.recipe import parse_recipe

ROUNDS = 7
WIDE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRIDS: dict[str, dict] = {
    "lfm2": {},
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 32},
    "olmo_hybrid": {},
}


ENCODER: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224, "patch_size": 14,
    "num_register_tokens": 4, "intermediate_size": 1536,
}  # fmt: skip


def medians(variants: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each variant, rounds interleaved, one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernel_rows() -> list[tuple[str, dict[str, float]]]:
    """9 query heads, 3 key/value heads, head dim 64, 2 slots, causal."""
    rows = []
    scale = 64**-0.5
    for length, dtype in ((512, torch.float32), (2048, torch.float32), (2048, torch.bfloat16), (4096, torch.bfloat16)):
        query, key, value = (torch.randn(1, heads, length, 64, dtype=dtype) for heads in (9, 3, 3))
        slot_key, slot_value = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
        wide_key, wide_value = (t.repeat_interleave(3, dim=1) for t in (key, value))
        keys, values, mask = eab_kernel._concatenate(query, key, value, slot_key, slot_value, True, None, None)

        def plain(q=query, k=wide_key, v=wide_value):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

        def merged(q=query, k=key, v=value, sk=slot_key, sv=slot_value):
            return eab_kernel.slot_attention(q, k, v, sk, sv, scale=scale, causal=True)

        def concatenated(q=query, k=keys, v=values, m=mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale)

        with torch.inference_mode():
            name = f"attention, T={length}, {str(dtype).removeprefix('torch.')}"
            rows.append((name, medians({"plain": plain, "merged": merged, "concatenated": concatenated})))
    return rows


def model_rows(gguf: Path) -> list[tuple[str, dict[str, float]]]:
    """The real model, original against converted: a forward pass of 512 tokens, and 32 generated ones."""
    recipe = parse_recipe("surgery: 1\noperations:\n  - attention_bias: {prefix: [216, 198]}\n", "bench")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "converted"
        surgery.run(recipe, str(gguf), out, surgery.RunOptions(verify=False))
        tokenizer = AutoTokenizer.from_pretrained(out)
        converted = AutoModelForCausalLM.from_pretrained(out).eval()
        original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = torch.randint(5, 49000, (1, 512), generator=torch.Generator().manual_seed(0))
    short = tokenizer("The capital of France", return_tensors="pt")

    def forward(model):
        return lambda: model(input_ids=ids, use_cache=False)

    def generate(model):
        return lambda: model.generate(**short, max_new_tokens=32, min_new_tokens=32, do_sample=False)

    with torch.inference_mode():
        return [
            ("SmolLM2 forward, 512 tokens", medians({"plain": forward(original), "merged": forward(converted)})),
            ("SmolLM2 generate, 32 tokens", medians({"plain": generate(original), "merged": generate(converted)}, 3)),
        ]


def hybrid_rows() -> list[tuple[str, dict[str, float]]]:
    """Random models whose mixers remember two tokens, 12 layers of width 512: 512 tokens at once, and 32 generated."""
    rows = []
    for kind, settings in HYBRIDS.items():
        config = CONFIG_MAPPING[kind](**WIDE, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            original = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        live = Live(copy.deepcopy(original), examine(config.to_dict()))
        ids = torch.randint(5, 4000, (1, 512), generator=torch.Generator().manual_seed(0))
        new = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        with grafted(live, fold(live, (5, 7), "as_prefix")), torch.inference_mode():
            both = {"plain": original, "merged": live.model}
            forward = {name: partial(model, input_ids=ids, use_cache=False) for name, model in both.items()}
            generate = {name: partial(model.generate, input_ids=ids[:, :8], **new) for name, model in both.items()}
            rows += [
                (f"{kind} forward, 512 tokens", medians(forward)),
                (f"{kind} generate, 32 tokens", medians(generate, 3)),
            ]
    return rows


def encoder_rows() -> list[tuple[str, dict[str, float]]]:
    """Encoders of 12 layers, 384 wide, random weights: 8 images of 224 x 224 with 4 registers, and with 4 slots."""
    rows = []
    operation = EstimatedBias.model_validate({"from": "registers"})
    for kind in ("dinov2_with_registers", "dinov3_vit"):
        anatomy = examine_encoder({"model_type": kind, **ENCODER})
        model = AutoModel.from_config(CONFIG_MAPPING[kind](**ENCODER)).eval()
        live, pixels = Live(copy.deepcopy(model), anatomy, port_of(anatomy)), torch.randn(8, 3, 224, 224)
        shapes = every_shape(anatomy.eab(4, "always"))
        slots = Fold((), {name: torch.randn(shape) for name, shape in shapes.items()}, "always")
        with torch.inference_mode(), operation.graft(live, Estimated(slots, 1, 4.0)):
            calls = {"plain": partial(model, pixel_values=pixels), "merged": partial(live.model, pixel_values=pixels)}
            rows.append((f"{kind}, 4 registers", medians(calls)))
    return rows


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = [*kernel_rows(), *model_rows(Path(sys.argv[1])), *hybrid_rows(), *encoder_rows()]
    table = Table(
        title=f"Median of {ROUNDS} interleaved rounds, {torch.get_num_threads()} threads", title_justify="left"
    )
    for column in ("", "without slots", "with slots", "ratio", "concatenated", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in rows:
        plain, joined = seconds["plain"], seconds.get("concatenated")
        cells = [
            name,
            f"{plain * 1e3:.1f} ms",
            f"{seconds['merged'] * 1e3:.1f} ms",
            f"{seconds['merged'] / plain:.2f}x",
        ]
        table.add_row(*cells, *((f"{joined * 1e3:.1f} ms", f"{joined / plain:.2f}x") if joined else ("", "")))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
