"""Where a checkpoint comes from: a directory, a hub id or a GGUF file, opened without reading a weight."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedCheckpoint, SourceError
from ..progress import Advance, unseen
from ..words import named
from .config import CONFIG, read_config, without_choices
from .copying import sha256_of_all
from .elsewhere import NOWHERE, Elsewhere
from .hub import HubId, Snapshot, download, fetch_some, hub_id, weights_of
from .layout import INDEX, SINGLE, Layout, read_layout
from .manifest import MANIFEST, TYPE_PREFIX
from .own_files import require_own_files
from .provenance import name_of, plain
from .quantised import Quantised, quantised
from .regular import is_lfs_pointer, is_plain_name, lfs_pointer, open_regular, read_json
from .witness import State, states_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"  # where it is, transformers loads what it names in place of the model, or on top of it
COMPANION_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYING*",
)
# Never carried along, whatever their name begins with: pickles, weights of any kind, code.
REFUSED_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".msgpack",
    ".onnx",
    ".tflite",
    ".safetensors",
    ".gguf",
    ".py",
    ".pyc",
    ".so",
    ".sh",
)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `root` is its directory, or the .gguf file itself.

    `layout` is what lies on disk; for a GGUF what `materialise` will write (its `root` is then the .gguf file, from
    which no tensor can be read by it: call `read_layout` on the materialised directory). `companions` are plain file
    names beside the weights that belong to the model; for a GGUF those that `materialise` will write.
    `revision` is the commit of a hub snapshot, whose weights are not in `root` before `materialise`.
    """

    spec: str
    kind: str
    root: Path
    revision: str | None
    config: dict[str, Any]
    layout: Layout
    companions: tuple[str, ...]
    plan: Any = field(default=None, repr=False, compare=False)  # a GGUF's GgufPlan, derived once
    quantised: Quantised | None = None
    seen: Mapping[str, State] = field(default_factory=dict, repr=False, compare=False)  # before anything was read

    @property
    def name(self) -> str:
        """What files may call it: an id of the hub, or the last part of a path."""
        return self.spec if self.kind == "hub" else plain(name_of(self.spec))

    @property
    def blank(self) -> PreTrainedModel | None:
        """The model on the meta device, where opening the source has built it: for a GGUF."""
        return None if self.plan is None else self.plan.blank

    @property
    def repo(self) -> str | None:
        """The hub's "owner/name", where it comes from there."""
        found = hub_id(self.spec) if self.kind == "hub" else None
        return None if found is None else found.repo

    @property
    def missing(self) -> dict[str, int]:
        """Bytes of the weight files, by name, that `materialise` will download."""
        if self.kind != "hub":
            return {}
        return {name: self.layout.sizes[name] for name in self.layout.shards if not (self.root / name).exists()}


def open_source(spec: str, *, revision: str | None = None, dtype: str | None = None) -> Source:
    """Open a directory, a `.gguf` file or a hub id, "owner/name" or "owner/name@revision"; no weights are read.

    What exists on this disk is never taken for a hub id. Of the hub's files only small ones are downloaded, and of
    weights their headers. revision: branch, tag or commit, hub ids only. dtype: "float32" (default), "bfloat16" or
    "float16", GGUF only. Raises SourceError for what is not a checkpoint we take, DamagedCheckpoint for one whose bytes
    are wrong, UnsupportedModel for a GGUF that would not come out exactly.
    """
    try:
        spec.encode("utf-8")
    except UnicodeEncodeError:
        raise SourceError(f"{spec!a} is not a UTF-8 path, and the manifest could not name it; rename it.") from None
    path = Path(os.path.expanduser(spec))
    is_directory = os.path.isdir(path)  # pathlib raises where a name is longer than the disk allows
    is_gguf = spec.endswith(".gguf") and not is_directory
    if dtype is not None and not is_gguf:
        raise SourceError(f"A dtype ({dtype}) can be asked for only with a .gguf file: {spec} keeps the dtypes it has.")
    if revision is not None and (is_gguf or os.path.exists(path)):
        raise SourceError(f"A revision ({revision}) can be asked for only with a hub id, and {spec} is on this disk.")
    if is_gguf:
        return _open_gguf(spec, path, dtype or "float32")
    if is_directory:
        return _open_directory(spec, "directory", path, None)
    if os.path.exists(path):
        raise SourceError(f"{spec} is a file, but not a .gguf file; give its directory, a .gguf file or a hub id.")
    at = hub_id(spec, revision)
    if at is None:
        raise SourceError(f"{spec:.200} does not exist, nor is it a hub id of the form owner/name; check the path.")
    return _open_hub(at)


def fetch_small(at: HubId) -> Snapshot:
    """What a model on the hub has beside its weights; pickles are left there."""
    refused = (f"*{suffix}" for suffix in REFUSED_SUFFIXES if suffix != ".py")
    telling = (CONFIG, ADAPTER, MANIFEST, INDEX, "README.md", "*quant*config.json")  # of what this is, or is not
    return fetch_some(at, [*telling, "*.py", *COMPANION_PATTERNS], ["*/*", *refused])


