"""The command grammar, and what wrong arguments lead to."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import REPOSITORY, RunCommand, small_run, write_category, write_texture
from in_process import Finished, invoke

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore
from patchcore.cli.grammar import announce
from patchcore.configs import ThresholdRule
from patchcore.errors import ConfigurationError

METHOD = ["patch_core", "-b", "resnet18", "-le", "layer2"]
SAMPLER = ["sampler", "identity"]
DATASET = ["dataset", "mpdd", "data"]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collects the arguments that the command hands to the pipeline, which does not run."""
    calls: list[tuple[Any, ...]] = []

    def record(method: str, config_of: Any, run: Any, dataset: Any, announce: Any) -> bool:
        calls.append((method, config_of("plate"), run, dataset))
        return True

    monkeypatch.setattr("patchcore.pipeline.train_and_evaluate", record)
    return calls


OPTIONS = {  # of the issue
    "run_patchcore": "--gpu --device --threads --seed --log_group --log_project --save_segmentation_images "
    "--save_patchcore_model --save_anomaly_scores --skip_existing --calibration --threshold_rule "
    "--validation_data --log_online --tensorboard --launcher --workers --ray_address --gpus_per_task --cpus_per_task "
    "--shards --shard_coreset",
    "patch_core": "-b --backbone_names -le --layers_to_extract_from --pretrain_embed_dimension "
    "--target_embed_dimension --preprocessing --aggregation --anomaly_scorer_num_nn --patchsize --patchscore "
    "--patchoverlap -pa --patchsize_aggregate --faiss_on_gpu --faiss_num_workers --precision --memory_budget --weights "
    "--embedding --normalization --score_reweighting --score_normalization --index",
    "sampler": "-p --percentage",
    "dataset": "-d --subdatasets --train_val_split --batch_size --num_workers --resize --imagesize --augment "
    "--resize_mode --limit_train --limit_test",
}


@pytest.mark.parametrize("step", OPTIONS)
def test_the_options_are_those_of_the_original_and_the_additions(step: str) -> None:
    command = run_patchcore if step == "run_patchcore" else run_patchcore.commands[step]
    found = [name for p in command.params if isinstance(p, click.Option) for name in p.opts]
    assert sorted(found) == sorted(OPTIONS[step].split())


def test_left_out_options_give_the_published_configuration(captured: list[tuple[Any, ...]]) -> None:
    assert invoke(run_patchcore, "out", *METHOD, *SAMPLER, *DATASET).code == 0
    method, config, run, dataset = captured[0]
    assert method == "patchcore"
    assert (config.backbone.name, config.backbone.layers, config.backbone.weights) == (
        "resnet18",
        ("layer2",),
        "pretrained",
    )
    assert (config.num_nn, config.patchsize, config.embedding) == (5, 3, "pooled")
    assert (config.pretrain_embed_dimension, config.target_embed_dimension) == (1024, 1024)
    assert (config.sampler.name, config.sampler.percentage) == ("identity", 0.1)
    assert (run.results_path, run.log_project, run.log_group, run.seeds) == ("out", "project", "group", (0,))
    assert (run.calibration, run.skip_existing, run.runtime.device, run.runtime.gpus) == ("kfold", False, "auto", (0,))
    assert (run.threshold_rule, run.validation_path) == (ThresholdRule("mean3std"), None)
    assert (dataset.name, dataset.path, dataset.categories, dataset.batch_size) == ("mpdd", "data", (), 2)
    assert (dataset.preprocessing.resize_px, dataset.preprocessing.imagesize_px) == (256, 224)
    assert (run.runtime.faiss_on_gpu, run.runtime.faiss_num_workers) == (False, None)
    assert run.runtime.memory_budget_bytes is None


