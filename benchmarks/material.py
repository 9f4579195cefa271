"""What the rows are measured on: one class of a data set, its features, and the alternating clock."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from reference import HookedBackbone, ReferenceImages

from patchcore.configs import (
    DEMO_CATEGORIES,
    BackboneConfig,
    DatasetConfig,
    DemoConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
from patchcore.datasets.demo import render_demo_dataset
from patchcore.datasets.inspection import DatasetSplit, InspectionDataset, resolve_categories
from patchcore.datasets.loader import ImageLoader
from patchcore.datasets.mpdd import MPDDDataset
from patchcore.detector import Prediction
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import load_backbone
from patchcore.methods.patchcore import PatchCore
from patchcore.runtime import available_cpus, derive_seed, progress
from patchcore.storage.model_folder import read_model_tensors

T = TypeVar("T")
SEED = 0
BATCH_SIZE = 8


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often.

    Attributes:
        data: Folder that holds the class, in the layout of MPDD.
        category: The class.
        data_name: What the table calls the data.
        threads: Of torch and faiss.
        rounds: Alternating repetitions, of which the median counts.
        backbone: With two layers; the same weights on both sides.
        percentage: Share of the patches in the memory bank.
        preprocessing: Resize and crop.
        reference_steps: Steps of a coreset of the reference that are run; the time of the rest is extrapolated.
    """

    data: Path
    category: str
    data_name: str
    threads: int = 2
    rounds: int = 3
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig("efficientnet_lite0", ("blocks.2", "blocks.4"))
    )
    percentage: float = 0.1
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    reference_steps: int = 500


def demo_data(folder: Path, category: str) -> Path:
    """Render the demo data set where it is not yet there, and return its folder.

    Raises:
        ConfigurationError: The demo set has no such class.
    """
    if category not in DEMO_CATEGORIES:
        raise ConfigurationError(
            f"--category {category!r} is none of the demo set ({', '.join(DEMO_CATEGORIES)}): name its data with --data"
        )
    return render_demo_dataset(folder, DemoConfig())


