"""Frozen configurations of data sets, methods and runs.

A configuration is complete and valid once it is constructed.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from patchcore.errors import ConfigurationError

RESIZE_MODES = ("shorter", "square", "letterbox")
EMBEDDINGS = ("pooled", "concat")
NORMALIZATIONS = ("imagenet", "backbone")
DEMO_CATEGORIES = ("metal_plate", "bracket_black", "bracket_brown", "bracket_white")
CALIBRATION_METHODS = ("none", "kfold", "split")
MAX_LIST_LENGTH = 250  # of the known names in a message, characters: three lines
MAX_SEED = 2**63 - 1  # what torch takes
PATCH_SCORES = ("max", "mean", "topk")
SCORE_NORMALIZATIONS = ("calibrated", "minmax")
SCHEDULES = ("constant", "cosine", "one_cycle")
MAP_MODES = ("nll", "prob", "weighted")
IMAGE_SCORES = ("max", "mean", "topk")
PRECISIONS = ("float32", "bfloat16")


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for a mistyped name, or the known names where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = names
    while len(", ".join(shown)) > MAX_LIST_LENGTH:
        shown = shown[:-1]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"known: {', '.join(shown)}{more}"


def require_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigurationError with near matches unless `value` is one of the known names."""
    names = list(known)
    if value not in names:
        raise ConfigurationError(f"unknown {what} {value!r}: {near_matches(value, names)}")


