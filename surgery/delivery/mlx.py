"""MLX: a prompt cache for the unmodified original, as `mlx_lm.generate --prompt-cache-file` takes it.

The file is written without MLX (`mlx_file`). What cache a layer has is mlx-lm's choice, and so is what it computes:
where mlx-lm and the original's weights are at hand the export is tried on random token ids, and elsewhere only model
types are taken that have been found the same.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import ClassVar

import torch

from ..checkpoint.source import Source
from ..checkpoint.stage import Stage
from ..converted.reading import load_converted
from ..converted.rope import with_both_spellings
from ..errors import SourceError, UnsupportedModel, brief, out_of_memory
from ..progress import Advance
from ..words import listing
from .base import Engine, Finished, carry_tokenizer, windowed
from .mlx_file import Kind, held_slots, prompt_cache
from .reading import all_log_probabilities, distance, expected, random_ids, require_close

CACHE = "slots.safetensors"
INSTALL = "pip install 'checkpoint-surgery[mlx]'"
# Model types found equal in mlx-lm 0.32.2 where layers see everything and rotary settings are plain
# (tests/delivery/test_mlx.py). Of others it is another function now and then: Gemma 2, GLM, Phi with norms of q and k.
PROVED = ("cohere", "granite", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm")

_USAGE = """```python
from mlx_lm import generate, load
from mlx_lm.models.cache import load_prompt_cache
from transformers import AutoTokenizer

model, _ = load({original})
tokenizer = AutoTokenizer.from_pretrained({name})
cache = load_prompt_cache({file})  # anew for each text: it grows
ids = tokenizer.encode("Once upon a time")
print(generate(model, tokenizer, prompt=ids, prompt_cache=cache))
```

{command}
"""
_COMMAND = """On the command line, `--ignore-chat-template` is needed: with a chat template mlx-lm takes the head of a
chat to be in the cache, and leaves it out.

