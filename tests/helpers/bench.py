"""A bench to damage inputs on, and what must be true of a command that refuses them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from helpers.tiny_checkpoint import (
    MEASURED,
    RECIPE,
    Ended,
    Place,
    edit_json,
    sha256_of_files,
    surgery_command,
)

INPUT, DAMAGED = 2, 3
IDS = RECIPE.replace('["<s>", "\\n"]', "[0, 5]")
AUTO = RECIPE.replace('["<s>", "\\n"]', "auto")
GATED = RECIPE.replace("max_ratio: 2.0", "max_ratio: 0.01")  # no perplexity is a hundredth of the original's


@dataclass
class Bench:
    """Copies of what is shared, to be damaged."""

    place: Place
    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def source(self, name: str = "source") -> Path:
        return Path(shutil.copytree(getattr(self.place, name), self.root / name))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def configured(self, **changes: object) -> Path:
        root = self.source()
        edit_json(root / "config.json", **changes)
        return root

    def run(self, source: object = None, recipe: str | Path = RECIPE, *options: object, text: object = None) -> list:
        recipe = self.file("recipe.yaml", recipe) if isinstance(recipe, str) else recipe
        source = self.place.source if source is None else source
        texts = ["--text", self.place.text if text is None else text] if text is not False else []
        return ["run", recipe, source, self.out, *texts, *MEASURED, *options]


def snapshot(*roots: Path) -> dict[str, str]:
    """Every file by hash and every directory, hidden ones too."""
    found = {}
    for root in roots:
        found |= {f"{root}/{name}": digest for name, digest in sha256_of_files(root).items()}
        found |= {str(path): "directory" for path in root.rglob("*") if path.is_dir()}
    return found


def refused(bench: Bench, arguments: list, code: int, *words: str) -> Ended:
    """Run it; assert that it ends as it should and leaves everything as it was."""
    before = snapshot(bench.place.root, bench.root)
    ended = surgery_command(*arguments)
    assert "Traceback" not in ended.err
    assert ended.code == code, ended.err
    for word in words:
        assert word in ended.error
    assert snapshot(bench.place.root, bench.root) == before
    return ended
