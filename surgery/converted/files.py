"""The files of a converted checkpoint that differ from its source: config, tokenizer files, index, new tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..anatomy.limits import LIMIT, is_only_a_limit
from ..anatomy.sites import Anatomy
from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import SINGLE, Layout, Stored
from ..checkpoint.regular import read_json
from ..checkpoint.writing import plan_file
from ..errors import SourceError
from ..live.templates import PROCESSORS
from .bos import silent_processor, silent_template, silent_templates
from .derived import Derived
from .rope import spelled_for_conversion

ADDED_SHARD = "model-attention-bias.safetensors"  # of sources in several shards; head norms lie there too
LOADED_FROM = ("_name_or_path", "name_or_path")
FOREVER = 10**12  # tokenizers write "no limit" as a number above this


def shard_names(layout: Layout, adds: bool = True) -> tuple[dict[str, str], str]:
    """Name of each source shard in the output, and the name of the shard for what is added, "" where nothing is.

    A lone model.safetensors must be renamed: loaders prefer it over an index, and would never see the other.
    """
    if not adds:
        return {shard: shard for shard in layout.shards}, ""
    if layout.shards == (SINGLE,):
        return {SINGLE: "model-00001-of-00002.safetensors"}, "model-00002-of-00002.safetensors"
    if ADDED_SHARD in layout.shards:
        raise SourceError(f"{layout.root}: already has a shard {ADDED_SHARD}, the name of one to be added; rename it")
    return {shard: shard for shard in layout.shards}, ADDED_SHARD


def added_layout(tensors: Mapping[str, Stored], shard: str) -> tuple[int, dict[str, TensorInfo]]:
    """Bytes of the shard of added tensors, and where they will lie."""
    header, infos = plan_file(shard, [(name, t.dtype, t.shape) for name, t in tensors.items()], {"format": "pt"})
    return len(header) + sum(info.nbytes for info in infos.values()), infos


def is_rewritten(layout: Layout, shard: str, replaced: Mapping[str, Mapping[str, Stored]]) -> bool:
    """Whether other tensors take the place of some in `shard`, so that the file is written anew."""
    return any(layout.tensors[name].shard == shard for name in replaced)


def rewritten_layout(
    layout: Layout, shard: str, name: str, replaced: Mapping[str, Mapping[str, Stored]]
) -> tuple[bytes, dict[str, TensorInfo]]:  # fmt: skip
    """Header of the file `name` that takes the place of `shard`, and where its tensors will lie, in their order.

    `replaced`: name of a tensor -> what is stored in its place.
    """
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for info in layout.of_shard(shard):
        instead = replaced.get(info.name, {info.name: Stored(info.dtype, info.shape)})
        entries += [(key, stored.dtype, stored.shape) for key, stored in instead.items()]
    return plan_file(name, entries, {"format": "pt"})


def converted_config(
    config: dict, derived: Derived, native: type, entries: Mapping[str, Any], lowered: Mapping[str, int]
) -> dict:
    """config.json of the converted checkpoint: the source's, with derived type, its code, and what was added described.

    `native`: the class of transformers that the source is of; `entries` are those of the operations.
    """
    emitted = without_paths(copy.deepcopy(spelled_for_conversion(config)))
    emitted.update(lowered)
    emitted.update(
        model_type=derived.model_type,
        architectures=[derived.name_of(native)],
        auto_map=derived.auto_map,
        **entries,
    )
    return emitted


def without_paths(value: Any) -> Any:
    """`value` (JSON) less what says, at any depth, from which directory it was once loaded: an id of the hub stays."""
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: without_paths(v) for k, v in value.items() if not (k in LOADED_FROM and _is_path(v))}


def _is_path(name: Any) -> bool:
    """Whether `name` is no "name" or "owner/name", as the hub has them."""
    return isinstance(name, str) and (name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name)


def lowered_limits(config: dict, anatomy: Anatomy, n_slots: int) -> dict[str, int]:
    """max_position_embeddings less the positions that the prefix takes, where that number is a limit and nothing else.

    A learned table is as long as this number says, and some rotary kinds compute with it: those keep it, and the
    runtime's positions simply end n earlier. `config` is the raw config.json that `anatomy` was made of.
    """
    limit = config.get(LIMIT)
    if not n_slots or not isinstance(limit, int) or limit <= n_slots:
        return {}
    return {LIMIT: limit - n_slots} if is_only_a_limit(config, anatomy.config, anatomy.blank) else {}


# ---- tokenizer


def may_rewrite(directory: Path, name: str, folds_bos: bool) -> bool:
    """Whether `converted_tokenizer` may change the file `name` of `directory`."""
    if name in PROCESSORS:
        return folds_bos and "chat_template" in read_json(directory / name)
    return name == "tokenizer_config.json" or folds_bos and name.endswith(("tokenizer.json", ".jinja"))


def converted_tokenizer(
    directory: Path, files: Sequence[str], tokenizer, n_slots: int, folded_bos: str | None
) -> dict[str, str]:
    """File name -> new text of the tokenizer files that must change; the others are carried along as they are.

    * `tokenizer_class` is written out: transformers chooses some tokenizers by model type, which is a new one now.
    * `model_max_length` is lowered by the slots, which take positions.
    * A folded BOS replaces the real one (`folded_bos` is its text): no flag, post-processor or chat template adds it.
    """
    name = "tokenizer_config.json"
    settings = read_json(directory / name) if name in files else {}
    settings = without_paths(settings)
    settings["tokenizer_class"] = type(tokenizer).__name__
    settings.pop("auto_map", None)  # it has loaded without the code that this names, and that code is not carried
    limit = settings.get("model_max_length")
    if isinstance(limit, int) and n_slots < limit < FOREVER:
        settings["model_max_length"] = limit - n_slots
    changed: dict[str, str] = {}
    if folded_bos is not None:
        # Beside a tokenizer.json the flag is not needed, and some versions would rebuild the post-processor from it.
        if "add_bos_token" in settings or "tokenizer.json" not in files:
            settings["add_bos_token"] = False
        if "chat_template" in settings:
            settings["chat_template"] = silent_templates(settings["chat_template"], tokenizer)
        for template in (file for file in files if file.endswith(".jinja")):
            changed[template] = silent_template((directory / template).read_text(encoding="utf-8"), tokenizer)
        for other in (file for file in files if file in PROCESSORS and may_rewrite(directory, file, True)):
            data = read_json(directory / other)
            changed[other] = _dumped({**data, "chat_template": silent_templates(data["chat_template"], tokenizer)})
        if "tokenizer.json" in files:
            data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            data["post_processor"] = silent_processor(data.get("post_processor"), tokenizer.bos_token_id)
            changed["tokenizer.json"] = json.dumps(data, ensure_ascii=False, indent=2)
    changed[name] = _dumped(settings)
    return changed


def _dumped(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
