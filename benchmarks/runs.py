"""Rows of whole runs, by the commands as a user types them: fit, predict, calibration, start."""

from __future__ import annotations

import contextlib
import csv
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import oracles
import torch
from material import SEED, Material, Settings, alternating, in_own_process, timed
from reference import ReferencePatchCore, ReferenceScores, all_metrics
from results import Row

from patchcore.cli import run_patchcore
from patchcore.datasets.inspection import DatasetSplit
from patchcore.memory.points import Points
from patchcore.runtime import set_threads
from patchcore.storage.model_folder import read_model_header

REPOSITORY = Path(__file__).parents[1]
BARE_BATCH = 8
SMALL_PERCENTAGE = 0.01
SAME_SCORES = 1e-4
AUROCS = ("instance_auroc", "full_pixel_auroc")
HELP_SECONDS = 0.5


class CommandFailed(RuntimeError):
    """A command did not end with exit code 0."""


@dataclass(frozen=True)
class Run:
    """What a command left in its run folder.

    Attributes:
        folder: The run folder.
        row: Name of the class in its tables.
    """

    folder: Path
    row: str

    def table(self, name: str) -> dict[str, float]:
        """Return {column: value} of the class in a table, without blank cells."""
        with (self.folder / name).open(newline="", encoding="utf-8") as file:
            rows = {row.pop("Row Names"): row for row in csv.DictReader(file)}
        return {column: float(value) for column, value in rows[self.row].items() if value}

    @property
    def timings(self) -> dict[str, float]:
        return self.table("timings.csv")

    @property
    def metrics(self) -> dict[str, float]:
        return self.table("results.csv")

    @property
    def scores(self) -> np.ndarray:
        """Return the image scores float64 [N] in the order of the test images."""
        with (self.folder / "anomaly_scores" / f"{self.row}.csv").open(newline="", encoding="utf-8") as file:
            return np.array([float(row["score"]) for row in csv.DictReader(file)])

    @property
    def model(self) -> Path:
        return self.folder / "models" / self.row


def call(command: click.Command, *arguments: object) -> str:
    """Run a command in this process and return the last line that it prints.

    Raises:
        CommandFailed: Its exit code is not 0.
    """
    out = io.StringIO()
    threads = torch.get_num_threads()
    code: object = 0
    with contextlib.redirect_stdout(out):
        try:
            command.main([str(a) for a in arguments], prog_name=command.name)
        except SystemExit as ended:
            code = ended.code
    torch.set_num_threads(threads)
    if code:
        raise CommandFailed(f"{command.name} {' '.join(map(str, arguments))}: exit code {code}")
    return out.getvalue().splitlines()[-1]


def train(material: Material, group: str, *options: object, percentage: float | None = None) -> Run:
    """Train and evaluate with the command, and return its run folder.

    Args:
        material: What to train on.
        group: Name of the run.
        options: Further options, of any step.
        percentage: Share of the patches in the memory bank; None takes that of the settings.
    """
    s = material.settings
    layers = [part for layer in s.backbone.layers for part in ("-le", layer)]
    last = call(
        run_patchcore, "--device", "cpu", "--threads", s.threads, "--seed", SEED, "--log_group", group,
        material.folder / "runs", "patch_core", "-b", s.backbone.name, *layers, "--weights", s.backbone.weights,
        "--anomaly_scorer_num_nn", 1, *options,
        "sampler", "-p", percentage or s.percentage, "approx_greedy_coreset",
        "dataset", "--resize", s.preprocessing.resize_px, "--imagesize", s.preprocessing.imagesize_px,
        "-d", s.category, "mpdd", s.data,
    )  # fmt: skip
    return Run(Path(last.removeprefix("results: ")), f"mpdd_{s.category}")


def evaluate(material: Material, model: Path, *options: object) -> Run:
    """Evaluate a stored model with the command, in a process of its own, and return the folder of its tables.

    Raises:
        CommandFailed: Its exit code is not 0.
    """
    s = material.settings
    arguments = [
        REPOSITORY / "bin" / "load_and_evaluate_patchcore.py", "--device", "cpu", "--threads", s.threads,
        material.folder / "evaluated", "patch_core_loader", "-p", model, *options,
        "dataset", "-d", s.category, "mpdd", s.data,
    ]  # fmt: skip
    ended = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CommandFailed(f"{' '.join(map(str, arguments))}: exit code {ended.returncode}: {ended.stderr[-500:]}")
    return Run(Path(ended.stdout.splitlines()[-1].removeprefix("results: ")), f"mpdd_{s.category}")


def reference_detector(material: Material) -> ReferencePatchCore:
    """Return the published loop, not fitted."""
    s = material.settings
    return ReferencePatchCore(material.network(), s.backbone.layers, material.num_workers, s.threads)


