"""The directory for vLLM, as far as it can be looked at without vLLM; tests/serving runs it there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.bench import IDS, INPUT, Bench, refused
from helpers.exports import in_memory
from helpers.tiny import live_of, tiny_config, tiny_model
from helpers.tiny_checkpoint import RECIPE, Place, surgery_command
from helpers.tiny_tokenizer import BOS_FIRST, ONCE, byte_level, llama_like
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from surgery.delivery.vllm import Vllm
from surgery.delivery.vllm_running import lacking
from surgery.delivery.vllm_tokenizer import NEW, Placeholders, choose, require_same, with_chats, with_placeholders
from surgery.errors import UnsupportedModel
from surgery.serving.names import layer_of, slot_of

CHAT = [{"role": "user", "content": "hi {{ there }}"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module")
def exported(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "served"
    ended = surgery_command("export", "vllm", place.converted, out)
    assert ended.code == 0, ended.err
    return out


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the directory


def test_config_is_the_originals_but_for_the_architecture(place: Place, exported: Path) -> None:
    source, served = read(place.source / "config.json"), read(exported / "config.json")
    assert served.pop("architectures") == ["SurgeryEabLlamaForCausalLM"]
    entry = served.pop("served_slots")
    assert entry["format"] == 1 and len(entry["placeholder_ids"]) == 2
    assert {key: served[key] for key in source.keys() - {"architectures"}} == {
        key: value for key, value in source.items() if key != "architectures"
    }
    assert served["max_position_embeddings"] == 256, "placeholders take the positions that the prefix had"
    assert not served.keys() & {"auto_map", "eab"}


def test_weights_and_slots_are_hard_links(place: Place, exported: Path) -> None:
    shards = sorted(exported.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [shard.name for shard in sorted(place.converted.glob("*.safetensors"))]
    assert all(shard.samefile(place.converted / shard.name) for shard in shards)
    assert not list(exported.glob("*.py"))


def test_texts_begin_with_placeholders(place: Place, exported: Path) -> None:
    placeholders = read(exported / "config.json")["served_slots"]["placeholder_ids"]
    before, after = (
        AutoTokenizer.from_pretrained(root, trust_remote_code=False) for root in (place.converted, exported)
    )
    for text in ("the river", "", "\nOld", "</s>"):
        assert after(text)["input_ids"] == [*placeholders, *before(text)["input_ids"]]
        assert after(text, add_special_tokens=False)["input_ids"] == before(text)["input_ids"]
    # This tokenizer has no token to spare.
    assert placeholders == read(place.converted / "config.json")["eab"]["prefix_ids"]


def test_what_was_written_is_said(exported: Path) -> None:
    said = read(exported / "export.json")
    assert (said["engine"], said["architecture"]) == ("vllm", "SurgeryEabLlamaForCausalLM")
    assert "not tried in vLLM" in said["proof"]
    assert "vllm serve served" in (exported / "README.md").read_text(encoding="utf-8")


# ---- what is refused


def test_a_model_of_another_type_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.delivery.vllm.PROVED", ())
    with pytest.raises(UnsupportedModel, match="llama has to be tried in vLLM before.*--engine-python"):
        Vllm().refuse(in_memory(live_of(tiny_model("llama"))))


def test_slots_outside_of_windows_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="every query.*windowed layers of mistral.*as_prefix"):
        Vllm().refuse(in_memory(live_of(tiny_model("mistral")), "always"))


@pytest.mark.parametrize(("kind", "why"), [("deepseek_v3", "a latent"), ("gemma3", "multimodal")])
def test_families_are_refused_by_name(kind: str, why: str) -> None:
    from helpers.families import any_model

    with pytest.raises(UnsupportedModel, match=f"{kind}.*{why}"):
        Vllm().refuse(in_memory(live_of(any_model(kind))))


def test_rotary_that_depends_on_length_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = tiny_config("llama", rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="llama changes its rotary frequencies"):
        Vllm().refuse(in_memory(live_of(tiny_model("llama", config=config))))


def test_head_norms_are_refused(bench: Bench) -> None:
    ended = surgery_command(*bench.run(None, RECIPE.replace("verify:", "  - head_norm: {}\nverify:")))
    assert ended.code == 0, ended.err
    converted = bench.out.rename(bench.root / "converted")
    refused(bench, ["export", "vllm", converted, bench.out], INPUT, "norms its heads")


def test_a_checkpoint_without_tokenizer_is_refused(bench: Bench) -> None:
    source = bench.source()
    for path in source.glob("*token*"):
        path.unlink()
    converted = bench.root / "converted"
    ended = surgery_command("run", bench.file("ids.yaml", IDS), source, converted, "--no-verify")
    assert ended.code == 0, ended.err
    refused(bench, ["export", "vllm", converted, bench.out], INPUT, "without a tokenizer", "placeholders")


def test_text_needs_vllm(bench: Bench) -> None:
    asked = ["export", "vllm", bench.place.converted, bench.out, "--text", bench.place.text]
    refused(bench, asked, INPUT, "vLLM is not installed here", "--engine-python")
    refused(bench, [*asked, "--engine-python", bench.root / "none"], INPUT, "does not run", "--engine-python")
    peft = ["export", "peft", bench.place.converted, bench.out, "--engine-python", sys.executable]
    refused(bench, peft, INPUT, "PEFT runs in surgery's own Python")


@pytest.mark.parametrize(
    ("says", "lacks"),
    [("", "has no vLLM"), ("0.31.2\nTrue", "has vLLM 0.31.2, and the plugin is made for 0.32"),
     ("0.32.0\nFalse", "without the plugin"), ("0.32.1\nTrue", None)],
)  # fmt: skip
def test_a_python_says_what_it_lacks(tmp_path: Path, says: str, lacks: str | None) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%b\\n' '{says.replace(chr(10), chr(92) + 'n')}'\n", encoding="utf-8")
    python.chmod(0o755)
    found = lacking(python)
    assert found is None if lacks is None else lacks in str(found)


def test_a_python_is_found_from_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relative path, through a link that says which environment it is of, and by its name."""
    link = tmp_path / "venv" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(link.parent))
    assert Vllm().with_python(Path("venv/python")).python == link
    assert Vllm().with_python(Path("python")).python == link


