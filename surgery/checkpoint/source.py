"""Where a checkpoint comes from: a directory, a hub id or a GGUF file, opened without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError, brief
from ..progress import Advance, unseen
from .disk import sha256_of
from .layout import INDEX, SINGLE, Layout, is_lfs_pointer, is_plain_name, lfs_pointer, read_json, read_layout
from .manifest import MANIFEST, TYPE_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
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
# A choice of kernel, not a part of the model: transformers writes neither, and one that is not installed would stop it.
NOT_CARRIED = ("_attn_implementation", "attn_implementation")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `root` is its directory, or the .gguf file itself.

    `layout` is what lies on disk; for a GGUF what `materialise` will write (its `root` is then the .gguf file, from
    which no tensor can be read by it: call `read_layout` on the materialised directory). `companions` are plain file
    names beside the weights that belong to the model; for a GGUF those that `materialise` will write.
    `revision` is the commit of a hub snapshot.
    """

    spec: str
    kind: str
    root: Path
    revision: str | None
    config: dict[str, Any]
    layout: Layout
    companions: tuple[str, ...]
    plan: Any = field(default=None, repr=False, compare=False)  # a GGUF's GgufPlan, derived once

    @property
    def blank(self) -> PreTrainedModel | None:
        """The model on the meta device, where opening the source has built it: for a GGUF."""
        return None if self.plan is None else self.plan.blank


def open_source(spec: str, *, revision: str | None = None, dtype: str | None = None) -> Source:
    """Open a directory, a `.gguf` file or a hub id "owner/name" (downloaded, pickles left out); no weights are read.

    revision: branch, tag or commit, hub ids only. dtype: "float32" (default), "bfloat16" or "float16", GGUF only.
    Raises SourceError for what is not a checkpoint we take, DamagedCheckpoint for one whose bytes are wrong,
    UnsupportedModel for a GGUF that would not come out exactly.
    """
    try:
        spec.encode("utf-8")
    except UnicodeEncodeError:
        raise SourceError(f"{spec!a} is not a UTF-8 path, and the manifest could not name it; rename it.") from None
    path = Path(spec).expanduser()
    is_gguf = spec.endswith(".gguf") and not path.is_dir()
    if dtype is not None and not is_gguf:
        raise SourceError(f"A dtype ({dtype}) can be asked for only with a .gguf file: {spec} keeps the dtypes it has.")
    if revision is not None and (is_gguf or path.exists()):
        raise SourceError(f"A revision ({revision}) can be asked for only with a hub id, and {spec} is on this disk.")
    if is_gguf:
        return _open_gguf(spec, path, dtype or "float32")
    if path.is_dir():
        return _open_directory(spec, "directory", path, None)
    if path.exists():
        raise SourceError(f"{spec} is a file, but not a .gguf file; give its directory, a .gguf file or a hub id.")
    if not _HUB_ID.fullmatch(spec):
        raise SourceError(f"{spec} does not exist, nor is it a hub id of the form owner/name; check the path.")
    root = _download(spec, revision)
    if not any((root / name).exists() for name in (SINGLE, INDEX)):
        raise SourceError(
            f"{spec} has no safetensors weights on the hub, and its pickles, which can run code, are not "
            "downloaded; if you trust them, save them anew with transformers and give that directory."
        )
    return _open_directory(spec, "hub", root, root.name)


def _open_directory(spec: str, kind: str, root: Path, revision: str | None) -> Source:
    config = _read_config(root)
    refuse_adapter(root)
    layout = read_layout(root)
    return Source(spec, kind, root, revision, config, layout, _companions(root, config))


def refuse_adapter(root: Path) -> None:
    """SourceError where a PEFT adapter lies beside the weights."""
    if (root / ADAPTER).exists():
        raise SourceError(
            f"{root / ADAPTER} is of a PEFT adapter, which transformers would apply unasked; merge it into the model "
            "and save that, or move the adapter's files elsewhere."
        )


def _read_config(root: Path) -> dict[str, Any]:
    path = root / CONFIG
    if not path.is_file():
        ggufs = sorted(entry.name for entry in root.glob("*.gguf"))
        way_out = f"name the file itself: {root / ggufs[0]}" if ggufs else "give a complete checkpoint directory"
        raise SourceError(f"{root} has no {CONFIG}; {way_out}.")
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError(f'{path} has no "model_type", so nothing says which architecture this is; add it.')
    if model_type.startswith(TYPE_PREFIX) or (root / MANIFEST).exists():
        raise SourceError(f"{root} is already converted (model type {model_type}); start from the original checkpoint.")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise SourceError(
            f'{path} has a "quantization_config" (method {method}): slots cannot be folded exactly from '
            "packed weights; give the checkpoint it was quantised from."
        )
    return {key: value for key, value in config.items() if key not in NOT_CARRIED}


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
            raise SourceError(f"{entry} has a name that is not plain UTF-8 text; rename it.")
        with entry.open("rb") as file:
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


def _code_files(config: dict[str, Any]) -> set[str]:
    """The Python files that `auto_map` names ("file.Class", one or a list of them), other repositories' left out."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return {f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item}


def _download(repo: str, revision: str | None) -> Path:
    """Directory of the hub snapshot, with nothing in it but what the companions and the layout can use."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[CONFIG, MANIFEST, "*.safetensors", INDEX, "*.py", *COMPANION_PATTERNS],
                ignore_patterns=[
                    "*/*",
                    "consolidated*",
                    *(f"*{suffix}" for suffix in REFUSED_SUFFIXES if suffix not in (".safetensors", ".py")),
                ],
            )
        )
    except hub.GatedRepoError as error:
        raise SourceError(f"{repo} is gated on the hub; accept its terms there, then log in: hf auth login.") from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(f"The hub has no revision {revision} of {repo}; check the branch, tag or commit.") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise SourceError(
            f"{repo} is neither a directory here nor a model on the hub; check the name (a private one "
            "needs: hf auth login)."
        ) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise SourceError(
            f"{at} is not complete in the local hub cache and the hub cannot be reached; go online, "
            "unset HF_HUB_OFFLINE, or give a directory."
        ) from error
    except (hub.HTTPError, OSError) as error:
        raise SourceError(f"{at} could not be downloaded ({brief(error)}); try again or give a directory.") from error


def _open_gguf(spec: str, path: Path, dtype: str) -> Source:
    from .gguf import plan_gguf

    plan = plan_gguf(path, dtype)
    return Source(spec, "gguf", path, None, plan.config, plan.layout, plan.companions, plan)


def source_hashes(source: Source, advance: Advance = unseen) -> dict[str, str]:
    """SHA-256 in hexadecimal of every weight file and config.json, by name; of the one file where it is a GGUF."""
    if source.kind == "gguf":
        files = [source.root]
    else:
        files = [source.root / name for name in (*source.layout.shards, CONFIG)]
    return {file.name: sha256_of(file, advance) for file in files}


def materialise(source: Source, into: Path, advance: Advance = unseen) -> Path:
    """A directory of plain Hugging Face files to load from: the source's own, or `into`, filled from the GGUF."""
    if source.kind != "gguf":
        return source.root
    from .gguf import write_plan

    write_plan(source.plan, into, advance)
    return Path(into)
