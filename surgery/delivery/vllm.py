"""vLLM: a directory that `vllm serve` takes, where surgery's plugin is installed (`surgery/serving`).

It holds the config of the original, with an architecture that only the plugin knows; the weights and slots of the
converted checkpoint, hard-linked; and a tokenizer that puts n placeholders in front of every request. Where vLLM is at
hand the export is tried on random token ids, and elsewhere only model types are taken that have been found the same.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..anatomy.stored import vocabulary_size
from ..checkpoint.config import CONFIG
from ..checkpoint.contents import SETTINGS
from ..checkpoint.layout import INDEX, read_layout
from ..checkpoint.regular import read_json
from ..checkpoint.source import has_tokenizer
from ..checkpoint.stage import Stage
from ..converted.files import FOREVER, without_paths
from ..converted.reading import load_converted
from ..converted.rope import with_both_spellings
from ..errors import SourceError, UnsupportedModel
from ..live.loading import load_tokenizer
from ..progress import Advance, unseen
from ..serving.names import ENTRY, FORMAT, PREFIX, VLLM, layer_of
from ..words import count_of
from .base import Engine, Finished, carry, windowed
from .reading import distance, expected, random_ids, require_close, text_log_probabilities
from .vllm_models import PROVED, REFUSED
from .vllm_running import in_vllm, lacking, own_python
from .vllm_tokenizer import CLASS, Placeholders, choose, require_same, with_chats, with_placeholders

TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
CARRIED = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*", "special_tokens_map.json", SETTINGS)
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_USAGE = """```sh
pip install --no-deps checkpoint-surgery  # into the Python that has vLLM {vllm}: it brings the plugin
vllm serve {name}
```

(Of vLLM for CPUs the command is `python -m vllm.entrypoints.openai.api_server --model {name}`.)

