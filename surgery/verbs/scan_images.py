"""The same for an encoder of images: CLS, registers and patches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..anatomy.encoders import examine_encoder
from ..anatomy.sites import Anatomy
from ..checkpoint.disk import require_space
from ..checkpoint.provenance import TextFiles, described, moment, name_of, plain
from ..checkpoint.source import open_source
from ..converted.described import read_described
from ..converted.reading import is_converted, live_converted
from ..errors import SourceError
from ..live.images import image_files, load_processor, picture_of, read_pixels, require_places
from ..live.loading import live_original, require_device
from ..live.memory import Place
from ..live.model import Live
from ..live.port import Images, port_of
from ..live.stream import stream
from ..progress import Reporter
from ..results import Survey
from ..steps.act import provenance, told
from ..steps.fetch import fetch_weights
from ..survey.fidelity import passes_on_images, run_on_images
from ..survey.full import FullSurvey
from ..survey.patches import SHOWN, SIDE


def scan_images(
    source: Path | str, images: Sequence[Path], revision: str | None, device: str, count: int, interventions: bool,
    heads: Sequence[tuple[int, int]], command: Sequence[str], reporter: Reporter,
) -> Survey:  # fmt: skip
    """Survey the encoder `source` (a directory or hub id) on the first `count` of `images`, files and directories; with
    `interventions`, say also what of its features is left where the survey suggests a change.

    Raises SourceError for what is no image and for a checkpoint without an image processor, UnsupportedModel for one
    that has no encoder which is called with pixels alone.
    """
    require_device(device)
    date, files = moment(), image_files(images, count)
    reporter.step(f"load {source}")
    opened = _opened(str(source), revision, reporter)
    pixels = read_pixels(load_processor(opened.root), files, opened.anatomy)
    port = port_of(opened.anatomy, pixels)
    assert isinstance(port, Images)
    live = opened.load(Place(device), port)
    require_places(live, pixels)
    found = FullSurvey(live, port.tokens, heads)
    with reporter.bar("scan", len(pixels)) as advance:
        stream(live, pixels, found.observers, advance=advance, what="survey")
    assert found.norms is not None
    shown = found.norms.to_dict([path.name for path in files], [picture_of(image, SIDE) for image in pixels[:SHOWN]])
    act = provenance(
        date,
        command=command,
        device=device,
        files=TextFiles(evaluation=described(files)),
        evaluation=pixels,
        hub_ids=[str(opened.source["spec"])],
    )
    survey = {**found.to_dict(None), "norm_maps": shown}
    if interventions:
        reporter.step("intervene")
        with reporter.bar("intervene", passes_on_images(live) * len(pixels)) as advance:
            survey["interventions"] = run_on_images(live, pixels, survey, advance)
    return cast(Survey, {"source": opened.source["spec"], "provenance": told(act, opened.source, None), **survey})


@dataclass(frozen=True)
class _Opened:
    """A checkpoint of which everything is known that can be refused before its weights are read, and how to read
    them."""

    source: dict[str, Any]  # as provenance has it
    root: Path
    anatomy: Anatomy
    load: Callable[[Place, Images], Live]


def _opened(source: str, revision: str | None, reporter: Reporter) -> _Opened:
    root = Path(source)
    if is_converted(root):
        anatomy = read_described(root).anatomy
        if anatomy.patching is None:
            raise SourceError(f"{root} is a converted language model; give --text to survey it.")
        return _Opened(
            {"spec": plain(name_of(root)), "kind": "converted", "revision": None}, root, anatomy,
            lambda place, port: live_converted(root, anatomy, place, port),
        )  # fmt: skip
    opened = open_source(source, revision=revision)
    if opened.kind == "gguf":
        raise SourceError(f"{source} is a GGUF file, which holds no encoder of images; give its directory or a hub id.")
    found = examine_encoder(opened.config)
    require_space(opened.root, sum(opened.missing.values()))
    return _Opened(
        {"spec": opened.name, "kind": opened.kind, "revision": opened.revision}, opened.root, found,
        lambda place, port: live_original(fetch_weights(opened, reporter), found, place, port=port),
    )  # fmt: skip
