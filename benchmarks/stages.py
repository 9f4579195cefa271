"""Rows of single stages: coreset, embedding, metrics, pictures."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

import numpy as np
import oracles
import reference
import torch
from material import Material, alternating, in_own_process, timed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Row

from patchcore.datasets.inspection import DatasetSplit
from patchcore.evaluation.plots.pictures import FAST_COMPRESSION, Caption, HeatScale, png_bytes, segmentation_picture
from patchcore.evaluation.summary import class_metrics
from patchcore.features.patches import PooledEmbedding
from patchcore.memory.points import Points
from patchcore.memory.sampler import ApproximateGreedyCoresetSampler, num_selected
from patchcore.runtime import in_threads, peak_memory_megabytes, reset_peak_memory, set_threads
from patchcore.storage.files import write_bytes

LARGE_IMAGES = 209  # of MVTec AD bottle: 163,856 patches
MAX_EXTRA_MEMORY = 0.15
MIN_OVERLAP = 0.999
EMBEDDED_MAPS = ((512, 28), (1024, 14))  # channels and side of layer2 and layer3 of a WideResNet50
EMBEDDED_IMAGES = 8
PICTURES = 24


def coreset(material: Material) -> list[Row]:
    """Measure the coreset of the training images."""
    return [_coreset_row("coreset", material, material.points(material.embeddings), 30, None)]


def coreset_large(material: Material) -> list[Row]:
    """Measure the coreset of as many images as a class of MVTec AD has: the training images and turned copies."""
    images = turned(material.train_images, LARGE_IMAGES)
    points = material.points(material.embedded(images))
    return [_coreset_row("coreset_large", material, points, 25, MAX_EXTRA_MEMORY)]


def turned(images: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to `count` images: those given [N, 3, S, S], then mirrored and turned by quarters, no view twice."""
    views = [torch.rot90(side, quarter, (2, 3)) for quarter in range(4) for side in (images, images.flip(3))]
    return torch.cat(views)[:count]


def _coreset_row(
    name: str, material: Material, points: torch.Tensor, at_least: float, max_extra_memory: float | None
) -> Row:
    settings = material.settings
    num_points = len(points)
    num_picks = num_selected(num_points, settings.percentage)
    steps = min(settings.reference_steps, num_picks)
    starts = reference.start_rows(num_points, material.generator("selection"))
    sampler = ApproximateGreedyCoresetSampler(settings.percentage)
    work = {
        "ours": timed(lambda: sampler.select_reduced(Points(points), material.generator("selection"))),
        "reference": timed(lambda: reference.greedy_coreset(points, starts, steps)),
    }
    seconds = alternating(work, settings.rounds, name, warm_up=False)
    whole = seconds["reference"] * num_picks / steps
    picks = sampler.select_reduced(Points(points), material.generator("selection")).numpy()
    shared = oracles.overlap(picks, oracles.greedy_in_float64(points, starts, num_picks))
    extra = _extra_memory(points, settings.percentage, settings.threads)
    limit = "" if max_extra_memory is None else f"; extra memory <= {max_extra_memory:.0%} of the points"
    return Row(
        name,
        f"coreset {num_points:,} x {points.shape[1]} -> {num_picks:,}",
        "s",
        seconds["ours"],
        whole,
        "norms anew in every step",
        whole / seconds["ours"],
        at_least=at_least,
        condition=f"overlap with a float64 per-step oracle >= {MIN_OVERLAP}" + limit,
        measured=f"overlap {shared:.4f}; extra memory {extra:.1%} of the points",
        holds=shared >= MIN_OVERLAP and (max_extra_memory is None or extra <= max_extra_memory),
        note="" if steps == num_picks else f"reference: {steps:,} of {num_picks:,} steps, extrapolated",
    )


def _extra_memory(points: torch.Tensor, percentage: float, threads: int) -> float:
    """Return the share of its points that the selection needs beside them: median of the peaks of three processes.

    One in six peaks is 6 MB higher than the others, as the system hands out memory.
    """
    peaks = [in_own_process(_peak_of_selection, points.numpy(), percentage, threads) for _ in range(3)]
    return statistics.median(peaks) / points.numpy().nbytes


def _peak_of_selection(points: np.ndarray, percentage: float, threads: int) -> float:
    """Return how far the memory of this process rises during a selection, bytes."""
    set_threads(threads)
    held = torch.from_numpy(points)
    sampler = ApproximateGreedyCoresetSampler(percentage)
    sampler.select_reduced(Points(held[:2000]), torch.Generator())  # libraries allocate their buffers once
    reset_peak_memory()
    before = peak_memory_megabytes()
    sampler.select_reduced(Points(held), torch.Generator())
    return 1e6 * (peak_memory_megabytes() - before)


