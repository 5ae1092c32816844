"""The command `surgery scan`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, require_result_folder, write_result
from ...results import Survey
from ..options import (
    AUDIO,
    DEVICE,
    DTYPE,
    FILE,
    IMAGES,
    JSON,
    MEMORY,
    QUIET,
    RESULT,
    REVISION,
    TEXT,
    chunking,
    command,
    options,
)  # fmt: skip
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Survey models on text, layer by layer.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@options(
    TEXT, IMAGES, AUDIO, chunking(8, 1),
    click.option(
        "--interventions", is_flag=True, help="Also change the live model as the survey suggests, and measure."
    ),
    click.option("--report", type=RESULT, metavar="FILE", help="Write a report as one HTML file."),
    click.option("--plots", type=FILE, metavar="DIR", help="Write the report's plots as PNG and SVG files."),
    DTYPE, REVISION, DEVICE, MEMORY, QUIET, JSON,
)  # fmt: skip
def scan(
    sources, text, chunks, chunk_length, images, audio, interventions, report, plots, dtype, revision, device, memory,
    quiet, json_file,
) -> int:  # fmt: skip
    """Survey each SOURCE on text, layer by layer: massive activations, geometry, attention, super neurons.

    An encoder of images (DINOv2, ViT, the vision tower of CLIP or LLaVA, ...) is surveyed on --images, one of sound
    (Whisper, wav2vec 2.0, HuBERT, ...) on --audio. One of text (BERT, the text tower of CLIP, ...) takes --text as
    language models do."""
    read = given_paths(*sources, *text, *images, *audio)
    require_result_file(json_file, "--json", given_paths(*read, report))
    require_result_file(report, "--report", read)
    require_result_folder(plots, "--plots", read)
    from ...live.text import Chunking
    from ...verbs.scan import scan as verb
    from ...verification.verdict import plain_json
    from ..show.survey import scanned, show_survey

    screen = Screen(quiet, json_file, report)
    surveys: list[Survey] = []
    heads: list[tuple[int, int]] = []  # those of the first source are shown of all, where they have them
    for source in sources:
        survey = verb(
            source, text=text, images=images, audio=audio, dtype=dtype, revision=revision, device=device,
            memory=memory, interventions=interventions, chunking=Chunking(chunks, chunk_length), heads=heads,
            command=command(), reporter=screen.reporter,
        )  # fmt: skip
        heads = heads or [(shown["block"], shown["head"]) for shown in survey["attention_maps"]]
        surveys.append(survey)
        show_survey(screen.tables, survey)
    result = plain_json(surveys[0] if len(surveys) == 1 else {"surveys": surveys})
    write_result(json_file, "--json", json_text(result))
    if report is not None or plots is not None:
        from ...report import write_plots, write_report

        if report is not None:
            write_report(surveys, report)
        if plots is not None:
            write_plots(surveys, plots)
    for survey in surveys:
        screen.end(scanned(survey))
    return 0
