"""GGUF files of a random, llama-like model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

Edit = Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], None]
WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB, INNER = 64, 2, 4, 2, 96, 128


def tiny_llama(path: Path, edit: Edit | None = None, arch: str = "llama", skip: str = "", kind: str = "F32") -> Path:
    """A GGUF of a random llama-like model; `edit` changes keys and tensors before they are written."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "vocab_size": VOCAB,
    }
    for key, value in numbers.items():
        if key != skip:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", 12345.0)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    head = WIDTH // HEADS
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (WIDTH,),
                "ffn_norm": (WIDTH,),
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (KV_HEADS * head, WIDTH),
                "attn_v": (KV_HEADS * head, WIDTH),
                "attn_output": (WIDTH, WIDTH),
                "ffn_gate": (INNER, WIDTH),
                "ffn_up": (INNER, WIDTH),
                "ffn_down": (WIDTH, INNER),
            }.items()
        }
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if edit is not None:
        edit(writer, tensors)
    for name, values in tensors.items():
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
