"""The commands of the baselines: what is typed, what a run leaves, and the script that trains all of them."""

from __future__ import annotations

import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_category
from in_process import Finished, invoke, read_rows
from safetensors.torch import load_file
from shell_scripts import BASELINES, SMALL, Desk, group, render_demo_set, run_whole_script, values

from patchcore.cli import load_and_evaluate_baselines, run_baselines
from patchcore.configs import (
    AutoencoderConfig,
    BackboneConfig,
    FeatureAutoencoderConfig,
    PreprocessingConfig,
    ResNetKNNConfig,
    TrainingConfig,
)
from patchcore.storage import run_folder

METHODS = ("resnet_knn", "autoencoder", "feature_autoencoder")
DATASET = ["dataset", "-d", "metal_plate", "mpdd", "data"]
LITE = ["-b", "efficientnet_lite0", "--weights", "random"]
SMALL_METHODS = {
    "resnet_knn": ["resnet_knn", *LITE, "-le", "blocks.2", "-k", "3"],
    "autoencoder": ["autoencoder", "--epochs", "3"],
    "feature_autoencoder": ["feature_autoencoder", *LITE, "-le", "blocks.1", "-le", "blocks.2", "--epochs", "3"],
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects what the command hands to the pipeline, which does not run."""
    calls: list[Any] = []
    monkeypatch.setattr("patchcore.pipeline.train_and_evaluate", lambda *given: calls.append(given) or True)
    return calls


def run(*args: object) -> Finished:
    return invoke(run_baselines, "out", *args)


def configured(trained: list[Any], *args: object) -> Any:
    finished = run(*args)
    assert finished.code == 0, finished.err
    return trained[-1][1]("metal_plate")


# ---------------------------------------------------------------- what is typed


def test_the_command_of_the_nearest_neighbours(trained: list[Any]) -> None:
    line = (
        "--gpu 0 --seed 0 --log_group G --save_model --save_segmentation_images RESULTS "
        "resnet_knn -b resnet50 --num_features 400 -k 40 --clamp_k "
        "dataset --resize 256 --imagesize 224 -d metal_plate mpdd data"
    )
    assert invoke(run_baselines, *line.split()).code == 0
    method, config_of, settings, dataset, _ = trained[0]
    assert method == "resnet_knn"
    assert config_of("metal_plate") == ResNetKNNConfig(BackboneConfig("resnet50", ("layer4",)), 400, 40, True)
    assert (settings.results_path, settings.log_group, settings.seeds) == ("RESULTS", "G", (0,))
    assert (settings.outputs.models, settings.outputs.segmentation_images) == (True, True)
    assert (dataset.name, dataset.path, dataset.categories) == ("mpdd", "data", ("metal_plate",))
    assert dataset.preprocessing == PreprocessingConfig(256, 224)


def test_defaults(trained: list[Any]) -> None:
    knn = BackboneConfig("resnet50", ("layer4",))
    middle = BackboneConfig("resnet50", ("layer2", "layer3"))
    assert configured(trained, "resnet_knn", *DATASET) == ResNetKNNConfig(knn)
    assert (ResNetKNNConfig(knn).num_features, ResNetKNNConfig(knn).num_neighbours) == (500, 50)
    assert configured(trained, "autoencoder", *DATASET) == AutoencoderConfig()
    assert configured(trained, "feature_autoencoder", *DATASET) == FeatureAutoencoderConfig(middle)
    lite = configured(trained, "feature_autoencoder", "-b", "efficientnet_lite0", *DATASET)
    assert lite.backbone.layers == ("blocks.2", "blocks.4")
    last = configured(trained, "resnet_knn", "-b", "efficientnet_lite0", *DATASET)
    assert last.backbone.layers == ("bn2",), "what is pooled for the classifier"


def test_every_option_of_the_feature_autoencoder(trained: list[Any], tmp_path: Path) -> None:
    line = (
        "feature_autoencoder -b resnet18 -le layer1 --normalization backbone --patchsize 5 --latent_channels 7 "
        "--variational --kl_weight 0.5 --epochs 9 --lr 0.1 --weight_decay 0 --schedule cosine --grad_clip 2 "
        "--patience 4 --feature_noise 0.25 --smoothing_px 2 --image_score topk --eval_every 2 --checkpoint_every 3 "
        "dataset --batch_size 6 --train_val_split 0.8 -d metal_plate mpdd data"
    )
    config = configured(trained, *line.split(), "--weights", "weights.pth")
    assert config == FeatureAutoencoderConfig(
        BackboneConfig("resnet18", ("layer1",), str(Path("weights.pth").absolute()), "backbone"),
        patchsize=5,
        latent_channels=7,
        variational=True,
        kl_weight=0.5,
        feature_noise=0.25,
        training=TrainingConfig(9, 6, 0.1, 0.0, "cosine", 2.0, 4),
        smoothing_px=2.0,
        image_score="topk",
    )
    epochs = trained[-1][2].epochs
    assert (epochs.eval_every, epochs.checkpoint_every) == (2, 3)
    wider = configured(trained, "feature_autoencoder", "--explained_variance", "0.5", *DATASET)
    assert wider.explained_variance == 0.5


def test_what_is_typed_behind_the_last_step_reaches_the_method(trained: list[Any]) -> None:
    config = configured(trained, "autoencoder", "--epochs", "3", *DATASET, "--epochs", "5", "--latent_channels", "9")
    assert (config.training.epochs, config.latent_channels) == (5, 9)
    assert configured(trained, "autoencoder", *DATASET, "--grad_clip", "0").training.grad_clip is None
    assert trained[-1][3].preprocessing == PreprocessingConfig(256, 224)
    configured(trained, "autoencoder", *DATASET, "--imagesize", "112")
    assert trained[-1][3].preprocessing == PreprocessingConfig(128, 112), "the resize follows"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dataset mpdd data", "step resnet_knn or autoencoder or feature_autoencoder is missing"),
        ("resnet_knn", "step dataset is missing, expected RESULTS_PATH, then the steps resnet_knn or autoencoder or"),
        (
            "resnet_knn autoencoder dataset mpdd data",
            "found the steps resnet_knn and autoencoder, expected one of them",
        ),
        ("resnet_knn dataset mpdd data --epochs 3", "it belongs to autoencoder and feature_autoencoder"),
        ("autoencoder dataset mpdd data -b resnet18", "it belongs to resnet_knn and feature_autoencoder"),
        ("resnet_knn -k 0 dataset mpdd data", "-k is 0, expected 1 or more"),
        ("resnet_knn -le layer3 -le layer4 dataset mpdd data", "resnet_knn pools one layer, found 2"),
        ("resnet_knn -b resnet51 dataset mpdd data", "unknown backbone 'resnet51': did you mean"),
        ("feature_autoencoder -b timm:resnet18 dataset mpdd data", "no layers of its own here: name what is wanted"),
        ("feature_autoencoder --kl_weight 1 dataset mpdd data", "--kl_weight 1 without --variational: type both"),
        (
            "feature_autoencoder --latent_channels 4 --explained_variance 0.9 dataset mpdd data",
            "--latent_channels 4 and --explained_variance 0.9 both say how wide the bottleneck is",
        ),
        ("feature_autoencoder --weights= dataset mpdd data", "--weights is empty"),
        ("autoencoder --patience 3 dataset mpdd data", "--patience watches held-out images, --train_val_split 1"),
        ("autoencoder dataset --augment mpdd data", "--augment is not available"),
        ("autoencoder dataset --preserve_high_res mpdd data", "dataset has no option '--preserve_high_res'"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, trained: list[Any]) -> None:
    finished = run(*line.split())
    assert finished.code == 2
    assert len(finished.error_lines) == 1 and message in finished.err, finished.err
    assert not trained


# ---------------------------------------------------------------- whole runs

SIZES = ("--resize", 64, "--imagesize", 64, "--num_workers", 0)
COMMON = ("--device", "cpu", "--threads", 1)


def train(out: Path, data: Path, method: str, *flags: object, classes: tuple[str, ...] = ("plate",)) -> Finished:
    chosen = [part for name in classes for part in ("-d", name)]
    dataset = ["dataset", *SIZES, *chosen, "mpdd", data]
    return invoke(run_baselines, out, *COMMON, "--save_model", *SMALL_METHODS[method], *dataset, *flags)


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_model_gives_the_numbers_of_its_run(method: str, small_dataset: Path, tmp_path: Path) -> None:
    finished = train(tmp_path / "out", small_dataset, method, "--save_segmentation_images", "--save_anomaly_scores")
    assert finished.code == 0, finished.err
    folder = tmp_path / "out" / "project" / "group"
    (row, _) = read_rows(folder / "results.csv")
    has_maps = method != "resnet_knn"
    assert bool(row["full_pixel_auroc"]) == bool(row["full_pro"]) == has_maps, "blank cells without maps"
    assert row["instance_auroc"] and row["recall"], "a threshold all the same"
    assert (folder / "segmentation_images" / "mpdd_plate").exists() == has_maps
    assert (folder / "anomaly_scores" / "mpdd_plate.npz").exists() == has_maps
    assert ("no anomaly maps: neither pictures nor raw maps are written" in finished.err) == (not has_maps)
    assert (folder / "training" / "mpdd_plate" / "training_curve.png").exists() == has_maps

    model = folder / "models" / "mpdd_plate"
    dataset = ["dataset", "--num_workers", 0, "mpdd", small_dataset]
    again = invoke(load_and_evaluate_baselines, tmp_path / "again", *COMMON, "baseline_loader", "-p", model, *dataset)
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    other = [*dataset, "--imagesize", 32]
    refused = invoke(load_and_evaluate_baselines, tmp_path / "no", *COMMON, "baseline_loader", "-p", model, *other)
    assert refused.code == 2 and "--imagesize 32 was typed, but model" in refused.err


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_has_nothing_left_to_do(method: str, small_dataset: Path, tmp_path: Path) -> None:
    saved = ("--save_segmentation_images", "--save_anomaly_scores", "--resume")
    assert train(tmp_path, small_dataset, method, *saved).code == 0
    finished = train(tmp_path, small_dataset, method, *saved)
    assert finished.code == 0 and "plate: finished before, skipped" in finished.err


@pytest.mark.parametrize("method", ["autoencoder", "feature_autoencoder"])
def test_an_interrupted_run_resumes_with_the_same_weights(
    method: str, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--resume", "--checkpoint_every", 1, "--calibration", "none")
    assert train(tmp_path / "whole", small_dataset, method, *flags).code == 0
    from patchcore.methods.training import Training

    take_epoch = Training._train_epoch

    def interrupted(self: Training, epoch: int, *given: Any) -> Any:
        if epoch == 3:
            raise KeyboardInterrupt
        return take_epoch(self, epoch, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_epoch", interrupted)
        assert train(tmp_path / "parts", small_dataset, method, *flags).code == 130
    finished = train(tmp_path / "parts", small_dataset, method, *flags)
    assert finished.code == 0 and "plate: resumes from" in finished.err
    models = [tmp_path / part / "project/group/models/mpdd_plate" for part in ("whole", "parts")]
    one, other = (load_file(next(model.glob("*.safetensors"))) for model in models)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_class_with_too_few_images_fails_alone_and_by_name(small_dataset: Path, tmp_path: Path) -> None:
    shutil.rmtree(small_dataset / "rod")
    write_category(small_dataset, "rod", num_train=3)
    finished = train(tmp_path, small_dataset, "resnet_knn", classes=("rod", "plate"))
    assert finished.code == 1
    assert "rod failed: k=3 needs 4 training images for leave-one-out, got 3: use -k 2 or --clamp_k" in finished.err
    folder = tmp_path / "project" / "group"
    cells = {row["Row Names"]: row["instance_auroc"] for row in read_rows(folder / "results.csv")}
    assert cells["mpdd_plate"] and not cells["mpdd_rod"]
    assert train(tmp_path, small_dataset, "resnet_knn", "--clamp_k", classes=("rod", "plate")).code == 0


def test_test_metrics_between_epochs_change_nothing(small_dataset: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "a", small_dataset, "feature_autoencoder")
    shown = train(tmp_path / "b", small_dataset, "feature_autoencoder", "--eval_every", 1)
    assert plain.code == shown.code == 0
    assert shown.err.count("on TEST images, which select nothing") == 3
    one, other = (tmp_path / name / "project" / "group" / "results.csv" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_two_seeds_give_two_folders(small_dataset: Path, tmp_path: Path) -> None:
    assert train(tmp_path, small_dataset, "autoencoder", "--seed", 0, "--seed", 1).code == 0
    scores = [
        [row["score"] for row in read_rows(tmp_path / "project" / name / "anomaly_scores" / "mpdd_plate.csv")]
        for name in ("group_S0", "group_S1")
    ]
    assert scores[0] != scores[1]
    assert run_folder.group_without_seed("group_S1") == "group"


def test_a_model_of_another_method_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    assert train(tmp_path, small_dataset, "resnet_knn").code == 0
    from patchcore.cli import load_and_evaluate_fastflow

    model = tmp_path / "project" / "group" / "models" / "mpdd_plate"
    loader = ("fastflow_loader", "-p", model, "dataset", "-d", "plate", "mpdd", small_dataset)
    refused = invoke(load_and_evaluate_fastflow, tmp_path / "no", *COMMON, *loader)
    assert refused.code == 2 and "is of method 'resnet_knn', expected fastflow" in refused.err


# ---------------------------------------------------------------- the script

CLASSES = "-d metal_plate -d bracket_white -d bracket_brown -d bracket_black"
FRAME = "--gpu 0 --seed 0 --save_model --save_segmentation_images --save_anomaly_scores --log_group {0} results {1} "
READING = f"dataset --resize 256 --imagesize 224 {CLASSES} mpdd"
KNN = "--num_features 500 -k 50 --clamp_k"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("flags", "backbone", "name"), [((), "resnet50", "R50"), (("--offline",), "efficientnet_lite0", "LITE0")]
)
def test_the_script_trains_all_methods(flags: tuple[str, ...], backbone: str, name: str, desk: Desk) -> None:
    expected = [
        FRAME.format(f"MPDD_IM224_KNN_{name}_S0", f"resnet_knn -b {backbone} {KNN}"),
        FRAME.format("MPDD_IM224_AE_S0", "autoencoder"),
        FRAME.format(f"MPDD_IM224_FAE_{name}_S0", f"feature_autoencoder -b {backbone}"),
    ]
    commands = [[*shlex.split(head + READING), str(desk.data)] for head in expected]
    assert desk.train(BASELINES, *flags) == commands


def test_methods_and_classes_can_be_chosen(desk: Desk, trained: list[Any]) -> None:
    (command,) = desk.train(BASELINES, "--epochs", "2", "--seed", "5", METHODS="autoencoder", CLASSES="rod")
    assert values(command, "-d") == ["rod"] and group(command) == "MPDD_IM224_AE_S5"
    assert invoke(run_baselines, *command).code == 0
    assert trained[0][1]("rod").training.epochs == 2 and trained[0][2].seeds == (5,)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("knn", "error: unknown method 'knn' in METHODS, expected some of: resnet_knn autoencoder feature_autoencoder"),
        ("autoencoder autoencoder", "error: METHODS has 'autoencoder' more than once"),
    ],
)
def test_unknown_methods_are_refused(methods: str, message: str, desk: Desk) -> None:
    ran = desk.run(BASELINES, desk.data, METHODS=methods)
    assert ran.code == 2 and message in ran.err and not ran.commands


@pytest.mark.slow
def test_the_script_on_a_small_demo_set(tmp_path: Path) -> None:
    data = render_demo_set(tmp_path / "demo")
    script = partial(run_whole_script, tmp_path, BASELINES, data, "--offline", *SMALL)
    ran = script(CLASSES="metal_plate bracket_white", METHODS="resnet_knn")
    assert ran.returncode == 0, ran.stderr
    ran = script("--epochs", "3", CLASSES="metal_plate bracket_white", METHODS="autoencoder feature_autoencoder")
    assert ran.returncode == 0, ran.stderr
    for name in ("KNN_LITE0", "AE", "FAE_LITE0"):
        folder = tmp_path / "results" / "project" / f"MPDD_IM224_{name}_S0"
        assert [row["Row Names"] for row in read_rows(folder / "results.csv")] == [
            "mpdd_metal_plate",
            "mpdd_bracket_white",
            "Mean",
        ]
        assert len(list((folder / "models").iterdir())) == 2
