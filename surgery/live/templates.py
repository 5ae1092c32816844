"""Chat templates are programs of strangers: they are rendered in a child with limits, never in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..bounded import GIB, Unbounded, bounded
from ..checkpoint.regular import read_json
from ..errors import SourceError, brief, shortened
from ..words import listing

PROCESSORS = ("chat_template.json", "processor_config.json")  # where processors look for chat templates
SECONDS, MEMORY = 10, GIB  # a template renders in milliseconds
MOST = 100  # templates; the largest number that is known is 3
LARGEST = 1_000_000  # characters of a template; the largest that are known have a tenth of it
# What a template is tried on: each line is a system message or none, then turns of user and assistant.
CONVERSATIONS = [
    [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    for roles in (["user"], ["user", "assistant"] * 2 + ["user"], ["system", "user", "assistant", "user"])
]
# How templates refuse a conversation, on purpose or because they ask for what it does not hold.
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Name -> text of the tokenizer's chat templates; a single one is called "default". Not all may be texts."""
    found: Any = tokenizer.chat_template
    return found if isinstance(found, dict) else {} if found is None else {"default": found}


def _of_processors(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PROCESSORS:
        if (directory / name).is_file():
            template = read_json(directory / name).get("chat_template")
            several = template if isinstance(template, dict) else {} if template is None else {"": template}
            found |= {f"{name} {key}".strip(): text for key, text in several.items()}
    return found


def require_templates(directory: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """SourceError for a chat template that is not one, or does not come to an end in bounded time and memory.

    Looked at are the tokenizer's, and those that processors find in the files beside it. `name` is for errors.
    """
    templates = {**templates_of(tokenizer), **_of_processors(directory)}
    for key, template in templates.items():
        if not isinstance(template, str):
            raise SourceError(f"{_which(name, key)} is no text but {type(template).__name__}; mend or remove it.")
    if len(templates) > MOST:
        raise SourceError(f"{name} has {len(templates):,} chat templates, as none has; remove some.")
    if sum(map(len, templates.values())) > LARGEST:
        raise SourceError(
            f"{_which(name, *templates)} has more than {LARGEST:,} characters, as none has; mend or remove it."
        )
    if not templates:
        return
    try:  # all of them in one child: each may be small, and they may be thousands
        key, fault = bounded(_first_fault, tokenizer, templates, seconds=SECONDS, memory=MEMORY)
    except Unbounded as error:
        raise SourceError(f"{_which(name, *templates)} cannot be rendered ({error}); mend or remove it.") from error
    if fault is not None:
        raise SourceError(f"{_which(name, key)} cannot be rendered ({fault}); mend or remove it.")


def _which(name: str, *keys: str) -> str:
    if len(keys) > 1:
        return f"{name}: one of its chat templates ({listing([repr(key) for key in keys], 4)})"
    return f"{name}: its chat template" + (f" {shortened(repr(keys[0]))}" if keys[0] != "default" else "")


def equals_less(candidate: str, template: str, leading: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `candidate` writes what `template` does less `leading` in front, on every conversation that it accepts.

    False where either does not end well.
    """
    try:
        return bool(bounded(_equals_less, candidate, template, leading, tokenizer, seconds=SECONDS, memory=MEMORY))
    except Unbounded:
        return False


# ---- in the child


def _equals_less(candidate: str, template: str, leading: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    expected, found = _written(template, tokenizer), _written(candidate, tokenizer)
    pairs = [(text, other) for text, other in zip(expected, found, strict=True) if isinstance(text, str)]
    return bool(pairs) and all(other == text.removeprefix(leading) for text, other in pairs)


def _first_fault(tokenizer: PreTrainedTokenizerBase, templates: dict[str, str]) -> tuple[str, str | None]:
    """The first of `templates` that nobody can use, by name, and why."""
    for key, template in templates.items():
        if (fault := _fault(tokenizer, template)) is not None:
            return key, fault
    return "", None


def _fault(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Why nobody can use `template`; None where it renders a conversation, or refuses them as templates do."""
    written = _written(template, tokenizer)
    errors = [error for error in written if isinstance(error, Exception)]
    if len(errors) < len(written) or all(isinstance(error, REFUSALS) for error in errors):
        syntax = next((error for error in errors if isinstance(error, TemplateSyntaxError)), None)
        return None if syntax is None else brief(syntax)
    return brief(next(error for error in errors if not isinstance(error, REFUSALS)))


def _written(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str | Exception]:
    """What `template` writes for each conversation, with and without a prompt for the answer; or the error."""
    results: list[str | Exception] = []
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            try:
                text = tokenizer.apply_chat_template(
                    conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                results.append(str(text))
            except MemoryError:
                raise
            except Exception as error:
                results.append(error)
    return results