def test_every_typed_value_arrives(captured: list[tuple[Any, ...]]) -> None:
    finished = invoke(
        run_patchcore,
        "--gpu", 1, "--gpu", 2, "--device", "cpu", "--threads", 2, "--seed", 3, "--seed", 4, "--log_group", "g",
        "--log_project", "p", "--save_segmentation_images", "--save_patchcore_model", "--save_anomaly_scores",
        "--skip_existing", "--calibration", "none", "out",
        "patch_core", "--backbone_names", "b", "--layers_to_extract_from", "x", "-le", "y",
        "--pretrain_embed_dimension", 7, "--target_embed_dimension", 8, "--preprocessing", "mean",
        "--aggregation", "mean", "--anomaly_scorer_num_nn", 9, "--patchsize", 5, "--patchscore", "max",
        "--patchoverlap", "0.0", "--faiss_on_gpu", "--faiss_num_workers", 3, "--weights", "random",
        "--embedding", "pooled", "--normalization", "backbone", "--index", "projected",
        "sampler", "--percentage", 0.25, "random",
        "dataset", "--subdatasets", "one", "-d", "two", "--train_val_split", 0.5, "--batch_size", 6,
        "--num_workers", 0, "--resize", 300, "--imagesize", 200, "--resize_mode", "letterbox",
        "--limit_train", 10, "--limit_test", 11, "folder", "path",
    )  # fmt: skip
    assert finished.code == 0, finished.err
    _, config, run, dataset = captured[0]
    assert run.runtime.gpus == (1, 2) and run.runtime.device == "cpu" and run.runtime.threads == 2
    assert run.seeds == (3, 4) and (run.log_project, run.log_group) == ("p", "g") and run.calibration == "none"
    assert run.outputs.segmentation_images and run.outputs.models and run.outputs.anomaly_maps and run.skip_existing
    assert (config.backbone.name, config.backbone.layers) == ("b", ("x", "y"))
    assert (config.backbone.weights, config.backbone.normalization) == ("random", "backbone")
    assert (config.pretrain_embed_dimension, config.target_embed_dimension) == (7, 8)
    assert (config.num_nn, config.patchsize, config.index) == (9, 5, "projected")
    assert (config.sampler.name, config.sampler.percentage) == ("random", 0.25)
    assert (dataset.name, dataset.path, dataset.categories) == ("folder", "path", ("one", "two"))
    assert (dataset.train_val_split, dataset.batch_size, dataset.num_workers) == (0.5, 6, 0)
    assert (dataset.preprocessing.resize_px, dataset.preprocessing.imagesize_px) == (300, 200)
    assert dataset.preprocessing.resize_mode == "letterbox"
    assert (dataset.limit_train, dataset.limit_test) == (10, 11)
    assert run.runtime.faiss_on_gpu and run.runtime.faiss_num_workers == 3


def test_a_threshold_rule_arrives_with_its_data(captured: list[tuple[Any, ...]]) -> None:
    typed = ("--threshold_rule", "f1", "--validation_data", "labelled")
    assert invoke(run_patchcore, "out", *METHOD, *SAMPLER, *DATASET, *typed).code == 0
    assert (captured[0][2].threshold_rule, captured[0][2].validation_path) == (ThresholdRule("f1"), "labelled")
    assert invoke(run_patchcore, "out", *METHOD, *SAMPLER, *DATASET, "--threshold_rule", "quantile:0.9").code == 0
    assert captured[1][2].threshold_rule == ThresholdRule("quantile", 0.9)


def test_place_of_options_and_order_of_steps_change_nothing(captured: list[tuple[Any, ...]]) -> None:
    run_forms = [["--seed", "3", "--skip_existing", "out"], ["out", "--skip_existing", "--seed=3"]]
    method = ["patch_core", "-le", "layer3", "--patchsize", "5", "-b", "resnet18"]
    sampler_forms = [["sampler", "-p", "0.3", "random"], ["sampler", "random", "-p0.3"]]
    dataset_forms = [
        ["dataset", "-d", "a", "--resize", "300", "mpdd", "data"],
        ["dataset", "mpdd", "-da", "data", "--resize=300"],
        ["dataset", "mpdd", "data", "--resize", "300", "--subdatasets", "a"],
    ]
    for own, sampler, dataset in itertools.product(run_forms, sampler_forms, dataset_forms):
        assert invoke(run_patchcore, *own, *method, *sampler, *dataset).code == 0
    for steps in itertools.permutations([method, sampler_forms[1], dataset_forms[2]]):
        assert invoke(run_patchcore, *run_forms[1], *itertools.chain(*steps)).code == 0
    assert len(captured) == 18
    assert all(call == captured[0] for call in captured)


def test_an_argument_may_be_called_like_a_step(captured: list[tuple[Any, ...]]) -> None:
    assert invoke(run_patchcore, "out", *METHOD, "dataset", "folder", "dataset", *SAMPLER).code == 0
    assert captured[0][3].path == "dataset"


