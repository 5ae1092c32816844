"""Which transformers model a GGUF header describes, and whether transformers would read all of it.

What its loader passes over in silence (unmapped tensors, rope scaling, windows, partial rotary widths) is compared with
the derived config here, and refused where the model would compute something else than the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DamagedCheckpoint, SurgeryError, UnsupportedModel, brief
from ..words import named
from .config import require_countable
from .gguf_header import Header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NEEDED = ("block_count", "embedding_length", "attention.head_count", "context_length")
# Keys that change nothing the model computes, or nothing that the comparison of shapes would not find.
_HARMLESS = ("tensor_data_layout", "use_parallel_residual", "vocab_size", "feed_forward_length")
INSTEAD = "give the original safetensors checkpoint instead"


@dataclass(frozen=True)
class Derived:
    """The model of a GGUF: `names` maps each stored tensor to its parameter, `shapes` are the parameters' shapes.

    `blank` is the model itself, on the meta device.
    """

    blank: PreTrainedModel
    generation_config: dict[str, Any]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    processor: Any  # transformers' TensorProcessor of the architecture: undoes llama.cpp's permutations


def derive(header: Header) -> Derived:
    """The model of which `header` is, built on the meta device; UnsupportedModel where anything would not be read."""
    missing = [key for key in _NEEDED if f"{header.architecture}.{key}" not in header.metadata]
    if missing:
        raise DamagedCheckpoint(f"{header.path} lacks the key {header.architecture}.{missing[0]}; download it again.")
    blocks = header.metadata[f"{header.architecture}.block_count"]
    if type(blocks) is not int or blocks > len(header.tensors):  # a model is built from it, so it must be sane
        raise DamagedCheckpoint(
            f"{header.path} says {header.architecture}.block_count = {blocks}, more than it has "
            "tensors for; download it again."
        )
    _check_rope_scaling(header)
    with deriving(header):
        processor, config = _config(header)
        _check_config(header, config)
        model = _meta_model(config, len(header.tensors))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = _names(header, model, processor, shapes)
    config.architectures = [type(model).__name__]
    return Derived(model, model.generation_config.to_diff_dict(), names, shapes, processor)


@contextmanager
def deriving(header: Header) -> Iterator[None]:
    """Errors of transformers about this file, which are of any class, as UnsupportedModel with the cause kept."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot read {header.path} (architecture {header.architecture}: {brief(error)}); {INSTEAD}."
        ) from error


def _check_rope_scaling(header: Header) -> None:
    prefix = f"{header.architecture}.rope.scaling."
    neutral = {
        "type": "none",
        "finetuned": None,
        "factor": 1.0,
        "attn_factor": 1.0,
        "original_context_length": header.metadata[f"{header.architecture}.context_length"],
    }
    for key, value in header.metadata.items():
        if not key.startswith(prefix):
            continue
        suffix = key.removeprefix(prefix)
        if suffix not in neutral or neutral[suffix] is not None and value != neutral[suffix]:
            raise UnsupportedModel(
                f"{header.path} scales its rotary positions ({named(key)} = {named(value, 40)}), which transformers "
                f"does not read from a GGUF; {INSTEAD}."
            )


def _config(header: Header) -> tuple[Any, PreTrainedConfig]:
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, load_gguf_checkpoint

    if header.architecture in _packed_architectures():
        raise UnsupportedModel(
            f"{header.path} has the architecture {header.architecture}, which transformers converts "
            f"while loading and surgery cannot stream; {INSTEAD}."
        )
    raw = load_gguf_checkpoint(str(header.path), return_tensors=False)["config"]
    kind: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    config = {key: value for key, value in raw.items() if key != "_model_name_or_path"}  # a title, not a path
    require_countable(raw, [stored.name for stored in header.tensors], header.path)
    return kind(config=raw), CONFIG_MAPPING[raw["model_type"]].from_dict(config)


