"""A tiny llama with its tokenizer in one GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HEADS, KV_HEADS, HEAD, DIM, INNER, LAYERS, POSITIONS = 4, 2, 8, 32, 48, 2, 256


def save_gguf(path: Path, seed: int = 0) -> Path:
    """Random float32 weights, large enough that attention matters; bytes as tokens, and BOS 0, EOS 1."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (len(tokens), DIM),
        "output.weight": (len(tokens), DIM),
        "output_norm.weight": (DIM,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (DIM,), f"blk.{layer}.ffn_norm.weight": (DIM,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD, DIM), f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD, DIM),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD, DIM),
            f"blk.{layer}.attn_output.weight": (DIM, HEADS * HEAD), f"blk.{layer}.ffn_gate.weight": (INNER, DIM),
            f"blk.{layer}.ffn_up.weight": (INNER, DIM), f"blk.{layer}.ffn_down.weight": (DIM, INNER),
        }  # fmt: skip
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(scale=0.2, size=shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
