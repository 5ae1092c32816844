"""A tiny llama on disk, with a tokenizer and text, for tests that go through the command line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

BOS, EOS = "<s>", "</s>"
WORDS = "the a of in river stone old bridge was built by people who lived near water and fields when it rained".split()

RECIPE = """surgery: 1
operations:
  - attention_bias:
      prefix: ["<s>", "\\n"]
verify:
  equivalence: {max_delta_nll: 1.0e-3}
  perplexity: {max_ratio: 2.0}
  massive_activations: {max: 1000000}
"""


def write_text(path: Path, words: int, seed: int) -> Path:
    """Sentences of random words: enough for a tokenizer to learn from and for a model to be wrong about."""
    chosen = random.Random(seed)
    lines = []
    while words > 0:
        count = chosen.randint(4, 9)
        lines.append(" ".join(chosen.choice(WORDS) for _ in range(count)).capitalize() + ".")
        words -= count
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_tokenizer(root: Path, text: Path, framed: bool = False) -> None:
    """A byte-level BPE that puts BOS in front of every text, as llama's does; `framed`: and EOS behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train([str(text)], trainer)
    single, pair = (f"{BOS} $A {EOS}", f"{BOS} $A {EOS} $B {EOS}") if framed else (f"{BOS} $A", f"{BOS} $A {BOS} $B")
    special = [(token, inner.token_to_id(token)) for token in (BOS, EOS)]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    padding = {"pad_token": EOS} if framed else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, **padding).save_pretrained(root)


def enlarge(model) -> None:
    """Other random weights in place of the model's matrices, large enough that attention matters."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)


def save_model(root: Path, *, shard_size: str = "1GB", seed: int = 0, massive: int | None = None) -> None:
    """Two layers, four heads, two of them for keys; random weights, large enough that attention matters.

    `massive`: a token that shall carry a massive activation, wherever it stands: the first MLP writes it (dim 7), from
    a mark that no other token has (dim 5).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    enlarge(model)
    if massive is not None:
        with torch.no_grad():
            embedding, mlp = model.model.embed_tokens.weight, model.model.layers[0].mlp
            embedding[:, 5], embedding[massive, 5] = 0.0, 30.0
            model.model.layers[0].self_attn.o_proj.weight[5] = 0.0
            for part in (mlp.gate_proj, mlp.up_proj):
                part.weight[3] = 0.0
                part.weight[3, 5] = 10.0
            mlp.down_proj.weight[7, 3] = 20.0
    model.save_pretrained(root, max_shard_size=shard_size)


def sha256_of_files(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def rehash(root: Path) -> None:
    """What a careful attacker does last: write every file's new hash and size into the manifest."""
    files = {
        name: {"sha256": digest, "bytes": (root / name).stat().st_size}
        for name, digest in sha256_of_files(root).items()
        if name not in ("surgery.json", "model.sig")
    }
    edit_json(root / "surgery.json", files=files)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence on standard error, less the word before it; fails unless there is one, at the end."""
        lines = self.err.splitlines()
        assert [line.startswith("error ") for line in lines].count(True) == 1, self.err
        assert lines[-1].startswith("error "), self.err
        sentence = lines[-1].removeprefix("error ")
        assert sentence.endswith(".") and not re.search(r"[.!?] +[A-Z][a-z]+ [a-z]", sentence), sentence
        return sentence


def surgery_command(*arguments: object, stdout: TextIO | None = None) -> Ended:
    """The real command line, in this process: importing torch anew costs seconds."""
    from surgery import cli
    from surgery.endings.signals import command_released

    out, err = stdout or io.StringIO(), io.StringIO()
    before = sys.argv, warnings.showwarning
    sys.argv = ["surgery", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv, warnings.showwarning = before
        command_released()
    return Ended(ended.value.code, "" if stdout else out.getvalue(), err.getvalue())


MEASURED = ("--chunks", "4", "--chunk-length", "32")


@dataclass(frozen=True)
class Place:
    """A source (also in shards), texts, a recipe, and what `surgery run` made of them."""

    root: Path

    source = property(lambda self: self.root / "source")
    sharded = property(lambda self: self.root / "sharded")
    text = property(lambda self: self.root / "evaluation.txt")
    recipe = property(lambda self: self.root / "recipe.yaml")
    converted = property(lambda self: self.root / "converted")
    verdict = property(lambda self: json.loads((self.root / "verdict.json").read_text(encoding="utf-8")))


def build_place(root: Path) -> Place:
    place = Place(root)
    write_text(place.text, 1500, seed=1)
    place.recipe.write_text(RECIPE, encoding="utf-8")
    save_model(place.source)
    save_model(place.sharded, shard_size="40KB")
    for directory in (place.source, place.sharded):
        save_tokenizer(directory, place.text)
    result = root / "verdict.json"
    ended = surgery_command(
        "run", place.recipe, place.source, place.converted, "--text", place.text, *MEASURED, "--json", result
    )
    assert ended.code == 0, ended.out + ended.err
    return place
