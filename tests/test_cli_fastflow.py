"""The grammar of the FastFlow commands, and what beats what."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import write_category
from in_process import Finished, invoke

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow
from patchcore.configs import FastFlowConfig, PreprocessingConfig, TileConfig
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
    method, config_of, settings, dataset, _ = trained[0]
    assert (method, settings.results_path, settings.log_group) == (
        "fastflow",
        "results/improved",
        "FFLOW_IMPROVED_metal_plate_R18",
    )
    assert (settings.outputs.models, settings.outputs.segmentation_images) == (True, True)
    assert (dataset.name, dataset.path, dataset.categories) == ("mpdd", "data", ("metal_plate",))
    assert dataset.preprocessing == PreprocessingConfig(256, 224)
    assert (config_of("metal_plate").training.lr, config_of("bracket_black").training.epochs) == (1e-2, 25)


PATCH_COMMAND = (
    "--gpu 0 --seed 42 --log_group fastflow_patch_bracket_white --save_model results/fastflow_patch "
    "dataset --category bracket_white --batch_size 10 --num_workers 0 --resize 256 --imagesize 224 "
    "--preserve_high_res data fastflow --backbone resnet18 --flow_steps 4 --input_size 224 --hidden_ratio 0.5 "
    "--use_class_specific --enable_patch_inference --patch_size 160 --patch_stride 80 --low_memory"
)


def test_patch_command(trained: list[Any]) -> None:
    assert invoke(run_fastflow, *PATCH_COMMAND.split()).code == 0
    _, config_of, settings, dataset, _ = trained[0]
    config = config_of("bracket_white")
    assert (settings.seeds, settings.log_group) == ((42,), "fastflow_patch_bracket_white")
    assert (config.flow_steps, config.hidden_ratio) == (4, 0.5), "typed beats the preset"
    assert (config.training.epochs, config.training.batch_size) == (8, 10), "the preset's, and the typed batches"
    assert config.tiles == TileConfig(patch_size=160, patch_stride=80, training_tiles=4, low_memory=True)
    assert (dataset.preprocessing.imagesize_px, dataset.preprocessing.max_side_px) == (224, 1024)


def test_evaluation_command(evaluated: list[dict[str, Any]]) -> None:
    line = (
        "results/eval dataset --category metal_plate data fastflow --backbone resnet18 --log_group FFLOW_EVAL "
        "--eval_only --checkpoint model --save_segmentation_images"
    )
    assert invoke(run_fastflow, *line.split()).code == 0
    given = evaluated[0]
    assert given["model_paths"] == ("model",) and given["save_folder"] == "results/eval/project/FFLOW_EVAL"
    assert given["outputs"].segmentation_images
    assert [(s.option, s.value) for s in given["typed"].settings] == [("--backbone", "resnet18")]


def test_loader_command(evaluated: list[dict[str, Any]]) -> None:
    line = (
        "--gpu 0 --seed 0 --save_segmentation_images evaluated/metal_plate fastflow_loader -p model "
        "dataset --resize 256 --imagesize 224 -d metal_plate mpdd data"
    )
    assert invoke(load_and_evaluate_fastflow, *line.split()).code == 0
    given = evaluated[0]
    typed = given["typed"]
    assert [(s.option, s.value) for s in typed.settings] == [("--resize", 256), ("--imagesize", 224)]
    assert (given["dataset"].name, given["dataset"].categories) == ("mpdd", ("metal_plate",))
    assert typed.overrides == () and typed.describe is None


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
        ("--category a --category b data", "--category is 'a' and then 'b': type it once"),
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
        ("--map_mode nll", lambda c: c.map_mode == "nll"),
        ("--image_score topk", lambda c: c.image_score == "topk"),
        ("--schedule cosine", lambda c: c.training.schedule == "cosine"),
        ("--grad_clip 0", lambda c: c.training.grad_clip is None),
        ("--weight_decay 0", lambda c: c.training.weight_decay == 0),
        ("--layers layer2 --layers layer3", lambda c: c.backbone.layers == ("layer2", "layer3")),
        ("--weights random", lambda c: c.backbone.weights == "random"),
        ("--feature_noise 0.1", lambda c: c.feature_noise == 0.1),
        ("--precision bfloat16", lambda c: c.precision == "bfloat16"),
        ("--smoothing gaussian", lambda c: c.post_processing.smoothing == "gaussian"),
        ("--smoothing guided --smoothing_px 7.5", lambda c: c.post_processing.smoothing_px == 7.5),
        ("--adaptive_normalization", lambda c: c.post_processing.adaptive_normalization),
        ("--multi_scale 0.75 --multi_scale 1", lambda c: c.post_processing.scales == (0.75, 1.0)),
    ],
)
def test_every_flag_arrives(flags: str, value: Any, trained: list[Any]) -> None:
    assert value(configured(trained, *flags.split())) and not value(configured(trained))


def test_backbones_bring_layers_and_input_size(trained: list[Any]) -> None:
    assert run(*DATASET, "fastflow", "--backbone", "cait_m48_448").code == 0
    assert trained[0][3].preprocessing == PreprocessingConfig(512, 448)
    assert trained[0][1]("a").backbone.layers == ("blocks.40",)
    refused = run(*DATASET, "fastflow", "--backbone", "cait_m48_448", "--input_size", "224")
    assert refused.code == 2 and "--input_size is 224 but the backbone's size is 448" in refused.err
    refused = run(*DATASET, "fastflow", "--backbone", "deit_base_distilled_patch16_224", "--input_size", "256")
    assert refused.code == 2 and "--input_size is 256 but the backbone's size is 224" in refused.err
    assert run(*DATASET, "fastflow", "--backbone", "timm:resnet10t").code == 0
    with pytest.raises(ConfigurationError, match="name each layer with --layers"):
        trained[-1][1]("a")


def test_an_unknown_backbone_is_told_its_near_matches(trained: list[Any]) -> None:
    assert run(*DATASET, "fastflow", "--backbone", "resnet81").code == 0
    with pytest.raises(ConfigurationError, match=r"'resnet81' has no layers.*did you mean resnet18"):
        trained[-1][1]("a")


@pytest.mark.parametrize(
    ("backbone", "epochs", "lr"),
    [
        ("resnet18", 6, 1e-2),
        ("wide_resnet50_2", 30, 1e-3),
        ("efficientnet_lite1", 30, 1e-2),
        ("efficientnet_lite2", 30, 1e-2),
    ],
)
def test_names_that_users_type_find_their_presets(backbone: str, epochs: int, lr: float, trained: list[Any]) -> None:
    flags = ("fastflow", "--backbone", backbone)
    for typed in ((), ("--use_class_specific",), ("--use_class_specific", "--epochs", "3")):
        assert run(*DATASET, *flags, *typed).code == 0
    default, preset, flag = (given[1]("metal_plate").training for given in trained)
    assert (default.epochs, default.lr) == (50, 1e-3)
    assert (preset.epochs, preset.lr) == (epochs, lr)
    assert (flag.epochs, flag.lr) == (3, lr)


# ---------------------------------------------------------------- tiles and images at their own resolution


def tiled(trained: list[Any], flags: str, of_dataset: str = "") -> tuple[TileConfig | None, PreprocessingConfig]:
    assert run(*DATASET, *of_dataset.split(), *FASTFLOW, *flags.split()).code == 0
    return trained[-1][1]("metal_plate").tiles, trained[-1][3].preprocessing


def test_tiles_have_defaults_that_follow_from_one_another(trained: list[Any]) -> None:
    assert tiled(trained, "") == (None, PreprocessingConfig(256, 224))
    tiles, _ = tiled(trained, "--enable_patch_inference")
    assert tiles == TileConfig(224, 112, training_tiles=4, low_memory=False)
    tiles, _ = tiled(trained, "--enable_patch_inference --patch_size 97 --training_tiles 9")
    assert tiles == TileConfig(97, 48, training_tiles=9)
    tiles, preprocessing = tiled(trained, "--enable_patch_inference", "--preserve_high_res --imagesize 320")
    assert tiles == TileConfig(320, 160) and preprocessing.imagesize_px == 320


def test_images_that_keep_their_resolution_know_no_resize(trained: list[Any]) -> None:
    plain = tiled(trained, "--enable_patch_inference", "--preserve_high_res")
    assert plain == tiled(trained, "--enable_patch_inference", "--preserve_high_res --resize 100 --imagesize 224")
    assert plain[1] == PreprocessingConfig(256, 224, max_side_px=1024)
    _, bounded = tiled(trained, "--enable_patch_inference", "--preserve_high_res --max_side 600")
    assert bounded.max_side_px == 600


@pytest.mark.parametrize(
    ("of_dataset", "flags", "message"),
    [
        ("", "--patch_size 64", "--patch_size without --enable_patch_inference"),
        ("", "--patch_stride 64", "--patch_stride without --enable_patch_inference"),
        ("", "--training_tiles 2", "--training_tiles without --enable_patch_inference"),
        ("", "--low_memory", "--low_memory without --enable_patch_inference"),
        ("--max_side 512", "--enable_patch_inference", "--max_side 512 bounds images that keep their resolution"),
        (
            "--preserve_high_res --resize_mode square",
            "--enable_patch_inference",
            "--resize_mode square has no effect with --preserve_high_res",
        ),
        ("", "--enable_patch_inference --patch_size 64 --patch_stride 65", "--patch_stride 65 is larger than"),
        ("", "--enable_patch_inference --patch_size 8", "--patch_size is 8, expected 16 or more"),
        ("", "--enable_patch_inference --training_tiles 0", "--training_tiles is 0"),
        ("--preserve_high_res --max_side 8", "--enable_patch_inference", "--max_side is 8"),
    ],
)
def test_options_of_tiles_without_effect(of_dataset: str, flags: str, message: str, trained: list[Any]) -> None:
    finished = run(*DATASET, *of_dataset.split(), *FASTFLOW, *flags.split())
    assert finished.code == 2 and message in finished.err and len(finished.error_lines) == 1
    assert trained == []


def test_stored_models_are_asked_about_tiles_but_for_memory(evaluated: list[dict[str, Any]]) -> None:
    of_dataset = ["--preserve_high_res", "--max_side", "512"]
    flags = [
        "--enable_patch_inference",
        "--patch_size",
        "64",
        "--low_memory",
        "--smoothing",
        "guided",
        "--multi_scale",
        "0.5",
    ]
    loader = ["fastflow_loader", "-p", "model", *flags]
    assert invoke(load_and_evaluate_fastflow, "out", *loader, *DATASET, *of_dataset).code == 0
    typed = evaluated[0]["typed"]
    assert {s.option for s in typed.settings} == {
        "--preserve_high_res",
        "--max_side",
        "--enable_patch_inference",
        "--patch_size",
        "--smoothing",
        "--multi_scale",
    }
    assert [(s.option, s.value) for s in typed.overrides] == [("--low_memory", True)]


# ---------------------------------------------------------------- options of both parts


def test_run_options_are_accepted_on_fastflow_too(trained: list[Any]) -> None:
    assert run(*DATASET, *FASTFLOW, "--log_group", "a", "--save_model", "--save_segmentation_images").code == 0
    settings = trained[0][2]
    assert settings.log_group == "a" and settings.outputs.models and settings.outputs.segmentation_images
    assert run("--log_group", "a", *DATASET, *FASTFLOW, "--log_group", "a").code == 0


def test_an_appended_option_of_the_command_needs_no_place(trained: list[Any]) -> None:
    assert run(*FASTFLOW, *DATASET, "--log_group", "a", "--save_model").code == 0
    assert trained[0][2].log_group == "a" and trained[0][2].outputs.models
    refused = run("--log_group=a", *FASTFLOW, *DATASET, "--log_group", "b")
    assert refused.code == 2 and "--log_group is 'a' and then 'b': type it once" in refused.err


@pytest.mark.parametrize("option", ["--log_group", "--checkpoint", "--category"])
def test_two_different_values_are_an_error(option: str) -> None:
    dataset = ("dataset", "data") if option == "--category" else DATASET
    finished = run(*dataset, *FASTFLOW, option, "a", option, "b", "--eval_only")
    assert finished.code == 2 and f"{option} is 'a' and then 'b': type it once" in finished.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_only"], "--eval_only without --checkpoint"),
        (["--checkpoint", "x"], "--checkpoint without --eval_only"),
        (["--patience", "2"], "--patience watches held-out images"),
        (["--smoothing_px", "3"], "--smoothing_px 3.0 without --smoothing"),
        (["--smoothing", "none", "--smoothing_px", "3"], "--smoothing_px 3.0 without --smoothing"),
        (["--smoothing", "gaussian", "--smoothing_px", "0"], "--smoothing_px is 0.0"),
        (["--multi_scale", "1", "--multi_scale", "1"], "--multi_scale (1.0, 1.0): name each scale once"),
        (["--multi_scale", "9"], "--multi_scale is 9.0, expected a factor from 0.25 to 4"),
        (["--multi_scale", "1.01", "--weights", "random"], "--multi_scale 1.01 is 224 px for an input of 224 px"),
        (["--hidden_ratio", "17"], "--hidden_ratio is 17.0, expected 16 or less"),
        (["--hidden_ratio", "1e30"], "--hidden_ratio is 1e+30, expected 16 or less"),
        (["--epochs", "1000001"], "--epochs is 1000001, expected 1000000 or less"),
        (["--lr", "1e7"], "--lr is 10000000.0, expected 1e+06 or less"),
        (["--weight_decay", "1e7"], "--weight_decay is 10000000.0, expected 1e+06 or less"),
        (["--clamp", "21"], "--clamp is 21.0, expected 20 or less"),
        (["--feature_noise", "101"], "--feature_noise is 101.0, expected 100 or less"),
        (["--flow_steps", "65"], "--flow_steps is 65, expected 64 or less"),
        (["--batch_size", "65537"], "--batch_size is 65537, expected 65536 or less"),
        (["--patience", "0", "--train_val_split", "0.5"], "--patience is 0, expected 1 or more"),
        (["--smoothing", "gaussian", "--smoothing_px", "257"], "--smoothing_px is 257.0, expected 256 or less"),
        (["--precision", "half"], "'half' is not one of"),
        (["--preserve_high_res"], "scored in tiles: add --enable_patch_inference"),
        (["--enable_patch_inference", "--patch_size", "225"], "--patch_size 225 is larger than the images of 224 px"),
        (
            ["--preserve_high_res", "--max_side", "150", "--enable_patch_inference", "--patch_size", "160"],
            "--patch_size 160 is larger than the images of 150 px",
        ),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--calibration split", "--calibration split is not available, the thresholds of a stored model are its own"),
        ("--threshold_rule quantile:0.5", "--threshold_rule quantile:0.5 is not available, the thresholds of a stored"),
        ("--threshold_rule f1 --validation_data data", "--threshold_rule f1 is not available"),
        ("--resume", "--resume (--skip_existing) is not available, stored models are not trained again"),
        ("--skip_existing", "--resume (--skip_existing) is not available"),
        ("--save_model", "--save_model is not available, stored models are not trained again: leave it out"),
        ("--log_online", "--log_online is not available"),
        ("--tensorboard", "--tensorboard is not available"),
        ("--eval_every 2", "--eval_every 2 is not available"),
        ("--checkpoint_every 3", "--checkpoint_every 3 is not available"),
        ("--train_val_split 0.5", "--train_val_split 0.5 is not available"),
        ("--limit_train 3", "--limit_train 3 is not available"),
    ],
)
def test_options_of_training_are_refused_with_eval_only(
    flags: str, message: str, evaluated: list[dict[str, Any]]
) -> None:
    finished = run(*DATASET, *FASTFLOW, "--eval_only", "--checkpoint", "model", *flags.split())
    assert finished.code == 2 and message in finished.err and len(finished.error_lines) == 1
    assert evaluated == []


def test_seeds_and_defaults_are_accepted_with_eval_only(evaluated: list[dict[str, Any]]) -> None:
    flags = "--seed 7 --seed 8 --calibration kfold --threshold_rule mean3std --checkpoint_every 10 --train_val_split 1"
    assert run(*DATASET, *FASTFLOW, "--eval_only", "--checkpoint", "model", *flags.split()).code == 0
    assert "changes nothing with --eval_only" in " ".join(run("--help").out.split())
    assert len(evaluated) == 1


@pytest.mark.parametrize(
    ("dataset", "flags", "message"),
    [
        (["--category", "plate"], ["--backbone", ""], "backbone '' has no layers of its own here"),
        (["--category", "plate"], ["--backbone", "", "--layers", "layer2"], "unknown backbone ''"),
        (["--category", "plate"], ["--weights", ""], "--weights is empty, expected pretrained, random or a path"),
        (["--category", "plate", "--dataset_name", ""], [], "unknown data set ''"),
        (["--category", ""], [], "class '' not found"),
        (["-d", ""], [], "class '' not found"),
        (["-d", "plate", ""], [], "unknown data set ''"),
    ],
)
def test_an_unset_variable_is_not_taken_for_the_default(
    dataset: list[str], flags: list[str], message: str, tmp_path: Any
) -> None:
    write_category(tmp_path, "plate")
    name = ["mpdd"] if dataset == ["-d", ""] else []
    finished = invoke(run_fastflow, tmp_path / "out", "dataset", *dataset, *name, tmp_path, "fastflow", *flags)
    assert finished.code == 2 and message in finished.err, finished.err
    assert len(finished.error_lines) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--hidden_ratio 16 --clamp 20 --feature_noise 100 --flow_steps 64",
        "--epochs 1000000 --lr 1e6 --weight_decay 1e6 --batch_size 65536",
        "--smoothing gaussian --smoothing_px 256",
    ],
)
def test_bounds_belong_to_what_is_allowed(flags: str, trained: list[Any]) -> None:
    configured(trained, *flags.split())
