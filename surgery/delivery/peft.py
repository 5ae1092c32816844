"""PEFT: a prefix-tuning adapter for the unmodified original.

PEFT puts trained keys and values into the cache and lets the text begin after them. These are the slots. What it saves
is one tensor, `prompt_embeddings` (n, 2 L H D): of each place the key and value of layer 0, then of layer 1, and so on
(`PeftModel.get_prompt` and `BasePromptEncoder` in PEFT's source).
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..checkpoint.stage import Stage
from ..converted.reading import load_converted
from ..errors import UnsupportedModel, brief, out_of_memory
from ..live.loading import load_original
from ..progress import Advance
from ..words import count_of
from .base import Engine, Finished, carry_tokenizer, windowed
from .original import original_within
from .reading import (
    Distance,
    all_log_probabilities,
    distance,
    expected,
    random_ids,
    require_close,
    text_log_probabilities,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PADDING = 5

_USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({original})
model = PeftModel.from_pretrained(model, {name})
tokenizer = AutoTokenizer.from_pretrained({name})
```

The tokenizer beside the adapter is that of the converted checkpoint: it adds no token that is folded already. Left
padding needs `position_ids`, as with the original; `generate` makes them.
"""


class Peft(Engine):
    """A prefix-tuning adapter."""

    name: ClassVar[str] = "peft"
    title: ClassVar[str] = "PEFT"
    library: ClassVar[str] = "peft"

    def refuse(self, finished: Finished) -> None:
        finished.require_slots_only("a prefix-tuning adapter")
        anatomy, root = finished.described.anatomy, finished.root
        if finished.described.eab.slots_visible == "always" and (window := windowed(anatomy)):
            raise UnsupportedModel(
                f"{root} shows its slots to every query, also in the windowed layers of {anatomy.model_type} "
                f"({window}), where PEFT's cache hides them; convert it with slots_visible: as_prefix."
            )
        if "past_key_values" not in inspect.signature(type(anatomy.blank).forward).parameters:
            raise UnsupportedModel(
                f"{anatomy.model_type} has no key/value cache, which is where a prefix-tuning adapter puts its slots."
            )
        if [site.block for site in anatomy.sites] != [*range(len(anatomy.sites))]:
            raise UnsupportedModel(
                f"{anatomy.model_type} has {count_of(len(anatomy.sites), 'attention site')} in "
                f"{count_of(len(anatomy.blocks), 'block')}, and a prefix-tuning adapter has one key and value for each."
            )
        shapes = {(site.kv_heads, site.key_dim, site.value_dim) for site in anatomy.sites}
        if len(shapes) > 1:
            (heads, dim, _), (others, another, _) = sorted(shapes)[:2]
            raise UnsupportedModel(
                f"{anatomy.model_type}: layers differ in their keys ({heads} heads of {dim}, {others} of {another}), "
                "and a prefix-tuning adapter has one shape for all layers."
            )
        ((_, key_dim, value_dim),) = shapes
        if key_dim != value_dim:
            raise UnsupportedModel(
                f"{anatomy.model_type}: keys have {key_dim} dims and values {value_dim}, and a prefix-tuning adapter "
                "has one shape for both."
            )
        taken, own = _shape_that_peft_takes(anatomy), (anatomy.sites[0].kv_heads, key_dim)
        if taken != own:
            raise UnsupportedModel(
                f"{anatomy.model_type}: PEFT takes the shape of a prefix from config.json ({taken[0]} heads of "
                f"{taken[1]}), and the keys of this model are {own[0]} heads of {own[1]}."
            )

    def write(self, finished: Finished, stage: Stage) -> None:
        slots = finished.slots
        layers = [part for site in finished.described.anatomy.sites for part in slots[site.name]]
        stacked = torch.stack(layers, dim=1)  # (n, 2 L, H, D)
        stage.add_tensors(WEIGHTS, {"prompt_embeddings": stacked.flatten(1)}, {"format": "pt"})
        stage.add_json(CONFIG, adapter_config(finished))
        carry_tokenizer(finished, stage)

    def prove(self, finished: Finished, directory: Path, device: str) -> str:
        anatomy = finished.described.anatomy
        model = load_converted(finished.root, device=device)
        ids = random_ids(finished).to(model.device)
        ways: dict[str, dict[str, torch.Tensor]] = {"": {}, " under left padding": _padding(ids)}
        wanted = {
            how: expected(model, finished, functools.partial(_answers, model, ids, **given))
            for how, given in ways.items()
        }
        adapted = _adapted(original_within(model, anatomy), directory, anatomy.model_type)
        found: dict[str, Distance] = {}
        for how, given in ways.items():
            try:
                found[how] = distance(_answers(adapted, ids, **given), wanted[how], self, finished)
            except Exception as error:  # code of PEFT and of models: whatever it raises, there is no such adapter
                if out_of_memory(error):
                    raise
                raise UnsupportedModel(
                    f"{anatomy.model_type} does not run with a prefix-tuning adapter{how} ({brief(error)})."
                ) from error
        plain, padded = found.values()
        require_close(plain, self, finished)
        said = f"On random token ids, the {plain.called} is {plain.value:.2g}"
        if padded.close and not windowed(anatomy):
            return f"{said}, and {padded.value:.2g} under left padding."
        return (
            f"{said}. Left padding is another function: PEFT puts the slots in front of the padding, and windows and "
            "ALiBi count the places between. Give rows of one length, or pad on the right."
        )

    def absent(self) -> str | None:
        return None  # surgery depends on it

    def log_probabilities(
        self, finished: Finished, directory: Path, original: Path | None, chunks: torch.Tensor, device: str,
        advance: Advance,
    ) -> torch.Tensor:  # fmt: skip
        assert original is not None
        model = load_original(original, device=device)
        return text_log_probabilities(_adapted(model, directory, model.config.model_type), chunks, advance)

    def usage(self, finished: Finished, name: str) -> str:
        source = finished.manifest.source
        where, revision = json.dumps(str(source["spec"]).partition("@")[0]), source.get("revision")
        given = f"{where}, revision={json.dumps(str(revision))}" if revision else where
        if source.get("kind") == "gguf":
            given = f'"DIRECTORY", gguf_file={where}'
        return _USAGE.format(original=given, name=json.dumps(name))


