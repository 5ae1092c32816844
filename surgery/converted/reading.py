"""What a converted checkpoint says about itself, and loading it as users do, without running code from strangers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..anatomy.sites import Anatomy, examine
from ..checkpoint.layout import read_json
from ..checkpoint.manifest import MANIFEST, converted_from
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import one_line, quiet, require_fit, require_memory
from ..operations.attention_bias import FORMAT
from .files import lowered_limits
from .registration import register

_AGAIN = "convert the source again"


def require_converted(root: Path) -> None:
    """SourceError unless `root` is a directory that looks like the output of a run, whole or damaged."""
    if not root.is_dir():
        raise SourceError(f"{root} is not a directory; give the output of a run.")
    if (root / MANIFEST).exists():
        return
    kind = read_json(root / "config.json").get("model_type") if (root / "config.json").is_file() else None
    if converted_from(kind) is None:
        raise SourceError(f"{root} is not a converted checkpoint: it has no {MANIFEST}; give the output of a run.")


def read_config(root: Path) -> dict:
    """config.json of a converted checkpoint; DamagedCheckpoint unless its type and what it says of slots and norms are
    what a run writes."""
    path = root / "config.json"
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing; {_AGAIN}.")
    config = read_json(path)
    found = converted_from(config.get("model_type"))
    if found is None:
        raise DamagedCheckpoint(f"{path}: model_type {config.get('model_type')!r} is not a converted type; {_AGAIN}.")
    normed, head_norm = found[1], config.get("head_norm")
    wrong = _wrong(config.get("eab"), normed)
    if wrong is None and normed != (head_norm is not None):
        wrong = f"model_type {config['model_type']!r} {'has no' if normed else 'does not go with a'} head_norm entry"
    if wrong is None and normed:
        wrong = _wrong_norms(head_norm, config["eab"]["sites"])
    if wrong:
        raise DamagedCheckpoint(f"{path}: {wrong}; {_AGAIN}.")
    return config


def _wrong(eab: object, normed: bool) -> str | None:
    """What is wrong with `config.eab`, in words. Only beside norms may there be no slots."""
    if not isinstance(eab, dict):
        return "has no eab entry that describes the slots"
    n, ids, sites = eab.get("n_slots"), eab.get("prefix_ids"), eab.get("sites")
    if type(n) is not int or n < (0 if normed else 1):
        return f"eab.n_slots is {n!r}, not a count"
    known = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
    if not known or len(ids) not in (0, n):  # slots that were trained from nothing have no prefix
        return f"eab.prefix_ids is not a list of {n} token ids"
    if eab.get("slots_visible") not in ("as_prefix", "always"):
        return f"eab.slots_visible is {eab.get('slots_visible')!r}"
    if not isinstance(sites, dict) or not sites:
        return "eab.sites names no attention site"
    for name, dims in sites.items():
        if not isinstance(dims, list) or len(dims) != 3 or not all(type(dim) is int and dim > 0 for dim in dims):
            return f"eab.sites.{name} is not [kv_heads, key_dim, value_dim]"
    return None


def _wrong_norms(head_norm: object, attending: dict) -> str | None:
    """What is wrong with `config.head_norm`, in words; `attending` are the sites that attend."""
    if not isinstance(head_norm, dict):
        return "head_norm does not describe the norms"
    sites, eps = head_norm.get("sites"), head_norm.get("eps")
    for name in ("per_head", "gated"):
        if type(head_norm.get(name)) is not bool:
            return f"head_norm.{name} is {head_norm.get(name)!r}, not true or false"
    if type(eps) is not float or not 0 < eps < 1:
        return f"head_norm.eps is {eps!r}, not a small number"
    if not isinstance(sites, dict) or not sites:
        return "head_norm.sites names no attention site"
    for name, dims in sites.items():
        if name not in attending:
            return f"head_norm.sites.{name} is not in eab.sites"
        if not isinstance(dims, list) or len(dims) != 2 or not all(type(dim) is int and dim > 0 for dim in dims):
            return f"head_norm.sites.{name} is not [heads, value_dim]"
    return None


def converted_anatomy(root: Path) -> Anatomy:
    """The anatomy of the model that the checkpoint in `root` was converted from, read from its config.json.

    DamagedCheckpoint where what config.json says of slots and norms is not what a run writes for that model.
    """
    config = read_config(root)
    ours = ("eab", "head_norm", "auto_map", "architectures")
    base = {key: value for key, value in config.items() if key not in ours}
    base["model_type"] = converted_from(config["model_type"])[0]
    n_slots, limit = config["eab"]["n_slots"], base.get("max_position_embeddings")
    raised = {**base, "max_position_embeddings": limit + n_slots} if type(limit) is int else base
    with quiet():  # the raised limit is a guess
        anatomy = examine(raised)
        if raised != base and not lowered_limits(raised, anatomy, n_slots):  # then a run had left the limit as it was
            anatomy = examine(base)
    _require_described(root / "config.json", config, anatomy)
    return anatomy


def _require_described(path: Path, config: dict, anatomy: Anatomy) -> None:
    """DamagedCheckpoint unless `eab`, and the sites of `head_norm`, are those of a model of this anatomy."""
    eab, norms = config["eab"], config.get("head_norm") or {"sites": {}}
    expected = {"format": FORMAT, "prefix_ids": eab["prefix_ids"], **anatomy.eab(eab["n_slots"], eab["slots_visible"])}
    wrong = [f"eab.{key}" for key in sorted(eab.keys() ^ expected)]
    wrong += [f"eab.{key}" for key in sorted(eab.keys() & expected) if eab[key] != expected[key]]
    normed = {site.name: [site.heads, site.value_dim] for site in anatomy.sites}
    wrong += [f"head_norm.sites.{name}" for name, dims in norms["sites"].items() if normed.get(name) != dims]
    if wrong:
        raise DamagedCheckpoint(f"{path}: {wrong[0]} is not as a run writes it for {anatomy.model_type}; {_AGAIN}.")


def load_converted(root: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The converted model in `root`, fresh from its files, through AutoModelForCausalLM.

    The class is the installed one, and the Python files in `root` are never run; the integrity check says whether they
    are the same. Raises DamagedCheckpoint where tensors and config do not fit.
    """
    register()
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                root, dtype=dtype, device_map=None if device == "cpu" else device, local_files_only=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        require_memory(root, error)
        raise DamagedCheckpoint(f"{root} does not load ({one_line(error)}); {_AGAIN}.") from error
    require_fit(root, report)
    return model.eval()
