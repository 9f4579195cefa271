"""The grammar of the FastFlow commands, and what beats what."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import write_category
from in_process import Finished, invoke

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow
from patchcore.configs import FastFlowConfig, PreprocessingConfig
from patchcore.errors import ConfigurationError

DATASET = ["dataset", "--category", "metal_plate", "data"]
FASTFLOW = ["fastflow", "--backbone", "resnet18"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects what the command hands to the pipeline, which does not run."""
    calls: list[Any] = []
    monkeypatch.setattr("patchcore.pipeline.train_and_evaluate", lambda *given: calls.append(given) or True)
    return calls


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("patchcore.pipeline.load_and_evaluate", lambda **given: calls.append(given) or True)
    return calls


def run(*args: object) -> Finished:
    return invoke(run_fastflow, "out", *args)


def configured(trained: list[Any], *flags: object, category: str = "metal_plate") -> FastFlowConfig:
    assert run(*DATASET, *FASTFLOW, *flags).code == 0
    config = trained[-1][1](category)
    assert isinstance(config, FastFlowConfig)
    return config


# ---------------------------------------------------------------- the commands of scripts


def test_training_command(trained: list[Any]) -> None:
    line = (
        "--log_group FFLOW_IMPROVED_metal_plate_R18 --save_model --save_segmentation_images results/improved "
        "dataset --category metal_plate data fastflow --backbone resnet18 --use_class_specific"
    )
    assert invoke(run_fastflow, *line.split()).code == 0
    method, config_of, settings, dataset, _, _ = trained[0]
    assert (method, settings.results_path, settings.log_group) == (
        "fastflow",
        "results/improved",
        "FFLOW_IMPROVED_metal_plate_R18",
    )
    assert (settings.outputs.models, settings.outputs.segmentation_images) == (True, True)
    assert (dataset.name, dataset.path, dataset.categories) == ("mpdd", "data", ("metal_plate",))
    assert dataset.preprocessing == PreprocessingConfig(256, 224)
    assert (config_of("metal_plate").training.lr, config_of("bracket_black").training.epochs) == (1e-2, 25)


def test_patch_command_is_understood_and_refused_for_its_tiles_alone(trained: list[Any]) -> None:
    line = (
        "--gpu 0 --seed 42 --log_group fastflow_patch_bracket_white --save_model results/fastflow_patch "
        "dataset --category bracket_white --batch_size 10 --num_workers 0 --resize 256 --imagesize 224 data "
        "fastflow --backbone resnet18 --flow_steps 4 --input_size 224 --hidden_ratio 0.5 --use_class_specific"
    )
    assert invoke(run_fastflow, *line.split()).code == 0
    config = trained[0][1]("bracket_white")
    assert (config.flow_steps, config.hidden_ratio) == (4, 0.5), "typed beats the preset"
    assert (config.training.epochs, config.training.batch_size) == (8, 10), "the preset's, and the typed batches"
    tiles = "--enable_patch_inference --patch_size 160 --patch_stride 80 --low_memory"
    refused = invoke(run_fastflow, *f"{line} {tiles}".split())
    assert refused.code == 2 and "--enable_patch_inference True is not available" in refused.err


def test_evaluation_command(evaluated: list[dict[str, Any]]) -> None:
    line = (
        "results/eval dataset --category metal_plate data fastflow --backbone resnet18 --log_group FFLOW_EVAL "
        "--eval_only --checkpoint model --save_segmentation_images"
    )
    assert invoke(run_fastflow, *line.split()).code == 0
    given = evaluated[0]
    assert given["model_paths"] == ("model",) and given["save_folder"] == "results/eval/project/FFLOW_EVAL"
    assert given["outputs"].segmentation_images
    assert [(s.option, s.value) for s in given["typed_model"].settings] == [("--backbone", "resnet18")]


def test_loader_command(evaluated: list[dict[str, Any]]) -> None:
    line = (
        "--gpu 0 --seed 0 --save_segmentation_images evaluated/metal_plate fastflow_loader -p model "
        "dataset --resize 256 --imagesize 224 -d metal_plate mpdd data"
    )
    assert invoke(load_and_evaluate_fastflow, *line.split()).code == 0
    given = evaluated[0]
    assert (given["typed"].resize_px, given["typed"].imagesize_px) == (256, 224)
    assert (given["dataset"].name, given["dataset"].categories) == ("mpdd", ("metal_plate",))
    assert given["typed_model"].settings == () and given["typed_model"].describe is None


# ---------------------------------------------------------------- the step dataset


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--category a data", ("mpdd", ("a",))),
        ("data --category a", ("mpdd", ("a",))),
        ("--category=a --dataset_name mvtec data", ("mvtec", ("a",))),
        ("-d a -d b mvtec data", ("mvtec", ("a", "b"))),
        ("mvtec data", ("mvtec", ())),
    ],
)
def test_the_name_is_absent_exactly_when_category_is_typed(
    typed: str, expected: tuple[str, tuple[str, ...]], trained: list[Any]
) -> None:
    assert run("dataset", *typed.split(), *FASTFLOW).code == 0
    dataset = trained[0][3]
    assert (dataset.name, dataset.categories, dataset.path) == (*expected, "data")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--category a mpdd data", "found 'data' where a step was expected"),
        ("--category a -d b data", "name classes with one of the two"),
        ("--dataset_name mvtec mpdd data", "'mpdd' and --dataset_name 'mvtec'"),
    ],
)
def test_contradictory_data_sets(typed: str, message: str) -> None:
    finished = run("dataset", *typed.split(), *FASTFLOW)
    assert finished.code == 2 and message in finished.err and len(finished.error_lines) == 1