def adapter_config(finished: Finished) -> dict[str, Any]:
    """adapter_config.json, all sizes written out, so that PEFT need not guess them."""
    anatomy, source = finished.described.anatomy, finished.manifest.source
    site = anatomy.sites[0]
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source["spec"]).partition("@")[0],
        "revision": source.get("revision"),
        "inference_mode": True,
        "num_virtual_tokens": finished.described.eab.n_slots,
        "num_transformer_submodules": 1,
        "num_layers": len(anatomy.sites),
        "num_attention_heads": site.kv_heads,
        "token_dim": site.kv_heads * site.key_dim,
        "encoder_hidden_size": site.kv_heads * site.key_dim,
        "prefix_projection": False,
    }


def _shape_that_peft_takes(anatomy: Anatomy) -> tuple[int, int]:
    """Heads and dims that PEFT gives a prefix, whatever its own config says (`_prepare_prompt_learning_config`)."""
    text, site = anatomy.config.get_text_config().to_dict(), anatomy.sites[0]
    if "num_key_value_heads" not in text:
        return site.kv_heads, site.key_dim
    return text["num_key_value_heads"], text.get("head_dim") or site.key_dim


def _adapted(original: PreTrainedModel, directory: Path, kind: str) -> Any:
    """The original with the adapter in `directory`, as users load it."""
    from peft import PeftModel

    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated"
            )  # its old name, which PEFT uses
            return PeftModel.from_pretrained(original, directory).eval()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"{kind}: PEFT does not load a prefix-tuning adapter for it ({brief(error)})."
        ) from error


def _padding(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What says that the first PADDING of `ids` (B, T) are hidden, and where the others stand."""
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _answers(model: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, T, V) of what is not padding, on the CPU."""
    return all_log_probabilities(model, ids, **given)[:, PADDING if given else 0 :]
