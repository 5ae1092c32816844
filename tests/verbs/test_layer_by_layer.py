"""Every verb on a model that comes layer by layer: the files and figures of a resident one, to the bit."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from helpers.measured import Notes
from helpers.memory import least
from helpers.packed import COMPRESSED, save_packed
from helpers.tiny import build, one_thread, tiny_config
from helpers.tiny_checkpoint import save_model, save_tokenizer, sha256_of_files, surgery_command, write_text

import surgery
from surgery.anatomy.fit import examine_stored
from surgery.checkpoint.config import read_config
from surgery.checkpoint.layout import read_layout
from surgery.errors import NoSpace, SourceError
from surgery.live.memory import Needs, Place, free_memory, parse_memory

CHUNKS = surgery.Chunking(8, 32)
GATES = {
    "equivalence": {"max_delta_nll": 1e-3}, "perplexity": {"max_ratio": 9.0}, "massive_activations": {"max": 10**6},
    "quantised": {"w8a8_static": {"max_ratio": 99.0}, "w4": {"max_ratio": 99.0}, "kv4": {"max_ratio": 99.0}},
    "streaming": {"window": 16, "max_ratio": 99.0}, "agreement": {"min_share": 0.01},
}  # fmt: skip
SEARCHED = {
    "surgery": 1,
    "operations": [{"attention_bias": {"prefix": "auto", "max_slots": 2}}, {"head_norm": {}}],
    "verify": GATES,
}
GIVEN = {**SEARCHED, "operations": [{"attention_bias": {"prefix": [1, 5]}}]}
OF_EXPERTS = {**GIVEN, "verify": {key: gate for key, gate in GATES.items() if key != "quantised"}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("texts")
    return write_text(root / "calibration.txt", 4000, 0), write_text(root / "evaluation.txt", 2000, 1)


def source(root: Path, kind: str, text: Path) -> Path:
    root.mkdir()
    save_tokenizer(root, text)
    if kind == "llama":
        save_model(root, massive=0, shard_size="60KB")
    else:
        config = tiny_config(kind, vocab_size=320, bos_token_id=0, eos_token_id=1)
        build(config).to(torch.bfloat16).save_pretrained(root, max_shard_size="60KB")
    return root


def found(result) -> str:
    """All that a verb found, less what tells one run from another."""

    def stripped(value):
        if isinstance(value, dict):
            left = {key: stripped(one) for key, one in value.items()}
            return {key: one for key, one in left.items() if key not in ("provenance", "digest", "speed", "sample")}
        return [stripped(one) for one in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(stripped(result), sort_keys=True)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", SEARCHED),
        pytest.param("mixtral", OF_EXPERTS, marks=pytest.mark.slow),
        pytest.param("gpt2", GIVEN, marks=pytest.mark.slow),
    ],
)
def test_all_that_is_found_and_written_is_the_same(kind, recipe, texts, tmp_path):
    root = source(tmp_path / "source", kind, texts[0])
    results = {}
    for way, memory in (("resident", None), ("layers", least(root))):
        out, notes = tmp_path / way / "out", Notes()
        out.parent.mkdir()
        given = {"text": texts[1], "calibration": texts[0], "chunking": CHUNKS, "memory": memory, "reporter": notes}
        ran = surgery.run(recipe, root, out, surveys=True, **given)
        verified = surgery.verify(out, against=root, **given)
        scans = [
            surgery.scan(one, text=texts[1], chunking=CHUNKS, memory=memory, reporter=notes) for one in (root, out)
        ]
        assert ran["passed"] and verified["passed"]
        told = [note for note in notes.seen if "layer by layer" in note]
        assert len(told) == (4 if memory is not None else 0), notes.seen
        weights = {name: one for name, one in sha256_of_files(out).items() if name.endswith(".safetensors")}
        results[way] = (found(ran), found(verified), *map(found, scans), weights)
    for ours, theirs in zip(results["layers"], results["resident"], strict=True):
        assert ours == theirs


def test_interventions_find_the_same(texts, tmp_path):
    root = source(tmp_path / "source", "llama", texts[0])
    given = {"text": texts[1], "chunking": surgery.Chunking(2, 24), "interventions": True}
    assert found(surgery.scan(root, memory=least(root), **given)) == found(surgery.scan(root, **given))


def test_a_plan_says_which_and_what_it_takes(texts, tmp_path):
    root = source(tmp_path / "source", "llama", texts[0])
    for memory, layers in ((least(root), True), (10**11, False)):
        planned = surgery.plan(GIVEN, root, memory=memory).to_dict()["memory"]
        assert planned["layer_by_layer"] is layers and planned["allowed"] == memory
        assert planned["peak"] == planned["least" if layers else "resident"]
        stored = sum(tensor.nbytes for tensor in read_layout(root).tensors.values())
        assert planned["read_each_pass"] == (stored if layers else 0)
        ended = surgery_command("plan", "eab", root, "--memory", f"{memory}B")
        assert ("layer by layer: all weights at once would take" in " ".join(ended.out.split())) is layers, ended.out


def test_what_cannot_be_is_said_before_weights_are_read(texts, tmp_path, monkeypatch):
    root = source(tmp_path / "source", "llama", texts[0])
    monkeypatch.setattr("surgery.steps.operate.live_original", None)
    given = {"text": texts[1], "chunking": CHUNKS}
    with pytest.raises(
        NoSpace, match=r"needs 8..\.. MB of memory even layer by layer, and 1.0 MB are given \(--memory\)"
    ):
        surgery.run(GIVEN, root, tmp_path / "out", memory=10**6, **given)
    for operation in ("rotation", "tune"):
        more = {"tune": {"steps": 1}} if operation == "tune" else {}
        operations = GIVEN["operations"] + ([] if more else [{operation: {}}])
        recipe = {"surgery": 1, "operations": operations, **more}
        with pytest.raises(NoSpace, match=rf"since '{operation}' in the recipe works on all weights at once"):
            surgery.run(recipe, root, tmp_path / "out", memory=least(root), **given)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_channels_are_smoothed_alike(kind, texts, tmp_path):
    """Pairs are found and proved a block at a time, and what is scaled is made when it is written."""
    root, given = source(tmp_path / "source", kind, texts[0]), {"calibration": texts[0], "chunking": CHUNKS}
    recipe = {**(OF_EXPERTS if kind == "mixtral" else GIVEN), "operations": [*GIVEN["operations"], {"smoothing": {}}]}
    results = {}
    for way, memory in (("resident", None), ("layers", least(root))):
        ran = surgery.run(recipe, root, tmp_path / way, memory=memory, text=texts[1], **given)
        weights = {k: v for k, v in sha256_of_files(tmp_path / way).items() if k.endswith(".safetensors")}
        assert ran["passed"] and weights.items() != sha256_of_files(root).items()
        results[way] = (found(ran), weights)
    assert results["layers"] == results["resident"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"scheme": "w8a8_static", "per_token": ["down_proj"]}, {"scheme": "w4a16", "group": 16}, {"scheme": "fp8_dynamic"},
])  # fmt: skip
def test_layers_are_written_in_few_bits_and_read_again_alike(settings, texts, tmp_path):
    """Scales come from a pass by layers, weights one at a time from their files; each is unpacked when it comes."""
    root, given = source(tmp_path / "source", "llama", texts[0]), {"text": texts[1], "chunking": CHUNKS}
    gates = {"perplexity": {"max_ratio": 99.0}, "massive_activations": {"max": 10**6}}
    operations = [*GIVEN["operations"], {"smoothing": {}}, {"quantise": settings}]
    recipe, results = {"surgery": 1, "operations": operations, "verify": gates}, {}
    for way, memory in (("resident", None), ("layers", least(root, packs=True))):
        out = tmp_path / way / "out"
        out.parent.mkdir()
        ran = surgery.run(recipe, root, out, memory=memory, calibration=texts[0], surveys=True, **given)
        files = {k: v for k, v in sha256_of_files(out).items() if k.endswith((".safetensors", "g.json"))}
        again = surgery.verify(out, against=root, memory=memory, **given), surgery.scan(out, memory=memory, **given)
        assert ran["passed"] and again[0]["passed"] and len(files) > 2
        results[way] = (found(ran), *map(found, again), files)
    for ours, theirs in zip(results["layers"], results["resident"], strict=True):
        assert ours == theirs


@pytest.mark.parametrize(
    "form", [form if form == "w8a8 static" else pytest.param(form, marks=pytest.mark.slow) for form in COMPRESSED]
)
def test_a_quantised_source_comes_layer_by_layer(form, texts, tmp_path):
    root, results = save_packed(tmp_path / "source", form), []
    save_tokenizer(root, texts[0])
    recipe = {**GIVEN, "verify": {"perplexity": {"max_ratio": 99.0}}}
    for way, memory in (("resident", None), ("layers", least(root))):
        out = tmp_path / way
        ran = surgery.run(recipe, root, out, memory=memory, text=texts[1], chunking=CHUNKS)
        results.append((found(ran), {k: v for k, v in sha256_of_files(out).items() if k.endswith(".safetensors")}))
    assert results[0] == results[1]


def test_what_is_unpacked_at_once_says_so(texts, tmp_path):
    root = save_packed(tmp_path / "source", "fp8")
    save_tokenizer(root, texts[0])
    with pytest.raises(NoSpace, match=r"comes all at once, as .* do: that needs 8..\.. MB of memory"):
        surgery.scan(root, text=texts[1], chunking=CHUNKS, memory=10**6)


# ---- memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 2**33), ("800 MB", 8 * 10**8), ("1.5gib", 3 * 2**29), ("123456789", 123456789), ("64k", 64000)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "8 GiBs", "1e9", "8GB 2"])
def test_what_is_no_size_is_refused(text, place):
    with pytest.raises(SourceError, match="is no size; write one such as 8GiB"):
        parse_memory(text)
    assert surgery_command("plan", "eab", place.source, "--memory", text).code == 2


def test_limits_of_the_process_count():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (2**36, before[1]))
        assert free_memory() <= 2**36
        resource.setrlimit(resource.RLIMIT_DATA, (2**31, before[1]))
        assert free_memory() < 2**32
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_model_that_fits_is_resident(texts, tmp_path):
    root = source(tmp_path / "source", "llama", texts[0])
    anatomy, _ = examine_stored(read_config(root), layout := read_layout(root))
    needs = Needs.of(anatomy, layout, torch.float32)
    assert needs.weights == sum(4 * p.numel() for p in anatomy.blank.parameters())
    assert Place(memory=needs.resident).by_layers(anatomy, layout) is None
    by_layers = Place(memory=needs.resident - 1).by_layers(anatomy, layout)
    assert by_layers is not None and 0 < by_layers.room <= needs.weights and by_layers.aside > 0
    assert Place("auto").by_layers(anatomy, layout) is None
    with pytest.raises(SourceError, match="--device auto places the model by itself"):
        Place("auto", 2**33)