def fit(material: Material) -> list[Row]:
    """Measure a whole fit from files, calibration apart."""
    s = material.settings
    images = material.reference_images(DatasetSplit.TRAIN)
    published = reference_detector(material)
    runs: list[Run] = []

    def toolkit() -> float:
        runs.append(train(material, "fit", "--calibration", "none"))
        return runs[-1].timings["train_seconds"]

    def loop() -> None:
        published.fit(images, s.percentage, material.generator("coreset"), material.generator("selection"))

    seconds = alternating({"ours": toolkit, "reference": timed(loop)}, s.rounds, "fit", warm_up=False)
    theirs = _metrics_of(material, published.predict(material.reference_images(DatasetSplit.TEST)))
    ours = runs[-1].metrics
    difference = max(abs(ours[name] - theirs[name]) for name in AUROCS)
    return [
        Row(
            "fit",
            f"fit of {len(images)} images, whole, calibration apart",
            "s",
            seconds["ours"],
            seconds["reference"],
            "the published loop",
            seconds["reference"] / seconds["ours"],
            at_least=9,
            condition="AUROC, image and pixel, within 0.002",
            measured=f"{difference:.4f} apart: " + ", ".join(f"{ours[n]:.4f} and {theirs[n]:.4f}" for n in AUROCS),
            holds=difference <= 0.002,
        )
    ]


def _metrics_of(material: Material, found: ReferenceScores) -> dict[str, float]:
    return all_metrics(found.scores, material.labels, found.maps, found.masks)


def bare_seconds(settings: Settings, folder: Path) -> float:
    """Return how long it takes to decode, resize and crop the test images and run the backbone on them, s."""
    set_threads(settings.threads)
    material = Material(settings, folder)
    images = material.reference_images(DatasetSplit.TEST)
    backbone = material.hooked_backbone()

    def run() -> None:
        for start in range(0, len(images), BARE_BATCH):
            batch = [images.image(i) for i in range(start, min(start + BARE_BATCH, len(images)))]
            backbone(torch.stack(batch))

    return timed(run)()


def published_seconds(settings: Settings, folder: Path, model: Path) -> tuple[float, np.ndarray]:
    """Return how long the published loop takes for the test images, s, and their scores [N]."""
    set_threads(settings.threads)
    material = Material(settings, folder)
    images = material.reference_images(DatasetSplit.TEST)
    published = reference_detector(material)
    published.set_bank(material.stored_bank(model))
    found: list[ReferenceScores] = []
    return timed(lambda: found.append(published.predict(images)))(), found[0].scores


def predict(material: Material) -> list[Row]:
    """Measure scoring from files, without metrics: by stored models with a small and a large bank.

    Every run is a process of its own, as commands are.
    """
    s = material.settings
    small = train(
        material, "small", "--calibration", "none", "--save_patchcore_model", percentage=SMALL_PERCENTAGE
    ).model
    large = train(material, "large", "--calibration", "none", "--save_patchcore_model").model
    expected: list[np.ndarray] = []
    variants = {
        "small": (small, ()),
        "flat": (large, ()),
        "projected": (large, ("--index", "projected")),
        "auto": (large, ("--index", "projected", "--precision", "auto")),
    }
    runs: dict[str, Run] = {}

    def toolkit(name: str) -> Callable[[], float]:
        def run() -> float:
            model, options = variants[name]
            runs[name] = evaluate(material, model, *options)
            return 1 / runs[name].timings["images_per_second"]

        return run

    def loop() -> float:
        seconds, scores = in_own_process(published_seconds, s, material.folder, large)
        expected[:] = [scores]
        return seconds

    work = {
        "bare": lambda: in_own_process(bare_seconds, s, material.folder),
        "reference": loop,
        **{name: toolkit(name) for name in variants},
    }
    seconds = alternating(work, s.rounds, "predict", warm_up=False)
    rate = {name: 1 / seconds[name] for name in variants}
    rate |= {name: len(material.labels) / seconds[name] for name in ("bare", "reference")}
    difference = float(np.max(np.abs(runs["flat"].scores / expected[0] - 1)))
    return [
        _predict_row(
            "predict_small",
            f"predict from files, {SMALL_PERCENTAGE:.0%} bank",
            rate["small"],
            rate["bare"],
            "decode, resize and backbone alone",
            0.7,
        ),
        _predict_row(
            "predict_flat",
            f"predict from files, {s.percentage:.0%} bank",
            rate["flat"],
            rate["reference"],
            "the published loop",
            None,
            condition=f"scores equal to {SAME_SCORES:g}",
            measured=f"largest relative difference {difference:.1e}",
            holds=difference <= SAME_SCORES,
        ),
        _variant_row("projected", "--index projected", rate, runs, s.percentage, 2, 0.001),
        _variant_row("auto", "--index projected --precision auto", rate, runs, s.percentage, 2.7, 0.002),
    ]