def _open_hub(at: HubId) -> Source:
    snapshot = fetch_small(at)
    weights = weights_of(snapshot)
    if not any((snapshot.root / name).exists() or name in weights.names for name in (SINGLE, INDEX)):
        raise SourceError(
            f"{at} has no safetensors weights on the hub; of a .gguf give the file, and pickles, which can run code, "
            "are left there: if you trust them, save them anew with transformers and give that directory."
        )
    return _open_directory(str(at), "hub", snapshot.root, snapshot.commit, weights)


def _open_directory(
    spec: str, kind: str, root: Path, revision: str | None, weights: Elsewhere = NOWHERE
) -> Source:  # fmt: skip
    seen = states_in(root)
    require_own_files(root)
    config = _read_config(root, spec)
    refuse_adapter(root)
    layout = read_layout(root, weights)
    packed = quantised(root, config, layout)
    companions, config = _companions(root, config), without_choices(config, root / CONFIG)
    return Source(spec, kind, root, revision, config, layout, companions, seen=seen, quantised=packed)


def refuse_adapter(root: Path) -> None:
    """SourceError where a PEFT adapter lies beside the weights."""
    if (root / ADAPTER).exists():
        raise SourceError(
            f"{root / ADAPTER} is of a PEFT adapter, which transformers would apply unasked; merge it into the model "
            "and save that, or move the adapter's files elsewhere."
        )


def _read_config(root: Path, spec: str) -> dict[str, Any]:
    path = root / CONFIG
    if not path.is_file():
        ggufs = sorted(entry.name for entry in root.glob("*.gguf"))
        way_out = f"name the file itself: {root / ggufs[0]}" if ggufs else "give a complete checkpoint directory"
        raise SourceError(f"{root} has no {CONFIG}; {way_out}.")
    config = read_config(root)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError(f'{path} has no "model_type", so nothing says which architecture this is; add it.')
    if model_type.startswith(TYPE_PREFIX) or (root / MANIFEST).exists():
        raise SourceError(
            f"{spec} is already converted (model type {named(model_type)}); start from the original checkpoint."
        )
    quantised(root, config)  # before what is wrong with its weights, which is often that they are packed
    return config


def _companions(root: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Plain names of the files in `root` that go with the weights."""
    code = _code_files(config)
    if (root / "tokenizer_config.json").is_file():
        code |= _code_files(read_json(root / "tokenizer_config.json"))
    found = []
    for entry in sorted(root.iterdir()):
        name = entry.name
        listed = any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)
        if not entry.is_file() or not (name in code or listed and not name.lower().endswith(REFUSED_SUFFIXES)):
            continue
        if not is_plain_name(name):
            raise SourceError(f"{entry} has a name that is not plain UTF-8 text; rename or remove it.")
        with open_regular(entry) as file:
            if is_lfs_pointer(file.read(64)):
                raise lfs_pointer(entry)
        found.append(name)
    return tuple(found)


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether there are files of a tokenizer among these."""
    return any(
        name.startswith(("tokenizer", "vocab", "merges", "tekken")) or name.endswith((".model", ".tiktoken"))
        for name in names
    )


def without_tokenizer(source: Source) -> Source:
    """`source` as if it had no files of a tokenizer, nor chat templates."""
    others = ("special_tokens_map.json", "added_tokens.json")
    kept = tuple(
        name
        for name in source.companions
        if not has_tokenizer([name])
        and name not in others
        and not name.startswith("chat_template")
        and ".jinja" not in name
    )
    plan = None if source.plan is None else replace(source.plan, companions=kept)
    return replace(source, companions=kept, plan=plan)


def _code_files(config: dict[str, Any]) -> set[str]:
    """The Python files that `auto_map` names ("file.Class", one or a list of them), other repositories' left out."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return {f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item}


def _open_gguf(spec: str, path: Path, dtype: str) -> Source:
    from .gguf import plan_gguf

    seen = states_in(path)
    plan = plan_gguf(path, dtype)
    return Source(spec, "gguf", path, None, plan.config, plan.layout, plan.companions, plan, seen=seen)


def source_hashes(source: Source, advance: Advance = unseen) -> dict[str, str]:
    """SHA-256 in hexadecimal of every weight file and config.json, by name; of the one file where it is a GGUF."""
    if source.kind == "gguf":
        files = [source.root]
    else:
        files = [source.root / name for name in (*source.layout.shards, CONFIG)]
    return sha256_of_all({file.name: file for file in files}, advance)


def materialise(source: Source, into: Path, advance: Advance = unseen) -> Path:
    """A directory of plain Hugging Face files to load from: the source's own, with the weights of a hub id downloaded
    into it; or `into`, filled from the GGUF.

    DamagedCheckpoint where what was downloaded has other headers than those that the source was opened by.
    """
    if source.kind == "gguf":
        from .gguf import write_plan

        write_plan(source.plan, into, advance)
        return Path(into)
    if source.missing:
        at = hub_id(source.spec)
        assert at is not None
        download(Snapshot(at, source.root), source.missing, advance)
        if read_layout(source.root) != source.layout:
            raise DamagedCheckpoint(f"{source.spec}: what was downloaded is not what the hub showed; run again.")
    return source.root
