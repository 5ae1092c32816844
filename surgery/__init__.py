"""surgery: convert checkpoints so that massive activations become an explicit attention bias, and prove it.

    surgery.plan(recipe, source)                                   what would change, from headers only
    surgery.run(recipe, source, out, RunOptions(text=[...]))       convert, verify, publish
    surgery.verify(out, VerifyOptions(against=source))             check a converted checkpoint
    surgery.scan(source, text=[...])                               massive activations and sinks, layer by layer
    surgery.push(out, "owner/name")                                send a converted checkpoint to the hub
    surgery.pretrain(recipe, out, text=[...])                      small models from nothing

Importing surgery also makes the converted model types (`eab_llama`, ...) known to transformers' Auto classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from .steps.options import RunOptions, VerifyOptions
    from .verbs.plan import plan
    from .verbs.pretrain import pretrain
    from .verbs.push import push
    from .verbs.run import run
    from .verbs.scan import scan
    from .verbs.verify import verify

__version__ = "0.1.0"
_HOMES = {
    **{verb: f"verbs.{verb}" for verb in ("plan", "pretrain", "push", "run", "scan", "verify")},
    **dict.fromkeys(("RunOptions", "VerifyOptions"), "steps.options"),
}
__all__ = ["RunOptions", "VerifyOptions", "plan", "pretrain", "push", "run", "scan", "verify"]


def __getattr__(name: str):
    # torch and transformers take seconds to import, so a verb is imported when it is first asked for.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_derived_types(module) -> None:
    from .converted.registration import register

    register()
