"""More normal images for a stored PatchCore, or for each member of an ensemble.

The greedy selection goes on from the stored memory bank, whose patches count as picked. The thresholds are learned anew
from the stored normal scores and those of the new images, each by a bank that has none of its patches.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from patchcore.configs import RuntimeConfig
from patchcore.configs.thresholds import F1, ThresholdRule
from patchcore.detector import AnomalyDetector
from patchcore.digests import sha256_of_tensors
from patchcore.errors import ConfigurationError, DataError
from patchcore.inference.detector import prepared_image
from patchcore.inference.inputs import find_inputs, require_inputs
from patchcore.memory.buffers import Buffers
from patchcore.memory.continued_coreset import continued_selection
from patchcore.methods.ensemble import Ensemble
from patchcore.methods.patchcore import PatchCore, PatchEmbedder
from patchcore.methods.training_features import embed_images
from patchcore.prediction import StoredModel, prepare_stored, read_header
from patchcore.runtime import available_cpus, derive_seed, progress, resolve_device, set_threads
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate, fold_bounds
from patchcore.scoring.thresholds import highest_quantile, images_needed, with_rule
from patchcore.storage.files import write_new_folder
from patchcore.storage.folder_lock import FolderInUseError, locked
from patchcore.storage.legacy import is_original_folder

BANK = "memory_bank"
KEPT_FOLDER = "before_update"  # not beside the model: scripts take every folder there for a model of the run


@dataclass(frozen=True)
class UpdateJob:
    """Which model learns which images, and where it goes.

    Attributes:
        model: Folder of a PatchCore, or of an ensemble.
        inputs: Normal images: files, folders and globs.
        out: Folder of the new model, which must not exist; None puts it in the place of the old one, which is kept.
        runtime: How the machine computes.
        batch_size: Images that the model takes at once.
        threshold_rule: How the new thresholds are chosen; None for the rule of the model.
    """

    model: Path
    inputs: tuple[str, ...]
    out: Path | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    batch_size: int = 8
    threshold_rule: ThresholdRule | None = None


class _Images:
    """Images in memory, in batches."""

    def __init__(self, images: torch.Tensor, batch_size: int) -> None:
        self.images = images  # uint8 [N, 3, S, S]
        self.batch_size = batch_size

    @property
    def num_images(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.images.split(self.batch_size):
            yield {"image": batch}


def update_model(job: UpdateJob, announce: Callable[[str], None]) -> Path:
    """Add normal images to a stored model.

    Args:
        job: Which model, which images.
        announce: Receives lines for a person.

    Returns:
        Folder of the new model, or of the old one if it knows all images; the old one is whole at every moment, under
        its name or in `before_update`.

    Raises:
        ConfigurationError: Wrong arguments, or a model that cannot learn more.
        DataError: An image cannot be read; nothing was changed.
    """
    require_inputs(job.inputs, None, may_be_empty=False)
    if job.out is not None and job.out.exists():
        raise ConfigurationError(f"--out {str(job.out)!r} exists, expected a new name: nothing is replaced")
    set_threads(job.runtime.threads)
    with _no_other_update(job):
        update = _Update(job)
        images_by_digest = _read_images(job, update.detector, announce)
        if not images_by_digest:
            announce("nothing to do: the model is as it was")
            return job.model
        images = torch.stack(list(images_by_digest.values()))
        update.require_enough(len(images))
        updated, num_picked = update.with_images(images)
        updated.learned_images_ = (*update.detector.learned_images_, *images_by_digest)
        _say_what_was_learned(update.detector, updated, len(images), num_picked, announce)
        return _save(updated, job, announce)


@contextmanager
def _no_other_update(job: UpdateJob) -> Iterator[None]:
    """Keep other updates of the model out from reading to writing, else one would lose what the other has learned."""
    model = job.model.resolve()
    with ExitStack() as locks:
        if job.out is None and model.is_dir():
            try:
                locks.enter_context(locked(model.parent, _lock_name(model)))
            except FolderInUseError as error:
                raise ConfigurationError(
                    f"model {str(job.model)!r} is being updated by another process: wait for its end, or type --out"
                ) from error
        yield


def _lock_name(model: Path) -> str:
    return f".{model.name[:60]}.lock"  # at most 246 bytes of the 255 that a name may have


def _save(updated: AnomalyDetector, job: UpdateJob, announce: Callable[[str], None]) -> Path:
    """Write the new model and return its folder; one that it replaces is kept first."""
    target = job.out or job.model.resolve()  # a link goes on leading to the model
    kept = _keep(target) if job.out is None else None
    try:
        updated.save(target)
    except Exception:  # the model is as it was: a copy would say that it is not. After Ctrl-C nobody knows: it stays
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):
                kept.parent.rmdir()
        raise
    if kept is not None:
        announce(f"the model before: {kept}")
    announce(f"model: {target}")
    return target


class _Update:
    """A stored model with what makes others of its configuration.

    Raises:
        ConfigurationError: The model is damaged, of another method, or keeps no patches that more could be added to.
    """

    def __init__(self, job: UpdateJob) -> None:
        if job.model.is_file():
            raise ConfigurationError(f"{str(job.model)!r} is a file, expected a model folder: exports are not updated")
        if is_original_folder(job.model):
            raise ConfigurationError(
                f"{str(job.model)!r} was written by the original repository, which stores neither the share of patches "
                "that its bank keeps nor thresholds: train the model anew with all images"
            )
        header = read_header(job.model)
        assert header is not None  # of a folder there is one
        if header.method not in (PatchCore.method, Ensemble.method):
            raise ConfigurationError(
                f"model {str(job.model)!r} is of method {header.method!r}, which keeps no memory bank that images "
                "could be added to: train it anew with all images"
            )
        builder = prepare_stored(header, str(job.model), job.runtime)
        self.batch_size = job.batch_size
        self.rule = job.threshold_rule
        stored_rule = header.calibration.rule if header.calibration is not None else None
        if stored_rule is not None and (self.rule or stored_rule).name == F1:
            raise ConfigurationError(
                f"model {str(job.model)!r}: the rule {F1} needs labelled validation images, which an update has not: "
                "type --threshold_rule mean3std or quantile:Q"
            )
        if self.rule is not None and header.calibration is None:
            raise ConfigurationError(
                f"--threshold_rule {self.rule} was typed, but model {str(job.model)!r} was stored without calibration: "
                "leave --threshold_rule out"
            )
        device = resolve_device(job.runtime.device, job.runtime.gpus)
        self._new: Callable[[], AnomalyDetector] = lambda: builder(header.source, device)
        self.detector = StoredModel(job.model, header, builder).restore(device)
        self.tensors = self.detector.tensors()
        detector = self.detector
        self.members: list[PatchCore] = (
            detector.members
            if isinstance(detector, Ensemble)
            else [detector]
            if isinstance(detector, PatchCore)
            else []
        )
        self.bank_names = [name for name in self.tensors if name.rpartition("/")[2] == BANK]
        whole = all(self.tensors[name].dtype == torch.float32 for name in self.bank_names)
        if len(self.bank_names) != len(self.members) or not whole:
            raise ConfigurationError(
                f"model {str(job.model)!r} keeps its memory bank in a compressed index, which cannot grow: train it "
                "anew with all images, or with --index flat"
            )

    def require_enough(self, num_images: int) -> None:
        """Raise ConfigurationError unless the typed quantile can be had of the stored scores and so many new ones."""
        calibration, quantile = self.detector.calibration_, self.rule.quantile if self.rule else None
        if calibration is None or quantile is None:
            return
        total = len(calibration.image_scores) + num_images
        if total < images_needed(quantile):
            raise ConfigurationError(
                f"--threshold_rule {self.rule} needs {images_needed(quantile)} normal images, there are {total} with "
                f"the {num_images} new ones: type at most quantile:{highest_quantile(total)}, or give more images"
            )

    def with_images(self, images: torch.Tensor) -> tuple[AnomalyDetector, int]:
        """Return the model that has learned more images uint8 [N, 3, S, S], and how many patches it took over."""
        embeddings = self._embeddings(images)
        updated = self._with_patches(embeddings, torch.arange(len(images)), "all")
        calibration = self.detector.calibration_
        updated.calibration_ = calibration and self._calibration(calibration, images, embeddings)
        learned = updated.tensors()
        return updated, sum(len(learned[name]) - len(self.tensors[name]) for name in self.bank_names)

    def _embeddings(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the patch embeddings float32 [N, P, D] for each member; members that embed alike share them."""
        batches = _Images(images, self.batch_size)
        by_embedder: dict[PatchEmbedder, torch.Tensor] = {}
        for member in self.members:
            if member.embedder not in by_embedder:
                embedded = embed_images(batches, [member], Buffers(), "new images: features")
                by_embedder[member.embedder] = embedded.embeddings[member.embedder]
        return [by_embedder[member.embedder] for member in self.members]

    def _with_patches(self, embeddings: list[torch.Tensor], rows: torch.Tensor, purpose: str | int) -> AnomalyDetector:
        """Return the model whose banks have taken over patches of some of the new images."""
        banks: dict[str, torch.Tensor] = {}
        for name, member, of_member in zip(self.bank_names, self.members, embeddings, strict=True):
            bank, features = self.tensors[name].cpu(), of_member[rows].flatten(0, 1)
            source = self.detector.source
            seed = derive_seed(source.seed, source.category, "update", len(bank), name, purpose)
            chosen = continued_selection(member.sampler, bank, features, torch.Generator().manual_seed(seed))
            banks[name] = torch.cat([bank, features[chosen]])
        detector = self._new()
        detector.restore({**self.tensors, **banks})
        return detector

    def _calibration(self, stored: Calibration, images: torch.Tensor, embeddings: list[torch.Tensor]) -> Calibration:
        """Learn the thresholds from the stored normal scores and those of the new images.

        Each new image is scored by the stored bank and patches of the other new ones. The stored scores are kept as
        they are: their images are not there any more, and with more patches in the bank they could only be lower.
        """
        folds = fold_bounds(len(images)) or [(0, 1)]  # one image: by the stored bank alone
        scores: list[np.ndarray] = []
        maps: list[MapStatistics] = []
        for number, (start, end) in enumerate(progress(folds, "calibration")):
            rest = torch.cat([torch.arange(start), torch.arange(end, len(images))])
            detector = self._with_patches(embeddings, rest, number) if len(rest) else self.detector
            for batch in images[start:end].split(self.batch_size):
                prediction = detector.predict(batch)
                assert prediction.maps is not None  # of a memory bank there are always maps
                scores.append(prediction.scores)
                maps.append(MapStatistics.of([prediction.maps]))
        assert stored.map_maxima is not None and stored.pixel_floor is not None
        floors = np.full(len(stored.map_maxima), stored.pixel_floor)
        joined = calibrate(
            stored.method,
            stored.num_folds + len(folds),
            np.concatenate([stored.image_scores, *scores]),
            MapStatistics(
                np.concatenate([stored.map_maxima, *(m.maxima for m in maps)]),
                np.concatenate([floors, *(m.means for m in maps)]),
            ),
        )
        return with_rule(joined, self.rule or stored.rule)


