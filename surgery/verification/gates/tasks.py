"""Zero-shot tasks of lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness), where installed.

Original and converted model answer the same documents, each through its own tokenizer, in float32. What counts is what
the harness reports as a mean over documents of which more is better (acc, acc_norm, exact_match, ...): only that can be
compared document by document, and a drop so found has a far narrower interval than the two standard errors suggest.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from transformers import PreTrainedModel

from ...errors import SourceError, brief, out_of_memory
from ...live.paired import NONE_IN, Interval, mean_interval
from ...recipe.fields import AsTuple
from ...table import Table
from ...words import fixed, interval, number, visible_name
from .base import Gate, Inputs, Judgement, Measured, Subject, at_most

BATCH = 8


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: its value for each document, in the order of the task, and the harness's own error."""

    values: tuple[float, ...]
    stderr: float

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)


TaskScores = dict[tuple[str, str], TaskScore]  # task, metric -> score


def drop(original: TaskScore, converted: TaskScore) -> Interval:
    """How much is lost, paired by document, with a 95% interval."""
    lost = [before - after for before, after in zip(original.values, converted.values, strict=True)]
    if len(set(lost)) == 1:  # which says nothing of how much documents vary
        return Interval(lost[0], lost[0] - NONE_IN / len(lost), lost[0] + NONE_IN / len(lost))
    return mean_interval(lost)


@dataclass(frozen=True)
class TaskSet:
    """Tasks that have been found and whose data is here. `load` gives them afresh: the harness writes into them.

    `max_length`: so many tokens the harness keeps of a text for either model, whatever each could hold.
    """

    load: Callable[[], dict[str, Any]]
    limit: int | None
    max_length: int | None

    def measure(self, model: PreTrainedModel, tokenizer: Any) -> TaskScores:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with _silent():
                loaded = self.load()
                lm = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=BATCH,
                    max_length=self.max_length,
                )  # fmt: skip
                found = evaluate(lm=lm, task_dict=loaded, limit=self.limit)
        except Exception as error:  # whatever tasks, filters and metrics of so many authors raise
            if out_of_memory(error):
                raise
            raise SourceError(
                f"verify.tasks: the tasks cannot be evaluated ({brief(error)}); name other tasks, or mend these."
            ) from error
        scores: TaskScores = {}
        for name, task in loaded["tasks"].items():
            for metric in _means(task):
                for kept in dict.fromkeys(sample["filter"] for sample in found["samples"][name]):
                    values = [s[metric] for s in found["samples"][name] if s["filter"] == kept and metric in s]
                    if not values or not all(isinstance(value, (bool, numbers.Real)) for value in values):
                        continue
                    label = metric if kept == "none" else f"{metric}, {kept}"
                    stderr = found["results"][name].get(f"{metric}_stderr,{kept}")
                    own = float(stderr) if isinstance(stderr, numbers.Real) else math.nan
                    scores[name, label] = TaskScore(tuple(map(float, values)), own)
        if missing := set(loaded["tasks"]) - {name for name, _ in scores}:
            raise SourceError(f"verify.tasks: {min(missing)} gave no value for each document; name other tasks.")
        return scores


