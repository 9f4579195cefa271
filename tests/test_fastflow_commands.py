"""Commands of FastFlow as they are typed: the four forms that have to run, and the transformers of the paper."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_category
from in_process import Finished, invoke
from PIL import Image

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow
from patchcore.configs import (
    BackboneConfig,
    FastFlowConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.methods.fastflow import FastFlow
from patchcore.presets import fastflow_backbone
from patchcore.storage.torch_export import read_torch_file

RANDOM = ("--weights", "random")  # pretrained ones would have to be downloaded

TRAINING = """
python bin/run_fastflow.py --log_group FFLOW_IMPROVED_metal_plate_R18 --save_model --save_segmentation_images results/fastflow_improved/metal_plate \\
dataset --category metal_plate $datapath fastflow --backbone resnet18 --use_class_specific
"""  # noqa: E501  # as scripts have it

TILES = """
python bin/run_fastflow.py --gpu 0 --seed 42 --log_group fastflow_patch_bracket_white --save_model results/fastflow_patch \\
dataset --category bracket_white --batch_size 10 --num_workers 0 --resize 256 --imagesize 224 --preserve_high_res $datapath \\
fastflow --backbone resnet18 --flow_steps 4 --input_size 224 --hidden_ratio 0.5 --use_class_specific --enable_patch_inference --patch_size 160 --patch_stride 80 --low_memory
"""  # noqa: E501

EVALUATION = """
python bin/run_fastflow.py results/eval dataset --category metal_plate $datapath \\
fastflow --backbone resnet18 --log_group FFLOW_EVAL --eval_only --checkpoint $checkpoint --save_segmentation_images
"""

LOADER = """
python bin/load_and_evaluate_fastflow.py --gpu 0 --seed 0 --save_segmentation_images evaluated_results/fastflow_results/metal_plate \\
fastflow_loader -p $model dataset --resize 256 --imagesize 224 -d metal_plate mpdd $datapath
"""  # noqa: E501

RUN = Path("results/fastflow_improved/metal_plate/project/FFLOW_IMPROVED_metal_plate_R18")
COMMANDS = {"bin/run_fastflow.py": run_fastflow, "bin/load_and_evaluate_fastflow.py": load_and_evaluate_fastflow}


def paste(command: str, *appended: str, **variables: object) -> Finished:
    """Run a command as a shell would, in the process of the test."""
    for name, value in variables.items():
        command = command.replace(f"${name}", shlex.quote(str(value)))
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert python == "python"
    return invoke(COMMANDS[script], *arguments, *appended)


def metrics(folder: Path) -> dict[str, str]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    return {name: row[name] for name in ("instance_auroc", "full_pixel_auroc", "full_pro")}


@pytest.mark.slow
def test_train_then_evaluate_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    write_category(tmp_path / "MPDD", "metal_plate")
    datapath = tmp_path / "MPDD"
    trained = paste(TRAINING, *RANDOM, datapath=datapath)
    assert trained.code == 0, trained.err
    model = RUN / "models" / "mpdd_metal_plate"
    export = model / "fastflow_FFLOW_IMPROVED_metal_plate_R18_final.pth"
    for number, checkpoint in enumerate((model, export)):
        assert paste(EVALUATION, datapath=datapath, checkpoint=checkpoint).code == 0
        assert paste(LOADER, datapath=datapath, model=checkpoint).code == 0
        suffix = f"_{number - 1}" if number else ""
        evaluated = Path(f"results/eval/project/FFLOW_EVAL{suffix}")
        loaded = Path(f"evaluated_results/fastflow_results/metal_plate{suffix}")
        assert metrics(RUN) == metrics(evaluated) == metrics(loaded)
        for folder in (RUN, evaluated, loaded):
            assert len(list((folder / "segmentation_images" / "mpdd_metal_plate").rglob("*.png"))) == 6


def write_large_category(folder: Path) -> None:
    """Write a class whose images are larger than its tiles and not square."""
    rng = np.random.default_rng(0)
    pixels = {"train/good": 3, "test/good": 2, "test/spot": 2}
    for part, number in pixels.items():
        for i in range(number):
            image = rng.integers(90, 110, (200, 260, 3), dtype=np.uint8)
            mask = np.zeros((200, 260), dtype=np.uint8)
            mask[120:150, 150:190] = 255
            if part == "test/spot":
                image[mask > 0] = (250, 240, 20)
                path = folder / "ground_truth" / "spot" / f"{i:03d}_mask.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
            path = folder / part / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


@pytest.mark.slow
def test_tiles_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    write_large_category(tmp_path / "MPDD" / "bracket_white")
    trained = paste(TILES, *RANDOM, datapath=tmp_path / "MPDD")
    assert trained.code == 0, trained.err
    assert "centre crop" not in trained.err, "images are not cropped"
    run = Path("results/fastflow_patch/project/fastflow_patch_bracket_white")
    assert float(metrics(run)["full_pixel_auroc"]) > 0.9
    loader = ["fastflow_loader", "-p", run / "models" / "mpdd_bracket_white"]
    dataset = ["dataset", "--num_workers", "0", "-d", "bracket_white", "mpdd", tmp_path / "MPDD"]
    for number, flags in enumerate(([], ["--low_memory"])):
        assert invoke(load_and_evaluate_fastflow, f"out{number}", *loader, *flags, *dataset).code == 0
        assert metrics(Path(f"out{number}")) == metrics(run)
    refused = invoke(load_and_evaluate_fastflow, "out", *loader, "--patch_stride", "40", *dataset)
    assert refused.code == 2 and "--patch_stride 40 was typed" in refused.err and "with 80" in refused.err


KILLED = """
import os, patchcore.class_run
from patchcore.cli import run_fastflow
patchcore.class_run._announce_epoch = lambda *_: os._exit(9)  # as kill -9: nothing is tidied up
run_fastflow()
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_weights(small_dataset: Path, tmp_path: Path) -> None:
    layers = ("--layers", "blocks.1", "--layers", "blocks.2")
    model = ("--backbone", "efficientnet_lite0", *RANDOM, *layers, "--flow_steps", "2", "--epochs", "5")
    dataset = ("dataset", "--resize", "64", "--imagesize", "64", "--num_workers", "0", "--category", "plate")
    common = ("--device", "cpu", "--threads", "1", "--save_model")
    line = (*common, *dataset, str(small_dataset), "fastflow", *model, "--checkpoint_every", "2")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), *line, "--eval_every", "3"]
    assert subprocess.run(arguments, env=environment, capture_output=True, timeout=600, check=False).returncode == 9
    assert invoke(run_fastflow, tmp_path / "killed", *line, "--resume").code == 0
    assert invoke(run_fastflow, tmp_path / "whole", *line).code == 0
    model_file = Path("project/group/models/mpdd_plate/fastflow_group_final.pth")
    resumed, whole = (read_torch_file(tmp_path / name / model_file).tensors for name in ("killed", "whole"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    log = (tmp_path / "killed" / "project" / "group" / "run.log").read_text(encoding="utf-8")
    assert "plate: resumes from" in log


# ---------------------------------------------------------------- transformers


class RandomImages:
    """Two images as a loader gives them."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        self.num_images = 2

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield {"image": self.images}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "grid"), [("deit_base_distilled_patch16_224", 224, 14), ("cait_m48_448", 448, 28)]
)
def test_transformers_train_at_the_size_they_are_made_for(name: str, size: int, grid: int, one_thread: None) -> None:
    backbone = fastflow_backbone(name)
    assert backbone.input_size == size
    config = FastFlowConfig(
        BackboneConfig(backbone.name, backbone.layers, weights="random"),
        flow_steps=2,
        training=TrainingConfig(epochs=1, batch_size=2),
    )
    preprocessing, source = PreprocessingConfig(size, size), TrainingSource("mpdd", "plate")
    detector = FastFlow.prepare(config, preprocessing, RuntimeConfig())(source, torch.device("cpu"))
    loader = RandomImages(size)
    detector.fit(loader)
    assert isinstance(detector, FastFlow) and detector.shapes == [(768, grid, grid)]
    assert len(detector.history_) == 1 and np.isfinite(detector.history_[0].loss)
    prediction = detector.predict(loader.images)
    assert prediction.maps is not None and prediction.maps.shape == (2, size, size)
    assert np.isfinite(prediction.maps).all() and np.ptp(prediction.maps) > 0