def embedding(material: Material) -> list[Row]:
    """Measure the published embedding of random maps of the size that a WideResNet50 gives for 224 px."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(EMBEDDED_IMAGES, channels, side, side) for channels, side in EMBEDDED_MAPS]
    maps = [torch.rand(shape, generator=generator) for shape in shapes]
    ours = PooledEmbedding([channels for channels, _ in EMBEDDED_MAPS], (3,), 1024, 1024)
    pairs = list(zip(*(m.split(reference.BATCH_SIZE) for m in maps), strict=True))

    @torch.inference_mode()
    def toolkit() -> torch.Tensor:
        return ours(maps)

    def published() -> np.ndarray:
        return np.concatenate([np.asarray(reference.as_arrays(reference.embed(pair))) for pair in pairs])

    seconds = alternating(
        {"ours": timed(toolkit), "reference": timed(published)}, material.settings.rounds, "embedding"
    )
    difference = float(np.abs(toolkit().flatten(0, 2).numpy() - published()).max())
    return [
        Row(
            "embedding",
            "embedding, 512x28x28 + 1024x14x14 -> 1024",
            "ms/image",
            1000 * seconds["ours"] / EMBEDDED_IMAGES,
            1000 * seconds["reference"] / EMBEDDED_IMAGES,
            "unfold, resize of nine taps, adaptive poolings",
            seconds["reference"] / seconds["ours"],
            at_least=20,
            condition="equal to 1e-5",
            measured=f"largest difference {difference:.1e}",
            holds=difference <= 1e-5,
        )
    ]


def metrics(material: Material) -> list[Row]:
    """Measure all columns of results.csv from the scores and maps of the test images."""
    labels = material.labels
    arguments = (material.prediction.scores, labels, material.maps, material.masks)
    work = {
        "ours": timed(lambda: class_metrics(*arguments, None)),
        "reference": timed(lambda: reference.all_metrics(*arguments)),
    }
    seconds = alternating(work, material.settings.rounds, "metrics", warm_up=False)
    ours, theirs = class_metrics(*arguments, None), reference.all_metrics(*arguments)
    difference = max(abs(value - _number(ours[name])) for name, value in theirs.items())
    return [
        Row(
            "metrics",
            f"metrics of {len(labels)} images, all columns",
            "s",
            seconds["ours"],
            seconds["reference"],
            "curves of scikit-learn over all pixels",
            seconds["reference"] / seconds["ours"],
            at_least=10,
            condition="equal to scikit-learn to 1e-9, PRO by its weighted ROC curve",
            measured=f"largest difference {difference:.1e}",
            holds=difference <= 1e-9,
        )
    ]


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


def pictures(material: Material) -> list[Row]:
    """Measure the pictures of test images beside one matplotlib figure for each."""
    num_images = len(material.labels)
    chosen = np.linspace(0, num_images - 1, min(PICTURES, num_images)).astype(int).tolist()
    work = {
        "ours": timed(lambda: write_pictures(material, chosen)),
        "reference": timed(lambda: write_figures(material, chosen)),
    }
    write_pictures(material, chosen[:1])  # makes what it shows, outside the clock
    seconds = alternating(work, material.settings.rounds, "pictures", warm_up=False)
    sizes = [path.stat().st_size for path in (material.folder / "pictures").glob("*.png")]
    return [
        Row(
            "pictures",
            "segmentation pictures, written to disk",
            "ms/image",
            1000 * seconds["ours"] / len(chosen),
            1000 * seconds["reference"] / len(chosen),
            "one matplotlib figure per image",
            seconds["reference"] / seconds["ours"],
            at_least=5,
            condition="looks as good",
            measured=f"image, mask and map, with scale, threshold and caption; up to {max(sizes) / 1000:.0f} kB",
        )
    ]


def write_pictures(material: Material, chosen: Sequence[int]) -> None:
    """Write the pictures of some test images as a run does."""
    maps, scores, records = material.maps, material.prediction.scores, material.dataset(DatasetSplit.TEST).records
    images = material.test_images.permute(0, 2, 3, 1).numpy()  # [N, S, S, 3]
    scale = HeatScale.up_to_threshold(float(maps.mean()), float(maps.max()) / 1.5)

    def write(i: int) -> None:
        caption = Caption(records[i].path.name, records[i].defect_type, float(scores[i]), scale.threshold)
        picture = segmentation_picture(images[i], material.masks[i], maps[i], scale, caption)
        write_bytes(material.folder / "pictures" / f"{i:03d}.png", png_bytes(picture, FAST_COMPRESSION))

    for _ in in_threads(write, chosen):
        pass


def write_figures(material: Material, chosen: Sequence[int]) -> None:
    """Write a matplotlib figure for each of some test images."""
    images = material.test_images.permute(0, 2, 3, 1).numpy()  # [N, S, S, 3]
    for i in chosen:
        figure = reference_figure(images[i], material.masks[i], material.maps[i])
        write_bytes(material.folder / "figures" / f"{i:03d}.png", figure)


def reference_figure(image: np.ndarray, mask: np.ndarray, anomaly_map: np.ndarray) -> bytes:
    """Return a PNG of image, mask and map side by side, as one draws it with matplotlib.

    Args:
        image: uint8 [S, S, 3].
        mask: uint8 [S, S].
        anomaly_map: float [S, S].
    """
    figure = Figure(figsize=(9, 3))
    FigureCanvasAgg(figure)
    for axes, picture in zip(figure.subplots(1, 3), (image, mask, anomaly_map), strict=True):
        axes.imshow(picture)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