# ---- placeholders


def fast(inner, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def special(*texts: str):
    inner = byte_level()
    inner.add_special_tokens(list(texts))
    return fast(inner)


TAKEN = (0, 1, 2)


def test_a_token_that_was_reserved_is_chosen() -> None:
    tokenizer = special("<|x|>", "<|reserved_1|>", "<|z|>")
    assert choose(tokenizer, 262, [5], TAKEN, 2) == Placeholders((260, 260), ("<|reserved_1|>",) * 2)


def test_a_row_to_spare_becomes_a_token() -> None:
    assert choose(special("<|x|>"), 300, [5], TAKEN, 3) == Placeholders((260,) * 3, (NEW,) * 3, added=True)


def with_a_hole():
    """Numbers to 258, of which one stands for nothing."""
    content = json.loads(byte_level().to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary.pop(next(token for token, number in vocabulary.items() if number == 200))
    return fast(Tokenizer.from_str(json.dumps(content)))


def test_a_new_token_takes_no_number_of_another() -> None:
    tokenizer = with_a_hole()
    assert max(tokenizer.get_vocab().values()) >= len(tokenizer)
    assert choose(tokenizer, 300, [40], TAKEN, 1) == Placeholders((40,), tuple(tokenizer.batch_decode([[40]])))


def test_a_token_that_lost_its_number_is_noticed() -> None:
    before, after = with_a_hole(), with_a_hole()
    after.add_special_tokens({"additional_special_tokens": [NEW]})
    assert after.get_vocab()[NEW] in before.get_vocab().values(), "the library counts, and the count is taken"
    with pytest.raises(UnsupportedModel, match="one that is not its alone"):
        require_same(before, after, Placeholders((after.get_vocab()[NEW],), (NEW,)))


def test_a_special_token_of_the_chat_is_not_chosen() -> None:
    tokenizer = special("<|x|>", "<|user|>")
    tokenizer.chat_template = "<|user|>{{ messages }}"
    assert choose(tokenizer, 261, [5], TAKEN, 1).ids == (259,)
    assert choose(tokenizer, 261, [259], TAKEN, 1).ids == (259,), "the prefix itself, for want of another"


def test_the_prefix_stands_in_where_there_is_none() -> None:
    assert choose(special(), 259, [40, 41], TAKEN, 2).ids == (40, 41)
    with pytest.raises(UnsupportedModel, match="no special token to spare"):
        choose(special(), 259, [], TAKEN, 2)


def test_a_token_that_eats_spaces_is_not_chosen() -> None:
    from tokenizers import AddedToken

    inner = byte_level()
    inner.add_special_tokens([AddedToken("<|reserved|>", rstrip=True, special=True)])
    assert choose(fast(inner), 260, [40], TAKEN, 1).ids == (40,)


POSTS = {
    "none": None,
    "bos and eos": BOS_FIRST,
    "bytes": processors.ByteLevel(trim_offsets=False),
    "bytes, bos": processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS_FIRST]),
}


@pytest.mark.parametrize("post", POSTS.values(), ids=POSTS)
@pytest.mark.parametrize("kind", [byte_level, llama_like])
def test_placeholders_come_first_whatever_comes_after(tmp_path: Path, kind, post) -> None:
    before = fast(kind(post), ONCE)
    chosen = Placeholders((len(before),) * 2, (NEW,) * 2, added=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_placeholders(before, chosen)), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": with_chats(before.chat_template, chosen)}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    after = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a river", "", "b  c"):
        assert after(text)["input_ids"] == [*chosen.ids, *before(text)["input_ids"]]
    rendered = after.apply_chat_template(CHAT, tokenize=False)
    assert rendered == NEW * 2 + str(before.apply_chat_template(CHAT, tokenize=False))
    assert after(rendered, add_special_tokens=False)["input_ids"].count(chosen.ids[0]) == 2
    assert require_same(before, after, chosen) > 8


def test_a_tokenizer_that_adds_none_is_refused() -> None:
    before = fast(byte_level())
    with pytest.raises(UnsupportedModel, match="does not put placeholders in front of"):
        require_same(before, before, Placeholders((7,), ("x",)))


# ---- names


def test_a_slot_tells_its_layer() -> None:
    assert slot_of("model.layers.13.self_attn.attention_bias.key") == (13, "key")
    assert slot_of("transformer.h.0.attn.attention_bias.value") == (0, "value")
    assert slot_of("model.layers.3.self_attn.k_proj.weight") is None
    with pytest.raises(ValueError, match="one number"):
        layer_of("layers.3.attn.1")