BAD_GRAMMAR = {
    "nothing": ([], "no arguments"),
    "no results path": ([*METHOD, *SAMPLER, *DATASET], "RESULTS_PATH"),
    "no steps": (["out"], "patch_core is missing"),
    "missing step": (["out", *METHOD, *DATASET], "sampler is missing"),
    "repeated step": (["out", *METHOD, *SAMPLER, *SAMPLER, *DATASET], "'sampler' was given twice"),
    "misspelt step": (["out", "patchcore", *METHOD[1:], *SAMPLER, *DATASET], "did you mean patch_core?"),
    "step in excess": (["out", *METHOD, *SAMPLER, *DATASET, "more"], "found 'more' where a step was expected"),
    "missing argument": (["out", *METHOD, *SAMPLER, "dataset", "mpdd"], "DATA_PATH"),
    "missing value": (["out", *METHOD, *SAMPLER, *DATASET, "--resize"], "'--resize' of dataset needs a value"),
    "unknown option": (["out", *METHOD, *SAMPLER, *DATASET, "--rezise", "3"], "did you mean --resize"),
    "unknown run option": (["out", "--sed", "3", *METHOD, *SAMPLER, *DATASET], "did you mean --seed"),
    "not a number": (["out", *METHOD, *SAMPLER, *DATASET, "--resize", "big"], "'big'"),
    "value for a flag": (["out", "--skip_existing=1", *METHOD, *SAMPLER, *DATASET], "--skip_existing"),
    "--preprocessing": (["out", *METHOD, "--preprocessing", "conv", *SAMPLER, *DATASET], "use mean or leave it out"),
    "--aggregation": (["out", *METHOD, "--aggregation", "mlp", *SAMPLER, *DATASET], "use mean or leave it out"),
    "--patchscore": (["out", *METHOD, "--patchscore", "min", *SAMPLER, *DATASET], "'min' is not one of"),
    "--patchoverlap": (["out", *METHOD, "--patchoverlap", "0.5", *SAMPLER, *DATASET], "use 0.0 or leave it out"),
    "-pa": (["out", *METHOD, "-pa", "3", *SAMPLER, *DATASET], "one is named twice"),
    "--augment": (["out", *METHOD, *SAMPLER, *DATASET, "--augment"], "leave it out"),
    "no backbone": (["out", "patch_core", "-le", "x", *SAMPLER, *DATASET], "expected one -b"),
    "two backbones": (["out", *METHOD, "-b", "vgg11", *SAMPLER, *DATASET], "as in 0.layer2"),
    "two weights": (["out", *METHOD, "--weights", "a", "--weights", "b", *SAMPLER, *DATASET], "one for each -b"),
    "no layer": (["out", "patch_core", "-b", "resnet18", *SAMPLER, *DATASET], "-le"),
    "repeated layer": (["out", *METHOD, "-le", "layer2", *SAMPLER, *DATASET], "named twice"),
    "even patchsize": (["out", *METHOD, "--patchsize", "4", *SAMPLER, *DATASET], "odd"),
    "no neighbour": (["out", *METHOD, "--anomaly_scorer_num_nn", "0", *SAMPLER, *DATASET], "1 or more"),
    "no worker": (["out", *METHOD, "--faiss_num_workers", "0", *SAMPLER, *DATASET], "1 or more"),
    "embedding": (["out", *METHOD, "--embedding", "sum", *SAMPLER, *DATASET], "pooled"),
    "unused dimension": (
        ["out", *METHOD, "--embedding", "concat", "--target_embed_dimension", "9", *SAMPLER, *DATASET],
        "concat keeps every channel",
    ),
    "percentage 0": (["out", *METHOD, "sampler", "-p", "0", "random", *DATASET], "(0, 1]"),
    "percentage above 1": (["out", *METHOD, "sampler", "-p", "1.5", "random", *DATASET], "(0, 1]"),
    "percentage below 0": (["out", *METHOD, "sampler", "random", "-p", "-0.1", *DATASET], "(0, 1]"),
    "percentage nan": (["out", *METHOD, "sampler", "-p", "nan", "random", *DATASET], "(0, 1]"),
    "imagesize": (["out", *METHOD, *SAMPLER, *DATASET, "--imagesize", "300"], "--resize 256"),
    "train_val_split": (["out", *METHOD, *SAMPLER, *DATASET, "--train_val_split", "0"], "(0, 1]"),
    "batch_size": (["out", *METHOD, *SAMPLER, *DATASET, "--batch_size", "0"], "1 or more"),
    "num_workers": (["out", *METHOD, *SAMPLER, *DATASET, "--num_workers", "-1"], "0 or more"),
    "limit_train": (["out", *METHOD, *SAMPLER, *DATASET, "--limit_train", "0"], "1 or more"),
    "repeated class": (["out", *METHOD, *SAMPLER, *DATASET, "-d", "a", "-d", "a"], "more than once"),
    "negative seed": (["out", "--seed", "-1", *METHOD, *SAMPLER, *DATASET], "0 or more"),
    "repeated seed": (["out", "--seed", "1", "--seed", "1", *METHOD, *SAMPLER, *DATASET], "named twice"),
    "threads": (["out", "--threads", "0", *METHOD, *SAMPLER, *DATASET], "1 or more"),
    "calibration": (["out", "--calibration", "best", *METHOD, *SAMPLER, *DATASET], "kfold"),
    "log_group above": (["out", "--log_group", "../x", *METHOD, *SAMPLER, *DATASET], "plain name"),
    "log_group empty": (["out", "--log_group", "", *METHOD, *SAMPLER, *DATASET], "plain name"),
    "log_project": (["out", "--log_project", "a/b", *METHOD, *SAMPLER, *DATASET], "plain name"),
}