# ---------------------------------------------------------------- default, preset, typed flag


def test_default_then_preset_then_typed_flag(trained: list[Any]) -> None:
    default = configured(trained)
    preset = configured(trained, "--use_class_specific")
    typed = configured(trained, "--lr", "0.5", "--use_class_specific", "--epochs", "2")
    assert (default.training.lr, default.training.epochs, default.flow_steps) == (1e-3, 50, 8)
    assert (preset.training.lr, preset.training.epochs, preset.flow_steps) == (1e-2, 6, 2)
    assert (typed.training.lr, typed.training.epochs, typed.flow_steps) == (0.5, 2, 2)
    assert default.training.weight_decay == 1e-5 and default.training.batch_size == 8


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--hidden_ratio 0.3", lambda c: c.hidden_ratio == 0.3),
        ("--conv3x3_only", lambda c: c.conv3x3_only),
        ("--clamp 1.5", lambda c: c.clamp == 1.5),
        ("--map_mode prob", lambda c: c.map_mode == "prob"),
        ("--image_score topk", lambda c: c.image_score == "topk"),
        ("--schedule cosine", lambda c: c.training.schedule == "cosine"),
        ("--grad_clip 0", lambda c: c.training.grad_clip is None),
        ("--weight_decay 0", lambda c: c.training.weight_decay == 0),
        ("--layers layer2 --layers layer3", lambda c: c.backbone.layers == ("layer2", "layer3")),
        ("--weights random", lambda c: c.backbone.weights == "random"),
        ("--feature_noise 0.1", lambda c: c.feature_noise == 0.1),
    ],
)
def test_every_flag_arrives(flags: str, value: Any, trained: list[Any]) -> None:
    assert value(configured(trained, *flags.split())) and not value(configured(trained))


def test_backbones_bring_layers_and_input_size(trained: list[Any]) -> None:
    assert run(*DATASET, "fastflow", "--backbone", "cait_m48_448").code == 0
    assert trained[0][3].preprocessing == PreprocessingConfig(512, 448)
    assert trained[0][1]("a").backbone.layers == ("blocks.40",)
    assert run(*DATASET, "fastflow", "--backbone", "wide_resnet50_2", "--use_class_specific").code == 0
    assert trained[1][1]("metal_plate").backbone.name == "wideresnet50"
    assert trained[1][1]("metal_plate").training.epochs == 30
    refused = run(*DATASET, "fastflow", "--backbone", "cait_m48_448", "--input_size", "224")
    assert refused.code == 2 and "--input_size is 224 but the backbone's size is 448" in refused.err
    assert run(*DATASET, "fastflow", "--backbone", "timm:resnet10t").code == 0
    with pytest.raises(ConfigurationError, match="name each with --layers"):
        trained[-1][1]("a")


# ---------------------------------------------------------------- options of both parts


def test_run_options_are_accepted_on_fastflow_too(trained: list[Any]) -> None:
    assert run(*DATASET, *FASTFLOW, "--log_group", "a", "--save_model", "--save_segmentation_images").code == 0
    settings = trained[0][2]
    assert settings.log_group == "a" and settings.outputs.models and settings.outputs.segmentation_images
    assert run("--log_group", "a", *DATASET, *FASTFLOW, "--log_group", "a").code == 0


@pytest.mark.parametrize("option", ["--log_group", "--checkpoint"])
def test_two_different_values_are_an_error(option: str) -> None:
    finished = run(option, "a", *DATASET, *FASTFLOW, option, "b", "--eval_only")
    assert finished.code == 2 and f"{option} is 'a' and, on fastflow, 'b': type it once" in finished.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_only"], "--eval_only without --checkpoint"),
        (["--checkpoint", "x"], "--checkpoint without --eval_only"),
        (["--patience", "2"], "--patience watches held-out images"),
        (["--imagesize", "320", "--input_size", "256"], "--imagesize is 320 but --input_size is 256"),
        (["--epochs", "0"], "--epochs"),
        (["--checkpoint_every", "0"], "--checkpoint_every"),
        (["--eval_only", "--checkpoint", "no/such"], "no/such"),
    ],
)
def test_wrong_options_are_one_line(flags: list[str], message: str, tmp_path: Any) -> None:
    write_category(tmp_path, "metal_plate")
    finished = invoke(
        run_fastflow, tmp_path / "out", "dataset", "--category", "metal_plate", tmp_path, *FASTFLOW, *flags
    )
    assert finished.code == 2 and message in finished.error_lines[-1], finished.err
    assert not (tmp_path / "out" / "project" / "group").exists()
