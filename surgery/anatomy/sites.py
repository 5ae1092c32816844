"""Find the attention sites of a model from its config alone, and refuse what slots would not be exact on."""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel
from ..runtime.eab_families import ADAPTERS
from .calls import Call
from .limits import max_length, max_positions
from .mixers import Indexer, Mixer, described
from .parsed import parse_config
from .patching import Patching, Reads, read_by
from .structure import MIXED_TOKENS, run_mixers, run_structure

# Arguments that a site may pass on and that leave attention what it is. All others that are not None are refused.
KNOWN_ARGUMENTS = {
    "dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux",
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "layer_idx", "deterministic", "logit_bias", "logits_to_keep", "indices",
}  # fmt: skip

# Modules that a converted site may hold and an original must not.
ADDED = ("attention_bias", "head_norm", "remembered_inputs", "index_keys")
TRAINED = ("attention_bias", "head_norm", "remembered_inputs")  # indexers choose, and no gradient comes through that

# Kinds of layer (`config.layer_types`) that hand nothing but keys and values from token to token, and those that hand
# on a state too, or instead; or choose keys.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
MIXED_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "indexed_attention"}


@dataclass(frozen=True)
class Site:
    """One attention module: `name` within the trunk, the index `block` of its block, heads and dims."""

    name: str
    block: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Anatomy:
    """What a config says about a model: classes, the trunk's name within the causal LM, its blocks, sites and mixers.

    Made once for a source, since it takes a parse of the config and a model on the meta device; both are kept, as
    `config` and `blank`. The blank model has modules and shapes and no weights, and nothing is changed on it.
    `max_positions` is how many positions the model has, `max_length` how many the fold is exact on, if that is bounded.
    `vocab_size` is how many token ids the config gives embeddings to, None where it does not say. `patching`: of an
    encoder, of images, sound or text; its trunk is what is called with them.
    """

    model_type: str
    model_class: type
    config_class: type
    trunk: str
    trunk_class: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    mixers: tuple[Mixer, ...]
    indexers: tuple[Indexer, ...]
    max_positions: int | None
    max_length: int | None
    vocab_size: int | None
    config: PreTrainedConfig = field(repr=False, compare=False)
    blank: PreTrainedModel = field(repr=False, compare=False)
    patching: Patching | None = None

    @property
    def reads(self) -> Reads:
        """What the model is given."""
        return read_by(self.patching)

    @property
    def sees_all(self) -> bool:
        """Whether tokens see those after them: in encoders, but for the text tower of CLIP and its like."""
        return self.patching is not None and not self.patching.causal

    @property
    def lead(self) -> str:
        """What names of tensors begin with, before the name of a site."""
        return f"{self.trunk}." if self.trunk else ""

    def eab(self, n_slots: int, slots_visible: str) -> dict:
        """What the runtime has to know of this model: `config.eab`."""
        adapter = ADAPTERS.get(self.model_type)
        return {
            "n_slots": n_slots,
            "slots_visible": slots_visible,
            "trunk": self.trunk_class,
            "sites": {site.name: [site.kv_heads, site.key_dim, site.value_dim] for site in self.sites},
            **{
                key: {part.name: part.entry for part in parts}
                for key, parts in (("mixers", self.mixers), ("indexers", self.indexers))
                if parts and n_slots
            },
            **({"whole_mask": True} if adapter is not None and adapter.whole_mask else {}),
            **({} if self.max_length is None else {"max_length": self.max_length}),
            **({"sees_all": True} if self.sees_all else {}),
        }


def examine(config: dict, blank: PreTrainedModel | None = None, tensors: int | None = None) -> Anatomy:
    """Probe the model that `config` (a raw config.json) describes, on the meta device, without weights.

    `blank` is the model of that config, where somebody has built it on the meta device already. `tensors` is how many a
    stranger's checkpoint has for it: `fit.examine_stored` gives it, and looks at them as well.
    Raises UnsupportedModel, with the reason, for whatever slots would not be exact on.
    """
    parsed = parse_config(config) if blank is None else blank.config
    refuse_config(parsed)
    # Building a model writes its dtype into the config, and may complete the dicts inside.
    model, calls = run_structure(copy.deepcopy(parsed), blank, tensors)
    if type(model.config) is not type(parsed):
        raise UnsupportedModel(
            f"{parsed.model_type}: AutoModelForCausalLM builds only the {model.config.model_type} inside it, and the "
            "rest of the checkpoint would be lost; load and save that by itself, and convert the result"
        )
    return _describe(parsed, model, calls)