class Tasks(Gate):
    """How much less the converted model may score than the original on zero-shot tasks of lm-evaluation-harness.

    In each metric that is a mean over documents, at the upper end of the interval paired by document.
    """

    name: ClassVar[str] = "tasks"
    reading: ClassVar[Literal["text", "images"] | None] = "text"

    names: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        AsTuple,
        Field(min_length=1, examples=[["arc_easy"]], description="tasks of the harness, or of `--tasks DIR`"),
    ]
    limit: Annotated[int, Field(ge=2)] | None = Field(
        default=None, examples=[500], description="so many documents of each task, instead of all"
    )
    max_drop: Annotated[
        float, Field(ge=0, allow_inf_nan=False, examples=[0.02], description="the largest drop, of every metric")
    ]

    def require_tools(self, device: str) -> None:
        require_harness()

    def require(self, inputs: Inputs) -> TaskSet:
        return open_tasks(self.names, self.limit, inputs.tasks, inputs.room)

    @classmethod
    def refuse(cls, inputs: Inputs) -> None:
        if inputs.tasks is not None:
            raise SourceError(
                f"--tasks {inputs.tasks}: no gate of the recipe is on tasks; name them under verify.tasks."
            )

    def measure(self, subject: Subject, ready: TaskSet) -> TaskScores:
        subject.step("on tasks")
        return ready.measure(subject.live.model, subject.tokenizer)

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        before: TaskScores = original.further[self.name]
        return [
            at_most(f"{self.name}.{task}.{metric}", drop(before[task, metric], after).high, self.max_drop)
            for (task, metric), after in converted.further[self.name].items()
        ]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Task -> metric -> both means over documents, their standard errors, and the drop, paired by document."""
        if original is None:
            return {}
        found: dict[str, Any] = {}
        for (task, metric), after in converted.further[self.name].items():
            before = original.further[self.name][task, metric]
            found.setdefault(task, {})[metric] = {
                "documents": len(after.values),
                "original": before.mean,
                "original_stderr": before.stderr,
                "converted": after.mean,
                "converted_stderr": after.stderr,
                "drop": drop(before, after).to_dict(),
            }
        return {self.name: found}

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        rows = []
        for task, metrics in (verdict.get(cls.name) or {}).items():
            for metric, entry in metrics.items():
                means = [
                    f"{fixed(entry[name], 3)} ± {fixed(entry[f'{name}_stderr'], 3)}"
                    for name in ("original", "converted")
                ]
                name = visible_name(f"{task}, {metric}")
                rows.append((name, number(entry["documents"]), *means, interval(entry["drop"])))
        if not rows:
            return None
        return Table(
            "Zero-shot tasks", ("", "documents", "original", "converted", "drop"), rows,
            note="± is a standard error.",
            text="Questions without examples. Drop is what the converted model scores less, with its 95% interval, "
            "paired by document.",
        )  # fmt: skip

    @classmethod
    def label(cls, judgement: str) -> str:
        return f"drop in {visible_name(judgement.partition('.')[2].replace('.', ', '))}"


def open_tasks(names: Sequence[str], limit: int | None, files: Path | None, max_length: int | None) -> TaskSet:
    """The named tasks of the harness, or of the YAML files in directory `files`, with their data; see `TaskSet`.

    SourceError where the harness is not installed, a name is not one task, its data cannot be had, or nothing that it
    reports can be compared.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    # The harness's own are thirteen thousand files: not read where one's own suffice. Ours come second, and win.
    manager = TaskManager(include_path=files, include_defaults=False) if files is not None else None
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=files)
    for name in names:
        if name not in manager.all_subtasks:
            kind = "a group of tasks" if name in manager.all_tasks else "no task"
            raise SourceError(
                f"verify.tasks: {name!r} is {kind} of lm-evaluation-harness; name single tasks, which it lists "
                "(lm-eval ls tasks), or give the directory of your own with --tasks."
            )

    def load() -> dict[str, Any]:
        loaded: dict[str, Any] = manager.load(list(names))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        return loaded

    try:
        with _silent():
            found = load()["tasks"]
    except Exception as error:  # whatever the readers of so many formats raise
        raise SourceError(
            f"verify.tasks: {', '.join(names)} cannot be loaded ({brief(error)}); its data must be here, or the "
            "network."
        ) from error
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) or not _means(task):
            raise SourceError(
                f"verify.tasks: {name} runs code, needs images, or reports no mean over documents, which alone can be "
                "compared document by document; name other tasks."
            )
    return TaskSet(load, limit, max_length)


def require_harness() -> None:
    """SourceError unless lm-evaluation-harness is installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise SourceError(
            "verify.tasks needs lm-evaluation-harness: pip install 'checkpoint-surgery[tasks]', or leave 'tasks' "
            "out of the recipe."
        ) from error


def _means(task: Any) -> list[str]:
    """What the task reports as a mean over documents of which more is better."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return [name for name, how in task.aggregation().items() if how is mean and better.get(name)]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Its progress bars and advice are not ours."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
