"""The training images of one class in shares, each read by a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from patchcore.batch_halving import call_in_memory
from patchcore.configs import RuntimeConfig
from patchcore.datasets.inspection import InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import ImageBatches
from patchcore.errors import DataError
from patchcore.launching import Executor, Job
from patchcore.runtime import derive_seed, resolve_device, set_threads

if TYPE_CHECKING:
    from patchcore.class_run import ClassTask

LOGGER = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Crew:
    """Processes that read shares of the training images.

    Attributes:
        executor: Runs them.
        runtime: How they compute, threads and precision settled.
        num_shares: Shares of the images of a class.
    """

    executor: Executor
    runtime: RuntimeConfig
    num_shares: int

    def shares(self, task: ClassTask, train: InspectionDataset, seed: int, images_per_pass: int) -> ClassShares:
        """Divide the training images of a class at random, into parts that differ by one image at most.

        Raises:
            DataError: There are fewer images than shares.
        """
        if len(train) < self.num_shares:
            raise DataError(
                f"{len(train)} training image(s) for --shards {self.num_shares}, expected one for each share at "
                "least: use fewer shares"
            )
        drawn = torch.Generator().manual_seed(derive_seed(seed, train.category, "shards"))
        order = torch.randperm(len(train), generator=drawn)
        images = [part.sort().values for part in order.tensor_split(self.num_shares)]
        logs = task.folder / "logs"
        return ClassShares(self, train, images, images_per_pass, task.dataset.num_workers, logs, seed)


@dataclass(frozen=True)
class ClassShares:
    """Images of a class in shares, as `detector.ImageShares` describes them.

    Attributes:
        crew: What reads them.
        train: All training images.
        images: Numbers of the images of each share, int64 [n].
        images_per_pass: Images that the network gets at once.
        num_workers: Threads that read images.
        logs: Folder of the logs.
        seed: Seed of the run, for their names.
    """

    crew: Crew
    train: InspectionDataset
    images: Sequence[torch.Tensor]
    images_per_pass: int
    num_workers: int
    logs: Path
    seed: int

    @property
    def runtime(self) -> RuntimeConfig:
        return self.crew.runtime

    def map(self, calls: Iterable[tuple[int, Callable[[ImageBatches], R]]]) -> Iterator[tuple[int, R]]:
        """Call functions with shares, each in a process that has room for it.

        Args:
            calls: Number of a share, and what to call with its images.

        Yields:
            Number of the share and the result, as they come.

        Raises:
            DataError: An image cannot be used, or a process was lost again and again.
        """
        jobs = (self._job(share, call) for share, call in calls)
        with closing(self.crew.executor.run(jobs)) as ended:
            for end in ended:
                if end.lost:
                    raise DataError(f"share {end.key}: {end.lost}")
                yield end.key, end.value

    def _job(self, share: int, call: Callable[[ImageBatches], R]) -> Job:
        part = self.train.subset(self.images[share].tolist())
        log = self.logs / f"{self.train.category}_{self.seed}_share{share}.log"
        read = ReadShare(part, self.images_per_pass, self.num_workers, self.runtime, call)
        return Job(share, f"{self.train.category}, share {share}", log, read)


@dataclass(frozen=True)
class ReadShare:
    """Calls a function with some images, in whichever process.

    Attributes:
        part: The images.
        images_per_pass: How many of them the network gets at once.
        num_workers: Threads that read images.
        runtime: How the process computes.
        call: The function.
    """

    part: InspectionDataset
    images_per_pass: int
    num_workers: int
    runtime: RuntimeConfig
    call: Callable[[ImageBatches], object]

    def __call__(self) -> object:
        LOGGER.debug("%s: %d images, from %s", self.part.category, len(self.part), self.part.records[0].path)
        set_threads(self.runtime.threads)
        pinned = resolve_device(self.runtime.device, self.runtime.gpus, warn=False).type == "cuda"

        def loader_of(batch_size: int) -> ImageLoader:
            return ImageLoader(self.part, batch_size, self.num_workers, pinned)

        batch_size = min(self.images_per_pass, len(self.part))
        return call_in_memory(self.call, loader_of, batch_size, self.part.category)
