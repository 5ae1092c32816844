"""surgery: convert checkpoints so that massive activations become an explicit attention bias, and prove it.

    surgery.plan(recipe, source)                                   what would change, from headers only
    surgery.run(recipe, source, out, RunOptions(text=[...]))       convert, verify, publish
    surgery.verify(out, VerifyOptions(against=source))             check a converted checkpoint
    surgery.seal(out)                                              take edited documents into the manifest
    surgery.scan(source, text=[...])                               massive activations and sinks, layer by layer
    surgery.pretrain(recipe, out, text=[...])                      small models from nothing
    surgery.clean(directory)                                       remove what killed runs left behind

Importing surgery also makes the converted model types (`eab_llama`, ...) known to transformers' Auto classes.
"""

from __future__ import annotations

import sys

from .version import VERSION

TYPE_CHECKING = False  # what typing calls so
if TYPE_CHECKING:
    from .steps.options import RunOptions, VerifyOptions
    from .verbs.clean import clean
    from .verbs.plan import plan
    from .verbs.pretrain import pretrain
    from .verbs.run import run
    from .verbs.scan import scan
    from .verbs.seal import seal
    from .verbs.verify import verify

__version__ = VERSION
_HOMES = {
    **{verb: f"verbs.{verb}" for verb in ("clean", "plan", "pretrain", "run", "scan", "seal", "verify")},
    **dict.fromkeys(("RunOptions", "VerifyOptions"), "steps.options"),
}
__all__ = ["RunOptions", "VerifyOptions", "clean", "plan", "pretrain", "run", "scan", "seal", "verify"]


def __getattr__(name: str):
    # torch and transformers take seconds to import, so a verb is imported when it is first asked for.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    from .converted.registration import register

    register()


class _Awaiting:
    """Registers the converted types as soon as transformers' table of model types is imported, by whoever it is."""

    name = "transformers.models.auto.configuration_auto"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != cls.name:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(cls)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


if _Awaiting.name in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Awaiting)