```sh
mlx_lm.generate --prompt-cache-file {file} --ignore-chat-template --prompt "Once upon a time"
```"""
_NO_COMMAND = """`mlx_lm.generate` on the command line is no way to use it: it puts the BOS token in front of the text,
which is folded already."""


class Mlx(Engine):
    """A prompt cache."""

    name: ClassVar[str] = "mlx"
    title: ClassVar[str] = "mlx-lm"
    library: ClassVar[str] = "mlx"
    needs_original: ClassVar[bool] = True

    def refuse(self, finished: Finished) -> None:
        finished.require_slots_only("a prompt cache")
        anatomy, source = finished.described.anatomy, finished.original
        assert source is not None
        kind = anatomy.model_type
        if source.kind == "gguf":
            raise UnsupportedModel(
                f"{source.spec} is a GGUF file, which mlx-lm does not load; give a directory of safetensors that holds "
                "the same weights: --original DIR."
            )
        if finished.described.eab.slots_visible == "always" and (window := windowed(anatomy)):
            raise UnsupportedModel(
                f"{finished.root} shows its slots to every query, also in the windowed layers of {kind} ({window}), "
                "where mlx-lm's cache drops them; convert it with slots_visible: as_prefix."
            )
        if [site.block for site in anatomy.sites] != [*range(len(anatomy.sites))]:
            raise UnsupportedModel(f"{kind} has layers without a cache of their own, and a prompt cache has one each.")
        plain = kind in PROVED and not windowed(anatomy) and "rope_scaling" not in with_both_spellings(source.config)
        if not plain and not self._tries(finished):
            lacks = "the original's weights on this disk" if self.absent() is None else INSTALL
            raise UnsupportedModel(f"{kind} has to be tried in mlx-lm before it is exported, and that needs {lacks}.")
        if missing := _unread(finished, source):
            raise SourceError(
                f"{source.spec}: mlx-lm does not read the rope_parameters of {kind}, and would compute with other "
                f"rotary settings; add {listing(missing)} to its config.json, and give that: --original DIR."
            )

    def write(self, finished: Finished, stage: Stage) -> None:
        source, anatomy = finished.original, finished.described.anatomy
        assert source is not None
        slots = [finished.slots[site.name] for site in anatomy.sites]
        kinds = [Kind()] * len(slots)
        if self.absent() is None:
            from .mlx_running import built, kinds_of

            kinds = kinds_of(built(source.root), anatomy.model_type)
            if windowed(anatomy) and not any(kind.window for kind in kinds):
                raise UnsupportedModel(
                    f"{anatomy.model_type}: its layers have windows ({windowed(anatomy)}), in mlx-lm they have none."
                )
        if len(kinds) != len(slots):
            raise UnsupportedModel(f"{anatomy.model_type} has {len(slots)} layers, and in mlx-lm {len(kinds)} caches.")
        # Whose cache it is: the command line loads this, with these settings for its tokenizer.
        tensors, metadata = prompt_cache(slots, kinds, {"model": _named(source), "tokenizer_config": "{}"})
        stage.add_tensors(CACHE, tensors, metadata)
        carry_tokenizer(finished, stage)

    def prove(self, finished: Finished, directory: Path, device: str) -> str:
        source, sites = finished.original, finished.described.anatomy.sites
        assert source is not None
        for site, parts in zip(sites, held_slots(directory / CACHE, len(sites)), strict=True):
            if not all(torch.equal(a, b) for a, b in zip(parts, finished.slots[site.name], strict=True)):
                raise RuntimeError(f"{CACHE} does not hold the slots of {site.name}")
        if not self._tries(finished):
            return "The file holds the slots. It was not tried in mlx-lm, which has been found the same for this type."
        from .mlx_running import Running

        ids = random_ids(finished)
        converted = load_converted(finished.root, device=device)
        wanted = expected(converted, finished, functools.partial(all_log_probabilities, converted, ids))
        del converted
        length = ids.shape[1]
        try:
            found = Running(source.root, directory / CACHE).log_probabilities(ids, (length // 2, length - 1))
        except Exception as error:  # code of mlx-lm's models: whatever it raises, there is no such cache
            if out_of_memory(error):
                raise
            raise UnsupportedModel(
                f"{finished.described.anatomy.model_type} does not run in mlx-lm with the slots ({brief(error)})."
            ) from error
        apart = distance(found, wanted, self, finished)
        require_close(apart, self, finished)
        return f"On random token ids in mlx-lm, the {apart.called} is {apart.value:.2g}."

    def _tries(self, finished: Finished) -> bool:
        """Whether the export can be tried here: mlx-lm and the original's weights are at hand."""
        return self.absent() is None and finished.original is not None and not finished.original.missing

    def absent(self) -> str | None:
        return None if all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm")) else INSTALL

    def log_probabilities(
        self, finished: Finished, directory: Path, original: Path | None, chunks: torch.Tensor, device: str,
        advance: Advance,
    ) -> torch.Tensor:  # fmt: skip
        from .mlx_running import Running

        assert original is not None
        running, rows = Running(original, directory / CACHE), []
        for chunk in chunks:
            logs = running.log_probabilities(chunk[None])[0, :-1]
            rows.append(logs.gather(1, chunk[1:, None])[:, 0])
            advance(1, "")
        return torch.stack(rows)

    def usage(self, finished: Finished, name: str) -> str:
        assert finished.original is not None
        file, bos = f"{name}/{CACHE}", finished.described.config.get("bos_token_id")
        return _USAGE.format(
            original=json.dumps(_named(finished.original)), name=json.dumps(name), file=json.dumps(file),
            command=_NO_COMMAND if bos in finished.described.eab.prefix_ids else _COMMAND.format(file=file),
        )  # fmt: skip


def _named(source: Source) -> str:
    """What mlx-lm may load the original by: an id of the hub, or a directory's name."""
    return source.repo or source.name


def _unread(finished: Finished, source: Source) -> list[str]:
    """Rotary settings as mlx-lm spells them that the original's config.json lacks, and that it would not find."""
    spelled = with_both_spellings(source.config)
    lacking = {key: value for key, value in spelled.items() if key not in source.config}
    if lacking and Mlx().absent() is None:
        from .mlx_running import built, reads

        model = built(source.root)
        if reads(model, "rope_parameters"):
            return []
        lacking = {key: value for key, value in lacking.items() if getattr(model.args, key, None) != value}
    return [f'"{key}": {json.dumps(value)}' for key, value in lacking.items()]
