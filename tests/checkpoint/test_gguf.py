"""A GGUF becomes the checkpoint that transformers would have loaded, bit for bit, or is refused with a reason."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.tiny_gguf import HEADS, INNER, LAYERS, VOCAB, WIDTH, Edit, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from surgery.checkpoint.gguf import gguf_config, gguf_layout, plan_gguf, stream_gguf
from surgery.checkpoint.gguf_header import read_header
from surgery.checkpoint.layout import INDEX, SINGLE, read_layout, read_tensor_bytes
from surgery.checkpoint.source import materialise, open_source, source_hashes
from surgery.checkpoint.values import tensor_bytes
from surgery.errors import DamagedCheckpoint, OutputError, SourceError, SurgeryError, UnsupportedModel
from surgery.steps.emit import emitted_config
from surgery.steps.nature import source_tokenizer
from surgery.steps.plan import prepare
from surgery.steps.recipe import parse_recipe

logging.set_verbosity_error()
logging.disable_progress_bar()


def refused(path: Path, kind: type[SurgeryError], *words: str, dtype: str = "float32") -> None:
    with pytest.raises(kind) as caught:
        plan_gguf(path, dtype)
    says(caught, kind, path.name, *words)


def says(caught: pytest.ExceptionInfo, kind: type[SurgeryError], *words: str) -> None:
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def assert_as_loaded(path: Path, streamed: Path, dtype: str) -> int:
    """Every tensor on disk equals the loader's, none is missing, and the directory loads. Returns how many."""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))
    expected = loaded.state_dict()
    layout = read_layout(streamed)
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    assert set(layout.tensors) == set(expected) - tied
    for name, info in layout.tensors.items():
        assert info.shape == tuple(expected[name].shape)
        assert read_tensor_bytes(layout, name) == tensor_bytes(expected[name]), name
    again, report = AutoModelForCausalLM.from_pretrained(streamed, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(loaded) and again.dtype == getattr(torch, dtype)
    ignored = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "quantization_config"}
    before, after = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (loaded, again))
    assert before == after
    return len(layout.tensors)


STREAM = """
import json, resource, sys
from pathlib import Path
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.source import materialise, open_source
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source, steps = open_source(sys.argv[1]), []
before = peak()
root = materialise(source, Path(sys.argv[2]), lambda *step: steps.append(step))
grown, layout = peak() - before, read_layout(root)
assert layout.tensors == source.layout.tensors and layout.sizes == source.layout.sizes
assert json.loads((root / "config.json").read_text()) == source.config
print(json.dumps({"grown": grown, "steps": steps, "companions": source.companions}))
"""


@pytest.fixture(scope="module")
def run(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """SmolLM2 opened and materialised as the commands do it, in a process whose memory is watched."""
    root = tmp_path_factory.mktemp("gguf") / "model"
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(smollm2_gguf), str(root)],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {"root": root, "stderr": done.stderr, **json.loads(done.stdout)}


@pytest.fixture(scope="module")
def streamed(run: dict) -> Path:
    return run["root"]


def test_streaming_smollm2_is_complete_bounded_and_warns(run: dict) -> None:
    """538 MB go through a process that grows by less than 4 times the largest tensor (113 MB)."""
    tensors = read_layout(run["root"]).tensors.values()
    total, largest = sum(info.nbytes for info in tensors), max(info.nbytes for info in tensors)
    assert run["grown"] < 4 * largest < total
    assert len(run["steps"]) == 272 and all(count > 0 for count, _ in run["steps"])
    assert sum(count for count, _ in run["steps"]) == total
    assert {name for _, name in run["steps"]} == {info.name for info in tensors}
    assert {entry.name for entry in run["root"].iterdir()} == {*run["companions"], "config.json", SINGLE}
    assert "pre-tokenizer 'smollm'" in run["stderr"] and "compare token ids" in run["stderr"]


def test_smollm2_is_bit_equal_to_the_loader(smollm2_gguf: Path, streamed: Path) -> None:
    assert assert_as_loaded(smollm2_gguf, streamed, "float32") == 272


