"""What is installed under the name checkpoint-surgery: the wheel, as its build backend makes it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from helpers import ROOT

import surgery

BUILD = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
NO_METADATA = "import importlib.metadata as m\ndel m.version\n"  # for a copy that was never installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_package_recipes_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name.startswith(f"checkpoint_surgery-{surgery.__version__}-")
    assert {name.split("/")[0] for name in names} == {"surgery", f"checkpoint_surgery-{surgery.__version__}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "surgery").rglob("*.py")}
    assert sources <= names
    assert {"surgery/py.typed", "surgery/report/template.html.jinja"} <= names
    assert {f"surgery/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names


def test_its_names_are_our_own(wheel: Path) -> None:
    found = next(metadata.distributions(path=[str(wheel)]))
    assert found.metadata["Name"] == "checkpoint-surgery" and found.version == surgery.__version__
    entries = {(entry.group, entry.name): entry.value for entry in found.entry_points}
    assert entries == {
        ("console_scripts", "surgery"): "surgery.cli:main",
        ("vllm.general_plugins", "surgery_eab"): "surgery.serving.plugin:register",
    }
    assert not [asked for asked in found.requires or () if asked.startswith("surgery")]  # another project of that name


def test_installed_elsewhere_it_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    script = f"{NO_METADATA}import sys; sys.argv = ['surgery', *sys.argv[1:]]; from surgery.cli import main; main()"
    for arguments, said in ((["recipes", "eab"], (ROOT / "recipes" / "eab.yaml").read_text()), (["--version"], None)):
        ended = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=tmp_path / "cwd", capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip
        assert ended.stdout == (said or f"surgery, version {surgery.__version__}\n")


def test_messages_name_the_distribution() -> None:
    """`pip install 'surgery[tasks]'` would install somebody else's project."""
    written = [*(ROOT / "surgery").rglob("*.py"), *ROOT.rglob("recipes/*"), ROOT / "README.md", ROOT / "pyproject.toml"]
    wrong = [path for path in written if "'surgery[" in path.read_text() or '"surgery[' in path.read_text()]
    assert not wrong