class Material:
    """The class under measurement; what is expensive is made when first asked for.

    Args:
        settings: What is measured.
        folder: Where runs, models and pictures go.

    Raises:
        ConfigurationError: There is no such class, or it has no images to train or test on.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        resolve_categories(DatasetConfig("mpdd", str(settings.data), (settings.category,)), MPDDDataset.categories)
        self.settings = settings
        self.folder = folder
        self.config = PatchCoreConfig(
            settings.backbone, SamplerConfig("approx_greedy_coreset", settings.percentage), num_nn=1
        )
        self.runtime = RuntimeConfig("cpu", threads=settings.threads)

    def dataset(self, split: DatasetSplit) -> InspectionDataset:
        """Return the images of a split as the toolkit reads them."""
        s = self.settings
        return MPDDDataset(str(s.data), s.category, split, s.preprocessing)

    def loader(self, split: DatasetSplit) -> ImageLoader:
        """Return the images of a split in batches."""
        return ImageLoader(self.dataset(split), BATCH_SIZE, self.num_workers)

    def reference_images(self, split: DatasetSplit) -> ReferenceImages:
        """Return the same images as the reference reads them, in the same order."""
        records = self.dataset(split).records
        size = self.settings.preprocessing
        return ReferenceImages(
            [r.path for r in records], [r.mask_path for r in records], size.resize_px, size.imagesize_px
        )

    def network(self) -> torch.nn.Module:
        """Return the backbone with its weights, as it comes from its package."""
        backbone = self.settings.backbone
        return load_backbone(backbone.name, backbone.weights, backbone.seed).module

    def hooked_backbone(self) -> HookedBackbone:
        """Return the reference's backbone."""
        return HookedBackbone(self.network(), self.settings.backbone.layers)

    @property
    def num_workers(self) -> int:
        """Return how many processes read images, on both sides."""
        return min(self.settings.threads, available_cpus())

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return random numbers as the toolkit's model of this class draws them for a purpose."""
        return torch.Generator().manual_seed(derive_seed(SEED, self.settings.category, *purpose))

    def detector(self) -> PatchCore:
        """Return the toolkit's detector, not fitted."""
        build = PatchCore.prepare(self.config, self.settings.preprocessing, self.runtime)
        detector = build(TrainingSource("mpdd", self.settings.category, SEED), torch.device("cpu"))
        assert isinstance(detector, PatchCore)
        return detector

    @cached_property
    def train_images(self) -> torch.Tensor:
        """Return the training images uint8 [N, 3, S, S]."""
        return torch.cat([batch["image"] for batch in self.loader(DatasetSplit.TRAIN)])

    @cached_property
    def embeddings(self) -> torch.Tensor:
        """Return the patch embeddings float32 [N, P, D] of the training images."""
        return self.embedded(self.train_images)

    def embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patch embeddings float32 [N, P, D] of images uint8 [N, 3, S, S]."""
        embedder = self.detector().embedder
        batches = progress(images.split(BATCH_SIZE), "features", total=-(-len(images) // BATCH_SIZE))
        return torch.cat([embedder(embedder.extractor(batch)) for batch in batches])

    def points(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what the coreset of embeddings [N, P, D] is chosen from, float32 [N * P, 128]."""
        return self.detector().sampler.reduce(embeddings.flatten(0, 1), self.generator("coreset"))[:]

    @cached_property
    def fitted(self) -> PatchCore:
        """Return the toolkit's detector, fitted on the training images."""
        detector = self.detector().fit(self.loader(DatasetSplit.TRAIN))
        detector.release_training_data()
        return detector

    @cached_property
    def prediction(self) -> Prediction:
        """Return scores and maps of the test images by the toolkit."""
        detector = self.fitted
        parts = [detector.predict(batch["image"]) for batch in self.loader(DatasetSplit.TEST)]
        return detector.join(parts)

    @property
    def maps(self) -> np.ndarray:
        """Return the anomaly maps float32 [N, S, S] of the test images by the toolkit."""
        maps = self.prediction.maps
        assert maps is not None
        return maps

    @cached_property
    def test_images(self) -> torch.Tensor:
        """Return the test images uint8 [N, 3, S, S]."""
        return torch.cat([batch["image"] for batch in self.loader(DatasetSplit.TEST)])

    @cached_property
    def masks(self) -> np.ndarray:
        """Return the masks uint8 [N, S, S] of the test images.

        Raises:
            ConfigurationError: The class has none.
        """
        dataset = self.dataset(DatasetSplit.TEST)
        if not dataset.has_masks:
            raise ConfigurationError(f"class {self.settings.category!r} has no ground truth, which pixel metrics need")
        return np.concatenate([batch["mask"].numpy() for batch in self.loader(DatasetSplit.TEST)])

    @cached_property
    def labels(self) -> np.ndarray:
        """Return bool [N], True for the anomalous test images."""
        return np.array([record.is_anomalous for record in self.dataset(DatasetSplit.TEST).records])

    def stored_bank(self, model_folder: Path) -> np.ndarray:
        """Return the memory bank float32 [M, D] of a stored model."""
        return read_model_tensors(model_folder)["memory_bank"].numpy()


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of a module in a fresh process: what ran here before it leaves threads and memory behind."""
    context = multiprocessing.get_context("spawn")  # a forked process shares all that
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # its processes may have children, those of a Pool not
        return pool.submit(_called, multiprocessing.get_start_method(), function, *arguments).result()


def _called(start_method: str, function: Callable[..., T], *arguments: object) -> T:
    """Call a function where further processes start as in a program that a user starts."""
    multiprocessing.set_start_method(start_method, force=True)  # it would be that by which this one was started
    return function(*arguments)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that does the work and returns how long it took, s."""

    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def alternating(
    work: Mapping[str, Callable[[], float]], rounds: int, what: str, warm_up: bool = True
) -> dict[str, float]:
    """Run several things in turn, so that other work on the machine meets them alike, and return their medians, s.

    Args:
        work: What returns seconds, by name: of `timed`, or by its own clock.
        rounds: How often.
        what: What is going on, for the progress bar.
        warm_up: Whether a round goes before that does not count; of what takes seconds it would tell little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    total = rounds + warm_up
    with progress(None, what, total=total * len(work)) as bar:
        for number in range(total):
            for name, run in work.items():
                taken = run()
                bar.update(1)
                if number >= warm_up:
                    seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