def test_smollm2_keeps_its_tokenizer_and_generation_config(smollm2_gguf: Path, streamed: Path) -> None:
    original = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    emitted = AutoTokenizer.from_pretrained(streamed)
    text = "The 3 cats' <|im_start|>user\n\n  naïve 東京 café 1234\t😀"
    assert emitted(text).input_ids == original(text).input_ids
    assert emitted.chat_template == original.chat_template
    assert (emitted.bos_token_id, emitted.eos_token_id, emitted.pad_token_id) == (1, 2, 2)
    generation = json.loads((streamed / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    config = json.loads((streamed / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def test_a_gguf_source_is_one_file_with_the_dtype_asked_for(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    source = open_source(str(path), dtype="bfloat16")
    assert (source.kind, source.root, source.config["dtype"]) == ("gguf", path, "bfloat16")
    assert (
        {info.dtype for info in source.layout.tensors.values()}
        == {"BF16"}
        == {info.dtype for info in read_layout(materialise(source, tmp_path / "out")).tensors.values()}
    )
    assert gguf_layout(path, "bfloat16") == source.layout
    assert source_hashes(source) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "BF16"])
def test_tiny_models_are_bit_equal_in_every_dtype(tmp_path: Path, dtype: str, kind: str) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", kind=kind)
    stream_gguf(path, tmp_path / "out", dtype)
    assert assert_as_loaded(path, tmp_path / "out", dtype) == 3 + 9 * LAYERS


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tied.gguf", lambda _, tensors: tensors.pop("output.weight"))
    stream_gguf(path, tmp_path / "out")
    assert gguf_config(path)["tie_word_embeddings"] is True
    assert assert_as_loaded(path, tmp_path / "out", "float32") == 2 + 9 * LAYERS


def test_other_families_are_bit_equal(tmp_path: Path) -> None:
    def biases(_: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.split(".")[-2] in ("attn_q", "attn_k", "attn_v")]:
            tensors[name.replace("weight", "bias")] = np.ones(tensors[name].shape[0], dtype=np.float32)

    path = tiny_llama(tmp_path / "qwen.gguf", biases, arch="qwen2")
    stream_gguf(path, tmp_path / "qwen2")
    assert assert_as_loaded(path, tmp_path / "qwen2", "float32") == 3 + 12 * LAYERS


@pytest.mark.slow
def test_gpt2_which_transposes_and_places_its_own_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    for key, value in {
        "block_count": 1,
        "context_length": 1024,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "attention.head_count": 4,
    }.items():
        writer.add_uint32(f"gpt2.{key}", value)
    writer.add_float32("gpt2.attention.layer_norm_epsilon", 1e-5)
    writer.add_uint32("gpt2.vocab_size", VOCAB)
    shapes = {
        "token_embd.weight": (50257, 32),
        "position_embd.weight": (1024, 32),
        "output.weight": (50257, 32),
        "output_norm.weight": (32,),
        "output_norm.bias": (32,),
    }
    shapes |= {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm.weight": (32,),
            "attn_norm.bias": (32,),
            "ffn_norm.weight": (32,),
            "ffn_norm.bias": (32,),
            "attn_qkv.weight": (96, 32),
            "attn_qkv.bias": (96,),
            "attn_output.weight": (32, 32),
            "attn_output.bias": (32,),
            "ffn_up.weight": (128, 32),
            "ffn_up.bias": (128,),
            "ffn_down.weight": (32, 128),
            "ffn_down.bias": (32,),
        }.items()
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stream_gguf(tmp_path / "gpt2.gguf", tmp_path / "out")
    assert assert_as_loaded(tmp_path / "gpt2.gguf", tmp_path / "out", "float32") == len(shapes)


def test_large_models_are_sharded(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    stream_gguf(path, tmp_path / "out", max_shard=60_000)
    layout = read_layout(tmp_path / "out")
    assert len(layout.shards) > 2 and (tmp_path / "out" / INDEX).is_file()
    assert layout.shards[0] == f"model-00001-of-{len(layout.shards):05d}.safetensors"
    for shard in layout.shards:
        assert sum(info.nbytes for info in layout.tensors.values() if info.shard == shard) <= 60_000
    assert_as_loaded(path, tmp_path / "out", "float32")


def test_nothing_is_unpacked_into_a_directory_in_use(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("")
    with pytest.raises(OutputError) as caught:
        stream_gguf(path, tmp_path / "out")
    says(caught, OutputError, "out", "not empty")
    with pytest.raises(OutputError) as caught:
        stream_gguf(path, tmp_path / "missing" / "out")
    says(caught, OutputError, "missing")


def add_uint(key: str, value: int) -> Edit:
    return lambda writer, _: writer.add_uint32(key, value)


def add_float(key: str, value: float) -> Edit:
    return lambda writer, _: writer.add_float32(key, value)


def add_string(key: str, value: str) -> Edit:
    return lambda writer, _: writer.add_string(key, value)


def add_tensor(name: str, *shape: int) -> Edit:
    return lambda _, tensors: tensors.update({name: np.ones(shape, dtype=np.float32)})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (add_string("llama.rope.scaling.type", "linear"), ("rotary", "llama.rope.scaling.type", "linear")),
        (add_float("llama.rope.scaling.factor", 8.0), ("llama.rope.scaling.factor", "8.0")),
        (add_tensor("rope_freqs.weight", 8), ("rope_freqs.weight", "does not read")),
        (add_tensor("blk.0.attn_sinks.weight", 4), ("attn_sinks", "does not read")),
        (add_tensor("blk.7.attn_norm.weight", WIDTH), ("blk.7", "does not read")),
        (add_uint("llama.attention.sliding_window", 64), ("llama.attention.sliding_window", "64")),
        (add_uint("llama.rope.dimension_count", 8), ("attn_q", "shape")),  # becomes the head size
        (add_uint("llama.expert_count", 8), ("llama.expert_count", "does not read")),
        (add_float("llama.logit_scale", 0.5), ("llama.logit_scale", "does not read")),
        (lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"), ("no tensor", "model.layers.1.mlp.up_proj.weight")),
        (add_tensor("blk.0.ffn_up.weight", INNER + 1, WIDTH), ("blk.0.ffn_up.weight", "shape")),
    ],
)
def test_what_would_not_be_read_is_refused(tmp_path: Path, edit: Edit, words: tuple[str, ...]) -> None:
    refused(tiny_llama(tmp_path / "tiny.gguf", edit), UnsupportedModel, *words, "original safetensors")


def test_a_partial_rotary_width_that_is_passed_over_is_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "qwen.gguf", add_uint("qwen2.rope.dimension_count", 8), arch="qwen2")
    refused(path, UnsupportedModel, "qwen2.rope.dimension_count = 8", "16")


def test_neutral_rope_scaling_is_no_scaling(tmp_path: Path) -> None:
    def neutral(writer: gguf.GGUFWriter, _: object) -> None:
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_float32("llama.rope.scaling.factor", 1.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 128)
        writer.add_uint32("llama.rope.dimension_count", WIDTH // HEADS)
        writer.add_uint32("llama.attention.key_length", WIDTH // HEADS)

    plan_gguf(tiny_llama(tmp_path / "tiny.gguf", neutral))


@pytest.mark.parametrize("arch", ["no-such-arch", "t5", "lfm2", "deepseek2"])
def test_architectures_that_cannot_be_streamed(tmp_path: Path, arch: str) -> None:
    refused(tiny_llama(tmp_path / "tiny.gguf", arch=arch), UnsupportedModel, arch)


def test_merged_experts_are_refused(tmp_path: Path) -> None:
    def experts(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        writer.add_uint32("qwen3moe.expert_count", 4)
        writer.add_uint32("qwen3moe.expert_used_count", 2)
        writer.add_uint32("qwen3moe.attention.key_length", WIDTH // HEADS)
        for i in range(LAYERS):
            for name in ("gate", "up", "down"):
                tensors.pop(f"blk.{i}.ffn_{name}.weight")
            tensors |= {
                f"blk.{i}.ffn_gate_inp.weight": np.ones((4, WIDTH), dtype=np.float32),
                f"blk.{i}.ffn_gate_exps.weight": np.ones((4, 768, WIDTH), dtype=np.float32),
                f"blk.{i}.ffn_up_exps.weight": np.ones((4, 768, WIDTH), dtype=np.float32),
                f"blk.{i}.ffn_down_exps.weight": np.ones((4, WIDTH, 768), dtype=np.float32),
            }
            tensors |= {f"blk.{i}.attn_{x}_norm.weight": np.ones(WIDTH // HEADS, dtype=np.float32) for x in "qk"}

    path = tiny_llama(tmp_path / "moe.gguf", experts, arch="qwen3moe")
    refused(path, UnsupportedModel, "experts", "gate_up_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_damage(tmp_path: Path, bad: float) -> None:
    def spoil(_: object, tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.attn_v.weight"][3, 5] = bad

    path = tiny_llama(tmp_path / "tiny.gguf", spoil)
    with pytest.raises(DamagedCheckpoint) as caught:
        stream_gguf(path, tmp_path / "out")
    says(caught, DamagedCheckpoint, "blk.1.attn_v.weight", "NaN or Inf")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    """They are not rounded to infinity instead."""

    def large(_: object, tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_down.weight"][0, 0] = 1e6

    path = tiny_llama(tmp_path / "tiny.gguf", large)
    with pytest.raises(SourceError) as caught:
        stream_gguf(path, tmp_path / "out", "float16")
    says(caught, SourceError, "blk.0.ffn_down.weight", "float16", "float32")


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError) as caught:
        plan_gguf(path, "int4")
    says(caught, SourceError, "int4", "bfloat16")
    refused(tmp_path / "gone.gguf", SourceError, "cannot be read")
    part = tiny_llama(tmp_path / "part.gguf", lambda writer, _: writer.add_uint16("split.count", 3))
    refused(part, SourceError, "split", "--merge")
    endless = tiny_llama(tmp_path / "endless.gguf", add_uint("llama.block_count", 1 << 30), skip="block_count")
    refused(endless, DamagedCheckpoint, "llama.block_count", str(1 << 30))
    for key in ("block_count", "attention.head_count", "context_length"):
        refused(tiny_llama(tmp_path / f"{key}.gguf", skip=key), DamagedCheckpoint, f"llama.{key}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("not a GGUF",)),
        (b"GGUF", ("not a GGUF",)),
        (b"PK\3\4" + bytes(100), ("not a GGUF",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("git lfs pull",)),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), ("version 9",)),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("version",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), ("general.architecture",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(40), ("damaged",)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + bytes(40), ("damaged",)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 5, 1 << 60), ("damaged",)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 60), ("damaged",)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), ("unknown type 99",)),
    ],
)
def test_damaged_headers_are_damage_and_end_at_once(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    refused(path, DamagedCheckpoint, *words)


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """(scratch path, content, length of the header) of a tiny GGUF."""
    path = tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", kind="Q8_0")
    start = min(tensor.start for tensor in read_header(path).tensors)
    return path.parent / "scratch.gguf", path.read_bytes(), start


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_damage(tiny_bytes: tuple[Path, bytes, int], fraction: float) -> None:
    scratch, whole, _ = tiny_bytes
    scratch.write_bytes(whole[: int((len(whole) - 32) * fraction)])  # the last bytes may be padding
    with pytest.raises(DamagedCheckpoint) as caught:
        read_header(scratch)
    says(caught, DamagedCheckpoint, scratch.name)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.binary(min_size=64, max_size=200))
def test_any_extension_is_damage(tiny_bytes: tuple[Path, bytes, int], extra: bytes) -> None:
    scratch, whole, _ = tiny_bytes
    scratch.write_bytes(whole + extra)
    with pytest.raises(DamagedCheckpoint) as caught:
        read_header(scratch)
    says(caught, DamagedCheckpoint, "trailing")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_wrong_header_byte_is_a_sentence_or_harmless(
    tiny_bytes: tuple[Path, bytes, int], where: float, value: int
) -> None:
    scratch, whole, header = tiny_bytes
    content = bytearray(whole)
    content[int(header * where)] = value
    scratch.write_bytes(bytes(content))
    try:
        read_header(scratch)
    except SurgeryError as error:
        assert "\n" not in str(error)


# ---- its tokenizer is a stranger's program


def with_tokenizer(template: str, model: str = "gpt2") -> Edit:
    def edit(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        letters = [*map(chr, range(33, 126)), "ab"]
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre("default")
        writer.add_token_list(["<s>", "</s>", *letters])
        writer.add_token_types([3, 3, *[1] * len(letters)])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template(template)

    return edit


def test_a_tokenizer_is_read_from_what_is_written(tmp_path: Path) -> None:
    """The file is read once, in a child; what it becomes is loaded, as a run will."""
    path = tiny_llama(tmp_path / "tiny.gguf", with_tokenizer("{{ bos_token }}{{ messages[0].content }}"))
    tokenizer = source_tokenizer(open_source(str(path)))
    assert tokenizer("ab c", add_special_tokens=False)["input_ids"] == [95, 68]
    assert (tokenizer.bos_token, tokenizer.chat_template[:5]) == ("<s>", "{{ bo")


@pytest.mark.parametrize(
    ("template", "model", "words"),
    [("{{ 1/0 }}", "gpt2", "division by zero"), ("x", "odd", "no tokenizer that loads")],
    ids=["template", "vocabulary"],
)
def test_a_tokenizer_that_is_not_needed_is_left_out(tmp_path: Path, template: str, model: str, words: str) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", with_tokenizer(template, model))
    recipe = parse_recipe("surgery: 1\noperations:\n  - attention_bias: {prefix: [0]}\n", "recipe")
    with pytest.raises(SurgeryError, match=f"{path}.*{words}.*run --no-verify"):
        prepare(recipe, str(path), None, needs_tokenizer=True)
    with pytest.warns(UserWarning, match=f"{path}.*{words}.*left out"):
        plan = prepare(recipe, str(path), None, needs_tokenizer=False)
    assert plan.target.tokenizer is None
    materialise(plan.source, tmp_path / "plain")
    found = {entry.name for entry in (tmp_path / "plain").iterdir()}
    assert found == {"config.json", "generation_config.json", SINGLE}


def test_both_spellings_of_the_rotary_base_are_emitted(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    recipe = parse_recipe("surgery: 1\noperations:\n  - attention_bias: {prefix: [0]}\n", "recipe")
    plan = prepare(recipe, str(path), None, needs_tokenizer=False)
    config = emitted_config(plan, plan.changes)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
