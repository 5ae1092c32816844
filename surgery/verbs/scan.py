"""`surgery scan`: massive activations and attention sinks of a checkpoint, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy
from ..anatomy.stored import vocabulary_size
from ..checkpoint.disk import require_space
from ..checkpoint.hub import HubId
from ..checkpoint.layout import read_layout
from ..checkpoint.provenance import TextFiles, described, moment, name_of, plain
from ..checkpoint.source import fetch_small, materialise, open_source, refuse_adapter
from ..converted.described import read_described
from ..converted.reading import is_converted, live_converted
from ..endings.signals import caught
from ..endings.temporary import temporary
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import live_original, load_tokenizer, require_device
from ..live.memory import Place
from ..live.model import Live
from ..live.text import FEW_CHUNKS, Chunking, Files, files, read_texts
from ..progress import SILENT, Reporter
from ..results import Survey
from ..steps.act import provenance, told
from ..steps.fetch import fetch_all, fetch_weights, on_hub
from ..steps.inputs import Reader, Texts, WholeReader, fit_chunks, text_reader, words_of
from ..steps.nature import examine_source, port_of, source_tokenizer
from ..steps.ready import require_port
from ..survey.fidelity import passes_on_images, run_on_images
from ..survey.full import survey
from ..survey.interventions import audit, plan_interventions, run_interventions
from .scan_encoder import scan_encoder

GIVEN = Texts(None, "text")  # whatever it says


def scan(
    source: Path | str,
    *,
    text: Files = (),
    images: Files = (),
    audio: Files = (),
    interventions: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    memory: int | None = None,
    chunking: Chunking = FEW_CHUNKS,
    heads: Sequence[tuple[int, int]] = (),
    command: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> Survey:
    """Survey `source` (a directory, hub id "owner/name@revision", GGUF, or converted checkpoint) on `text`: layer by
    layer, and across them; so is an encoder of text (BERT, the text tower of CLIP), whose chunks are whole texts. An
    encoder of images is surveyed on `images`, one of sound on `audio`, files and directories (`scan_encoder`).

    Layer 0 is the embedding output and has no attention; layer k carries the attention of block k - 1, which writes it.
    With `interventions`, the live model is also changed in the ways that its survey suggests, and measured each time.
    `heads` (block, head) are those whose attention is shown, if it has them; else a few from strong sinks to weak ones.
    `command`: the words of the command line, for the survey's provenance.
    """
    if (encoded := _files_of_encoder(images, audio, text=bool(text), memory=memory, dtype=dtype)) is not None:
        return scan_encoder(source, *encoded, revision, device, chunking.count, interventions, heads, command, reporter)
    if not (text := files(text)):
        raise SourceError("a scan needs text to read: give --text FILE.")
    require_device(device)
    date, words = moment(), read_texts(text)
    read = TextFiles(evaluation=described(text))
    reporter.step(f"load {source}")
    with _opened(str(source), dtype, revision, reporter) as opened:
        fitting = fit_chunks(chunking, opened.anatomy, opened.n_slots)
        if fitting != chunking:
            reporter.note(f"chunks of {fitting.length} tokens: the model has no more positions")
        chunks = opened.reader.cut(words, fitting, "--text")
        live = opened.load(Place(device, memory))
        if isinstance(opened.reader, WholeReader):
            live = replace(live, port=words_of(opened.anatomy, opened.reader, chunks))
        if live.layers is not None:
            reporter.note(f"{source} does not fit into memory, and comes layer by layer")
        with reporter.bar("scan", len(chunks)) as advance:
            found = survey(live, opened.reader.tokenizer, chunks, heads=heads, advance=advance)
        if "perplexity" in found and not math.isfinite(found["perplexity"]["nll"]):
            raise DamagedCheckpoint(
                f"{source}: what it predicts is not finite, so there is nothing to survey; check its weights (download "
                "them again), or load it in float32 if it is in half precision."
            )
        act = provenance(
            date, command=command, device=device, files=read, evaluation=chunks, hub_ids=[str(opened.source["spec"])]
        )
        found = {"source": opened.source["spec"], "provenance": told(act, opened.source, None), **found}
        if interventions and not live.port.predicts:
            reporter.step("intervene")
            with reporter.bar("intervene", passes_on_images(live) * len(chunks)) as advance:
                found["interventions"] = run_on_images(live, chunks, found, advance)
        elif interventions:
            reporter.step("intervene")
            planned = plan_interventions(live, chunks.shape[1], found)
            with reporter.bar("intervene", planned.passes * len(chunks)) as advance:
                found["interventions"] = run_interventions(live, chunks, planned, advance)
            reporter.step("audit: how few scalars hold the model up")
            with reporter.bar("audit", None) as advance:
                found["audit"] = audit(live, chunks, found, advance=advance)
        return cast(Survey, found)


def _files_of_encoder(images: Files, audio: Files, **others: Any) -> tuple[Reads, Sequence[Path]] | None:
    """What is given for an encoder of images or sound; None where nothing is. SourceError for what does not go with
    it."""
    if not (paths := files(images) or files(audio)):
        return None
    kind: Reads = "images" if files(images) else "audio"
    others["audio"] = kind == "images" and files(audio)
    if asked := next((name for name, given in others.items() if given), None):
        raise SourceError(f"--{kind} surveys an encoder, for which there is no --{asked}; take one of them away.")
    return kind, paths


@dataclass(frozen=True)
class _Opened:
    """Everything about a checkpoint that can be refused before its weights are read, and how to read them."""

    source: dict[str, Any]  # as provenance has it
    anatomy: Anatomy
    reader: Reader
    n_slots: int
    load: Callable[[Place], Live]


@contextlib.contextmanager
def _opened(source: str, dtype: str | None, revision: str | None, reporter: Reporter) -> Iterator[_Opened]:
    root, at = Path(source), on_hub(source, revision)
    if is_converted(root):
        if dtype is not None or revision is not None:
            raise SourceError(f"{root} is a converted checkpoint on this disk; leave out --dtype and --revision.")
        yield _converted(root)
        return
    if at is not None and dtype is None and is_converted((snapshot := fetch_small(at)).root):
        yield _converted(fetch_all(snapshot, reporter), at)
        return
    opened = open_source(source, revision=revision, dtype=dtype)
    anatomy, _ = examine_source(opened, *port_of(opened, reads="text"))
    require_port(anatomy, GIVEN)
    vocab_size = vocabulary_size(opened.layout, anatomy)
    said = {"spec": opened.name, "kind": opened.kind, "revision": opened.revision}
    reader = text_reader(anatomy, source_tokenizer(opened), vocab_size)
    if opened.kind != "gguf":
        require_space(opened.root, sum(opened.missing.values()))
        yield _Opened(
            said, anatomy, reader, 0, lambda place: live_original(fetch_weights(opened, reporter), anatomy, place)
        )
        return
    with caught(), temporary(opened.layout.total_bytes) as scratch:
        yield _Opened(
            said, anatomy, reader, 0, lambda place: live_original(materialise(opened, scratch), anatomy, place)
        )


def _converted(root: Path, at: HubId | None = None) -> _Opened:
    """A converted checkpoint in the directory `root`, which holds that of the hub where `at` is given."""
    found = read_described(root)
    refuse_adapter(root)
    require_port(found.anatomy, GIVEN)
    if found.packed is not None:
        found.packed.require_loader(root)
    vocab_size = vocabulary_size(read_layout(root), found.anatomy)
    return _Opened(
        {
            "spec": plain(name_of(root)) if at is None else str(at),
            "kind": "converted",
            "revision": None if at is None else root.name,
        },
        found.anatomy,
        text_reader(found.anatomy, load_tokenizer(root), vocab_size),
        found.eab.n_slots,
        lambda place: live_converted(root, found.anatomy, place),
    )