def require_at_least(what: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Raise ConfigurationError unless `value` is `minimum` or more, and at most `maximum` where there is one."""
    if value < minimum:
        raise ConfigurationError(f"{what} is {value}, expected {minimum} or more")
    if maximum is not None and value > maximum:
        raise ConfigurationError(f"{what} is {value}, expected {maximum} or less")


def require_fraction(what: str, value: float) -> None:
    """Raise ConfigurationError unless `value` lies in (0, 1]."""
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ConfigurationError(f"{what} is {value}, expected a share in (0, 1], for example 0.1 for 10 %")


def require_positive(what: str, value: float) -> None:
    """Raise ConfigurationError unless `value` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{what} is {value}, expected a number above 0")


def require_not_negative(what: str, value: float) -> None:
    """Raise ConfigurationError unless `value` is a finite number, 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(f"{what} is {value}, expected a number of 0 or more")


@dataclass(frozen=True)
class PreprocessingConfig:
    """From an image file to the square that a detector sees.

    Attributes:
        resize_px: Length that the resize gives: of the shorter side ("shorter"), of both sides ("square") or
            of the longer side, the rest padded ("letterbox").
        imagesize_px: Side of the square cut from the centre afterwards, <= resize_px.
        resize_mode: One of RESIZE_MODES.
    """

    resize_px: int = 256
    imagesize_px: int = 224
    resize_mode: str = "shorter"

    def __post_init__(self) -> None:
        require_choice("resize mode", self.resize_mode, RESIZE_MODES)
        require_at_least("--imagesize", self.imagesize_px, 32, 8192)
        require_at_least("--resize", self.resize_px, 32, 16384)
        if self.imagesize_px > self.resize_px:
            raise ConfigurationError(
                f"--imagesize {self.imagesize_px} is larger than --resize {self.resize_px}: a crop cannot be larger "
                f"than the resized image, use --resize {self.imagesize_px} or more"
            )


@dataclass(frozen=True)
class DatasetConfig:
    """Which images a run reads, and how.

    Attributes:
        name: Name in the registry of data sets, for example "mpdd".
        path: Folder that holds one folder per class.
        categories: Classes to process; empty means every class found.
        train_val_split: Share of the training images used for training, in (0, 1]; the rest is held out.
        batch_size: Images per batch.
        num_workers: Processes that read images; at most one per CPU core is started, 0 reads in this process.
        preprocessing: Resize and crop.
        limit_train: Use so many training images per class, drawn with the seed; None uses all.
        limit_test: Use so many test images per defect type, the same ones for every seed; None uses all.
    """

    name: str
    path: str
    categories: tuple[str, ...] = ()
    train_val_split: float = 1.0
    batch_size: int = 2
    num_workers: int = 8
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    limit_train: int | None = None
    limit_test: int | None = None

    def __post_init__(self) -> None:
        require_fraction("--train_val_split", self.train_val_split)
        require_at_least("--batch_size", self.batch_size, 1, 65536)
        require_at_least("--num_workers", self.num_workers, 0)
        if self.limit_train is not None:
            require_at_least("--limit_train", self.limit_train, 1)
        if self.limit_test is not None:
            require_at_least("--limit_test", self.limit_test, 1)
        repeated = sorted({c for c in self.categories if self.categories.count(c) > 1})
        if repeated:
            raise ConfigurationError(f"class {', '.join(repeated)} is named more than once: name each -d once")


@dataclass(frozen=True)
class DemoConfig:
    """The rendered demo set.

    Attributes:
        categories: Names from DEMO_CATEGORIES.
        image_size_px: Side of the square images, >= 64.
        num_train: Training images per category, >= 1.
        num_test_good: Good test images per category, >= 0.
        num_test_defect: Test images per defect type, >= 0.
        seed: Same seed, same bytes; >= 0.
    """

    categories: tuple[str, ...] = DEMO_CATEGORIES
    image_size_px: int = 256
    num_train: int = 40
    num_test_good: int = 16
    num_test_defect: int = 10
    seed: int = 0


@dataclass(frozen=True)
class SamplerConfig:
    """How the memory bank is chosen from all training patches.

    Attributes:
        name: Name in the registry of samplers, for example "approx_greedy_coreset".
        percentage: Share of the patches that is kept, in (0, 1].
    """

    name: str = "approx_greedy_coreset"
    percentage: float = 0.1

    def __post_init__(self) -> None:
        require_fraction("sampler --percentage", self.percentage)


@dataclass(frozen=True)
class BackboneConfig:
    """A frozen feature extractor.

    Attributes:
        name: Name in the table of backbones, for example "wideresnet50".
        layers: Modules whose output is used; the first gives the patch grid.
        weights: "pretrained", "random" or the path of a state dict.
        normalization: "imagenet" (as the original, for every backbone) or "backbone" (its own mean and std).
        seed: Seed of random weights.
    """

    name: str
    layers: tuple[str, ...]
    weights: str = "pretrained"
    normalization: str = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("normalization", self.normalization, NORMALIZATIONS)
        require_at_least("seed of random weights", self.seed, 0, MAX_SEED)
        if not self.layers:
            raise ConfigurationError(f"backbone {self.name!r} has no layer: name at least one, such as -le layer2")
        if len(set(self.layers)) < len(self.layers):
            raise ConfigurationError(f"a layer is named twice in {', '.join(self.layers)}: name each -le once")


@dataclass(frozen=True)
class PatchCoreConfig:
    """PatchCore (Roth et al., CVPR 2022), one backbone.

    Attributes:
        backbone: Feature extractor and layers.
        sampler: How the memory bank is chosen.
        embedding: "pooled" (the published one) or "concat" (neighbourhood means, concatenated).
        pretrain_embed_dimension: Channels per layer after the first pooling; "pooled" only.
        target_embed_dimension: Channels of a patch embedding; "pooled" only.
        patchsize: Side of the neighbourhood, odd.
        num_nn: Neighbours whose distances are averaged, k.
        patchsize_aggregate: Sides of further neighbourhoods, odd; the embedding holds all sizes.
        patchscore: What of an image's patch scores is its score: one of PATCH_SCORES.
        score_reweighting: Bank members around the nearest one whose distances re-weight the image score (Eq. 7 of the
            paper), >= 2; None leaves the score as it is.
        seed: Seed of this model's coreset in place of the run's; None takes the run's.
    """

    backbone: BackboneConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    embedding: str = "pooled"
    pretrain_embed_dimension: int = 1024
    target_embed_dimension: int = 1024
    patchsize: int = 3
    num_nn: int = 5
    patchsize_aggregate: tuple[int, ...] = ()
    patchscore: str = "max"
    score_reweighting: int | None = None
    seed: int | None = None

    @property
    def patchsizes(self) -> tuple[int, ...]:
        """All sides of neighbourhoods."""
        return (self.patchsize, *self.patchsize_aggregate)

    def __post_init__(self) -> None:
        require_choice("embedding", self.embedding, EMBEDDINGS)
        require_choice("--patchscore", self.patchscore, PATCH_SCORES)
        require_at_least("--pretrain_embed_dimension", self.pretrain_embed_dimension, 1, 65536)
        require_at_least("--target_embed_dimension", self.target_embed_dimension, 1, 65536)
        require_at_least("--anomaly_scorer_num_nn", self.num_nn, 1)
        self._require_patchsizes()
        if self.score_reweighting is not None:
            require_at_least("--score_reweighting", self.score_reweighting, 2)
            if self.patchscore != "max":
                raise ConfigurationError(
                    f"--score_reweighting weighs the highest patch score, --patchscore {self.patchscore} has no such "
                    "one: leave one of the two out"
                )
        if self.seed is not None:
            require_at_least("seed of a backbone", self.seed, 0, MAX_SEED)
        dimensions = (self.pretrain_embed_dimension, self.target_embed_dimension)
        if self.embedding == "concat" and dimensions != (1024, 1024):
            raise ConfigurationError(
                f"--embedding concat keeps every channel, but dimensions {dimensions[0]} and {dimensions[1]} were "
                "asked for: leave --pretrain_embed_dimension and --target_embed_dimension out, or use pooled"
            )

    def _require_patchsizes(self) -> None:
        further = [("--patchsize_aggregate", size) for size in self.patchsize_aggregate]
        for name, size in [("--patchsize", self.patchsize), *further]:
            require_at_least(name, size, 1, 99)
            if size % 2 == 0:
                raise ConfigurationError(f"{name} is {size}, expected an odd number so that it has a centre")
        if len(set(self.patchsizes)) < len(self.patchsizes):
            raise ConfigurationError(f"patch sizes {self.patchsizes}: one is named twice, name each once")


def _same_model(one: PatchCoreConfig, other: PatchCoreConfig) -> bool:
    """Return whether two members come out alike: no random choice, or the same one, tells them apart."""
    if replace(one, seed=None) != replace(other, seed=None):
        return False
    return one.sampler.name == "identity" or (one.seed is not None and one.seed == other.seed)


@dataclass(frozen=True)
class EnsembleConfig:
    """Several PatchCore models whose scores are averaged.

    Attributes:
        members: The models, two or more.
        score_normalization: How members come to one scale: "calibrated" by normal images, "minmax" over the test
            images that are scored together, as the original does.
    """

    members: tuple[PatchCoreConfig, ...]
    score_normalization: str = "calibrated"

    def __post_init__(self) -> None:
        require_choice("--score_normalization", self.score_normalization, SCORE_NORMALIZATIONS)
        if len(self.members) < 2:
            raise ConfigurationError(
                f"an ensemble of {len(self.members)} member(s), expected two or more: name each -b"
            )
        for (first, one), (second, other) in itertools.combinations(enumerate(self.members), 2):
            if _same_model(one, other):
                raise ConfigurationError(
                    f"members {first} and {second} of the ensemble would be the same model: give one of them another "
                    "backbone, other layers or, with a random or coreset sampler, another .seed-N"
                )


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained by gradients, with Adam.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Highest learning rate of the schedule.
        weight_decay: Decoupled decay of the weights per step, as a share of the learning rate; >= 0.
        schedule: One of SCHEDULES.
        grad_clip: Longest gradient, as a Euclidean norm; None leaves gradients as they are.
        patience: Stop after so many epochs without a lower loss on held-out images, and keep the weights of the lowest;
            None trains all epochs and keeps the last weights.
    """

    epochs: int = 50
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-5
    schedule: str = "one_cycle"
    grad_clip: float | None = 1.0
    patience: int | None = None

    def __post_init__(self) -> None:
        require_at_least("--epochs", self.epochs, 1)
        require_at_least("training batch size", self.batch_size, 1, 65536)
        require_positive("--lr", self.lr)
        require_not_negative("--weight_decay", self.weight_decay)
        require_choice("--schedule", self.schedule, SCHEDULES)
        if self.grad_clip is not None:
            require_positive("--grad_clip", self.grad_clip)
        if self.patience is not None:
            require_at_least("patience of early stopping", self.patience, 1)


@dataclass(frozen=True)
class FastFlowConfig:
    """FastFlow (Yu et al., 2021): one normalizing flow per feature map of a frozen backbone.

    Attributes:
        backbone: Feature extractor and layers, each of which gets a flow.
        flow_steps: Coupling steps per flow.
        hidden_ratio: Hidden channels of a coupling network, as a multiple of its input channels.
        conv3x3_only: Use 3x3 convolutions in every step; otherwise 3x3 and 1x1 in turn.
        clamp: Largest logarithm of a coupling's scale.
        feature_noise: Standard deviation of the Gaussian noise on the standardised features while a flow is trained.
        training: Optimiser and epochs.
        map_mode: How the flows' likelihoods become a map: one of MAP_MODES.
        image_score: What of an image's map is its score: one of IMAGE_SCORES.
        precision: Arithmetic of the coupling networks: "float32", or "bfloat16" where the hardware has it.
        calibration_folds: Trainings that calibration repeats, each without a part of the images, >= 2.
    """

    backbone: BackboneConfig
    flow_steps: int = 8
    hidden_ratio: float = 1.0
    conv3x3_only: bool = False
    clamp: float = 2.0
    feature_noise: float = 0.0
    training: TrainingConfig = field(default_factory=TrainingConfig)
    map_mode: str = "nll"
    image_score: str = "max"
    precision: str = "float32"
    calibration_folds: int = 3

    def __post_init__(self) -> None:
        require_at_least("--flow_steps", self.flow_steps, 1, 64)
        require_positive("--hidden_ratio", self.hidden_ratio)
        require_positive("--clamp", self.clamp)
        require_not_negative("feature noise", self.feature_noise)
        require_choice("--map_mode", self.map_mode, MAP_MODES)
        require_choice("--image_score", self.image_score, IMAGE_SCORES)
        require_choice("precision", self.precision, PRECISIONS)
        require_at_least("calibration folds", self.calibration_folds, 2)


@dataclass(frozen=True)
class SearchConfig:
    """Where neighbours are searched; part of the machine, not of the model.

    Attributes:
        faiss_on_gpu: Search on the GPU where faiss was built for it.
        faiss_num_workers: Search with faiss on so many CPU threads, at most one per core; None searches with torch,
            which finds the same.
    """

    faiss_on_gpu: bool = False
    faiss_num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.faiss_num_workers is not None:
            require_at_least("--faiss_num_workers", self.faiss_num_workers, 1)


@dataclass(frozen=True)
class RuntimeConfig:
    """Device and threads of a run.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        gpus: GPU indices, of which the first is used.
        threads: Threads of CPU kernels; None leaves torch's choice.
    """

    device: str = "auto"
    gpus: tuple[int, ...] = (0,)
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            require_at_least("--threads", self.threads, 1)
        for gpu in self.gpus:
            require_at_least("--gpu", gpu, 0)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", self.device):
            raise ConfigurationError(f"--device {self.device!r} is unknown, expected auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class TrainingSource:
    """What a model was trained on; with the seed it also derives the seeds of every random choice.

    Attributes:
        dataset: Name of the data set.
        category: Class of the part.
        seed: Seed of the run.
    """

    dataset: str = ""
    category: str = ""
    seed: int = 0


@dataclass(frozen=True)
class OutputConfig:
    """Which optional files a run leaves.

    Attributes:
        segmentation_images: One picture per test image.
        models: One model folder per class.
        anomaly_maps: Raw anomaly maps beside the scores.
    """

    segmentation_images: bool = False
    models: bool = False
    anomaly_maps: bool = False


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of a run go besides its folder.

    Attributes:
        wandb: Weights & Biases; the environment variable WANDB_MODE=offline keeps the record in the run folder.
        tensorboard: Event files in the run folder.
    """

    wandb: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class EpochConfig:
    """What a run does between the epochs of a training; none of it changes the model.

    Attributes:
        eval_every: Show test metrics after every so many epochs; None never does.
        checkpoint_every: Write a checkpoint after every so many epochs, from which a killed run goes on; None never
            does.
    """

    eval_every: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--eval_every", self.eval_every), ("--checkpoint_every", self.checkpoint_every)):
            if value is not None:
                require_at_least(option, value, 1)


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, with which seeds, and what.

    Attributes:
        results_path: Folder below which run folders are made.
        log_project: First folder below it.
        log_group: Name of the run folder.
        seeds: One run folder per seed.
        calibration: Where score scale and thresholds come from, one of CALIBRATION_METHODS.
        outputs: Optional files.
        skip_existing: Reuse exactly the named run folder and do only what is missing.
        runtime: Device and threads.
        tracking: Experiment trackers.
        epochs: What happens between the epochs of a training.
    """

    results_path: str
    log_project: str = "project"
    log_group: str = "group"
    seeds: tuple[int, ...] = (0,)
    calibration: str = "kfold"
    outputs: OutputConfig = field(default_factory=OutputConfig)
    skip_existing: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    epochs: EpochConfig = field(default_factory=EpochConfig)

    def __post_init__(self) -> None:
        require_choice("calibration", self.calibration, CALIBRATION_METHODS)
        if not self.results_path.strip():
            raise ConfigurationError("RESULTS_PATH is empty, expected the path of a folder")
        for what, value in (("--log_project", self.log_project), ("--log_group", self.log_group)):
            if not value.strip() or value in (".", "..") or "/" in value or "\\" in value or "\0" in value:
                raise ConfigurationError(f"{what} is {value!r}, expected the plain name of one folder")
            if len(os.fsencode(value)) > 200:  # file systems allow 255 bytes, and numbers are appended
                raise ConfigurationError(f"{what} is longer than 200 bytes, which file systems may refuse: shorten it")
        if not self.seeds:
            raise ConfigurationError("no seed: name at least one --seed")
        for seed in self.seeds:
            require_at_least("--seed", seed, 0)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(f"--seed {' '.join(map(str, self.seeds))}: a seed is named twice")
