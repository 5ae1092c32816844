"""surgery: convert checkpoints so that massive activations become an explicit attention bias, and prove it.

    surgery.plan("eab", source)                        what would change, from headers only
    surgery.run("eab", source, out, text="wiki.txt")   convert, verify, publish
    surgery.verify(out, against=source)                check a converted checkpoint
    surgery.seal(out)                                  take edited documents into the manifest
    surgery.scan(source, text="wiki.txt")              massive activations and sinks, layer by layer
    surgery.push(out, "owner/name")                    send a converted checkpoint to the hub
    surgery.export("peft", out, "adapter")             the same model for another program
    surgery.pretrain(recipe, out, text=[...])          small models from nothing
    surgery.clean(directory)                           remove what killed runs left behind

A recipe is the name of one that comes with surgery, a path, a dict or a `Recipe`; a text is a file or several. Keywords
of `run`, `verify` and `export` are the fields of `RunOptions`, `VerifyOptions` and `ExportOptions`, which may be given
whole as well. What the verbs return is documented, key by key, in `surgery.results`. What a person can mend is raised
as `SurgeryError`.

Importing surgery also makes the converted model types (`eab_llama`, ...) known to transformers' Auto classes.
"""

from __future__ import annotations

import sys

from .version import VERSION

TYPE_CHECKING = False  # what typing calls so
if TYPE_CHECKING:
    from .errors import SurgeryError
    from .live.text import Chunking
    from .progress import Reporter
    from .results import Export, Pretrained, Survey, Verdict
    from .steps.options import ExportOptions, RunOptions, VerifyOptions
    from .steps.plan import Plan
    from .steps.recipe import Recipe
    from .verbs.clean import clean
    from .verbs.export import export
    from .verbs.plan import plan
    from .verbs.pretrain import pretrain
    from .verbs.push import push
    from .verbs.run import run
    from .verbs.scan import scan
    from .verbs.seal import seal
    from .verbs.verify import verify

__version__ = VERSION
_HOMES = {
    **{
        verb: f"verbs.{verb}"
        for verb in ("clean", "export", "plan", "pretrain", "push", "run", "scan", "seal", "verify")
    },
    **dict.fromkeys(("ExportOptions", "RunOptions", "VerifyOptions"), "steps.options"),
    **dict.fromkeys(("Export", "Pretrained", "Survey", "Verdict"), "results"),
    "Chunking": "live.text",
    "Plan": "steps.plan",
    "Recipe": "steps.recipe",
    "Reporter": "progress",
    "SurgeryError": "errors",
}
__all__ = [
    "Chunking", "Export", "ExportOptions", "Plan", "Pretrained", "Recipe", "Reporter", "RunOptions", "Survey",
    "SurgeryError", "Verdict", "VerifyOptions", "clean", "export", "plan", "pretrain", "push", "run", "scan", "seal",
    "verify",
]  # fmt: skip


def __getattr__(name: str):
    # torch and transformers take seconds to import, so a verb is imported when it is first asked for.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # not what this file needs, but what is for callers


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
