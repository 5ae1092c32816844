"""Encoders of text through scan, run and verify: BOS of a causal one becomes slots, exactly; others are estimated."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import reference, save_encoder, save_pictures
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import BOS, save_model, save_tokenizer, surgery_command, write_text
from helpers.writing import (
    BLOCKS,
    BOTH_WAYS,
    CAUSAL,
    LONGEST,
    VOCABULARY,
    save_clip_tokenizer,
    save_text_encoder,
    text_config_of,
    text_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    OwlViTConfig,
    OwlViTForObjectDetection,
)

import surgery
from surgery.anatomy.calls import observing
from surgery.converted.described import read_described
from surgery.converted.reading import live_converted
from surgery.errors import DamagedCheckpoint, RecipeError, SourceError, UnsupportedModel
from surgery.live.port import port_of
from surgery.survey import patches

FEW = surgery.Chunking(6)
ANY = {"fidelity": {"min_cls": -0.99, "min_patches": -0.99}}
EXACT = {"fidelity": {"min_cls": 0.999999, "min_patches": 0.999999}}
FOLD = {"attention_bias": {"prefix": ["<s>"]}}
MASSIVE = {"attention_bias": {"from": "massive_tokens"}}
NO_TOKENIZER = {"siglip2"}  # whose own class wants a vocabulary that none of 320 tokens is


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("writing")
    for kind in ("clip", "bert"):
        save_text_encoder(root / kind, kind)
    return root


def recipe(*operations: dict, gates: dict = ANY, **verify: object) -> dict:
    return {"surgery": 1, "operations": [*operations], "verify": {**gates, **verify}}


def of_text(root: Path) -> Any:
    """The converted encoder in `root`, live."""
    anatomy = read_described(root).anatomy
    return live_converted(root, anatomy, port=port_of(anatomy))


def some(kinds: Iterable[str], first: str) -> list:
    return [kind if kind == first else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# ---- a causal one: its BOS is folded


@pytest.mark.parametrize("kind", some(CAUSAL, "clip"))
def test_a_folded_bos_leaves_the_features(kind: str, tmp_path: Path) -> None:
    """What is written gives each token, and the pooled text, what the original gives behind BOS; padded too."""
    source = save_text_encoder(tmp_path / kind, kind)
    out, text = tmp_path / "out", tmp_path / f"{kind}.txt"
    found = surgery.run(recipe(FOLD, gates=EXACT), source, out, text=text, chunking=FEW)
    assert found is not None and found["passed"], found
    assert found["fidelity"]["length"] == {"original": LONGEST, "converted": LONGEST - 1}
    verified = surgery.verify(out, against=source, text=text)
    assert verified["passed"] and verified["fidelity"] == found["fidelity"]
    checks = {check["name"]: check["detail"] for check in verified["integrity"]["checks"]}
    assert checks["tensors again"] == f"{2 * BLOCKS} tensors as computed again from {kind}, to the bit"
    live, original = of_text(out), text_model(kind).double()
    trunk = original.get_submodule(live.anatomy.trunk)
    live.model.double()
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1
    ids[1, 6:] = 1  # padding, as it comes from the tokenizer
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    whole, seen = (torch.cat([torch.full((2, 1), first), part], dim=1) for first, part in ((0, ids), (1, mask)))
    with torch.no_grad():
        for ours, theirs in (({}, {}), ({"attention_mask": mask}, {"attention_mask": seen})):
            wanted, got = trunk(input_ids=whole, **theirs), live.trunk(input_ids=ids, **ours)
            real = mask.bool() if ours else torch.ones_like(mask).bool()
            assert torch.allclose(got[0][real], wanted[0][:, 1:][real], atol=1e-5)
            assert torch.allclose(got.pooler_output, wanted.pooler_output, atol=1e-5)
        bare = trunk(input_ids=ids)[0]
    assert not torch.allclose(bare, wanted[0][:, 1:], atol=1e-2)


def test_the_written_checkpoint_is_used_as_any_other(ground: Path, tmp_path: Path) -> None:
    """By CLIP's own calls, with its own tokenizer, which no longer puts BOS there; images are read as they were."""
    surgery.run(recipe(FOLD), ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    models = [AutoModel.from_pretrained(root).eval() for root in (ground / "clip", tmp_path / "out")]
    tokenizers = [AutoTokenizer.from_pretrained(root) for root in (ground / "clip", tmp_path / "out")]
    texts = ["A fox.", "He is a fox."]
    given = [tokenizer(texts, padding=True, return_tensors="pt") for tokenizer in tokenizers]
    assert torch.equal(given[0]["input_ids"][:, 1:], given[1]["input_ids"]) and bool(
        (given[0]["input_ids"][:, 0] == 0).all()
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (model(**one, pixel_values=pixels) for model, one in zip(models, given, strict=True))
        features = [
            model.get_text_features(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
            for model, one in zip(models, given, strict=True)
        ]
    assert torch.allclose(before.logits_per_image, after.logits_per_image, atol=1e-4)
    assert torch.equal(before.image_embeds, after.image_embeds)
    first, second = (one if isinstance(one, torch.Tensor) else one.pooler_output for one in features)
    assert torch.allclose(first, second, atol=1e-5)
    with pytest.raises((ValueError, IndexError, RuntimeError)):  # one position is the slot's
        models[1].text_model(input_ids=torch.zeros(1, LONGEST, dtype=torch.long))


def test_the_tokenizer_of_clip_adds_bos_no_more(tmp_path: Path) -> None:
    """Its class puts BOS there whatever its files say, so what is written is of another, and does the same else."""
    (source := tmp_path / "clip").mkdir()
    text_model("clip", 700).save_pretrained(source)
    text = write_text(tmp_path / "text.txt", 2000, 0)
    save_clip_tokenizer(source, text)
    found = surgery.run("clip-text", source, tmp_path / "out", text=text, chunking=FEW)
    assert found is not None and found["passed"], found
    assert surgery.verify(tmp_path / "out", against=source, text=text)["passed"]
    before, after = (AutoProcessor.from_pretrained(root) for root in (source, tmp_path / "out"))
    for words in ("A quick fox; and more.", "HELLO   World 42", "x"):
        ids, less = (one.tokenizer(words)["input_ids"] for one in (before, after))
        assert ids[0] == 0 and ids[1:] == less
        assert before.tokenizer.decode(less) == after.tokenizer.decode(less)
        assert before.tokenizer.decode(less[:-1]) == after.tokenizer.decode(less[:-1])
    pairs = [one.tokenizer("one", "two")["input_ids"] for one in (before, after)]
    assert [token for token in pairs[0] if token != 0] == pairs[1]
    assert (before.tokenizer.model_max_length, after.tokenizer.model_max_length) == (LONGEST, LONGEST - 1)


@pytest.mark.slow
def test_another_prefix_is_another_encoder(ground: Path, tmp_path: Path) -> None:
    """It is folded exactly, and the features are those of another text: the gate says so."""
    folded = recipe({"attention_bias": {"prefix": ["<s>", "."]}}, gates=EXACT)
    found = surgery.run(folded, ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    assert found is not None and not found["passed"] and not (tmp_path / "out").exists()
    assert {gate["name"] for gate in found["gates"] if not gate["passed"]} == {"fidelity.last", "fidelity.tokens"}


@pytest.mark.slow
def test_a_changed_slot_shows(ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe(FOLD), ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    shard = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors[min(tensors)][0, 0, 0] += 0.1
    save_file(tensors, shard, {"format": "pt"})
    assert not surgery.verify(tmp_path / "out", against=ground / "clip")["passed"]


# ---- others: estimated slots


@pytest.mark.parametrize("kind", some([kind for kind in BOTH_WAYS if kind not in NO_TOKENIZER], "bert"))
def test_each_type_attends_to_its_slots(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site of what was written is softmax over slots and keys, by a plain reference; padding stays hidden."""
    monkeypatch.setattr(patches, "HIGH", 1.0)  # in tiny random encoders no token stands out
    source = save_text_encoder(tmp_path / kind, kind)
    out, text = tmp_path / "out", tmp_path / f"{kind}.txt"
    found = surgery.run(recipe(MASSIVE, {"head_norm": {}}), source, out, text=text, chunking=FEW)
    assert found is not None and found["passed"], found
    verified = surgery.verify(out, against=source, text=text)
    assert verified["passed"] and verified["fidelity"] == found["fidelity"]
    live, seen = of_text(out), []
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad(), observing(None, lambda call, output: seen.append((call, output))):
        both = live.trunk(input_ids=ids, attention_mask=mask)[0]
    assert len(seen) == BLOCKS
    for call, _ in seen:
        assert torch.allclose(call.summed.double(), reference(call), atol=1e-5)
        assert not torch.allclose(call.summed.double(), reference(call, slots=False), atol=1e-4)
    with torch.no_grad():
        alone = live.trunk(input_ids=ids[1:, :8])[0]
    assert torch.allclose(both[1, :8], alone[0], atol=1e-5)


@pytest.mark.slow
def test_a_classifier_stays_one(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.0)
    settings = {key: value for key, value in text_config_of("bert").items() if key != "model_type"}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(BertConfig(**settings, num_labels=5)).save_pretrained(
        tmp_path / "cls"
    )
    save_tokenizer(tmp_path / "cls", ground / "bert.txt", framed=True)
    found = surgery.run(
        recipe(MASSIVE, top1={"min_share": 0.1}), tmp_path / "cls", tmp_path / "out", text=ground / "bert.txt",
        chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"] and found["top1"]["texts"] == 6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "EabBertForSequenceClassification"
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 5)
    assert "pipeline_tag: text-classification" in (tmp_path / "out" / "README.md").read_text()


# ---- scan


def test_a_scan_tells_bos_from_the_text(ground: Path) -> None:
    found = surgery.scan(ground / "clip", text=ground / "clip.txt", chunking=FEW, interventions=True)
    assert found["text"] == {"tokens": LONGEST - 1, "causal": True, "special": 1, "registers": 1}
    assert "perplexity" not in found and found["chunks"] == 6 and found["chunk_length"] == LONGEST
    assert all(row["register_norm"] > 0 and row["cls_norm"] is None for row in found["layers"])
    assert all(0 <= row["to_registers"] <= 1 for row in found["layers"][1:])
    assert all(len(row["sink_score"]) == 4 for row in found["layers"][1:])
    shown = found["attention_maps"][0]
    assert shown["tokens"][0] == "<s>" and shown["tokens"][1] != "<s>"
    rows = {row["name"]: row for row in found["interventions"]}
    assert rows["largest activation to its mean"]["fidelity"]["last"]["mean"] > 0.99
    hidden = rows["BOS hidden from all others"]
    assert hidden["touched"] == 6 * BLOCKS * (LONGEST - 1) and hidden["fidelity"]["tokens"]["mean"] < 0.99


def test_what_a_scan_says_of_attention_is_so(ground: Path) -> None:
    """The attention that goes to BOS, and to CLS, by the model's own weights."""
    for kind, key in (("clip", "to_registers"), ("bert", "to_cls")):
        found = surgery.scan(ground / kind, text=ground / f"{kind}.txt", chunking=FEW)
        tokenizer = AutoTokenizer.from_pretrained(ground / kind)
        text = tokenizer((ground / f"{kind}.txt").read_text(), add_special_tokens=False)["input_ids"]
        inside = LONGEST - 2
        rows = torch.tensor([[0, *text[at * inside : (at + 1) * inside], 1] for at in range(6)])
        model = AutoModel.from_pretrained(ground / kind, attn_implementation="eager").eval()
        trunk = model.text_model if kind == "clip" else model
        with torch.no_grad():
            weights = trunk(input_ids=rows, output_attentions=True).attentions
        for row, layer in zip(found["layers"][1:], weights, strict=True):
            assert row[key] == pytest.approx(layer[:, :, 1:, 0].mean().item(), abs=1e-5)


@pytest.mark.slow
def test_a_converted_encoder_is_scanned_with_its_slots(ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe(FOLD), ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    found = surgery.scan(tmp_path / "out", text=ground / "clip.txt", chunking=FEW, interventions=True)
    assert found["n_slots"] == 1 and found["text"]["registers"] == 0
    assert found["attention_maps"][0]["tokens"][0] != "<s>"
    before = surgery.scan(ground / "clip", text=ground / "clip.txt", chunking=FEW)
    # What the slot is given is what BOS was given, of the first chunk's text.
    for row, was in zip(found["layers"][1:], before["layers"][1:], strict=True):
        assert np.mean(row["slot_score"]) == pytest.approx(was["to_registers"], rel=0.05)


@pytest.mark.slow
def test_a_report_shows_texts(ground: Path, tmp_path: Path) -> None:
    ended = surgery_command(
        "scan", ground / "bert", "--text", ground / "bert.txt", "--chunks", "4", "--interventions", "--report",
        tmp_path / "report.html",
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert ended.code == 0 and "Each text is CLS and 23 tokens" in ended.out
    assert "was given 4 texts, each of which becomes CLS and 23 tokens" in page and "tokens of high norm" in page


# ---- operations and tuning


@pytest.mark.slow
def test_norms_smoothing_and_quantisation(ground: Path, tmp_path: Path) -> None:
    asked = recipe(
        FOLD, {"smoothing": {"inputs": ["norm"]}}, {"head_norm": {}}, gates=EXACT, neighbours={"min_share": 0.1},
        quantised_features={"w8a8_static": {"min_cosine": 0.5}},
    )  # fmt: skip
    found = surgery.run(asked, ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    assert found is not None and found["passed"], found
    assert found["neighbours"]["texts"] == 6 and {"last", "tokens"} == {
        *found["quantised_features"]["w8a8_static"]["converted"]
    }
    assert surgery.verify(tmp_path / "out", against=ground / "clip", text=ground / "clip.txt")["passed"]
    written = recipe(
        FOLD, {"quantise": {"scheme": "w8a8_static"}}, gates={"fidelity": {"min_cls": 0.5, "min_patches": 0.5}}
    )
    found = surgery.run(written, ground / "clip", tmp_path / "int8", text=ground / "clip.txt", chunking=FEW)
    assert found is not None and found["passed"] and 0.5 < found["fidelity"]["last"]["mean"] < 1
    assert surgery.verify(tmp_path / "int8", against=ground / "clip", text=ground / "clip.txt")["passed"]


@pytest.mark.parametrize("kind", ["bert", pytest.param("clip", marks=pytest.mark.slow)])
def test_what_is_tuned_comes_nearer(kind: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal one the original, after BOS, is the teacher: unquantised slots have nothing to learn from it."""
    monkeypatch.setattr(patches, "HIGH", 1.0)
    tuning = {"steps": 6, "batch": 4, "held_out": 4, "evaluate_every": 2, "learning_rate": 3e-3}
    tuning |= {"quantised": "w4a4_static"} if kind == "clip" else {}
    asked = {**recipe(FOLD if kind == "clip" else MASSIVE), "tune": tuning}
    found = surgery.run(asked, ground / kind, tmp_path / "out", text=ground / f"{kind}.txt", chunking=FEW)
    assert found is not None and found["passed"]
    judged = found["tuning"]["held_out"]
    assert min(entry["distance"] for entry in judged[1:]) < judged[0]["distance"] and judged[0]["distance"] > 1e-4
    assert surgery.verify(tmp_path / "out", against=ground / kind, text=ground / f"{kind}.txt")["passed"]


@pytest.mark.slow
def test_an_untouched_fold_teaches_nothing(ground: Path, tmp_path: Path) -> None:
    tuning = {"steps": 2, "batch": 4, "held_out": 4, "evaluate_every": 1, "learning_rate": 1e-3}
    found = surgery.run(
        {**recipe(FOLD, gates=EXACT), "tune": tuning}, ground / "clip", tmp_path / "out", text=ground / "clip.txt",
        chunking=FEW,
    )  # fmt: skip
    assert (
        found is not None
        and found["passed"]
        and math.isclose(found["tuning"]["held_out"][0]["distance"], 0, abs_tol=1e-9)
    )


# ---- what is refused


def refusals() -> list[tuple[str, list[dict], dict, type, str]]:
    return [
        ("bert", [FOLD], {}, UnsupportedModel, "sees all others, so that no prefix is constant"),
        ("clip", [MASSIVE], {}, UnsupportedModel, "see only those before them, and of a prefix slots are exact"),
        ("clip", [{"attention_bias": {"prefix": "auto"}}], {}, UnsupportedModel, "searched by what a language model"),
        ("clip", [{"attention_bias": {"prefix": ["nowhere"]}}], {}, SourceError, "is not one token of the vocabulary"),
        ("bert", [{"registers": {}}], {}, UnsupportedModel, "reads text, in which no place is a register's"),
        ("bert", [{"attention_bias": {"from": "registers"}}], {}, UnsupportedModel, "which has no registers"),
        ("bert", [MASSIVE], {"perplexity": {"max_ratio": 1.1}}, RecipeError, "verify.perplexity, which is not for"),
        ("clip", [FOLD], {"perplexity": {"max_ratio": 1.1}}, RecipeError, "verify.perplexity, which is not for"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "operations", "gates", "error", "words"), refusals())
def test_what_cannot_be_done_is_refused(
    kind: str, operations: list, gates: dict, error: type, words: str, ground: Path, tmp_path: Path
) -> None:
    asked = {"surgery": 1, "operations": operations, "verify": gates}
    with pytest.raises(error) as caught:
        surgery.run(asked, ground / kind, tmp_path / "out", text=ground / f"{kind}.txt", chunking=FEW)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_is_given_has_to_be_what_is_read(ground: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures", 12)
    with pytest.raises(UnsupportedModel, match="no part of it reads images alone; give --text for a model of text"):
        surgery.scan(ground / "bert", images=pictures)
    with pytest.raises(SourceError, match="bert is an encoder of text, which reads no --images; give --text"):
        surgery.run(recipe(MASSIVE), ground / "bert", tmp_path / "out", images=pictures, chunking=FEW)
    with pytest.raises(SourceError, match="vit is an encoder of images, which reads no text; give --images"):
        surgery.scan(save_encoder(tmp_path / "vit", "vit"), text=ground / "bert.txt")
    with pytest.raises(SourceError, match="chunks of 3 tokens leave too few between those that the tokenizer adds"):
        surgery.scan(ground / "bert", text=ground / "bert.txt", chunking=surgery.Chunking(2, 3))
    with pytest.raises(SourceError, match="has no tokenizer files"):
        text_model("bert").save_pretrained(tmp_path / "bare")
        surgery.scan(tmp_path / "bare", text=ground / "bert.txt")
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(SourceError, match="give more text"):
        surgery.scan(ground / "bert", text=tmp_path / "short.txt", chunking=FEW)


@pytest.mark.slow
def test_the_other_tower_of_a_converted_one_is_not_meant(ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe(FOLD), ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    with pytest.raises(SourceError, match="is an encoder of text, which reads no --images; give --text"):
        surgery.scan(tmp_path / "out", images=save_pictures(tmp_path / "pictures", 12))
    with pytest.raises(UnsupportedModel, match="is an encoder, and exports are for language models"):
        surgery.export("peft", tmp_path / "out", tmp_path / "adapter")


@pytest.mark.slow
def test_norms_go_to_the_tower_that_is_given_something(ground: Path, tmp_path: Path) -> None:
    """A recipe for any model, on a checkpoint of two towers: what is given says which."""
    asked = recipe({"head_norm": {}})
    found = surgery.run(asked, ground / "clip", tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
    assert found is not None and found["passed"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eab"]["trunk"] == "CLIPTextModel"
    assert surgery.verify(tmp_path / "out", against=ground / "clip", text=ground / "clip.txt")["passed"]


def test_what_would_be_lost_is_refused(ground: Path, tmp_path: Path) -> None:
    """A class that no Auto class loads, and heads that look at the ids themselves."""

    def settings(kind: str) -> dict[str, Any]:
        return {key: value for key, value in text_config_of(kind).items() if key != "model_type"}

    cases = (
        (CLIPTextModelWithProjection(CLIPTextConfig(**settings("clip_text_model"))), "which no Auto class loads"),
        (OwlViTForObjectDetection(OwlViTConfig(**settings("owlvit"))), "may look at the first token id"),
    )
    for model, words in cases:
        root = tmp_path / type(model).__name__
        model.save_pretrained(root)
        save_tokenizer(root, ground / "clip.txt", framed=True)
        with pytest.raises(UnsupportedModel, match=words):
            surgery.run(recipe(FOLD), root, tmp_path / "out", text=ground / "clip.txt", chunking=FEW)
        assert surgery.scan(root, text=ground / "clip.txt", chunking=surgery.Chunking(2))["text"]["causal"]


def test_what_the_tokenizer_goes_on_adding_is_not_folded(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "clip", tmp_path / "clip")
    tokenizer = json.loads((tmp_path / "clip" / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(1, first)
    (tmp_path / "clip" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for prefix in (["<s>", "</s>"], ["</s>"]):
        with pytest.raises(UnsupportedModel, match="the tokenizer puts '</s>' before each text, and would go on"):
            surgery.plan(recipe({"attention_bias": {"prefix": prefix}}), str(tmp_path / "clip"))


def test_a_word_is_no_cls(ground: Path, tmp_path: Path) -> None:
    """Of one text it is not told whether its first token is that of all."""
    found = surgery.scan(ground / "bert", text=ground / "bert.txt", chunking=surgery.Chunking(1), interventions=True)
    assert found["text"]["special"] == 0
    assert not any("CLS" in row["name"] for row in found["interventions"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_position_embeddings": 3}, "config.json"),
        ({"is_encoder_decoder": True}, "attends to an encoder"),
        ({"eab": {"sees_all": None}}, "eab.sees_all is not as a run writes it"),
        ({"eab": {"trunk": "BertEncoder"}}, "eab.trunk 'BertEncoder' is no encoder of bert"),
    ],
)
def test_a_changed_config_is_told_as_it_is(changed: dict, words: str, ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe({"head_norm": {}}), ground / "bert", tmp_path / "out", text=ground / "bert.txt", chunking=FEW)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    eab = {key: value for key, value in {**config["eab"], **changed.pop("eab", {})}.items() if value is not None}
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "eab": eab, **changed}))
    with pytest.raises(DamagedCheckpoint, match=words) as caught:
        surgery.scan(tmp_path / "out", text=ground / "bert.txt", chunking=FEW)
    assert "\n" not in str(caught.value)


def test_a_bert_that_is_a_decoder_is_a_language_model(tmp_path: Path) -> None:
    settings = {key: value for key, value in text_config_of("bert").items() if key != "model_type"}
    BertLMHeadModel(BertConfig(**settings, is_decoder=True)).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", write_text(tmp_path / "text.txt", 2000, 0))
    assert "perplexity" in surgery.scan(tmp_path / "bert", text=tmp_path / "text.txt", chunking=surgery.Chunking(2, 16))


def test_a_language_model_is_none_of_them(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    save_model(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama", write_text(tmp_path / "text.txt", 2000, 0))
    asked = {"surgery": 1, "operations": [{"attention_bias": {"prefix": [BOS]}}], "verify": EXACT}
    with pytest.raises(RecipeError, match="verify.fidelity, which is not for a language model"):
        surgery.run(asked, tmp_path / "llama", tmp_path / "out", text=tmp_path / "text.txt")