def refuse_config(config: Any) -> None:
    """UnsupportedModel for what no prefix is constant in, or for layers of kinds that are not known."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(
            f"{config.model_type}: attends to an encoder, and a prefix of the decoder is then not constant"
        )
    if getattr(config.get_text_config(), "cross_attention_layers", None):
        raise UnsupportedModel(
            f"{config.model_type}: some of its layers attend to images, and a prefix that sees one is not constant"
        )
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    if other := sorted(set(kinds) - PLAIN_LAYERS - MIXED_LAYERS):
        raise UnsupportedModel(
            f"{config.model_type}: layers of type {other[0]!r} are neither plain attention over keys and values nor "
            "mixers with a state, so nothing that could be stored carries all of a prefix"
        )


def _describe(config: PreTrainedConfig, model: PreTrainedModel, calls: list[Call]) -> Anatomy:
    kind = config.model_type
    names = {module: name for name, module in model.named_modules()}
    for module, count in collections.Counter(call.module for call in calls).items():
        if count != 1:
            raise UnsupportedModel(
                f"{kind}: {names[module]} attends {count} times in one forward pass, and slots would count twice"
            )
    require_known(kind, calls, names)
    for call in calls:
        # Older classes know only whether they are decoders.
        if not getattr(call.module, "is_causal", getattr(call.module, "is_decoder", True)):
            raise UnsupportedModel(
                f"{kind}: {names[call.module]} is not causal, and a prefix is constant only under causal attention"
            )
        if taken := [name for name in ADDED if hasattr(call.module, name)]:
            raise UnsupportedModel(
                f"{kind}: {names[call.module]} already has an attribute {taken[0]}, where what is added would live"
            )
    others = _others(config, model)
    trunk_name, trunk = _innermost(model, [names[call.module] for call in calls] + [other.name for other in others])
    lead = f"{trunk_name}." if trunk_name else ""
    others = [replace(other, name=other.name.removeprefix(lead)) for other in others]
    mixers = tuple(other for other in others if isinstance(other, Mixer))
    if kind not in ADAPTERS and "position_ids" not in inspect.signature(trunk.forward).parameters:
        raise UnsupportedModel(
            f"{kind}: {type(trunk).__name__} takes no position_ids, so its text cannot be shifted to after the prefix"
        )
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in trunk.modules()):
        raise UnsupportedModel(
            f"{kind}: numbers its text from pad_token_id + 1 when it is called and from 0 when it generates, so no one "
            "prefix is constant for both"
        )
    within = {module: name for name, module in trunk.named_modules()}
    blocks, block_of = blocks_of(kind, trunk, [within[call.module] for call in calls], [mixer.name for mixer in mixers])
    sites = sites_of(calls, within, block_of)
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    return Anatomy(
        model_type=kind, model_class=type(model), config_class=type(config), trunk=trunk_name,
        trunk_class=type(trunk).__name__, blocks=blocks, sites=sites, mixers=mixers,
        indexers=tuple(other for other in others if isinstance(other, Indexer)),
        max_positions=max_positions(config),
        max_length=max_length(config), vocab_size=vocab_size if isinstance(vocab_size, int) else None, config=config,
        blank=model,
    )  # fmt: skip


def require_known(kind: str, calls: list[Call], names: Mapping[nn.Module, str]) -> None:
    """UnsupportedModel where a call has arguments that slots do not know, by the `names` of modules."""
    for call in calls:
        unknown = sorted(k for k, v in call.arguments.items() if v is not None and k not in KNOWN_ARGUMENTS)
        if unknown:
            raise UnsupportedModel(
                f"{kind}: {names[call.module]} passes {', '.join(unknown)} to its attention, which slots do not know"
            )


def sites_of(
    calls: list[Call], names: Mapping[nn.Module, str], block_of: Mapping[str, int]
) -> tuple[Site, ...]:  # fmt: skip
    """The site of each call, by the `names` of modules and the block of each name."""
    return tuple(
        Site(
            name=names[call.module], block=block_of[names[call.module]], heads=call.query.shape[1],
            kv_heads=call.key.shape[1], key_dim=call.key.shape[-1], value_dim=call.value.shape[-1],
        )
        for call in calls
    )  # fmt: skip


def _others(config: PreTrainedConfig, model: PreTrainedModel) -> list[Mixer | Indexer]:
    """Mixers and indexers by their names in the model. Looked for where the config says that there are some."""
    mixed = sorted(MIXED_LAYERS & set(getattr(config.get_text_config(), "layer_types", None) or ()))
    if not mixed:
        return []
    names = {module: name for name, module in model.named_modules()}
    found: list[Mixer | Indexer] = []
    for asking in run_mixers(model):
        part = described(asking, names[asking.module], 1, MIXED_TOKENS)
        if isinstance(part, str):
            raise UnsupportedModel(f"{config.model_type}: {part}")
        found.append(part)
    if not found:
        raise UnsupportedModel(
            f"{config.model_type}: layers of type {mixed[0]!r} keep their state in themselves and not in a cache, "
            "where one text's cannot be told from another's"
        )
    return found


def _innermost(model: PreTrainedModel, sites: list[str]) -> tuple[str, PreTrainedModel]:
    """The smallest model inside `model` that contains all of `sites`: positions enter there, whoever calls it."""
    best = ("", model)
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and all(site.startswith(f"{name}.") for site in sites if name):
            best = (name, module)
    return best


def blocks_of(
    kind: str, trunk: nn.Module, sites: list[str], mixers: list[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The list of blocks that hold sites and mixers, in order, and the block of each site.

    Without mixers all must hold equally many sites.
    """
    owner = {}
    stacks: dict[str, int] = {}
    for part in (*sites, *mixers):
        parts = part.split(".")
        depth = next(
            (i for i in range(1, len(parts)) if isinstance(trunk.get_submodule(".".join(parts[:i])), nn.ModuleList)),
            None,
        )
        if depth is None:
            raise UnsupportedModel(f"{kind}: {part} does not sit in a list of blocks, so its layer is unknown")
        stack = ".".join(parts[:depth])
        stacks[stack] = len(cast(nn.ModuleList, trunk.get_submodule(stack)))
        owner[part] = f"{stack}.{parts[depth]}"
    blocks = tuple(f"{stack}.{i}" for stack, length in stacks.items() for i in range(length))
    held = collections.Counter(owner[site] for site in sites)
    usual = max(held.values())
    without = [] if mixers else [block for block in blocks if held[block] != usual]
    if without:
        raise UnsupportedModel(
            f"{kind}: {without[0]} (one of {len(without)} such blocks) holds {held[without[0]]} attention sites "
            f"instead of {usual}: looped layers carry the prefix in ways that slots do not"
        )
    order = {block: i for i, block in enumerate(blocks)}
    return blocks, {site: order[owner[site]] for site in sites}