def assert_refused(finished: Finished, expected: str) -> None:
    """Check for exit code 2 and one line that says what the test expects."""
    assert finished.code == 2
    assert len(finished.error_lines) == 1, finished.err
    assert finished.err.startswith("error: ")
    assert expected in finished.err
    assert finished.out == ""


@pytest.mark.parametrize("case", BAD_GRAMMAR)
def test_wrong_grammar_is_one_line_and_reaches_no_work(case: str, captured: list[tuple[Any, ...]]) -> None:
    args, expected = BAD_GRAMMAR[case]
    assert_refused(invoke(run_patchcore, *args), expected)
    assert not captured


def test_refused_options_pass_with_their_default_value(captured: list[tuple[Any, ...]]) -> None:
    defaults = ["--preprocessing", "mean", "--aggregation", "mean", "--patchscore", "max", "--patchoverlap", "0"]
    assert invoke(run_patchcore, "out", *METHOD, *defaults, *SAMPLER, *DATASET).code == 0


LOADER = ["patch_core_loader", "-p", "model"]
BAD_LOADER_GRAMMAR = {
    "no model": (["out", "patch_core_loader", *DATASET], "--patch_core_paths"),
    "missing step": (["out", *LOADER], "dataset is missing"),
    "sampler": (["out", *LOADER, *SAMPLER, *DATASET], "found 'sampler' where a step was expected"),
    "seed": (["out", "--seed", "-3", *LOADER, *DATASET], "0 or more"),
    "split": (["out", *LOADER, *DATASET, "--train_val_split", "0.5"], "not trained again"),
    "augment": (["out", *LOADER, *DATASET, "--augment"], "leave it out"),
    "model folder": (["out", *LOADER, *DATASET], "model 'model' not found"),
}


