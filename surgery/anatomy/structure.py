"""Run a model for its structure alone: on the meta device, without weights, so that 70B parameters cost nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel, pytorch_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..checkpoint.allowance import Allowance, within
from ..errors import SurgeryError, UnsupportedModel, brief
from ..runtime.eab_families import ADAPTERS, Adapter
from .calls import Call, observing
from .classes import causal_class
from .mixers import Asking, asking

TOKENS = 4
MIXED_TOKENS = 11  # a prime, which counts of heads, groups and states hardly ever are
SEAM = "surgery_structure_only"

Rule = Callable[..., Any]  # (batch, head, query, key), places -> whether the query sees the key


def run_structure(
    config: PreTrainedConfig, blank: PreTrainedModel | None = None, tensors: int | None = None
) -> tuple[PreTrainedModel, list[Call]]:
    """The model of a transformers config on the meta device, and the attention calls of one forward pass.

    The model is `blank`, where that is given, and as it was when this is done. `tensors`: how many a checkpoint has for
    it, where that is known; then DamagedCheckpoint ends what they could not fill.
    Raises UnsupportedModel where attention does not go through transformers' AttentionInterface, or where the model
    cannot run without values.
    """
    calls: list[Call] = []
    adapter = ADAPTERS.get(config.model_type)
    allowed = within(None if tensors is None else Allowance.of(tensors))
    without_values = (*_without_values(), allowed)
    try:
        with contextlib.ExitStack() as stack:
            for context in (_registered(with_mask=adapter is not None or _chooses(config)), *without_values):
                stack.enter_context(context)
            model = _built(config, adapter) if blank is None else blank.eval()
            stack.enter_context(_asking(model, adapter))
            with observing(calls.append, compute=False):
                model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    except SurgeryError:
        raise
    except Exception as error:  # whatever model code raises here, the answer is the same: we cannot read it
        if SEAM in str(error):
            raise off_the_seam(config.model_type) from error
        how = "be read without weights" if adapter is None else "be brought onto AttentionInterface by its adapter"
        raise UnsupportedModel(f"{config.model_type}: its structure could not {how} ({brief(error)})") from error
    if not calls:
        kinds = getattr(config.get_text_config(), "layer_types", None) or ()
        if kinds and not any("attention" in kind.replace("linear_attention", "") for kind in kinds):
            raise UnsupportedModel(
                f"{config.model_type}: no layer attends, so there are no sinks, and nothing that slots could take over"
            )
        raise off_the_seam(config.model_type)
    return model, calls


def run_mixers(model: PreTrainedModel) -> list[Asking]:
    """The modules of a model on the meta device that ask a cache for states, in one forward pass that has one."""
    without_values = _without_values()
    try:
        with contextlib.ExitStack() as stack:
            for context in (_registered(with_mask=_chooses(model.config)), *without_values):
                stack.enter_context(context)
            stack.enter_context(_asking(model, None))
            found = stack.enter_context(asking(model))
            with observing(None, compute=False):
                model(input_ids=torch.zeros(1, MIXED_TOKENS, dtype=torch.long), use_cache=True)
    except Exception as error:  # whatever model code raises here, the answer is the same: we cannot read it
        kind = model.config.model_type
        raise UnsupportedModel(f"{kind}: its mixers could not be read without weights ({brief(error)})") from error
    return found


def _without_values() -> tuple[contextlib.AbstractContextManager[Any], ...]:
    """In inference mode `_NoValues` would see other operations than those that it answers."""
    return torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _NoValues(), _uncached()


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """What model code caches by sizes alone is not cached meanwhile: another model would find it on the meta device."""
    functions: Any = pytorch_utils
    before = functions.is_torchdynamo_compiling
    functions.is_torchdynamo_compiling = lambda: True  # asked by transformers' caches, which it passes by then
    try:
        yield
    finally:
        functions.is_torchdynamo_compiling = before


@contextlib.contextmanager
def on_meta(
    model: PreTrainedModel | None = None, calls: list[Call] | None = None, rules: list[Rule] | None = None
) -> Iterator[None]:  # fmt: skip
    """Within the block, modules are made and run on the meta device; attention calls of `model` go into `calls`, and
    what masks are made by, where it asks for some, into `rules`: without these it gets none."""
    with contextlib.ExitStack() as stack:
        for context in _without_values():
            stack.enter_context(context)
        if model is not None and calls is not None:
            stack.enter_context(_registered(rules is not None, rules))
            stack.enter_context(_asking(model, None))
            stack.enter_context(observing(calls.append, compute=False))
        yield


def _chooses(config: PreTrainedConfig) -> bool:
    """Whether attention chooses keys, and so looks into the mask."""
    return "indexed_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def _built(config: PreTrainedConfig, adapter: Adapter | None) -> PreTrainedModel:
    # Families with adapters choose attention classes by this name while they are built, and know only their own.
    config._attn_implementation = SEAM if adapter is None else "eager"
    kind: Any = causal_class(type(config))
    model: PreTrainedModel = kind._from_config(config, dtype=torch.bfloat16).eval()
    return model


@contextlib.contextmanager
def _asking(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[None]:
    """`model`, which asks for attention by our name meanwhile, and for none afterwards."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    held = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values()
    with contextlib.nullcontext() if adapter is None else adapter.bring_onto_seam(model):
        for config in configs:
            config._attn_implementation = SEAM
        for part in parts:  # a warning would look at token ids
            part.warn_if_padding_and_no_attention_mask = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for part in parts:
                del part.warn_if_padding_and_no_attention_mask
            for config in configs:
                config._attn_implementation = None


