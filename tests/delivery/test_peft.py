"""A prefix-tuning adapter on the unmodified original is the converted model, in stock PEFT."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.exports import distance, in_memory, written
from helpers.families import EXACT, PREFIX, any_model, families, in_tiers
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import Place, surgery_command
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.delivery.peft import Peft
from surgery.errors import UnsupportedModel
from surgery.live.graft import grafted

N, PADDING = len(PREFIX), 5

# The exact families that PEFT has no place for, and why.
LATENT = "a prefix-tuning adapter has one shape for both"
MIXED = "a prefix-tuning adapter has one shape for all layers"
REFUSED = {
    **dict.fromkeys(["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"], LATENT),
    **dict.fromkeys(["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "mimo_v2_flash"], MIXED),
    **dict.fromkeys(["gpt_bigcode", "jetmoe"], "PEFT takes the shape of a prefix from config.json"),
    "longcat_flash": "4 attention sites in 2 blocks",
    "openai-gpt": "has no key/value cache",
}
# PEFT puts slots in front of the padding, which makes them farther away: where places are counted, another function.
COUNT_PLACES = {"window", "chunked"}
FLOAT32_INSIDE = {  # the original's own code computes attention in it
    "bloom", "codegen", "flint", "gemma2", "gpt_neo", "gptj", "granite_swa", "granitemoe_swa", "llama4_text", "mpt",
    "vaultgemma",
}  # fmt: skip


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """PEFT makes its embedding in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def adapted(model, directory: Path) -> PeftModel:
    with in_float64(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        return PeftModel.from_pretrained(model, directory).eval()


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("kind", in_tiers(EXACT))
@torch.no_grad()
def test_the_adapter_is_the_folded_model(kind: str, tmp_path: Path) -> None:
    """In float64: at once, under left padding, and in what is generated. Texts run past every window and chunk."""
    with one_thread(), families()[kind].default_dtype():
        model = any_model(kind)
        live = live_of(model)
        finished = in_memory(live)
        refused = "more of its prefix" if live.anatomy.mixers or live.anatomy.indexers else REFUSED.get(kind)
        if refused is not None:
            with pytest.raises(UnsupportedModel, match=refused):
                Peft().refuse(finished)
            return
        directory = written(Peft(), finished, tmp_path / "adapter")
        ids, prompt = tiny_text(), tiny_text(2, 21, seed=2)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with grafted(live, finished.folded):
            plain = model(input_ids=ids).logits
            behind = model(input_ids=ids, **padded(ids)).logits[:, PADDING:]
            tokens = model.generate(prompt, **settings)
        bare = model(input_ids=ids).logits
        both = adapted(model, directory)
        tolerance = 1e-5 if kind in FLOAT32_INSIDE else 1e-9
        assert distance(both(input_ids=ids).logits, plain) < tolerance < 1e-2 < distance(bare, plain)
        assert torch.equal(both.generate(input_ids=prompt, **settings), tokens)
        if not COUNT_PLACES & set(families()[kind].attention) and kind != "mpt":
            assert distance(both(input_ids=ids, **padded(ids)).logits[:, PADDING:], behind) < tolerance


def test_the_file_is_as_peft_saves_it(tmp_path: Path) -> None:
    """Loaded and saved again by PEFT, the tensor is the same, under the same name."""
    model = tiny_model("llama")
    finished = in_memory(live_of(model))
    ours = written(Peft(), finished, tmp_path / "ours")
    adapted(model, ours).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    (a, b) = (load_file(root / "adapter_model.safetensors") for root in (ours, tmp_path / "theirs"))
    assert a.keys() == b.keys() == {"prompt_embeddings"} and torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])
    slots = a["prompt_embeddings"].view(N, 8, 2, 8)  # (n, 2 L, H, D)
    key, value = finished.slots["layers.2.self_attn"]
    assert torch.equal(slots[:, 4], key) and torch.equal(slots[:, 5], value)
    config = json.loads((ours / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")


def test_slots_always_visible_are_refused_with_windows() -> None:
    finished = in_memory(live_of(tiny_model("mistral")), "always")
    with pytest.raises(
        UnsupportedModel, match=r"windowed layers of mistral \(sliding_window\).*slots_visible: as_prefix"
    ):
        Peft().refuse(finished)
    Peft().refuse(in_memory(live_of(tiny_model("llama")), "always"))


@pytest.fixture(scope="module")
def adapter(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "adapter"
    ended = surgery_command(
        "export", "peft", place.converted, out, "--original", place.source, "--text", place.text,
        "--json", out.with_suffix(".json"),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1].startswith(f"wrote {out} for peft: 6 files, ")
    return out


@torch.no_grad()
def test_stock_peft_gives_what_was_measured(place: Place, adapter: Path) -> None:
    found = json.loads(adapter.with_suffix(".json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = torch.tensor(tokenizer(place.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    chunks = ids[: 4 * 32].view(4, 32)  # as `surgery run` cut it, whole texts
    converted = AutoModelForCausalLM.from_pretrained(place.converted, dtype=torch.float64)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.source, dtype=torch.float64), adapter)
    both = [part(input_ids=chunks).logits[:, :-1].log_softmax(-1) for part in (converted, model)]
    mine, theirs = (logs.gather(2, chunks[:, 1:, None])[..., 0] for logs in both)
    assert (mine - theirs).abs().max() < 1e-5
    assert found["perplexity"]["exported"]["ppl"] == pytest.approx((-theirs.mean()).exp().item(), rel=1e-4)
    assert found["perplexity"]["converted"]["ppl"] == pytest.approx((-mine.mean()).exp().item(), rel=1e-4)
    assert found["passed"] and found["delta_log_probability"] < 1e-4 < found["gates"][0]["limit"]


def test_the_code_on_the_card_runs(place: Place, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (adapter / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    (adapter.parent / "source").symlink_to(place.source)  # what the original is called
    monkeypatch.chdir(adapter.parent)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert names["tokenizer"]("the river")["input_ids"][0] != names["tokenizer"].bos_token_id  # that is folded
    assert "Made of" in card and "sha256:" in card


def test_an_export_says_what_it_is(place: Place, adapter: Path) -> None:
    manifest = json.loads((adapter / "export.json").read_text(encoding="utf-8"))
    source = json.loads((place.converted / "surgery.json").read_text(encoding="utf-8"))["source"]
    assert manifest["engine"] == "peft" and manifest["original"]["sha256"] == source["sha256"]
    assert manifest["converted"]["digest"].startswith("sha256:") and manifest["slots"]["count"] == 2
    assert set(manifest["files"]) == {path.name for path in adapter.iterdir()} - {"export.json"}
    assert str(place.root) not in (adapter / "export.json").read_text(encoding="utf-8")
    assert os.stat(adapter / "tokenizer.json").st_ino == os.stat(place.converted / "tokenizer.json").st_ino