def _packed_architectures() -> frozenset[str]:
    """Architectures that newer transformers versions read by a second loader, with other tables than ours."""
    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_ARCHS)


def _check_config(header: Header, config: PreTrainedConfig) -> None:
    """Every key of the architecture was read into the config, agrees with it, or does not matter."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mappings: Any = GGUF_CONFIG_MAPPING
    mapping = mappings.get(header.architecture) or mappings.get(config.model_type) or {}
    expected = _expected(config)
    prefix = f"{header.architecture}."
    for key, value in header.metadata.items():
        suffix = key.removeprefix(prefix)
        if not key.startswith(prefix) or suffix.startswith("rope.scaling.") or suffix in _HARMLESS:
            continue
        if suffix == "context_length" and expected[suffix] is None:
            continue  # families without a limit, such as ALiBi's
        if suffix in expected:
            if not _agree(value, expected[suffix]):
                raise UnsupportedModel(
                    f"{header.path} says {named(key)} = {named(value, 40)}, and transformers would compute with "
                    f"{expected[suffix]}; {INSTEAD}."
                )
        elif mapping.get(suffix) is None:
            raise UnsupportedModel(
                f"{header.path} says {named(key)} = {named(value, 40)}, which transformers does not read; {INSTEAD}."
            )


def _expected(config: PreTrainedConfig) -> dict[str, Any]:
    """What the config makes of the keys (architecture left out) that transformers passes over for some families."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # by layer type where there are several
    return {
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope.get("rope_theta"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.causal": True,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "context_length": getattr(config, "max_position_embeddings", None),
    }


def _agree(stated: Any, computed: Any) -> bool:
    if isinstance(stated, float) and isinstance(computed, (int, float)):
        return math.isclose(stated, computed, rel_tol=1e-6)  # the file holds float32
    return bool(stated == computed)


def _meta_model(config: PreTrainedConfig, tensors: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from .allowance import Allowance, within

    config._attn_implementation = "eager"  # which all families know; what reads the structure asks in its own way
    with torch.device("meta"), within(Allowance.of(tensors)):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _names(
    header: Header, model: PreTrainedModel, processor: Any, shapes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """Stored tensor to parameter, one to one, none of either left over."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    # It descends into every module, for seconds, to add names that the whole model did not give; mostly there are none.
    table = get_gguf_hf_weights_map(_Childless(model), processor)
    if any(stored.name not in table for stored in header.tensors):
        table = get_gguf_hf_weights_map(model, processor)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for stored in header.tensors:
        name = table.get(stored.name)
        whole = name or table.get(stored.name.removesuffix(".weight"))  # merged experts lose the suffix
        if name in taken or name is None and whole in shapes:
            raise UnsupportedModel(
                f'{header.path} stores "{whole}" in pieces ("{named(stored.name)}"), as mixtures of '
                f"experts do, which cannot be streamed one to one; {INSTEAD}."
            )
        if name not in shapes:
            raise UnsupportedModel(
                f'{header.path} holds the tensor "{named(stored.name)}", which transformers does not read; {INSTEAD}.'
            )
        if math.prod(stored.shape) != math.prod(shapes[name]):
            raise UnsupportedModel(
                f'Tensor "{named(stored.name)}" of {header.path} has shape {stored.shape}, and "{name}" '
                f"needs {shapes[name]}; {INSTEAD}."
            )
        _check_kind(header, stored.name, stored.kind)
        names[stored.name] = name
        taken.add(name)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    missing = sorted(set(shapes) - set(taken) - tied)
    if missing:
        raise UnsupportedModel(f'{header.path} has no tensor for "{missing[0]}"; {INSTEAD}.')
    return names


class _Childless:
    """A model as the name map sees it, without its children."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


def _check_kind(header: Header, name: str, kind: Any) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f'Tensor "{name}" of {header.path} is stored as {kind.name}, which the gguf package '
            f"cannot unpack; {INSTEAD}."
        ) from error
