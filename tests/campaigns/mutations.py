"""Random changes of bytes, of JSON and of text, each drawn from a generator that the caller seeds."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is where a value is due, whatever JSON says to it."""

    text: str


DEEP = 30_000

# What no writer of ours would put there: other types, edges of numbers, text that reaches for files or the terminal.
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    "", "x", "0", "\ud800", "\x1b[31m\n\r\t", "\u202e\u2066", "a" * 100_000, "../../x", "/dev/zero", "/dev/stdin",
    "owner/name", "owner/name--code.Class", "__class__", "model.layers.0", "NaN", "float99",
    [], {}, [[]], [None], [{}], {"": 0}, {"a": {"b": [1]}}, list(range(5000)), ["x"] * 5000,
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("-" + "9" * 5000), Raw("0x10"),
    Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "0" + "}" * DEEP), Raw("{"), Raw(""),
)  # fmt: skip
# Keys that some library gives a meaning to.
KEYS = (
    "auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "num_hidden_layers",
    "vocab_size", "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "layer_types",
    "sliding_window", "rope_scaling", "rope_parameters", "rope_theta", "text_config", "vision_config", "model_type",
    "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "max_position_embeddings", "eab", "head_norm",
    "chat_template", "tokenizer_class", "model_max_length", "bos_token", "added_tokens_decoder", "extra_special_tokens",
    "normalizer", "pre_tokenizer", "post_processor", "decoder", "__metadata__", "data_offsets", "shape", "weight_map",
    "metadata", "files", "tensors", "verdict", "recipe", "source", "status", "format", "pad_token_id",
    "initializer_range", "num_experts", "num_local_experts", "is_decoder", "__float__", "_name_or_path",
)  # fmt: skip


def written(value: Any) -> str:
    """JSON text of `value`, raw parts as they are; lone surrogates as escapes."""
    raw: list[str] = []

    def marked(node: Any) -> Any:
        if isinstance(node, Raw):
            raw.append(node.text)
            return f"\x00{len(raw) - 1}\x00"
        if isinstance(node, dict):
            return {key: marked(child) for key, child in node.items()}
        return [marked(child) for child in node] if isinstance(node, list) else node

    text = json.dumps(marked(value))
    for i, part in enumerate(raw):
        text = text.replace(json.dumps(f"\x00{i}\x00"), part)
    return text


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every node below `value`, at most 2,000 of them."""
    found = [path]
    for node in found:
        if len(found) > 2000:
            break
        at = _at(value, node)
        keys = list(at) if isinstance(at, dict) else range(min(len(at), 20)) if isinstance(at, list) else ()
        found += [(*node, key) for key in keys]
    yield from found


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def hostile(rng: random.Random) -> Any:
    """One of HOSTILE that a later change may change in turn: a try must not depend on those before it."""
    return copy.deepcopy(rng.choice(HOSTILE))


def json_edit(rng: random.Random, original: Any) -> Any:
    """`original` with one to three changes: a node replaced, removed, renamed, moved, repeated, or a key added."""
    value = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(value)))
        if not path:
            if rng.random() < 0.05:
                return hostile(rng)
            if isinstance(value, dict):
                value[rng.choice(KEYS)] = hostile(rng)
            continue
        rng.choice(_JSON_EDITS)(rng, value, _at(value, path[:-1]), path[-1])
    return value


def _replace(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    parent[key] = hostile(rng)


def _remove(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    del parent[key]


def _rename(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        strings = [value for value in HOSTILE if isinstance(value, str)]
        parent[rng.choice([*KEYS, *strings])] = parent.pop(key)


def _add(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(KEYS)] = hostile(rng)


def _copy_another(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    parent[key] = copy.deepcopy(_at(root, rng.choice(list(places(root)))))


def _alter(rng: random.Random, root: Any, parent: Any, key: Any) -> None:
    old = parent[key]
    if isinstance(old, bool) or not isinstance(old, (int, float, str, list)):
        parent[key] = [old]
    elif isinstance(old, (int, float)):
        parent[key] = rng.choice((-old, old + 1, old - 1, old * 1000, old * 10**9, float(old), str(old)))
    else:
        parent[key] = rng.choice((old * 2, old[:-1], old[::-1], old * 1000))


_JSON_EDITS: tuple[Callable[[random.Random, Any, Any, Any], None], ...] = (
    _replace, _replace, _replace, _remove, _rename, _add, _copy_another, _alter, _alter,
)  # fmt: skip


def bytes_edit(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """`data` with one to four changes of bytes, most of them in its first `within`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = min(len(changed), within or len(changed)) if rng.random() < 0.9 else len(changed)
        at, length = rng.randrange(max(end, 1)), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(7)
        if kind == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[at] = rng.choice((0, 255, 0x22, 0x7B, 0x5D, 0x0A, 0xC3))
        elif kind == 2:
            changed[at:at] = rng.randbytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 100))
        elif kind == 5:
            changed[at : at + 8] = rng.choice((2**63, 2**64 - 1, 2**32, 2**40, 10**8)).to_bytes(8, "little")
        else:
            del changed[at:]
    return bytes(changed)


def as_json_bytes(rng: random.Random, data: bytes) -> bytes:
    """A JSON file changed in its structure, or now and then in its bytes."""
    if rng.random() < 0.2:
        return bytes_edit(rng, data)
    text = written(json_edit(rng, json.loads(data)))
    if rng.random() < 0.1 and text.startswith("{"):  # a key that is there twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")