Every request begins with {placeholders}, which tokenizer and chat template put there, as they would a BOS. At their
positions each attention layer has the slots. They count as tokens of the prompt. A request of token ids has to begin
with them too (`config.json`, `served_slots`), and is refused otherwise. vLLM without the plugin does not know the
architecture, and stops.
"""


class Vllm(Engine):
    """A directory for vLLM with the plugin. `python`: the interpreter that has it."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    library: ClassVar[str] = "vllm"
    uses_original: ClassVar[bool] = False

    def __init__(self, python: Path | None = None) -> None:
        self.python = own_python() if python is None else python

    def with_python(self, python: Path) -> Vllm:
        # It runs in another directory. A link stays one: by it Python knows its environment.
        return Vllm(Path(shutil.which(python) or python).absolute())

    def refuse(self, finished: Finished) -> None:
        anatomy, root = finished.described.anatomy, finished.root
        kind, text = anatomy.model_type, anatomy.config.get_text_config()
        if finished.described.head_norm is not None:
            raise UnsupportedModel(f"{root} norms its heads (head_norm), and vLLM's attention has no place for norms.")
        if not finished.described.eab.n_slots:
            raise UnsupportedModel(f"{root} has no slots, so there is nothing to export; fold a prefix first.")
        finished.require_prefix_in_slots("the plugin knows slots alone")
        if finished.described.eab.slots_visible == "always" and (window := windowed(anatomy)):
            raise UnsupportedModel(
                f"{root} shows its slots to every query, also in the windowed layers of {kind} ({window}), where "
                "vLLM's cache drops them; convert it with slots_visible: as_prefix."
            )
        if text is not anatomy.config:
            raise UnsupportedModel(f"{kind} is a multimodal model, whose requests to vLLM are not token ids alone.")
        if getattr(text, "kv_lora_rank", None) is not None:
            raise UnsupportedModel(f"{kind}: vLLM caches a latent in place of keys and values, which slots are.")
        if anatomy.max_length is not None:
            raise UnsupportedModel(
                f"{kind} changes its rotary frequencies with the length of a text, and vLLM does so at another length."
            )
        for site in anatomy.sites:
            try:
                layer_of(site.name)
            except ValueError as error:
                raise UnsupportedModel(f"{kind}: {error}.") from error
        if len({layer_of(site.name) for site in anatomy.sites}) < len(anatomy.sites):
            raise UnsupportedModel(f"{kind} attends twice in a layer, and the plugin has one place for slots in each.")
        if why := REFUSED.get(kind):
            raise UnsupportedModel(f"{kind}: {why}.")
        if kind not in PROVED and (missing := self.absent()) is not None:
            raise UnsupportedModel(f"{kind} has to be tried in vLLM before it is exported: {missing}.")
        if not has_tokenizer(finished.manifest.files):
            raise SourceError(
                f"{root} was converted without a tokenizer, which puts placeholders in front of requests."
            )

    def write(self, finished: Finished, stage: Stage) -> None:
        tokenizer = load_tokenizer(finished.root)
        chosen = self._chosen(finished, tokenizer)
        stage.add_json(CONFIG, served_config(finished, chosen))
        for name in (*read_layout(finished.root).shards, INDEX):
            carry(stage, finished.root / name, name)
        for name in finished.manifest.files:
            if any(fnmatchcase(name, pattern) for pattern in CARRIED):
                carry(stage, finished.root / name, name)
        stage.add_json(TOKENIZER, with_placeholders(tokenizer, chosen))
        settings = read_json(finished.root / TOKENIZER_SETTINGS)
        stage.add_json(TOKENIZER_SETTINGS, _settings(settings, tokenizer.chat_template, chosen))

    def _chosen(self, finished: Finished, tokenizer: Any) -> Placeholders:
        described, root = finished.described, finished.root
        rows = vocabulary_size(read_layout(root), described.anatomy)
        rows = min(rows, described.anatomy.vocab_size or rows)
        settings = read_json(root / SETTINGS) if (root / SETTINGS).is_file() else {}
        taken = {*_ids_in(described.config), *_ids_in(settings)}
        taken |= {getattr(tokenizer, f"{role}_token_id") for role in ROLES} - {None}
        return choose(tokenizer, rows, described.eab.prefix_ids, taken, described.eab.n_slots)

    def prove(self, finished: Finished, directory: Path, device: str) -> str:
        chosen = Placeholders(tuple(_placeholders(directory)), ())
        tried = require_same(load_tokenizer(finished.root), load_tokenizer(directory), chosen)
        said = f"Its tokenizer reads {tried} texts and chats as the checkpoint's does, behind the placeholders."
        if self.absent() is not None:
            return f"{said} It was not tried in vLLM {VLLM}, which has been found the same for this model type."
        assert self.python is not None
        model, ids = load_converted(finished.root, device=device), random_ids(finished)
        wanted = expected(model, finished, functools.partial(text_log_probabilities, model, ids, unseen))
        del model
        found = distance(in_vllm(self.python, directory, ids, unseen), wanted, self, finished)
        require_close(found, self, finished)
        return f"{said} On random token ids in vLLM, the {found.called} is {found.value:.2g}."

    def absent(self) -> str | None:
        return lacking(self.python)

    def log_probabilities(
        self, finished: Finished, directory: Path, original: Path | None, chunks: torch.Tensor, device: str,
        advance: Advance,
    ) -> torch.Tensor:  # fmt: skip
        assert self.python is not None
        return in_vllm(self.python, directory, chunks, advance)

    def usage(self, finished: Finished, name: str) -> str:
        placeholders = count_of(finished.described.eab.n_slots, "placeholder")
        return _USAGE.format(vllm=VLLM, name=name, placeholders=placeholders)

    def details(self, finished: Finished) -> Mapping[str, Any]:
        return {"vllm": VLLM, "architecture": f"{PREFIX}{finished.described.anatomy.model_class.__name__}"}


def served_config(finished: Finished, chosen: Placeholders) -> dict[str, Any]:
    """config.json: the original's, since placeholders take the positions that the prefix had, but the architecture."""
    anatomy = finished.described.anatomy
    return {
        **with_both_spellings(finished.described.original_config),
        "architectures": [f"{PREFIX}{anatomy.model_class.__name__}"],
        ENTRY: {"format": FORMAT, "placeholder_ids": list(chosen.ids)},
    }


def _settings(settings: dict[str, Any], templates: Any, chosen: Placeholders) -> dict[str, Any]:
    """tokenizer_config.json: a class that reads tokenizer.json as it is, and room for the placeholders."""
    kept = without_paths({k: v for k, v in settings.items() if k not in ("add_bos_token", "add_eos_token")})
    limit = kept.get("model_max_length")
    if isinstance(limit, int) and limit < FOREVER:
        kept["model_max_length"] = limit + len(chosen.ids)
    if templates is not None:
        kept["chat_template"] = with_chats(templates, chosen)
    return {**kept, "tokenizer_class": CLASS}


def _placeholders(directory: Path) -> list[int]:
    found: list[int] = read_json(directory / CONFIG)[ENTRY]["placeholder_ids"]
    return found


def _ids_in(settings: Mapping[str, Any]) -> set[int]:
    """Token ids that have a meaning in a config (`bos_token_id`, ...), where one may be a list."""
    found = (value for key, value in settings.items() if key.endswith("token_id"))
    return {number for value in found for number in (value if isinstance(value, list) else [value]) if number}
