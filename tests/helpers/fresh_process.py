"""Loads converted checkpoints as a stranger would: a process that has torch and transformers, and no surgery.

    python -I fresh_process.py TASKS.pt REPORT.pt

TASKS.pt: {"families": {family: task}, ...}, a task being {"path", "text", "prompt", "new_tokens"} and "scratch" where
everything is to be looked at, "caches" where only those are; or {"path", "auto", "weights", "batches", "scratch"} for
another head than the causal language model's. REPORT.pt: {family: {what: finding}, ...}.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock


class NoSurgery:
    """An import hook: whoever asks for surgery here has left a dependency in the checkpoint."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "surgery":
            raise ModuleNotFoundError(f"{name} must not be needed to load a checkpoint")
        return None


if __name__ == "__main__":
    sys.meta_path.insert(0, NoSurgery())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    logging,
)


def load(path, dtype=torch.float64, auto=AutoModelForCausalLM, trust_remote_code=True, **kwargs):
    """(model, loading info), experts computed one by one: grouped_mm knows no float64."""
    model, info = auto.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
    )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")
    return model.eval(), info


def refusal(load_it) -> str | None:
    """The error's type and first line, None where nothing was raised."""
    try:
        load_it()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}"
    return None


def problems(info: dict) -> dict:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def greedy(model, prompt, new_tokens: int, **kwargs) -> tuple:
    """The greedy continuation of `prompt`: tokens (rows, new) and the logits that chose them (rows, new, vocab)."""
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
    return output.sequences[:, prompt.shape[1] :], torch.stack(output.logits, dim=1)


def look(task: dict) -> dict:
    """All that is checked of one directory."""
    path, text, prompt = task["path"], task["text"], task["prompt"]
    found = {"without the flag": refusal(lambda: AutoModelForCausalLM.from_pretrained(path))}
    model, info = load(path)
    found["problems"], found["logits"] = problems(info), logits(model, text)
    for cache in ("dynamic", "static"):
        found[cache] = greedy(model, prompt, task["new_tokens"], cache_implementation=cache)
    output = model.get_output_embeddings().weight
    found["tied"] = output.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    if "AutoModel" in model.config.auto_map:
        trunk, info = load(path, auto=AutoModel)
        found["trunk"] = problems(info), trunk(input_ids=text, use_cache=False).last_hidden_state
        inner = model.model if model.base_model is model else model.base_model  # Llama 4 names its trunk otherwise
        found["inner trunk"] = inner(input_ids=text, use_cache=False).last_hidden_state
    return {**found, **resave(model, path, text, Path(task["scratch"]))}


def glance(task: dict) -> dict:
    """The one thing that matters: the same function, in one pass and when generating with each cache."""
    torch.set_default_dtype(task["default_dtype"])
    model, info = load(task["path"])
    found = {"problems": problems(info), "logits": logits(model, task["text"])}
    for cache in task["caches"]:
        found[cache] = greedy(model, task["prompt"], task["new_tokens"], cache_implementation=cache)
    torch.set_default_dtype(torch.float32)
    return found


def head(task: dict) -> dict:
    """What another Auto class loads, given the weights of its head: outputs of each batch, also after saving it."""
    auto = getattr(transformers, task["auto"])
    model, info = load(task["path"], auto=auto, num_labels=task["labels"])
    model.load_state_dict(task["weights"], strict=False)
    model.save_pretrained(task["scratch"])
    again, _ = load(task["scratch"], auto=auto)
    outputs = [[tuple(each(**batch).values())[0] for batch in task["batches"]] for each in (model, again)]
    return {"class": type(model).__name__, "problems": problems(info), "outputs": outputs[0], "again": outputs[1]}


def resave(model, path, text, scratch: Path) -> dict:
    """save_pretrained in the dtype that is on disk, reloaded; from the copy, not from the cache of dynamic modules."""
    stored, _ = load(path, dtype="auto")
    stored.save_pretrained(scratch / "resaved")
    again, info = load(scratch / "resaved")
    return {
        "resaved problems": problems(info),
        "resaved logits": logits(again, text),
        "resaved files": sorted(entry.name for entry in (scratch / "resaved").iterdir()),
        "resaved without the flag": refusal(lambda: AutoModelForCausalLM.from_pretrained(scratch / "resaved")),
        "dtypes": {name: str(tensor.dtype) for name, tensor in stored.state_dict().items()},
    }


def offloaded(task: dict) -> dict:
    """Spread over memory and disk by accelerate."""
    folder = Path(task["scratch"]) / "offloaded"
    model, _ = load(
        task["path"], dtype=torch.float32, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=folder
    )
    places = {name: str(place) for name, place in model.hf_device_map.items()}
    return {"map": places, "logits": logits(model, task["text"])}


def ask(root: Path, tasks: dict, timeout: int) -> dict:
    """The report of a fresh process on `tasks`; its files are in `root`."""
    torch.save(tasks, root / "tasks.pt")
    # The folder that trust_remote_code copies code to must be empty; one thread is fastest for models this small.
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-I", __file__, str(root / "tasks.pt"), str(root / "report.pt")],
        check=True, env=environment, stdin=subprocess.DEVNULL, cwd=root, timeout=timeout,
    )  # fmt: skip
    return torch.load(root / "report.pt")


def main(tasks_file: str, report_file: str) -> None:
    tasks = torch.load(tasks_file)
    report = {}
    for name, task in tasks["families"].items():
        try:
            report[name] = (head if "auto" in task else look if "scratch" in task else glance)(task)
        except Exception:  # the other families are looked at all the same
            report[name] = {"failed": traceback.format_exc()}
    if "damaged" in tasks:
        report["damaged"] = {name: refusal(lambda path=path: load(path)) for name, path in tasks["damaged"].items()}
        report["offloaded"] = offloaded(tasks["families"]["llama"])
        with mock.patch("builtins.input", side_effect=EOFError) as asked:
            tokenizer = AutoTokenizer.from_pretrained(tasks["tokenizer"], trust_remote_code=False)
            processor = AutoProcessor.from_pretrained(tasks["tokenizer"], trust_remote_code=False)
            GenerationConfig.from_pretrained(tasks["tokenizer"])
        report["tokenizer"] = tokenizer(tasks["words"])["input_ids"]
        report["processor"], report["asked"] = processor(tasks["words"])["input_ids"], asked.called
    report["surgery"] = [name for name in sys.modules if name.split(".")[0] == "surgery"]
    torch.save(report, report_file)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        main(*sys.argv[1:])
