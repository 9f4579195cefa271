"""Where the time of a fit and of a test run goes: the published loop before, the toolkit after.

    python benchmarks/stage_shares.py --data /path/to/mpdd --category metal_plate

The toolkit's stages are run one after the other, each over all images, so that nothing overlaps as it does in a run:
there the sum is smaller. The table goes to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import runs
import torch
from flat_index import tell_faiss_the_processor
from material import BATCH_SIZE, Material
from reference import StageSeconds, all_metrics
from results import environment, environment_line, write_between_markers
from run import add_options, settings_of
from stages import write_figures, write_pictures

from patchcore.datasets.inspection import DatasetSplit
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.summary import class_metrics
from patchcore.memory.points import Points
from patchcore.memory.sampler import num_selected
from patchcore.runtime import set_threads
from patchcore.scoring.anomaly_map import anomaly_maps

STAGES = ("decode", "backbone", "embedding", "coreset", "search", "maps", "metrics", "files")
Seconds = Mapping[str, float]


def reference_shares(material: Material) -> dict[str, Seconds]:
    """Return the seconds of each stage of the published loop, {"fit": ..., "test": ...}."""
    s = material.settings
    published = runs.reference_detector(material)
    images = material.reference_images(DatasetSplit.TRAIN)
    published.fit(images, s.percentage, material.generator("coreset"), material.generator("selection"))
    fit = dict(published.stages.seconds)
    found = published.predict(material.reference_images(DatasetSplit.TEST))
    test = published.stages
    test.start()
    all_metrics(found.scores, material.labels, found.maps, found.masks)
    test.end("metrics")
    write_figures(material, [0])  # makes what it shows, outside the clock
    test.start()
    write_figures(material, range(len(material.labels)))
    test.end("files")
    return {"fit": fit, "test": test.seconds}


def toolkit_shares(material: Material) -> dict[str, Seconds]:
    """Return the seconds of each stage of the toolkit, {"fit": ..., "test": ...}."""
    detector = material.fitted
    clock = StageSeconds()
    embeddings = _embedded_in_stages(material, DatasetSplit.TRAIN, clock)
    points = material.points(embeddings)
    picks = detector.sampler.select_reduced(Points(points), material.generator("selection"))
    assert len(picks) == num_selected(len(points), material.settings.percentage)
    clock.end("coreset")
    detector.restore({"memory_bank": embeddings.flatten(0, 1)[picks]})
    clock.end("search")
    detector.save(material.folder / "model")
    clock.end("files")
    fit, clock = clock.seconds, StageSeconds()

    embeddings = _embedded_in_stages(material, DatasetSplit.TEST, clock)
    scores = [detector.score_embeddings(batch) for batch in embeddings.split(BATCH_SIZE)]
    clock.end("search")
    grids = torch.cat([part.patches for part in scores])
    maps = anomaly_maps(grids, material.settings.preprocessing.imagesize_px).numpy()
    clock.end("maps")
    class_metrics(torch.cat([part.images for part in scores]).numpy(), material.labels, maps, material.masks, None)
    clock.end("metrics")
    write_pictures(material, range(len(grids)))
    clock.end("files")
    return {"fit": fit, "test": clock.seconds}


def _embedded_in_stages(material: Material, split: DatasetSplit, clock: StageSeconds) -> torch.Tensor:
    """Return the embeddings [N, P, D] of a split, and count decoding, backbone and embedding one after another."""
    embedder = material.fitted.embedder
    loader = material.loader(split)
    clock.start()
    batches = [batch["image"] for batch in loader]
    clock.end("decode")
    feature_maps = [embedder.extractor(batch) for batch in batches]
    clock.end("backbone")
    embeddings = torch.cat([embedder(maps) for maps in feature_maps])
    clock.end("embedding")
    return embeddings


def markdown_shares(reference: Mapping[str, Seconds], toolkit: Mapping[str, Seconds]) -> str:
    """Return seconds and shares of each stage, before and after, as a Markdown table."""
    header = [f"{part}, {side}" for part in ("fit", "test") for side in ("before", "after")]
    columns = [sides[part] for part in ("fit", "test") for sides in (reference, toolkit)]
    totals = [sum(column.values()) for column in columns]
    lines = [f"| stage | {' | '.join(header)} |", f"|---{'|---' * len(header)}|"]
    for stage in STAGES:
        cells = [
            f"{column[stage]:.2f} s, {column[stage] / total:.0%}" if stage in column else ""
            for column, total in zip(columns, totals, strict=True)
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| all | {' | '.join(f'{total:.2f} s' for total in totals)} |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and put it into the README of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        settings = settings_of(options)
        set_threads(options.threads)
        tell_faiss_the_processor()
        with tempfile.TemporaryDirectory(prefix="patchcore-shares-") as folder:
            material = Material(settings, Path(folder))
            table = markdown_shares(reference_shares(material), toolkit_shares(material))
        table += "\n\n" + environment_line(environment(settings.data_name, settings.threads))
        write_between_markers(table, "shares", options.readme)
        print(table)
    except (ConfigurationError, DataError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
