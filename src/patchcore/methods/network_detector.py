"""What the detectors that train a network by gradients have in common: caching, training, calibration by folds."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from patchcore.config_json import config_to_dict
from patchcore.configs import PreprocessingConfig, TrainingConfig, TrainingSource
from patchcore.detector import (
    AnomalyDetector,
    ImageBatches,
    NotFittedError,
    Prediction,
    TrainingArtifacts,
    TrainingPlan,
    require_images,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.methods.training import WITHOUT_HELD_OUT, EpochRecord, Training
from patchcore.runtime import derive_seed, progress
from patchcore.scoring.anomaly_map import image_scores
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate

LOGGER = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class TrainingData:
    """What calibration needs of the training images.

    Attributes:
        loader: The images; of several processes those that this one has.
        tensors: What the network was trained on, [R, ...] each.
        image_of_row: Number, among all images, of the image that each row belongs to, int64 [R].
    """

    loader: ImageBatches
    tensors: list[torch.Tensor]
    image_of_row: torch.Tensor


class NetworkDetector(AnomalyDetector, Generic[N]):
    """A detector whose network is trained by gradients on what is kept of the training images.

    A subclass says what is kept of an image, makes the network with its loss, and scores images with it.

    Where several processes train together, each reads images of its own and computes with what it keeps of them. So
    that is in memory once, however many there are; the price is that a batch is divided as its images happen to lie,
    not in equal parts.

    Args:
        training: Optimiser and epochs.
        calibration_folds: Trainings that calibration repeats.
        device: Where the network is.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives weights and order.

    Attributes:
        network_name: What is trained, for the progress bar, messages and seeds.
        kept_name: What is kept of the images, for the progress bar.
        loss_unit: Unit of the loss.
        rows_per_image: Most rows that are kept of an image.
        history_: One record per epoch, learned by `fit`; empty for a stored model.
    """

    network_name: ClassVar[str]
    kept_name: ClassVar[str]
    loss_unit: ClassVar[str]

    def __init__(
        self,
        training: TrainingConfig,
        calibration_folds: int,
        device: torch.device,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.training = training
        self.calibration_folds = calibration_folds
        self.device = device
        self.rows_per_image = 1
        self.history_: list[EpochRecord] = []
        self._network: N | None = None
        self._incomplete: list[torch.Tensor] | None = None  # rows from which the network has still to be completed
        self._training_data: TrainingData | None = None
        self._weights_epoch = 0

    @abstractmethod
    def _rows(self, images: torch.Tensor, first: int) -> tuple[list[torch.Tensor], list[int]]:
        """Return what is kept of images uint8 [B, 3, H, W] to train on.

        Args:
            images: A batch.
            first: Number of its first image among all.

        Returns:
            Tensors [R, ...], and the number of the image that each row belongs to.
        """

    @abstractmethod
    def _new_training(self, rows: Sequence[torch.Tensor], config: TrainingConfig, *purpose: str | int) -> Training:
        """Return a training of a new network, whose statistics are those of some rows."""

    @abstractmethod
    def _score(self, network: N, images: torch.Tensor) -> Prediction:
        """Score images uint8 [B, 3, H, W] by a network; there are maps."""

    def _complete(self, network: N, rows: Sequence[torch.Tensor]) -> None:  # most need nothing
        """Learn what takes a trained network, from the rows that it was trained on."""

    def fit(self, loader: ImageBatches) -> NetworkDetector[N]:
        """Train a network on normal images.

        Args:
            loader: Batches of normal images. The plan's held-out images are kept from the gradients: their loss is in
                the history, and early stopping watches it.

        Raises:
            DataError: There are no images, one cannot be used, or the training diverged.
            ConfigurationError: Early stopping is asked for without held-out images, or the plan resumes another
                training.
        """
        held_out = self.plan.held_out
        if self.training.patience is not None and held_out is None:
            raise ConfigurationError(WITHOUT_HELD_OUT)  # before anything is computed
        held_out_rows = None
        with self.plan.processes.together():
            rows, image_of_row = self._embedded(loader, self.kept_name, self.plan.first_image)
            if held_out is not None:
                what = f"held-out {self.kept_name}"
                held_out_rows, _ = self._embedded(held_out, what, self.plan.first_held_out)
        no_rows = self.plan.processes.from_first([_buffer(tensor, 0) for tensor in rows])  # of who has no images
        rows = rows or no_rows
        self._train(rows, held_out_rows if held_out_rows is None else held_out_rows or no_rows)
        self._training_data = TrainingData(loader, rows, image_of_row)
        return self

    def _train(self, rows: list[torch.Tensor], held_out: list[torch.Tensor] | None) -> None:
        """Train on rows [R, ...]."""
        training = self._new_training(rows, self.training, self.network_name)
        if self.plan.resume_from is not None:
            training.load_state_dict(self.plan.resume_from)
        after_epoch = self.plan.after_epoch

        def report(training: Training, record: EpochRecord) -> None:
            assert after_epoch is not None
            # The detector predicts, for as long as it is asked.
            self._network, self._incomplete = training.module, rows  # type: ignore[assignment]
            with self.plan.processes.together():
                after_epoch(record.epoch, training.state_dict)
            self._network = self._incomplete = None

        self.history_ = training.history  # filled as it goes: what diverges leaves its history too
        training.run(rows, held_out, None if after_epoch is None else report)
        self._network = self._completed(training, rows)
        self._weights_epoch = training.weights_epoch
        if self._weights_epoch < self.training.epochs:
            LOGGER.info(
                "%s: stopped after %d of %d epochs, the model has the weights of epoch %d",
                self.source.category,
                len(self.history_),
                self.training.epochs,
                self._weights_epoch,
            )

    def _embedded(self, loader: ImageBatches, what: str, first: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute what is trained on once: no backbone is trained, and there is no augmentation.

        Args:
            loader: The images of this process.
            what: What is computed, for the progress bar.
            first: Number of the first image among those of all processes.

        Returns:
            Tensors [R, ...] on the CPU, none of them without images; and the number of the image that each row belongs
            to, int64 [R].
        """
        if loader.num_images == 0 and self.plan.processes.is_first:  # it has as many as any other
            raise DataError("no training images, expected at least one")
        most_rows = loader.num_images * self.rows_per_image
        buffers: list[torch.Tensor] = []
        image_of_row: list[int] = []
        num_images = 0
        for batch in progress(loader, f"{self.source.category}: {what}", total=len(loader)):
            parts, image_of_part = self._rows(batch["image"], first + num_images)
            buffers = buffers or [_buffer(part, most_rows) for part in parts]
            chosen = slice(len(image_of_row), len(image_of_row) + len(image_of_part))
            for part, buffer in zip(parts, buffers, strict=True):
                buffer[chosen] = part
            image_of_row += image_of_part
            num_images += len(batch["image"])
        return [buffer[: len(image_of_row)] for buffer in buffers], torch.tensor(image_of_row, dtype=torch.int64)

    def _seed(self, *purpose: str | int) -> int:
        return derive_seed(self.source.seed, self.source.category, *purpose)

    def _training_of(
        self, network: N, batch_loss: Any, config: TrainingConfig, purpose: Sequence[str | int]
    ) -> Training:
        """Return the training of a network by its loss, with the seed of its purpose."""
        description = f"{self.source.category}: {' '.join(map(str, purpose))}"
        seed = self._seed(*purpose, "training")
        return Training(network, batch_loss, config, seed, description, self.plan.processes)

    def _completed(self, training: Training, rows: Sequence[torch.Tensor]) -> N:
        network: N = training.module  # type: ignore[assignment]
        self._complete(network, rows)
        return network

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the training images, each scored by a network that was trained without it.

        Each of a few folds is left out of a training of its own, from the cached rows and for as many epochs as the
        model's own, and scored like new images. K folds cost K - 1 times the training of the model. PatchCore's
        five, or one per image, would cost far more than the model; fewer folds train on fewer images, which makes
        scores and threshold higher, on the safe side of false alarms.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
            DataError: The training of a fold diverged.
        """
        data = self._training_data
        if data is None:
            raise NotFittedError("out-of-fold calibration needs the training data: call it right after fit()")
        processes = self.plan.processes
        num_images = sum(processes.gathered(data.loader.num_images))
        if num_images < 2:
            return None
        fold_of_image = self._folds(num_images)
        num_folds = int(fold_of_image.max()) + 1
        numbers = progress(range(num_folds), f"{self.source.category}: calibration, trainings")
        network_of_fold = [self._fold_network(data, fold_of_image, number) for number in numbers]
        own_fold = fold_of_image[self.plan.first_image :][: data.loader.num_images]
        with processes.together():
            own = self._scored_by_fold(data.loader, network_of_fold, own_fold)
        scores, maxima, means = np.concatenate(processes.gathered(own), axis=1)
        return calibrate("kfold", num_folds, scores, MapStatistics(maxima, means))

    def _scored_by_fold(
        self, loader: ImageBatches, network_of_fold: Sequence[N], fold_of_image: torch.Tensor
    ) -> np.ndarray:
        """Score images, each by the network of its fold.

        Args:
            loader: The images of this process.
            network_of_fold: The network of each fold, trained without it.
            fold_of_image: Fold of each of the images, int64 [N].

        Returns:
            float32 [3, N]: scores, and maxima and means of the maps.
        """
        results = np.empty((3, loader.num_images), dtype=np.float32)
        first = 0
        for batch in progress(loader, f"{self.source.category}: calibration, scoring", total=len(loader)):
            fold_of_row = fold_of_image[first : first + len(batch["image"])]
            for number in fold_of_row.unique().tolist():
                chosen = torch.nonzero(fold_of_row == number)[:, 0]
                prediction = self._score(network_of_fold[number], batch["image"][chosen])
                assert prediction.maps is not None
                statistics = MapStatistics.of([prediction.maps])
                images = (first + chosen).numpy()
                results[:, images] = prediction.scores, statistics.maxima, statistics.means
            first += len(fold_of_row)
        return results

    def _folds(self, num_images: int) -> torch.Tensor:
        """Return the fold of each image, int64 [N]: a random partition into equal parts."""
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(self._seed("folds")))
        fold_of_image = torch.empty(num_images, dtype=torch.int64)
        for number, images in enumerate(order.tensor_split(min(self.calibration_folds, num_images))):
            fold_of_image[images] = number
        return fold_of_image

    def _fold_network(self, data: TrainingData, fold_of_image: torch.Tensor, fold: int) -> N:
        """Return a network trained without the images of a fold, for as many epochs as the model has."""
        kept = torch.nonzero(fold_of_image[data.image_of_row] != fold)[:, 0]
        rows = [tensor[kept] for tensor in data.tensors]
        training = self._new_training(rows, replace(self.training, patience=None), "fold", fold)
        training.run(rows, stop_after=self._weights_epoch)
        return self._completed(training, rows)

    def release_training_data(self) -> None:
        self._training_data = None
        self.plan = TrainingPlan()  # may hold the state of an interrupted training

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images.

        Args:
            images: uint8 [B, 3, S, S], RGB; [B, 3, H, W] where images keep their resolution.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.
            DataError: They are too small.
        """
        network = self._require_fitted()
        require_images(images, self.preprocessing)
        return self._score(network, images)

    def predict_inside(self, images: torch.Tensor, inside: torch.Tensor) -> Prediction:
        prediction = self.predict(images)
        assert prediction.maps is not None  # networks locate what they find
        scores = image_scores(torch.from_numpy(prediction.maps), self._image_score, inside)
        return replace(prediction, scores=scores.numpy())

    @property
    @abstractmethod
    def _image_score(self) -> str:
        """What of an image's map is its score, as `image_scores` names it."""

    def _require_fitted(self) -> N:
        if self._network is None:
            name = type(self).__name__
            raise NotFittedError(f"this {name} has no trained {self.network_name}: call fit() or load a model folder")
        if self._incomplete is not None:
            self._complete(self._network, self._incomplete)
            self._incomplete = None
        return self._network

    def training_artifacts(self, log_group: str) -> TrainingArtifacts:
        """Return the history."""
        return TrainingArtifacts(tuple(config_to_dict(record) for record in self.history_), self.loss_unit)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._require_fitted().state_dict())

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a stored network.

        Raises:
            ConfigurationError: It does not fit the configuration; the message names the tensors.
        """


def _buffer(part: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return room on the CPU for rows like those of a tensor [R, C, H, W]."""
    return torch.empty(num_rows, *part.shape[1:], dtype=part.dtype, memory_format=torch.channels_last)
