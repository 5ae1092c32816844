"""The model card: what it carries of the source's own, what the hub reads from it, and what a hostile one can do."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import MEASURED, surgery_command
from huggingface_hub import ModelCard

from surgery.checkpoint.source import open_source
from surgery.converted.origin import Origin, _of_gguf, origin

THEIRS = """---
license: other
license_name: llama3
license_link: LICENSE
language: [en, "no"]
base_model: owner/older
tags: [theirs]
---
# Their model
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def of(tmp_path):
    """What is known of a source whose README.md holds these bytes."""
    config, header = b'{"model_type": "llama"}', b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'

    def read(readme: bytes, root: Path = tmp_path / "model") -> Origin:
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_bytes(config)
        (root / "LICENSE").write_text("terms")
        (root / "README.md").write_bytes(readme)
        (root / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        return origin(open_source(str(root)))

    return read


@pytest.fixture(scope="module")
def converted(place, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("card")
    source = Path(shutil.copytree(place.source, root / "theirs"))
    (source / "README.md").write_text(THEIRS, encoding="utf-8")
    (source / "LICENSE").write_text("Their terms.", encoding="utf-8")
    ended = surgery_command("run", place.recipe, source, root / "out", "--text", place.text, *MEASURED)
    assert ended.code == 0, ended.err
    return root / "out"


def test_metadata_are_what_the_hub_reads(converted, place):
    data = ModelCard.load(converted / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert data.language == ["en", "no"] and data.base_model == "owner/older"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.tags == ["surgery", "attention-bias"]
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "out")
    found = {result.metric_name: result for result in data.eval_results}
    scores = place.verdict["perplexity"]  # of the same weights on the same text
    assert found["perplexity"].metric_value == pytest.approx(scores["converted"]["ppl"], abs=1e-4)
    assert found["perplexity of the original"].metric_value == pytest.approx(scores["bare"]["ppl"], abs=1e-4)
    for result in data.eval_results:
        assert (result.dataset_name, result.metric_type, result.verified) == ("evaluation.txt", "perplexity", False)
        digests = [text["sha256"] for text in place.verdict["provenance"]["texts"]["evaluation"]]
        wanted = {"sha256": digests, "chunks": 4, "tokens in a chunk": 32, "part": "second half"}
        assert result.dataset_args == wanted


def test_the_page_tells_terms_limits_gates_and_provenance(converted, place):
    text = (converted / "README.md").read_text(encoding="utf-8")
    assert "`theirs` (a local directory, made of [owner/older](https://huggingface.co/owner/older))" in text
    assert "That of the source: other (llama3), see [LICENSE](LICENSE)." in text and (converted / "LICENSE").is_file()
    assert "`LlamaForCausalLM.from_pretrained`" in text.partition("## Limits")[2].partition("## Measured")[0]
    assert "### Gates" in text and "✓ passed" in text
    made = text.partition("## How it was made")[2]
    for told in (place.text.name, place.verdict["provenance"]["texts"]["evaluation"][0]["sha256"], "4 chunks of 32"):
        assert told in made
    assert "surgery run recipe.yaml theirs out" in made


def test_a_directory_of_the_hubs_cache_is_that_model(of, tmp_path):
    found = of(THEIRS.encode(), tmp_path / "models--owner--name" / "snapshots" / "a1")
    assert found.base_model == ("owner/name",) and found.cached and found.license == "other"


def test_without_a_card_nothing_is_claimed(of):
    assert of(b"# No metadata\n") == Origin(files=("LICENSE",)) == of(b"---\n---\n") == of(b"\xff\xfe")


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
BROKEN = {
    "aliases that grow": BOMB.encode(),
    "merge keys that grow": b"a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
    "a tag": b"license: !!python/object/apply:os.system [id]\n",
    "nesting": b"a: " + b"[" * 20000,
    "no mapping": b"- license\n",
    "no YAML": b"license: [mit\n",
    "control characters": b"license: \x00\x1b[31m\n",
    "megabytes": b"license: mit\n" + b"# x\n" * 2_000_000,
    "no end": b"license: mit",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_metadata_are_passed_over_and_said(of, how):
    began = time.process_time()
    found = of(b"---\n" + BROKEN[how] + (b"" if how == "no end" else b"---\n"))
    assert time.process_time() - began < 5
    assert found.license is None and found.base_model == () and found.files == ("LICENSE",)
    assert found.broken is not None and "README.md" in found.broken and len(found.broken) < 200
    assert found.broken.isprintable()


def test_values_of_other_forms_are_left_out(of):
    found = of(
        b"---\nlicense: [mit, 5, '<b>']\nlicense_name: {a: b}\nlicense_link: /home/somebody/LICENSE\n"
        b"language: [en, 5, null, '../x']\nbase_model: ['../../x', a/b, 'a/b', c, 'd/e/f', 1]\n---\n"
    )
    assert found == Origin(license="mit", language=("en",), base_model=("a/b",), files=("LICENSE",))


def test_a_broken_card_is_noted_and_does_not_stop_a_run(place, tmp_path):
    source = Path(shutil.copytree(place.source, tmp_path / "model"))
    (source / "README.md").write_bytes(b"---\nlicense: [mit\n---\n")
    ended = surgery_command("run", place.recipe, source, tmp_path / "out", "--no-verify")
    assert ended.code == 0 and "the card does not tell its licence" in " ".join(ended.err.split())
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Nothing: written with --no-verify." in text and "The source does not say" in text
    assert ModelCard(text).data.eval_results is None and ModelCard(text).data.license is None


def test_a_gguf_header_tells_licence_and_base_model():
    header = {"general.license": "apache-2.0", "general.license.link": "/home/somebody/LICENSE"}
    assert _of_gguf(header) == Origin(license="apache-2.0")
    link = {"general.base_model.0.repo_url": "https://huggingface.co/owner/name"}
    assert _of_gguf({**header, **link, "general.license": 5}) == Origin(base_model=("owner/name",))