def _predict_row(
    name: str,
    stage: str,
    ours: float,
    reference: float,
    compared_with: str,
    at_least: float | None,
    condition: str = "",
    measured: str = "",
    holds: bool = True,
) -> Row:
    return Row(
        name,
        stage,
        "images/s",
        ours,
        reference,
        compared_with,
        ours / reference,
        at_least,
        condition=condition,
        measured=measured,
        holds=holds,
    )


def _variant_row(
    name: str,
    options: str,
    rate: dict[str, float],
    runs: dict[str, Run],
    percentage: float,
    at_least: float,
    tolerance: float,
) -> Row:
    """Return the row of a way to score that may differ from flat search in float32 by a little."""
    flat, other = runs["flat"].metrics, runs[name].metrics
    difference = max(abs(flat[column] - other[column]) for column in AUROCS)
    return _predict_row(
        f"predict_{name}",
        f"predict from files, {percentage:.0%} bank, `{options}`",
        rate[name],
        rate["reference"],
        "the published loop",
        at_least,
        condition=f"AUROC, image and pixel, within {tolerance:g} of flat float32",
        measured=f"{difference:.4f} apart",
        holds=difference <= tolerance,
    )


def calibration(material: Material) -> list[Row]:
    """Measure the calibration beside the fit that it belongs to."""
    runs: list[Run] = []

    def once() -> float:
        runs.append(train(material, "calibrated", "--save_patchcore_model"))
        return runs[-1].timings["calibration_seconds"]

    seconds = alternating({"ours": once}, material.settings.rounds, "calibration", warm_up=False)
    fit_seconds = float(np.median([run.timings["train_seconds"] for run in runs]))
    header = read_model_header(runs[-1].model).calibration
    assert header is not None and header.pixel is not None
    ours = dict(zip(oracles.THRESHOLD_PARTS, (header.image.threshold, header.pixel.threshold), strict=True))
    expected = exact_thresholds(material)
    difference = max(abs(ours[part] / expected[part] - 1) for part in oracles.THRESHOLD_PARTS)
    return [
        Row(
            "calibration",
            "calibration",
            "s",
            seconds["ours"],
            fit_seconds,
            "the fit that it belongs to",
            seconds["ours"] / fit_seconds,
            at_most=2,
            condition=f"thresholds equal to {SAME_SCORES:g} of flat search in each fold",
            measured=f"largest relative difference {difference:.1e}",
            holds=difference <= SAME_SCORES,
        )
    ]


def exact_thresholds(material: Material) -> dict[str, float]:
    """Return the thresholds that flat search gives with a bank for each fold, chosen without the fold's images."""
    s = material.settings
    embeddings = material.embeddings
    points = material.points(embeddings).view(*embeddings.shape[:2], -1)  # [N, P, R]
    folds = oracles.fold_images(len(embeddings), SEED, s.category)
    sampler = material.detector().sampler
    banks = []
    for number, fold in enumerate(folds):
        rest = np.setdiff1d(np.arange(len(embeddings)), fold)
        picks = sampler.select_reduced(Points(points[rest].flatten(0, 1)), material.generator("fold", number))
        banks.append(embeddings[rest].flatten(0, 1)[picks].numpy())
    return oracles.out_of_fold_thresholds(embeddings, banks, folds, s.preprocessing.imagesize_px)


def start(material: Material) -> list[Row]:
    """Measure what costs time before any work: the help, and a finished class that is passed over."""
    script = REPOSITORY / "bin" / "run_patchcore.py"

    def show_help() -> None:
        subprocess.run([sys.executable, str(script), "--help"], check=True, capture_output=True)

    options = ("--calibration", "none", "--skip_existing")
    seconds = {"run": timed(lambda: train(material, "finished", *options))()}
    results = Run(material.folder / "runs" / "project" / "finished", f"mpdd_{material.settings.category}").metrics
    again: list[Run] = []
    seconds |= alternating(
        {"help": timed(show_help), "again": timed(lambda: again.append(train(material, "finished", *options)))},
        material.settings.rounds,
        "start",
    )
    return [
        Row(
            "help",
            "`bin/run_patchcore.py --help`",
            "s",
            seconds["help"],
            HELP_SECONDS,
            "the limit",
            HELP_SECONDS / seconds["help"],
            at_least=1,
        ),
        Row(
            "skip_existing",
            "`--skip_existing`, class finished before",
            "s",
            seconds["again"],
            seconds["run"],
            "the run itself",
            seconds["run"] / seconds["again"],
            condition="same table",
            measured="the same" if again[-1].metrics == results else "another",
            holds=again[-1].metrics == results,
        ),
    ]
