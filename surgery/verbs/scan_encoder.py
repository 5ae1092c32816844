"""The same for an encoder of images or sound: CLS, registers and patches, or frames, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..anatomy.encoders import examine_encoder
from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy
from ..checkpoint.disk import require_space
from ..checkpoint.provenance import TextFiles, described, moment, name_of, plain
from ..checkpoint.source import open_source
from ..converted.described import read_described
from ..converted.reading import is_converted, live_converted
from ..errors import SourceError
from ..live.images import picture_of
from ..live.loading import live_original, require_device
from ..live.memory import Place
from ..live.model import Live
from ..live.placed import require_places
from ..live.port import Images, port_of
from ..live.searched import first_files
from ..live.stream import stream
from ..progress import Reporter
from ..results import Survey
from ..steps.act import provenance, told
from ..steps.fetch import fetch_weights
from ..steps.pictures import Pictures
from ..steps.ready import require_port
from ..steps.recordings import file_reader, whole_files
from ..survey.fidelity import passes_on_images, run_on_images
from ..survey.full import FullSurvey
from ..survey.patches import SHOWN, SIDE


def scan_encoder(
    source: Path | str, kind: Reads, given: Sequence[Path], revision: str | None, device: str, count: int,
    interventions: bool, heads: Sequence[tuple[int, int]], command: Sequence[str], reporter: Reporter,
) -> Survey:  # fmt: skip
    """Survey the encoder `source` (a directory or hub id) on the first `count` of the images or recordings that are
    `given`, files and directories; with `interventions`, say also what of its features is left where the survey
    suggests a change.

    Raises SourceError for what is no image, or no recording, and for a checkpoint without an image processor or feature
    extractor, UnsupportedModel for one that has no encoder which is called with pixels, or with sound, alone.
    """
    require_device(device)
    date, every = moment(), whole_files(kind, given)
    files = first_files(given, every.evaluation or (), count, every.called)
    reporter.step(f"load {source}")
    opened = _opened(str(source), every, revision, reporter)
    inputs = file_reader(opened.root, opened.anatomy).over(files, reporter).read(files)
    port = port_of(opened.anatomy, inputs)
    assert isinstance(port, Images)
    live = opened.load(Place(device), port)
    require_places(live, inputs)
    found = FullSurvey(live, port.tokens, heads)
    with reporter.bar("scan", len(inputs)) as advance:
        stream(live, inputs, found.observers, advance=advance, what="survey")
    act = provenance(
        date,
        command=command,
        device=device,
        files=TextFiles(evaluation=described(files)),
        evaluation=inputs,
        hub_ids=[str(opened.source["spec"])],
    )
    survey = found.to_dict(None)
    if found.norms is not None:
        pictures = [picture_of(image, SIDE) for image in inputs[:SHOWN]]
        survey["norm_maps"] = found.norms.to_dict([path.name for path in files], pictures)
    if interventions:
        reporter.step("intervene")
        with reporter.bar("intervene", passes_on_images(live) * len(inputs)) as advance:
            survey["interventions"] = run_on_images(live, inputs, survey, advance)
    return cast(Survey, {"source": opened.source["spec"], "provenance": told(act, opened.source, None), **survey})


@dataclass(frozen=True)
class _Opened:
    """A checkpoint of which everything is known that can be refused before its weights are read, and how to read
    them."""

    source: dict[str, Any]  # as provenance has it
    root: Path
    anatomy: Anatomy
    load: Callable[[Place, Images], Live]


def _opened(source: str, given: Pictures, revision: str | None, reporter: Reporter) -> _Opened:
    root = Path(source)
    if is_converted(root):
        anatomy = read_described(root).anatomy
        if anatomy.patching is None:
            raise SourceError(f"{root} is a converted language model; give --text to survey it.")
        require_port(anatomy, given)
        return _Opened(
            {"spec": plain(name_of(root)), "kind": "converted", "revision": None}, root, anatomy,
            lambda place, port: live_converted(root, anatomy, place, port),
        )  # fmt: skip
    opened = open_source(source, revision=revision)
    if opened.kind == "gguf":
        raise SourceError(f"{source} is a GGUF file, which holds no encoder; give its directory or a hub id.")
    found = examine_encoder(opened.config, given.kind)
    require_space(opened.root, sum(opened.missing.values()))
    return _Opened(
        {"spec": opened.name, "kind": opened.kind, "revision": opened.revision}, opened.root, found,
        lambda place, port: live_original(fetch_weights(opened, reporter), found, place, port=port),
    )  # fmt: skip
