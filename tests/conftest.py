"""What all tests share: no network, few threads, and the real material that bin/setup fetches."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before any test module imports torch or transformers; child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ["OMP_NUM_THREADS"] = "2" if WORKERS == 1 else "1"  # what torch.get_num_threads() starts from

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`real` follows from what a test asks for: nobody has to think of it."""
    for item in items:
        if "material" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


def pytest_collection_finish() -> None:
    """What has been imported by now stays: no collection looks through torch and transformers again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_are_tried_once():
    """The same files are not tried in a child again: most tests have one tokenizer, and forks of this process are slow.

    What failed is tried again, and whatever is changed is tried.
    """
    from surgery.live import loading

    tried, bounded = set(), loading.bounded

    def once(function, directory, **limits):
        files = sorted(path for path in Path(directory).iterdir() if path.is_file() and path.stat().st_size < 2**20)
        content = tuple((path.name, path.read_bytes()) for path in files if not path.name.endswith(".safetensors"))
        if (key := hash(content)) not in tried:
            bounded(function, directory, **limits)
            tried.add(key)

    loading.bounded = once
    yield
    loading.bounded = bounded


SMALL = 2000  # tokens of a vocabulary that is told from another in less time than a fork takes


@pytest.fixture(scope="session", autouse=True)
def _texts_are_read_once():
    """Nor does the same small tokenizer read the same text in a child again: what it said is remembered."""
    from surgery.live import text

    said, bounded = {}, text.bounded

    def once(function, tokenizer, *given, **limits):
        if getattr(tokenizer, "backend_tokenizer", None) is None or len(tokenizer) > SMALL:
            return bounded(function, tokenizer, *given, **limits)
        settings = repr(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.backend_tokenizer.to_str()
        key = hash((function.__name__, type(tokenizer), settings, repr(given)))
        if key not in said:
            said[key] = json.dumps(bounded(function, tokenizer, *given, **limits))
        return json.loads(said[key])

    text.bounded = once
    yield
    text.bounded = bounded


def _material_root() -> Path:
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("SURGERY_MATERIAL") or root / ".material").resolve()


def _existing(path: Path) -> Path:
    """`path`, or a failure (never a skip: a test that does not run proves nothing) that tells how to get it."""
    if not path.exists():
        pytest.fail(f"{path} is missing: run bin/setup, or point SURGERY_MATERIAL at the material.", pytrace=False)
    return path


@pytest.fixture(scope="session")
def material() -> Path:
    """Folder with the real model and texts (SURGERY_MATERIAL, or .material in the repository)."""
    return _existing(_material_root())


@pytest.fixture(scope="session")
def smollm2_gguf(material: Path) -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as its package ships it."""
    return _existing(material / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same in float32, and its tokenizer; shared, so leave both as they are."""
    from surgery.checkpoint.source import materialise, open_source
    from surgery.live.loading import load_original, load_tokenizer

    with pytest.warns(UserWarning, match="pre-tokenizer 'smollm'"):
        root = materialise(open_source(str(smollm2_gguf)), tmp_path_factory.mktemp("smollm2") / "model")
    return load_original(root), load_tokenizer(root)


@pytest.fixture(scope="session")
def wikipedia_calibration(material: Path) -> Path:
    """English Wikipedia articles, plain text; shares no article with `wikipedia_evaluation`."""
    return _existing(material / "wikipedia" / "calibration.txt")


@pytest.fixture(scope="session")
def wikipedia_evaluation(material: Path) -> Path:
    """English Wikipedia articles, plain text; shares no article with `wikipedia_calibration`."""
    return _existing(material / "wikipedia" / "evaluation.txt")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A tiny llama with tokenizer, texts, recipe and converted checkpoint; shared, so copy before you change it."""
    from helpers.tiny_checkpoint import build_place

    return build_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def bench(place, tmp_path: Path):
    """Copies of `place` that a test may damage."""
    from helpers.bench import Bench

    return Bench(place, tmp_path)