def _read_images(job: UpdateJob, detector: AnomalyDetector, announce: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Return the images that the model has not learned yet, as it sees them: uint8 [3, S, S] by digest.

    The patches of an image that was learned are in the bank: its score is near 0 and would pull the thresholds down.

    Raises:
        DataError: One cannot be read: a model learns all images that were named, or none.
    """
    paths = [file.path for file in find_inputs(job.inputs, None)]
    known, num_known = set(detector.learned_images_), 0
    images: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(available_cpus()) as pool:
        reading = pool.map(lambda path: _pixels(path, detector), paths)
        for image in progress(reading, "new images", total=len(paths)):
            if isinstance(image, DataError):
                pool.shutdown(cancel_futures=True)
                raise image
            digest, pixels = image
            if digest in known:
                num_known += 1
            else:
                images[digest] = pixels
    num_repeated = len(paths) - num_known - len(images)
    if num_known:
        announce(f"{num_known} images were learned before: left out")
    if num_repeated:
        announce(f"{num_repeated} images repeat others of this call: left out")
    return images


def _pixels(path: Path, detector: AnomalyDetector) -> tuple[str, torch.Tensor] | DataError:
    """Return the digest of a decoded image, which is that of every copy of it, and what the model sees of it."""
    try:
        prepared = prepared_image(path, detector, None)
    except DataError as error:
        return error
    return sha256_of_tensors({"image": torch.from_numpy(np.array(prepared.image))}), prepared.pixels


def _say_what_was_learned(
    before: AnomalyDetector, after: AnomalyDetector, num_images: int, num_picked: int, announce: Callable[[str], None]
) -> None:
    announce(f"{num_images} images learned, {num_picked} patches added to the memory bank")
    old, new = before.calibration_, after.calibration_
    if old is None or new is None:
        announce("the model has no thresholds, and none were learned: it was stored without calibration")
    else:
        announce(f"image threshold {old.image.threshold:.5g} before, {new.image.threshold:.5g} now")


def _keep(model: Path) -> Path:
    """Copy a model folder to where it is kept, and return that place."""
    folder = model.parent / KEPT_FOLDER
    numbered = (folder / f"{model.name}-{number}" for number in itertools.count(1))

    def fill(temporary: Path) -> None:
        shutil.copytree(model, temporary, dirs_exist_ok=True)

    return write_new_folder((path for path in numbered if not path.exists()), fill)
