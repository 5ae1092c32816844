"""Edits of a converted checkpoint, as someone makes them who wants to be believed: each with what must see it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from surgery.checkpoint.layout import INDEX, read_layout

from .tiny_checkpoint import edit_json

KEPT, ADDED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KEY, VALUE = (f"model.layers.1.self_attn.attention_bias.{part}" for part in ("key", "value"))
TENSOR, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"

Edit = Callable[[Path], object]


def at_bit(tensor: str, bit: int, entry: int = 3) -> Edit:
    """Flip one bit (0 is the lowest of the mantissa) of one float32 entry, in place."""

    def edit(root: Path) -> None:
        info = read_layout(root).tensors[tensor]
        with (root / info.shard).open("r+b") as file:
            file.seek(info.start + 4 * entry + bit // 8)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return edit


def on_tensors(shard: str, change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def edit(root: Path) -> None:
        tensors = {name: tensor.copy() for name, tensor in load_file(root / shard).items()}
        change(tensors)
        save_file(tensors, root / shard, {"format": "pt"})

    return edit


def on_json(name: str, change: Callable[[dict], object]) -> Edit:
    """Edit a JSON file in place, written as surgery writes it."""

    def edit(root: Path) -> None:
        content = json.loads((root / name).read_text(encoding="utf-8"))
        change(content)
        (root / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    return edit


def keys(name: str, **changes: object) -> Edit:
    return on_json(name, lambda content: content.update(changes))


def inside(name: str, key: str, **changes: object) -> Edit:
    return on_json(name, lambda content: content[key].update(changes))


def without(name: str, key: str) -> Edit:
    return on_json(name, lambda content: content.pop(key))


def file(name: str, content: str | bytes = "{}") -> Edit:
    def edit(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def more(name: str, text: str = " ") -> Edit:
    """Something more at the end of a file."""

    def edit(root: Path) -> None:
        with (root / name).open("a", encoding="utf-8") as opened:
            opened.write(text)

    return edit


def gone(name: str) -> Edit:
    return lambda root: (root / name).unlink()


def extra_shard(name: str) -> Edit:
    return lambda root: save_file({"x": np.zeros(3, np.float32)}, root / name, {"format": "pt"})


def single(root: Path) -> None:
    """One file of weights, which loaders prefer to an index."""
    shutil.copyfile(root / KEPT, root / "model.safetensors")


def swap(tensors: dict[str, np.ndarray]) -> None:
    other = KEY.replace("layers.1", "layers.0")
    tensors[KEY], tensors[other] = tensors[other], tensors[KEY]


def scale_smoothed(root: Path) -> None:
    """A kept tensor doubled, and said to be changed by the recipe."""
    on_tensors(KEPT, lambda t: t.update({TENSOR: t[TENSOR] * 2}))(root)
    on_json("surgery.json", lambda m: m["tensors"][TENSOR].update(status="changed"))(root)


def other_prefix(root: Path) -> None:
    inside("config.json", "eab", prefix_ids=[0, 6])(root)


def tokens(change: Callable[[dict], object]) -> Edit:
    return on_json("tokenizer.json", change)


def add_token(content: dict) -> None:
    content["added_tokens"].append(
        {"id": 319, "content": "zz", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip


# What must see an edit after which every hash in the manifest was written anew: the files by themselves ("alone"), the
# source ("against"), or only what seals the manifest ("seal"). "note": nobody minds, and it is told.
@dataclass(frozen=True)
class Case:
    edit: Edit
    seen: str
    rehash: bool = True  # whether there are hashes to write anew


def manifest(change: Callable[[dict], object], seen: str = "seal") -> Case:
    return Case(on_json("surgery.json", change), seen, rehash=False)


CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
FOREIGN_MAP = {"AutoTokenizer": ["a/b--t.T", None]}

CASES: dict[str, Case] = {
    # slots
    "slots scaled": Case(on_tensors(ADDED, lambda t: t.update({KEY: t[KEY] * 1.5})), "against"),
    "slots scaled by 1.01": Case(on_tensors(ADDED, lambda t: t.update({VALUE: t[VALUE] * 1.01})), "against"),
    "slots negated": Case(on_tensors(ADDED, lambda t: t.update({VALUE: -t[VALUE]})), "against"),
    "slots of two layers swapped": Case(on_tensors(ADDED, swap), "against"),
    "slots in another order": Case(on_tensors(ADDED, lambda t: t.update({KEY: t[KEY][::-1].copy()})), "against"),
    "keys and values swapped": Case(on_tensors(ADDED, lambda t: t.update({KEY: t[VALUE], VALUE: t[KEY]})), "against"),
    "slots zeroed": Case(on_tensors(ADDED, lambda t: t[KEY].fill(0)), "alone"),
    "NaN in a slot": Case(on_tensors(ADDED, lambda t: t[KEY].put(5, np.nan)), "alone"),
    "sign bit of a slot": Case(at_bit(KEY, 31), "against"),
    "exponent bit of a slot": Case(at_bit(KEY, 24), "against"),
    "high mantissa bit of a slot": Case(at_bit(VALUE, 22), "against"),
    "middle mantissa bit of a slot": Case(at_bit(VALUE, 11), "against"),
    "lowest mantissa bit of a slot": Case(at_bit(VALUE, 0), "against"),
    "header of the added shard": Case(
        lambda root: save_file(load_file(root / ADDED), root / ADDED, {"format": "pt", "by": "me"}), "against"
    ),
    # weights
    "one bit of a kept tensor": Case(at_bit(TENSOR, 0), "against"),
    "the head scaled": Case(on_tensors(KEPT, lambda t: t.update({HEAD: t[HEAD] * 2})), "against"),
    "a kept tensor said to be changed": Case(scale_smoothed, "against"),
    "header of a kept shard": Case(
        lambda root: save_file(load_file(root / KEPT), root / KEPT, {"format": "pt", "by": "me"}), "against"
    ),
    # config.json
    "rope_theta": Case(keys(CONFIG, rope_theta=500000.0), "against"),
    "rope_parameters": Case(keys(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "against"),
    "rms_norm_eps": Case(keys(CONFIG, rms_norm_eps=1e-3), "against"),
    "hidden_act": Case(keys(CONFIG, hidden_act="gelu"), "against"),
    "attention_dropout": Case(keys(CONFIG, attention_dropout=0.5), "against"),
    "eos_token_id": Case(keys(CONFIG, eos_token_id=5), "against"),
    "bos_token_id": Case(keys(CONFIG, bos_token_id=5), "against"),
    "pad_token_id": Case(keys(CONFIG, pad_token_id=5), "against"),
    "torch dtype": Case(keys(CONFIG, dtype="float16"), "against"),
    "longest text": Case(keys(CONFIG, max_position_embeddings=128), "against"),
    "initializer_range": Case(keys(CONFIG, initializer_range=0.9), "against"),
    "use_cache": Case(keys(CONFIG, use_cache=False), "against"),
    "a key more": Case(keys(CONFIG, note="x"), "against"),
    "a key less": Case(without(CONFIG, "rms_norm_eps"), "against"),
    "config.json written otherwise": Case(lambda root: edit_json(root / CONFIG), "against"),
    "slots_visible": Case(inside(CONFIG, "eab", slots_visible="always"), "against"),
    "another prefix": Case(other_prefix, "against"),
    "fewer slots": Case(inside(CONFIG, "eab", n_slots=1, prefix_ids=[0]), "alone"),
    "a bound on lengths": Case(inside(CONFIG, "eab", max_length=8), "alone"),
    "code of another repository": Case(keys(CONFIG, auto_map={"AutoConfig": "a/b--c.C"}), "alone"),
    "code named deep inside": Case(keys(CONFIG, deep={"a": [{"auto_map": {"AutoModel": "a/b--c.C"}}]}), "alone"),
    "pipelines of others": Case(keys(CONFIG, custom_pipelines={"x": {"impl": "a/b--c.C"}}), "alone"),
    # tokenizer and what goes with it
    "merges dropped": Case(tokens(lambda c: c["model"].update(merges=c["model"]["merges"][:-20])), "against"),
    "two tokens swapped": Case(
        tokens(lambda c: c["model"]["vocab"].update({"a": c["model"]["vocab"]["b"], "b": c["model"]["vocab"]["a"]})),
        "against",
    ),
    "a decoder replaced": Case(tokens(lambda c: c.update(decoder={"type": "Fuse"})), "against"),
    "a normalizer added": Case(tokens(lambda c: c.update(normalizer={"type": "Lowercase"})), "against"),
    "a token added": Case(tokens(add_token), "against"),
    "a token less special": Case(tokens(lambda c: c["added_tokens"][1].update(special=False)), "against"),
    "another eos_token": Case(keys(TOKENIZER, eos_token="the"), "against"),
    "longest text of the tokenizer": Case(keys(TOKENIZER, model_max_length=7), "against"),
    "padding on the left": Case(keys(TOKENIZER, padding_side="left"), "against"),
    "a chat template inside": Case(keys(TOKENIZER, chat_template="{{ messages[0]['content'] }} and obey"), "against"),
    "a chat template beside": Case(file("chat_template.jinja", "{{ messages[0]['content'] }}"), "against"),
    "a licence": Case(file("LICENSE", "Do as you like."), "against"),
    "added_tokens.json": Case(file("added_tokens.json", '{"zz": 319}'), "against"),
    "a preprocessor": Case(file("preprocessor_config.json"), "against"),
    "code for the tokenizer": Case(keys(TOKENIZER, auto_map=FOREIGN_MAP), "alone"),
    "code for a processor": Case(file("processor_config.json", json.dumps({"auto_map": FOREIGN_MAP})), "alone"),
    "code for generation": Case(keys(GENERATION, auto_map=FOREIGN_MAP), "alone"),
    # foreign files
    "a library": Case(file("kernel.so", b"\x7fELF"), "alone"),
    "a pickle": Case(file("pytorch_model.bin", pickle.dumps({})), "alone"),
    "a pickle called a vocabulary": Case(file("tokenizer.model", pickle.dumps({})), "alone"),
    "a pickle called a note": Case(file("notes.txt", pickle.dumps({})), "alone"),
    "an archive called a tokenizer": Case(file("tokenizer.dat", b"PK\x03\x04"), "alone"),
    "Python": Case(file("sitecustomize.py", "pass\n"), "alone"),
    "Python below": Case(file("custom_generate/generate.py", "pass\n"), "alone"),
    "Python of ours edited": Case(more("eab_kernel.py", "\n# x\n"), "alone"),
    "Python of ours gone": Case(gone("eab_kernel.py"), "alone"),
    "weights that loaders prefer": Case(single, "alone"),
    "weights of an adapter": Case(extra_shard("adapter_model.safetensors"), "alone"),
    "settings of an adapter": Case(file("adapter_config.json"), "alone"),
    "a shard that no index names": Case(extra_shard("model-00003-of-00003.safetensors"), "alone"),
    "an index of pickles": Case(file("pytorch_model.bin.index.json"), "alone"),
    "weights below": Case(lambda root: file("below/config.json")(root), "alone"),
    "settings of quantisation": Case(file("quantize_config.json"), "alone"),
    # the index
    "metadata of the index": Case(inside(INDEX, "metadata", total_size=1), "against"),
    # the manifest, where nothing but a seal can tell
    "status": manifest(lambda m: m.update(status="unverified")),
    "figures of the verdict": manifest(lambda m: m["verdict"]["perplexity"]["converted"].update(ppl=1.0)),
    "a gate of the verdict": manifest(lambda m: m["verdict"]["gates"].clear()),
    "a gate of the recipe": manifest(lambda m: m["recipe"]["verify"]["perplexity"].update(max_ratio=9.0)),
    "the name of the source": manifest(lambda m: m["source"].update(spec="meta-llama/x")),
    "versions": manifest(lambda m: m["versions"].update(torch="9.9")),
    "the source's hash": manifest(lambda m: m["source"]["sha256"].update({"config.json": "0" * 64}), "against"),
    # what its owner may change
    "the card": Case(more("README.md", "Mine.\n"), "note"),
    "a note": Case(file("NOTES.md", "Mine.\n"), "note"),
    "an image": Case(file("images/loss.png", b"\x89PNG"), "note"),
    "generation settings": Case(keys(GENERATION, eos_token_id=7), "note"),
}  # fmt: skip
