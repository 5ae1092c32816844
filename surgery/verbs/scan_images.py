"""The same for an encoder of images: CLS, registers and patches, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ..anatomy.encoders import examine_encoder
from ..checkpoint.disk import require_space
from ..checkpoint.provenance import TextFiles, described, moment
from ..checkpoint.source import open_source
from ..errors import SourceError
from ..live.images import image_files, load_encoder, load_processor, picture_of, port_of, read_pixels
from ..live.loading import require_device
from ..live.stream import stream
from ..progress import Reporter
from ..results import Survey
from ..steps.act import provenance, told
from ..steps.fetch import fetch_weights
from ..survey.fidelity import passes_on_images, run_on_images
from ..survey.full import FullSurvey
from ..survey.patches import SHOWN

SIDE = 96  # pixels of a picture in the report


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
    opened = open_source(str(source), revision=revision)
    if opened.kind == "gguf":
        raise SourceError(f"{source} is a GGUF file, which holds no encoder of images; give its directory or a hub id.")
    encoder = examine_encoder(opened.config)
    processor = load_processor(opened.root)
    pixels = read_pixels(processor, files, encoder)
    require_space(opened.root, sum(opened.missing.values()))
    port = port_of(encoder, pixels)
    live = load_encoder(fetch_weights(opened, reporter), encoder, port, pixels, device)
    found = FullSurvey(live, port.tokens, heads)
    with reporter.bar("scan", len(pixels)) as advance:
        stream(live, pixels, found.observers, advance=advance, what="survey")
    assert found.norms is not None
    shown = found.norms.to_dict([path.name for path in files], [picture_of(image, SIDE) for image in pixels[:SHOWN]])
    act = provenance(
        date, command=command, device=device, files=TextFiles(evaluation=described(files)), hub_ids=[opened.name]
    )
    survey = {**found.to_dict(None), "norm_maps": shown}
    if interventions:
        reporter.step("intervene")
        with reporter.bar("intervene", passes_on_images(live) * len(pixels)) as advance:
            survey["interventions"] = run_on_images(live, pixels, survey, advance)
    said = {"spec": opened.name, "kind": opened.kind, "revision": opened.revision}
    return cast(Survey, {"source": opened.name, "provenance": told(act, said, None), **survey})