def off_the_seam(model_type: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{model_type}: its attention does not go through transformers' AttentionInterface, so slots cannot reach it; "
        f"surgery/runtime/eab_families.py says how to write an adapter, to be entered there under {model_type!r}"
    )


@contextlib.contextmanager
def _registered(with_mask: bool, rules: list[Rule] | None = None) -> Iterator[None]:
    """An attention name of our own. Without a mask function, transformers builds no mask; adapters may need one."""
    AttentionInterface.register(SEAM, _no_attention)
    if with_mask:
        AttentionMaskInterface.register(SEAM, functools.partial(_any_mask, [] if rules is None else rules))
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(SEAM, None)
        AttentionMaskInterface._global_mapping.pop(SEAM, None)


def _no_attention(module, query, key, value, attention_mask=None, **kwargs):
    raise RuntimeError(SEAM)  # asked for in another way than the one that `observing` stands at


def _any_mask(rules: list[Rule], batch_size, q_length, kv_length, mask_function=None, **kwargs) -> torch.Tensor:
    if mask_function is not None:
        rules.append(mask_function)
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")


class _NoValues(TorchDispatchMode):
    """Answers zero where model code asks a meta tensor for values: how many tokens an expert got, say.

    Structure does not depend on them; where it did, a site would go unseen, and that is refused. Sizes of a split must
    still sum to the whole: where zeros do not, the first part gets everything.
    """

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if given is not None and given.is_meta:
            if function is aten._local_scalar_dense.default:
                return torch.zeros((), dtype=given.dtype, device="cpu").item()
            if function is aten._is_all_true.default:
                return torch.ones((), dtype=torch.bool, device="cpu")
            if function is aten.nonzero.default:
                return torch.empty(0, given.ndim, dtype=torch.long, device="meta")
            if function is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return torch.zeros(given.shape, dtype=kwargs.get("dtype") or given.dtype, device="cpu")
            if function is aten.split_with_sizes.default and not any(args[1]):
                size = given.shape[args[2] if len(args) > 2 else kwargs.get("dim", 0)]
                args = (given, [size] + [0] * (len(args[1]) - 1), *args[2:])
        return function(*args, **kwargs)
