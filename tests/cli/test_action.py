"""The action for other people's workflows: its steps, run as shell scripts the way a runner does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.tiny_checkpoint import Place
from ruamel.yaml import YAML

ACTION = ROOT / ".github" / "actions" / "verify"
STEPS = YAML(typ="safe").load(ACTION / "action.yml")["runs"]["steps"]
INPUTS = YAML(typ="safe").load(ACTION / "action.yml")["inputs"]
# Notes its arguments, and makes a virtual environment whose Python is itself.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$NOTED"
if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


class Runner:
    """What a runner sets: its folders, and the inputs in the environment, as the step of this name maps them."""

    def __init__(self, root: Path) -> None:
        self.temporary, self.output, self.summary = root, root / "output", root / "step-summary"

    def step(self, name: str, environment: dict[str, str] | None = None, **inputs: str) -> subprocess.CompletedProcess:
        step = next(step for step in STEPS if step.get("name") == name)
        given = {key: entry.get("default", "") for key, entry in INPUTS.items()} | {
            key.replace("_", "-"): value for key, value in inputs.items()
        }
        mapped = {
            key: given[found[1]]
            for key, text in step["env"].items()
            if (found := re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", text))
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            env={
                **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                "GITHUB_ACTION_PATH": str(ACTION), "GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(self.temporary),
                "GITHUB_OUTPUT": str(self.output), "GITHUB_STEP_SUMMARY": str(self.summary), **mapped,
                **(environment or {}),
            },
            cwd=self.temporary, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def outputs(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())


def test_no_input_goes_into_the_text_of_a_script() -> None:
    """Only into the environment: a name such as $(reboot) stays a name."""
    scripts = [step for step in STEPS if "run" in step]
    assert [step["run"].split()[-1] for step in scripts] == ["install", "verify"]
    assert all("${{" not in step["run"] and step["shell"] == "bash" for step in scripts)
    mapped = {
        text for step in STEPS for text in (*step.get("env", {}).values(), *map(str, step.get("with", {}).values()))
    }
    assert all(f"${{{{ inputs.{name} }}}}" in mapped for name in INPUTS)
    assert [step["uses"].split("@")[0] for step in STEPS if "uses" in step] == [
        "actions/setup-python", "actions/upload-artifact",
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["", "0.1.0", "0.1.0 --index-url https://elsewhere", "-rfile"])
def test_it_installs_its_own_ref_or_a_version(tmp_path: Path, version: str) -> None:
    (stub := tmp_path / "stub").write_text(STUB)
    stub.chmod(0o755)
    noted = {"PYTHON": str(stub), "NOTED": str(tmp_path / "noted")}
    ended = Runner(tmp_path).step("Install surgery", noted, version=version)
    if version not in ("", "0.1.0"):
        assert ended.returncode == 2 and "version is not one of a package" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    _, torch, own = (tmp_path / "noted").read_text().splitlines()
    assert torch.endswith("torch --index-url https://download.pytorch.org/whl/cpu")
    assert own.split()[-1] == ("checkpoint-surgery==0.1.0" if version else str(ROOT))


@pytest.mark.slow
def test_what_passes_and_what_was_tampered_with(place: Place, tmp_path: Path) -> None:
    (runner := Runner(tmp_path)).output.touch()
    ended = runner.step("Verify", checkpoint=str(place.converted), against=str(place.source))
    assert ended.returncode == 0, ended.stderr
    outputs = runner.outputs()
    results = Path(outputs["results"])
    assert outputs == {"results": str(results), "exit-code": "0", "passed": "true"}
    assert json.loads((results / "verdict.json").read_text())["passed"] is True
    suite = ElementTree.parse(results / "junit.xml").getroot()
    assert suite.get("failures") == "0" and int(suite.get("tests") or 0) > 5
    assert "**passed: " in runner.summary.read_text() and "| tokenizer |" in runner.summary.read_text()
    # Names and texts of a stranger's checkpoint are no commands to the runner.
    first, *_, last = ended.stdout.splitlines()
    assert first.startswith("::stop-commands::") and last == f"::{first.rpartition(':')[2]}::"

    bad = Path(shutil.copytree(place.converted, tmp_path / "bad"))
    (bad / "generation_config.json").unlink()
    ended = runner.step("Verify", checkpoint=str(bad))
    assert ended.returncode == 3 and runner.outputs()["passed"] == "false"
    assert ElementTree.parse(results / "junit.xml").getroot().get("failures") == "1"
    assert "**failed: 1 of " in runner.summary.read_text()


@pytest.mark.slow
def test_what_is_refused_has_a_summary_too(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    name = f"$(touch {tmp_path}/ran)`touch {tmp_path}/ran`; touch {tmp_path}/ran"
    ended = runner.step("Verify", checkpoint=name, text="a b.txt\n\nc.txt\n")
    assert ended.returncode == 2 and runner.outputs()["exit-code"] == "2"
    assert not (tmp_path / "ran").exists()
    assert "ended with exit code 2**\n\n    error a b.txt: cannot be read" in runner.summary.read_text()
    assert "no checkpoint is given" in runner.step("Verify").stderr
