"""Configurations of a run: where it writes, on what it runs, what it leaves."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from patchcore.configs.checks import require_at_least, require_choice
from patchcore.configs.launching import LaunchConfig
from patchcore.configs.thresholds import F1, MEAN_3_STD, ThresholdRule
from patchcore.errors import ConfigurationError

CALIBRATION_METHODS = ("none", "kfold", "split")
BACKBONE_PRECISIONS = ("float32", "bf16", "fp16", "auto")


@dataclass(frozen=True)
class RuntimeConfig:
    """How this machine computes; part of the machine, not of the model.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        gpus: GPU indices, of which the first is used.
        threads: Threads of CPU kernels; None leaves torch's choice.
        precision: Numbers that the frozen backbone computes with, one of BACKBONE_PRECISIONS.
        memory_budget_bytes: How much of the features is held in memory, the rest in files; None holds all of them.
        faiss_on_gpu: Search on the GPU where faiss was built for it.
        faiss_num_workers: Search with faiss on so many CPU threads, at most one per core; None searches with torch,
            which finds the same.
    """

    device: str = "auto"
    gpus: tuple[int, ...] = (0,)
    threads: int | None = None
    precision: str = "float32"
    memory_budget_bytes: int | None = None
    faiss_on_gpu: bool = False
    faiss_num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            require_at_least("--threads", self.threads, 1)
        if self.faiss_num_workers is not None:
            require_at_least("--faiss_num_workers", self.faiss_num_workers, 1)
        if self.memory_budget_bytes is not None:
            require_at_least("--memory_budget", self.memory_budget_bytes, 1)
        require_choice("--precision", self.precision, BACKBONE_PRECISIONS)
        for gpu in self.gpus:
            require_at_least("--gpu", gpu, 0)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", self.device):
            raise ConfigurationError(f"--device {self.device!r} is unknown, expected auto, cpu, cuda, cuda:N or mps")


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
        threshold_rule: How the thresholds are chosen from there.
        validation_path: Folder of good and defective images in the layout of the data set, whose classes' `test` and
            `ground_truth` choose the thresholds of the rule "f1"; None for the other rules.
        outputs: Optional files.
        skip_existing: Reuse exactly the named run folder and do only what is missing.
        runtime: Device and threads.
        tracking: Experiment trackers.
        epochs: What happens between the epochs of a training.
        launch: Where the tasks of the run, one per class and seed, execute.
    """

    results_path: str
    log_project: str = "project"
    log_group: str = "group"
    seeds: tuple[int, ...] = (0,)
    calibration: str = "kfold"
    threshold_rule: ThresholdRule = field(default_factory=ThresholdRule)
    validation_path: str | None = None
    outputs: OutputConfig = field(default_factory=OutputConfig)
    skip_existing: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    epochs: EpochConfig = field(default_factory=EpochConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.launch.require_machine(self.runtime.device, self.runtime.gpus, self.runtime.threads)
        require_choice("calibration", self.calibration, CALIBRATION_METHODS)
        self._require_rule_with_data()
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

    def _require_rule_with_data(self) -> None:
        """Raise ConfigurationError for a threshold rule without its scores, or data without their rule."""
        rule = self.threshold_rule
        if self.validation_path is not None and not self.validation_path.strip():
            raise ConfigurationError("--validation_data is empty, expected the path of a folder")
        if self.calibration == "none" and rule.name != MEAN_3_STD:
            raise ConfigurationError(
                f"--threshold_rule {rule} chooses thresholds, --calibration none leaves them out: use kfold or split"
            )
        if rule.name == F1 and self.validation_path is None:
            raise ConfigurationError(
                "--threshold_rule f1 needs labelled images that are neither trained nor tested on: give "
                "--validation_data PATH with <class>/test/good, <class>/test/<defect type> and "
                "<class>/ground_truth, or use another rule"
            )
        if rule.name != F1 and self.validation_path is not None:
            raise ConfigurationError(
                f"--validation_data {self.validation_path!r} chooses the thresholds of --threshold_rule f1, found "
                f"{rule}: type f1 or leave --validation_data out"
            )
