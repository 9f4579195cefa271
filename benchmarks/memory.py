"""Memory and time of training PatchCore on many images, with and without --memory_budget.

The images are rendered; the rest is what `run_patchcore.py` does, in a process of its own for each measurement.
Memory is the anonymous memory of that process, which is what a program cannot give back: pages of files, the
memory-mapped features among them, can be taken from it at any time. A thread reads it every few milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from patchcore.cli.byte_size import ByteSize
from patchcore.configs import (
    BackboneConfig,
    DemoConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
from patchcore.datasets.demo import render_demo_dataset
from patchcore.datasets.inspection import DatasetSplit
from patchcore.datasets.loader import ImageLoader
from patchcore.datasets.mpdd import MPDDDataset
from patchcore.detector import TrainingPlan
from patchcore.memory.buffers import FLOAT_BYTES, Buffers
from patchcore.methods.patchcore import PatchCore
from patchcore.methods.training_features import embed_images
from patchcore.runtime import available_cpus, set_threads

CATEGORY = "metal_plate"
READING_INTERVAL_S = 0.005
BACKBONE = BackboneConfig("efficientnet_lite0", ("blocks.2", "blocks.4"))


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        data: Folder of the rendered data set.
        scratch: Folder for the features above the budget.
        num_images: Training images.
        percentage: Share of the patches in the memory bank.
        budget_bytes: --memory_budget; None for none.
        calibrate: Whether the thresholds are learned too.
        threads: Of torch.
        batch_size: Images per batch.
        imagesize: Side of the images, px.
        backbone: Network and layers.
    """

    data: Path
    scratch: Path
    num_images: int
    percentage: float
    budget_bytes: int | None
    calibrate: bool
    threads: int
    batch_size: int = 8
    imagesize: int = 224
    backbone: BackboneConfig = BACKBONE


@dataclass(frozen=True)
class Measurement:
    """What a case took.

    Attributes:
        num_patches: Patches of all images.
        feature_bytes: Size of their embeddings.
        projection_bytes: Size of their projection.
        bank_bytes: Size of the memory bank.
        embed_seconds: Images to embeddings.
        coreset_seconds: Embeddings to memory bank.
        calibration_seconds: Memory bank to thresholds; 0 where they were left out.
        fit_peak_bytes: Largest anonymous memory before calibration, above that of the process with the model loaded.
        peak_bytes: The same with calibration.
        digest: Of the memory bank and the thresholds.
    """

    num_patches: int
    feature_bytes: int
    projection_bytes: int
    bank_bytes: int
    embed_seconds: float
    coreset_seconds: float
    calibration_seconds: float
    fit_peak_bytes: int
    peak_bytes: int
    digest: str


class AnonymousMemory:
    """Largest anonymous memory of this process while the context lasts, above that at its start, bytes."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self._before = self._peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(READING_INTERVAL_S):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the resident anonymous memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def measure(case: Case) -> Measurement:
    """Train, and calibrate if asked for, in this process."""
    set_threads(case.threads)
    preprocessing = PreprocessingConfig(case.imagesize, case.imagesize)
    images = MPDDDataset(case.data, CATEGORY, DatasetSplit.TRAIN, preprocessing, limit=case.num_images)
    loader = ImageLoader(images, case.batch_size, available_cpus())
    config = PatchCoreConfig(case.backbone, SamplerConfig("approx_greedy_coreset", case.percentage), num_nn=1)
    runtime = RuntimeConfig("cpu", threads=case.threads, memory_budget_bytes=case.budget_bytes)
    build = PatchCore.prepare(config, preprocessing, runtime)
    detector = build(TrainingSource("demo", CATEGORY, 0), torch.device("cpu"))
    assert isinstance(detector, PatchCore)
    detector.plan = TrainingPlan(scratch_folder=case.scratch)
    with AnonymousMemory() as memory:  # what `fit` does, with a clock between its halves
        started = time.perf_counter()
        buffers = Buffers(case.budget_bytes, case.scratch)
        embedded = embed_images(loader, [detector], buffers, "features")
        embeddings = embedded.embeddings[detector.embedder]
        num_patches, dimension = embeddings.shape[0] * embeddings.shape[1], embeddings.shape[2]
        projection_bytes = embedded.projection.nbytes
        embedded_at = time.perf_counter()
        detector.fit_embeddings(embedded)
        del embedded, embeddings
        fitted, fit_peak = time.perf_counter(), memory.peak_bytes
        calibration = detector.out_of_fold_calibration() if case.calibrate else None
        detector.release_training_data()
        calibrated = time.perf_counter()
    digest = hashlib.sha256(detector.memory_bank_.numpy().tobytes() + repr(calibration).encode()).hexdigest()
    return Measurement(
        num_patches,
        num_patches * dimension * FLOAT_BYTES,
        projection_bytes,
        detector.memory_bank_.nbytes,
        embedded_at - started,
        fitted - embedded_at,
        calibrated - fitted,
        fit_peak,
        memory.peak_bytes,
        digest,
    )


def measure_apart(case: Case) -> Measurement:
    """Measure a case in a process of its own, which has held nothing before."""
    # No multiprocessing.Pool: its processes may not start those that read images.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def rendered(folder: Path, num_images: int, image_px: int = 256) -> Path:
    """Render training images where they are not yet there, and return the folder of the set."""
    return render_demo_dataset(folder / f"rendered_{num_images}", DemoConfig((CATEGORY,), image_px, num_images, 0, 0))


def table_row(case: Case, found: Measurement) -> str:
    """Return the line of the table for a measurement."""
    held = found.feature_bytes + found.projection_bytes
    limit = held if case.budget_bytes is None else case.budget_bytes
    budget = "none" if case.budget_bytes is None else f"{case.budget_bytes / 1e6:,.0f} MB"
    cells = [
        budget,
        f"{case.num_images:,}",
        f"{found.num_patches:,}",
        f"{found.feature_bytes / 1e6:,.0f}",
        f"{found.projection_bytes / 1e6:,.0f}",
        f"{found.bank_bytes / 1e6:,.0f}",
        f"{found.fit_peak_bytes / 1e6:,.0f}",
        f"{found.peak_bytes / 1e6:,.0f}",
        f"{found.peak_bytes / limit:.2f}",
        f"{found.embed_seconds:.1f}",
        f"{found.coreset_seconds:.1f}",
        f"{found.calibration_seconds:.1f}" if case.calibrate else "",
        found.digest[:8],
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| --memory_budget | images | patches | features, MB | projection, MB | bank, MB | peak of fit, MB | peak, MB | "
    "peak / budget, or / features + projection | features, s | coreset, s | calibration, s | bank and thresholds |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--percentage", type=float, default=0.01, help="share of the patches in the memory bank")
    parser.add_argument(
        "--budget", action="append", help="repeatable, such as 1GB; none measures without a budget (default: 1GB)"
    )
    parser.add_argument("--no_calibration", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for images and features, on a disk; images stay in a named one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(dir=Path.cwd(), prefix="memory_benchmark_"))
    try:
        data = rendered(folder, options.images)
        print(f"{BACKBONE.name}, share of {options.percentage:g}, {options.threads} thread(s)\n\n{HEADER}")
        print("|" + "---|" * HEADER.count(" | ") + "---|")
        for budget in options.budget or ["1GB"]:
            num_bytes = None if budget == "none" else ByteSize().convert(budget, None, None)
            case = Case(
                data, folder, options.images, options.percentage, num_bytes, not options.no_calibration, options.threads
            )
            print(table_row(case, measure_apart(case)), flush=True)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