@pytest.mark.parametrize("case", BAD_LOADER_GRAMMAR)
def test_wrong_grammar_of_the_evaluation(case: str) -> None:
    args, expected = BAD_LOADER_GRAMMAR[case]
    assert_refused(invoke(load_and_evaluate_patchcore, *args), expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with one good class, `plate`, and folders that are not quite a class."""
    root = tmp_path_factory.mktemp("cli") / "data set"
    write_category(root, "plate")
    (root / "untrained" / "train" / "good").mkdir(parents=True)
    write_texture(root / "untested" / "train" / "good" / "0.png", 0)
    (root.parent / "empty").mkdir()
    (root.parent / "file").write_text("not a folder")
    return root


def bad_arguments(data: Path) -> dict[str, tuple[list[str], str]]:
    """Return steps that only a look at data, backbone or disk shows to be wrong, and the words of the error."""
    good = small_run(data, "plate")

    def with_swap(old: str, new: str) -> list[str]:
        assert old in good
        return [new if part == old else part for part in good]

    return {
        "missing path": (small_run(data / "nowhere", "plate"), "nowhere"),
        "path is a file": (small_run(data.parent / "file"), "expected the folder that holds the classes"),
        "no class": (small_run(data.parent / "empty"), "no class found"),
        "unknown class": (small_run(data, "plates"), "found plate, untested, untrained"),
        "no training images": (small_run(data, "untrained"), "no training images"),
        "no test images": (small_run(data, "untested"), "no test images"),
        "unknown data set": (with_swap("mpdd", "mpd"), "did you mean mpdd"),
        "unknown sampler": (with_swap("approx_greedy_coreset", "aprox_greedy_coreset"), "approx_greedy_coreset"),
        "unknown backbone": (with_swap("efficientnet_lite0", "efficientnet_lite9"), "did you mean efficientnet_lite"),
        "unknown layer": (with_swap("blocks.2", "block.2"), "blocks.2"),
        "layer without a map": (with_swap("blocks.2", "classifier"), "expected a feature map"),
        "missing weights": (with_swap("random", "/nowhere/weights.pth"), "/nowhere/weights.pth"),
        "no held-out images": (["--calibration", "split", *good], "1.0 holds out 0 of 'plate'"),
        "unknown device": (["--device", "tpu", *good], "'tpu'"),
        "missing device": (["--device", "cuda:99", *good], "GPU 99"),
    }


@pytest.mark.parametrize("case", bad_arguments(Path("data")))
def test_wrong_arguments_are_one_line_and_leave_nothing(case: str, data: Path, tmp_path: Path) -> None:
    args, expected = bad_arguments(data)[case]
    assert_refused(invoke(run_patchcore, tmp_path / "out", *args), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/out", "/proc/patchcore/out"])
def test_unwritable_results_path(place: str, data: Path) -> None:
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    refused = invoke(run_patchcore, data.parent / place, *small_run(data, "plate"))
    assert_refused(refused, "cannot be written")


def test_the_warning_of_the_device_comes_once_and_not_before_the_arguments_are_right(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    steps = small_run(data, "plate")
    warned = invoke(run_patchcore, tmp_path, "--threads", 1, *steps)
    assert warned.code == 0
    assert len(warned.error_lines) == 1 and "no CUDA device" in warned.err
    silent = invoke(run_patchcore, tmp_path, "--threads", 1, "--device", "cpu", *steps)
    assert silent.code == 0 and silent.err == ""


def test_help_and_import_load_no_torch(run_command: RunCommand) -> None:
    for script in ("run_patchcore.py", "load_and_evaluate_patchcore.py", "make_demo_dataset.py"):
        finished = run_command(script, "--help")
        assert finished.returncode == 0 and finished.stdout.startswith("Usage: "), finished.stderr
    program = """
import contextlib, io, json, sys
import patchcore
from patchcore.cli import load_and_evaluate_patchcore, make_demo_dataset, run_patchcore
from patchcore.cli.grammar import announce
for command in (run_patchcore, load_and_evaluate_patchcore, make_demo_dataset):
    for step in ["", *getattr(command, "commands", {})]:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            command.main([step, "--help"] if step else ["--help"], prog_name="program")
        assert shown.getvalue().startswith("Usage: program"), shown.getvalue()
        assert step in shown.getvalue().splitlines()[0]
heavy = {"torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "faiss", "skimage"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    environment = {"PYTHONPATH": str(REPOSITORY / "src"), "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == []


@pytest.mark.parametrize("before", [[], ["out"], ["out", *METHOD], ["out", *METHOD, "--nonsense"]])
def test_help_of_a_step_needs_nothing_else(before: list[str]) -> None:
    shown = invoke(run_patchcore, *before, "sampler", "--help")
    assert shown.code == 0
    assert "--percentage" in shown.out and "approx_greedy_coreset" in shown.out and "--log_group" not in shown.out


def test_an_error_of_many_lines_is_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bool:
        raise ConfigurationError("first\nsecond \udcff third")

    monkeypatch.setattr("patchcore.pipeline.train_and_evaluate", fail)
    finished = invoke(run_patchcore, "out", *METHOD, *SAMPLER, *DATASET)
    assert finished.code == 2 and finished.err == "error: first second \\udcff third\n"


def test_an_interrupt_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchcore.pipeline.train_and_evaluate", interrupt)
    finished = invoke(run_patchcore, "out", *METHOD, *SAMPLER, *DATASET)
    assert finished.code == 130 and finished.err.strip() == "error: interrupted"


def test_a_terminal_that_knows_no_plus_minus_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="koi8-r", errors="surrogateescape"))
    announce("0.9 ± 0.1")
    sys.stdout.flush()
    assert written.getvalue() == rb"0.9 \xb1 0.1" + b"\n"
