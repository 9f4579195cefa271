"""Exported PatchCore models in onnxruntime beside the toolkit: time, size and what each form costs.

    python benchmarks/export.py --data /path/to/mpdd --category metal_plate

prints a line for the toolkit and for each file: images in memory, resized and cropped, in batches of 1 and 8. Ranges of
int8 are learned from training images. A second table says what it changes that a file resizes and crops itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from material import BATCH_SIZE, Material, Settings, alternating, demo_data, timed
from PIL import Image

from patchcore.datasets.images import crop_image, place, read_image
from patchcore.datasets.inspection import DatasetSplit
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.metrics import image_metrics, pixel_metrics
from patchcore.model_export import CALIBRATION_IMAGES, exported_model
from patchcore.runtime import progress, set_threads
from patchcore.storage.export import INPUT, MAP, SCORE, onnx_model, write_onnx
from patchcore.storage.export_int8 import in_8_bits
from patchcore.storage.export_resize import with_resize

ODD_SIZE = 700, 500  # width and height, px

Scored = tuple[np.ndarray, np.ndarray]
"""Scores [B] and maps [B, S, S]."""


def export_table(material: Material) -> str:
    """Return a Markdown table of the toolkit and of each exported file."""
    toolkit = material.fitted
    images = material.test_images.numpy()

    def predict(batch: np.ndarray) -> Scored:
        found = toolkit.predict(torch.from_numpy(batch))
        assert found.maps is not None
        return found.scores, found.maps

    scorers: dict[str, Callable[[np.ndarray], Scored]] = {"toolkit": predict}
    sizes = {"toolkit": ""}
    for name, path in exported_files(material).items():
        scorers[name] = scorer(path, material.settings.threads)
        sizes[name] = f"{path.stat().st_size / 1e6:.1f}"
    seconds = {size: per_image(scorers, images, size, material.settings.rounds) for size in (1, BATCH_SIZE)}
    lines = [
        f"{material.settings.data_name}, {material.settings.threads} threads, {len(images)} test images",
        "",
        "| | file, MB | ms/image, batches of 1 | of 8 | largest change of a score | image AUROC | pixel AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    expected = all_of(predict, images)[0]
    first: list[float] = []
    for name, score in scorers.items():
        scores, maps = all_of(score, images)
        metrics = [image_metrics(scores, material.labels).auroc, pixel_metrics(maps, material.masks).auroc]
        aurocs = [value for value in metrics if value is not None]
        first = first or aurocs
        compared = " | ".join(
            f"{value:.4f} ({value - of_toolkit:+.4f})" for value, of_toolkit in zip(aurocs, first, strict=True)
        )
        change = np.abs(scores / expected - 1).max()
        times = " | ".join(f"{1000 * of_size[name]:.1f}" for of_size in seconds.values())
        lines.append(f"| {name} | {sizes[name]} | {times} | {change:.1e} | {compared} |")
    return "\n".join(lines)


def resize_table(material: Material) -> str:
    """Return a Markdown table of what it changes that a file resizes and crops itself, instead of Pillow.

    The test images are taken as they are, and resampled to a size that resize and crop do not divide.
    """
    material.folder.mkdir(parents=True, exist_ok=True)
    model = onnx_model(exported_model(material.fitted))
    cropped = scorer(write_onnx(model, material.folder / "cropped.onnx")[-1], material.settings.threads)
    whole = scorer(write_onnx(with_resize(model), material.folder / "any_size.onnx")[-1], material.settings.threads)
    lines = [
        "| `--resize_in_graph`, images of | change of a score, highest and median | of a map, of its highest value | "
        "image AUROC |",
        "|---|---|---|---|",
    ]
    for what, size in (("their own size", None), (f"{ODD_SIZE[0]} x {ODD_SIZE[1]} px", ODD_SIZE)):
        found: list[tuple[float, float]] = []
        of_maps: list[float] = []
        for record in progress(material.dataset(DatasetSplit.TEST).records, what):
            image = read_image(record.path)
            image = image if size is None else image.resize(size, Image.Resampling.BICUBIC)
            placement = place(image.height, image.width, material.settings.preprocessing)
            (score, anomaly_map), (own_score, own_map) = (
                run(np.asarray(pixels).transpose(2, 0, 1)[None])
                for run, pixels in ((cropped, crop_image(image, placement)), (whole, image))
            )
            found.append((float(score[0]), float(own_score[0])))
            of_maps.append(float(np.abs(own_map - anomaly_map).max() / anomaly_map.max()))
        scores = np.array(found)
        changes = np.abs(scores[:, 1] / scores[:, 0] - 1)
        aurocs = [image_metrics(column, material.labels).auroc for column in scores.T]
        told = " and ".join("" if value is None else f"{value:.4f}" for value in aurocs)
        lines.append(f"| {what} | {changes.max():.1e}, {np.median(changes):.1e} | {max(of_maps):.1e} | {told} |")
    return "\n".join(lines)


def exported_files(material: Material) -> dict[str, Path]:
    """Return the files of the model, by what they compute with."""
    model = onnx_model(exported_model(material.fitted))
    every = -(-len(material.train_images) // CALIBRATION_IMAGES)
    models: dict[str, onnx.ModelProto] = {
        "float32": model,
        "int8": in_8_bits(model, list(material.train_images[::every].numpy())),
    }
    material.folder.mkdir(parents=True, exist_ok=True)
    return {name: write_onnx(content, material.folder / f"{name}.onnx")[-1] for name, content in models.items()}


def scorer(path: Path, threads: int) -> Callable[[np.ndarray], Scored]:
    """Return what scores batches uint8 [B, 3, S, S] with a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would slow the next one down
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: tuple(session.run([SCORE, MAP], {INPUT: batch}))


def all_of(score: Callable[[np.ndarray], Scored], images: np.ndarray) -> Scored:
    """Return scores and maps of all images."""
    parts = [score(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([maps for _, maps in parts])


def per_image(
    scorers: dict[str, Callable[[np.ndarray], Scored]], images: np.ndarray, size: int, rounds: int
) -> dict[str, float]:
    """Return the median time per image in batches of a size, s; the scorers run in turn."""
    batch = images[:size]
    work = {name: timed(lambda score=score: score(batch)) for name, score in scorers.items()}
    return {name: taken / len(batch) for name, taken in alternating(work, 5 * rounds, f"batches of {size}").items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="Folder of the data set, in the layout of MPDD; the demo set's if none."
    )
    parser.add_argument("--category", required=True, help="Class.")
    parser.add_argument("--percentage", type=float, default=0.1, help="Share of the patches in the memory bank.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch and of onnxruntime.")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    try:
        data = options.data or demo_data(Path("demo/data"), options.category)
        settings = Settings(
            data, options.category, options.category, threads=options.threads, percentage=options.percentage
        )
        with tempfile.TemporaryDirectory() as folder:
            material = Material(settings, Path(folder))
            print(f"{export_table(material)}\n\n{resize_table(material)}")
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
