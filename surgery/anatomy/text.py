"""The text tower of a checkpoint: an encoder of token ids, without a head that would predict the next."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ..errors import UnsupportedModel
from .calls import Call
from .classes import causal_class
from .limits import LIMIT
from .patching import TOKENS, Patching
from .sites import require_known
from .structure import Rule
from .tower import calls_of

TRIED = 8  # tokens of the text that it is tried on, if it has places for as many
TOWER = "text_model"  # as models with a tower for images, or sound, call that for text


def texts_of(kind: str, tower: PreTrainedModel) -> tuple[Patching, list[Call]]:
    """What becomes of a text, and the attention calls. UnsupportedModel where it is not a row of tokens in all layers,
    or where slots would not know what attention is given."""
    count = min(TRIED, places_of(tower) or TRIED)
    calls = calls_of(tower, (count,))
    if any(call.query.shape[2] != count or call.key.shape[2] != count for call in calls):
        raise UnsupportedModel(f"{kind}: a text of {count} tokens is not as many in all of its layers")
    require_known(kind, calls, {module: name for name, module in tower.named_modules()})
    if any(not hasattr(call.module, "is_causal") and call.arguments.get("is_causal") is None for call in calls):
        raise UnsupportedModel(f"{kind}: its attention does not say whether tokens see those after them")
    causal = {call.causal for call in calls}
    if len(causal) > 1:
        raise UnsupportedModel(f"{kind}: some of its layers see what comes later, and others do not")
    rules: list[Rule] = []
    calls_of(tower, (count,), rules=rules)
    first_sees_second = [bool(rule(*map(torch.tensor, (0, 0, 0, 1)))) for rule in rules]
    if any({seen} == causal for seen in first_sees_second):
        raise UnsupportedModel(f"{kind}: given an attention_mask its tokens see others than without")
    return Patching(TOKENS, (count,), None, None, 0, 0, causal=causal == {True}), calls


def places_of(tower: PreTrainedModel) -> int | None:
    """How many tokens a text may have; None where there is no end of them.

    Of RoBERTa's table the first rows are not for text: places are counted from after that of padding.
    """
    config: Any = tower.config
    limit = getattr(config, LIMIT, None)
    if type(limit) is not int:
        return None
    parts: list[Any] = [part for part in tower.modules() if hasattr(part, "create_position_ids_from_input_ids")]
    unused: list[int] = [part.padding_idx for part in parts]
    return limit - 1 - max(unused, default=-1)


def is_tower(model: PreTrainedModel, name: str) -> bool:
    """Whether the part `name` of `model` may be a text tower: it is called with token ids, and predicts none.

    Beside images or sound it is one by its name: a language model there is given them among its tokens, so that what
    comes first in its text does not stand first.
    """
    part: Any = model.get_submodule(name)
    takes = inspect.signature(part.forward).parameters
    if TOKENS not in takes or part.get_output_embeddings() is not None or any("image" in given for given in takes):
        return False
    if causal_class(type(part.config)) is not None and type(part.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return False
    if "text_config" not in model.config.sub_configs:
        return True
    path = name.split(".")
    above = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    heads = (one.get_output_embeddings() for one in above if isinstance(one, PreTrainedModel))
    return TOWER in path and all(head is None for head in heads)
