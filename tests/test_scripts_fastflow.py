"""The sample scripts of FastFlow: which commands they run, and, slowly, what these leave.

What every script has in common (help, data path, interpreter) is tested in test_scripts.py.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import pytest
from shell_scripts import (
    FASTFLOW_EVALUATION,
    FASTFLOW_IMPROVED,
    FASTFLOW_LOADER,
    FASTFLOW_PATCH,
    FASTFLOW_PLAIN,
    FASTFLOW_WIDE,
    SMALL,
    Desk,
    RunScript,
    group,
    render_demo_set,
    run_whole_script,
    values,
    without,
)

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow

CLASSES = ("metal_plate", "bracket_white", "bracket_brown", "bracket_black")

# The commands of one class, {0}, on the data {1}; the first and the patch one are published.
TRAININGS = {
    FASTFLOW_IMPROVED: "--log_group FFLOW_IMPROVED_{0}_R18 --save_model --save_segmentation_images "
    "results/fastflow_improved/{0} dataset --category {0} {1} fastflow --backbone resnet18 --use_class_specific",
    FASTFLOW_PLAIN: "--log_group FFLOW_{0}_R18 --save_model --save_segmentation_images results/fastflow/{0} "
    "dataset --category {0} {1} fastflow --backbone resnet18 --flow_steps 8",
    FASTFLOW_PATCH: "--gpu 0 --seed 42 --log_group fastflow_patch_{0} --save_model results/fastflow_patch "
    "dataset --category {0} --batch_size 10 --num_workers 0 --resize 256 --imagesize 224 --preserve_high_res {1} "
    "fastflow --backbone resnet18 --flow_steps 4 --input_size 224 --hidden_ratio 0.5 --use_class_specific "
    "--enable_patch_inference --patch_size 160 --patch_stride 80 --low_memory",
    FASTFLOW_WIDE: "--log_group FFLOW_{0}_WR50 --save_model --save_segmentation_images results/fastflow_wresnet50/{0} "
    "dataset --category {0} {1} fastflow --backbone wide_resnet50_2 --use_class_specific",
}
OFFLINE_GROUPS = {
    FASTFLOW_IMPROVED: "FFLOW_IMPROVED_{0}_LITE0",
    FASTFLOW_PLAIN: "FFLOW_{0}_LITE0",
    FASTFLOW_PATCH: "fastflow_patch_{0}_LITE0",
    FASTFLOW_WIDE: "FFLOW_{0}_LITE0",
}
# Each training with the script that evaluates its models, the variant there, and the folder that this writes to.
EVALUATIONS = {
    FASTFLOW_IMPROVED: (FASTFLOW_LOADER, {}, "fastflow_results"),
    FASTFLOW_PLAIN: (FASTFLOW_EVALUATION, {}, "fastflow"),
    FASTFLOW_PATCH: (FASTFLOW_EVALUATION, {"VARIANTS": "fastflow_patch"}, "fastflow_patch"),
    FASTFLOW_WIDE: (FASTFLOW_EVALUATION, {"VARIANTS": "fastflow_wresnet50"}, "fastflow_wresnet50"),
}
SCRIPTS = (*TRAININGS, FASTFLOW_LOADER, FASTFLOW_EVALUATION)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def results_of(command: list[str]) -> str:
    return command[command.index("dataset") - 1]


def pretend_runs(desk: Desk, commands: list[list[str]]) -> list[Path]:
    """Make the folders that some trainings leave; return the models."""
    models = []
    for command in commands:
        (name,) = values(command, "--category")
        folder = desk.pretend_models(group(command), "mpdd", name, results=results_of(command))
        models.append(folder / "models" / f"mpdd_{name}")
    return models


def models_of(commands: list[list[str]]) -> list[Path]:
    """Return the one model that each evaluation reads."""
    found = [[*values(c, "-p"), *values(c, "--checkpoint")] for c in commands]
    assert all(len(models) == 1 for models in found)
    return [Path(models[0]) for models in found]


@pytest.mark.parametrize("script", TRAININGS)
def test_a_training_runs_its_command_once_for_each_class(script: str, desk: Desk) -> None:
    data = shlex.quote(str(desk.data))
    assert desk.train(script) == [shlex.split(TRAININGS[script].format(name, data)) for name in CLASSES]


@pytest.mark.parametrize("script", TRAININGS)
def test_offline_changes_the_backbone_and_the_name_alone(script: str, desk: Desk) -> None:
    published, offline = desk.train(script), desk.train(script, "--offline")
    changed = ("--backbone", "--log_group")
    assert [without(c, *changed) for c in offline] == [without(c, *changed) for c in published]
    assert [group(c) for c in offline] == [OFFLINE_GROUPS[script].format(name) for name in CLASSES]
    assert all(values(c, "--backbone") == ["efficientnet_lite0"] for c in offline)


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("args", [("--offline", "{data}"), ("--offline",), ()])
def test_the_path_comes_first_or_from_the_variable(script: str, args: tuple[str, ...], desk: Desk) -> None:
    typed = [a.format(data=desk.data) for a in args]
    variable = {} if str(desk.data) in typed else {"MPDD_PATH": desk.data}
    ran = desk.run(script, *typed, "--epochs", "7", "--device=cpu", **variable)
    assert ran.code == 0, ran.err
    assert len(ran.commands) == len(CLASSES)
    for command in ran.commands:
        assert str(desk.data) in command and command[-3:] == ["--epochs", "7", "--device=cpu"]
        assert ("efficientnet_lite0" in command) == ("--offline" in args)


@pytest.mark.parametrize("script", TRAININGS)
def test_appended_flags_reach_the_command_and_win(script: str, desk: Desk) -> None:
    flags = shlex.split("--gpu 1 --backbone wideresnet50 --log_project mine --limit_train=4")
    for command in desk.train(script, *flags):
        assert command[-len(flags) :] == flags
        context = run_fastflow.make_context("run_fastflow", list(command))
        assert context.params.items() >= {("gpus", (1,)), ("log_project", "mine"), ("log_group", group(command))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_classes_and_folders_are_chosen_by_variables(script: str, desk: Desk) -> None:
    variables = {"CLASSES": "tubes\n  Front_Screw", "RESULTS": "my results", "EVALUATED": "my evaluation"}
    if script in TRAININGS:
        commands = desk.train(script, **variables)
        assert all(results_of(c).startswith("my results/fastflow") for c in commands)
        assert [values(c, "--category") for c in commands] == [["tubes"], ["Front_Screw"]]
        return
    training = FASTFLOW_IMPROVED if script == FASTFLOW_LOADER else FASTFLOW_PLAIN
    models = pretend_runs(desk, desk.train(training, **variables))
    ran = desk.run(script, desk.data, **variables)
    assert ran.code == 0, ran.err
    assert models_of(ran.commands) == models
    folder = "my evaluation/fastflow_results" if script == FASTFLOW_LOADER else "my evaluation/fastflow"
    for name, command in zip(("tubes", "Front_Screw"), ran.commands, strict=True):
        assert f"{folder}/{name}" in command


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_class_given_twice_is_refused_before_any_work(script: str, desk: Desk) -> None:
    ran = desk.run(script, desk.data, CLASSES="rod tubes rod")
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert ran.err.startswith("error: CLASSES has 'rod' more than once") and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [("--category", "rod"), ("-d", "rod"), ("--subdatasets=rod",)])
def test_classes_are_picked_by_the_variable_alone(script: str, flags: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(script, desk.data, "--threads", 1, *flags)
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert "is set by this script: pick classes with CLASSES" in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("flags", [("--log_group", "mine"), ("--log_group=mine",)])
def test_a_training_refuses_the_group_that_it_names_itself(script: str, flags: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(script, desk.data, "--threads", 1, *flags)
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert ran.err.startswith("error: --log_group is set by this script: ") and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("script", TRAININGS)
def test_a_failed_class_stops_no_other_and_is_named(script: str, desk: Desk) -> None:
    ran = desk.run(script, desk.data, FAIL_WITH="--category bracket_white", FAIL_CODE=1)
    assert ran.code == 1 and len(ran.commands) == len(CLASSES)
    assert ran.err.strip() == "error: failed: bracket_white"


@pytest.mark.parametrize("script", TRAININGS)
def test_an_interrupt_stops_the_script(script: str, desk: Desk) -> None:
    ran = desk.run(script, desk.data, FAIL_WITH="--category bracket_white", FAIL_CODE=130)
    assert ran.code == 130 and len(ran.commands) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_headings_tell_of_the_offline_backbones(script: str, desk: Desk) -> None:
    title = "fastflow/rod" if script == FASTFLOW_EVALUATION else "rod"
    for args, end in (((), ""), (("--offline",), " (offline backbones)")):
        assert desk.run(script, desk.data, *args, CLASSES="rod").out.splitlines()[0] == f"== {title}{end}"


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("offline", [(), ("--offline",)])
def test_each_evaluation_reads_the_models_of_its_training(training: str, offline: tuple[str, ...], desk: Desk) -> None:
    script, variables, folder = EVALUATIONS[training]
    models = pretend_runs(desk, desk.train(training, *offline))
    ran = desk.run(script, desk.data, *offline, "--threads", 2, **variables)
    assert ran.code == 0, ran.err
    backbone = "wide_resnet50_2" if training == FASTFLOW_WIDE else "resnet18"
    backbone, suffix = ("efficientnet_lite0", "_LITE0") if offline else (backbone, "")
    for name, model, command in zip(CLASSES, models, ran.commands, strict=True):
        if script == FASTFLOW_LOADER:
            expected = (
                f"load_and_evaluate_fastflow.py --gpu 0 --seed 0 --save_segmentation_images "
                f"evaluated_results/{folder}/{name} fastflow_loader -p {model} "
                f"dataset --resize 256 --imagesize 224 -d {name} mpdd"
            )
            assert command == [*shlex.split(expected), str(desk.data), "--threads", "2"]
            continue
        assert command == [
            *shlex.split(f"run_fastflow.py evaluated_results/{folder}/{name} dataset --category {name}"),
            str(desk.data),
            *shlex.split(f"fastflow --backbone {backbone} --log_group FFLOW_EVAL{suffix} --eval_only"),
            *shlex.split(f"--checkpoint {model} --save_segmentation_images --threads 2"),
        ]
        assert f"model: {model}\n" in ran.out


@pytest.mark.parametrize("training", TRAININGS)
def test_the_newest_run_with_the_model_is_evaluated(training: str, desk: Desk) -> None:
    script, variables, _ = EVALUATIONS[training]
    chosen = {**variables, "CLASSES": "rod"}
    (command,) = desk.train(training, CLASSES="rod")
    name, results = group(command), results_of(command)
    for suffix in ("", "_0", "_2", "_10", "_10_seeds", "_old"):
        desk.pretend_models(name + suffix, "mpdd", "rod", results=results)
    desk.pretend_models(f"{name}_11", "mpdd", "rod_11", results=results)  # a class whose group looks like a run of rod
    (desk.folder / results / "project" / f"{name}_12" / "training").mkdir(parents=True)
    ran = desk.run(script, desk.data, **chosen)
    assert ran.code == 0, ran.err
    assert models_of(ran.commands) == [Path(f"{results}/project/{name}_10/models/mpdd_rod")]
    other = desk.run(script, desk.data, LOG_PROJECT="mine", **chosen)
    assert other.code == 1 and other.commands == [] and f"{results}/mine" in other.err


@pytest.mark.parametrize("training", TRAININGS)
def test_what_was_never_trained_is_skipped_unless_it_was_asked_for(training: str, desk: Desk) -> None:
    script, variables, folder = EVALUATIONS[training]
    prefix = "" if script == FASTFLOW_LOADER else f"{folder}/"
    nothing = desk.run(script, desk.data, **variables)
    assert nothing.code == 1 and nothing.commands == []
    pretend_runs(desk, desk.train(training, CLASSES="metal_plate"))
    some = desk.run(script, desk.data, **variables)
    assert len(some.commands) == 1
    missing = " ".join(prefix + name for name in CLASSES[1:])
    if variables:
        assert some.code == 1 and some.err.splitlines()[-1] == f"error: without models: {missing}"
    else:
        assert some.code == 0 and some.out.splitlines()[-1] == f"skipped, never trained: {missing}"
    assert some.err.count(f"train them with {Path(training).name}\n") == 3
    named = desk.run(script, desk.data, **{**variables, "CLASSES": "bracket_white metal_plate"})
    assert named.code == 1 and len(named.commands) == 1
    assert f"error: without models: {prefix}bracket_white\n" in named.err
    broken = desk.run(script, desk.data, **{**variables, "FAIL_WITH": "metal_plate", "FAIL_CODE": 1})
    assert broken.code == 1 and f"error: failed: {prefix}metal_plate\n" in broken.err


def test_variants_are_evaluated_in_the_order_named(desk: Desk) -> None:
    models = []
    for training in (FASTFLOW_WIDE, FASTFLOW_PLAIN, FASTFLOW_PATCH):
        models += pretend_runs(desk, desk.train(training))
    ran = desk.run(FASTFLOW_EVALUATION, desk.data, VARIANTS="fastflow_wresnet50 fastflow fastflow_patch")
    assert ran.code == 0, ran.err
    assert models_of(ran.commands) == models
    assert len({results_of(c) for c in ran.commands}) == 12, "each variant and class has a folder of its own"
    blank = desk.run(FASTFLOW_EVALUATION, desk.data, VARIANTS=" ")
    assert models_of(blank.commands) == models[4:8]


@pytest.mark.parametrize("name", ["IM224_WR50", "*", "ls"])
def test_an_unknown_variant_is_refused_before_any_work(name: str, desk: Desk) -> None:
    ran = desk.run(FASTFLOW_EVALUATION, desk.data, VARIANTS=f"fastflow {name}")
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert len(ran.err.splitlines()) == 1
    assert f"'{name}'" in ran.err and "fastflow fastflow_patch fastflow_wresnet50" in ran.err


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("typed", [("--seed=5",), ("--seed", "05", "--seed", "6")])
def test_a_typed_seed_names_the_runs(training: str, typed: tuple[str, ...], desk: Desk) -> None:
    script, variables, _ = EVALUATIONS[training]
    classes = "metal_plate Front_Screw"  # a word after _S is no seed
    recipes = desk.train(training, CLASSES=classes)
    trained = desk.train(training, *typed, CLASSES=classes)
    assert [group(c) for c in trained] == [f"{group(c)}_S5" for c in recipes]
    for command in trained:
        context = run_fastflow.make_context("run_fastflow", list(command))
        assert context.params["seeds"] == ((5, 6) if "6" in typed else (5,))
    models = pretend_runs(desk, trained)
    ran = desk.run(script, desk.data, *typed, CLASSES=classes, **variables)
    assert ran.code == 0, ran.err
    assert models_of(ran.commands) == models
    for command in ran.commands:
        program = load_and_evaluate_fastflow if script == FASTFLOW_LOADER else run_fastflow
        program.make_context(program.name, command[1:])
        assert script == FASTFLOW_LOADER or group(command) == "FFLOW_EVAL_S5"
    others = desk.run(script, desk.data, "--seed", "7", CLASSES=classes, **variables)
    assert others.code == 1 and others.commands == []


def test_no_folder_is_taken_for_an_option(desk: Desk) -> None:
    (desk.folder / "-data").mkdir()
    variables = {"MPDD_PATH": "-data", "RESULTS": "-results", "EVALUATED": "--out", "CLASSES": "rod"}
    for training, (script, variant, folder) in EVALUATIONS.items():
        (command,) = desk.run(training, **variables).commands
        assert results_of(command).startswith("./-results/fastflow") and "./-data" in command
        (model,) = pretend_runs(desk, [command[1:]])
        (evaluation,) = desk.run(script, **variables, **variant).commands
        assert f"./--out/{folder}/rod" in evaluation and "./-data" in evaluation
        assert [f"./{model}"] == [*values(evaluation, "-p"), *values(evaluation, "--checkpoint")]


SMALL_TRAINING = ["--weights", "random", "--epochs", "1", "--limit_train", "4", *SMALL]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo_set(tmp_path_factory.mktemp("rendered") / "demo data")


@pytest.fixture
def run_whole(tmp_path: Path) -> RunScript:
    return partial(run_whole_script, tmp_path)


def table(folder: Path) -> bytes:
    return (folder / "results.csv").read_bytes()


@pytest.mark.slow
def test_the_improved_script_and_its_loader_whole(rendered: Path, run_whole: RunScript, tmp_path: Path) -> None:
    names = ("metal_plate", "bracket_white")  # each class is two processes, which take longest to start
    trained = run_whole(FASTFLOW_IMPROVED, rendered, "--offline", *SMALL_TRAINING, CLASSES=" ".join(names))
    assert trained.returncode == 0, trained.stderr
    evaluated = run_whole(FASTFLOW_LOADER, rendered, "--offline", *SMALL)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "skipped, never trained: bracket_brown bracket_black" in evaluated.stdout
    for name in names:
        run = tmp_path / "results" / "fastflow_improved" / name / "project" / f"FFLOW_IMPROVED_{name}_LITE0"
        save_folder = tmp_path / "evaluated_results" / "fastflow_results" / name
        assert table(save_folder) == table(run)
        assert list(save_folder.glob(f"segmentation_images/mpdd_{name}/*.png"))
        assert list(run.glob(f"models/mpdd_{name}/fastflow_{run.name}_final.pth"))


@pytest.mark.slow
def test_the_plain_script_and_its_evaluation_whole(rendered: Path, run_whole: RunScript, tmp_path: Path) -> None:
    chosen = {"CLASSES": "metal_plate"}
    trained = run_whole(FASTFLOW_PLAIN, rendered, "--offline", *SMALL_TRAINING, **chosen)
    assert trained.returncode == 0, trained.stderr
    evaluated = run_whole(FASTFLOW_EVALUATION, rendered, "--offline", *SMALL, **chosen)
    assert evaluated.returncode == 0, evaluated.stderr
    run = tmp_path / "results" / "fastflow" / "metal_plate" / "project" / "FFLOW_metal_plate_LITE0"
    evaluation = tmp_path / "evaluated_results" / "fastflow" / "metal_plate" / "project" / "FFLOW_EVAL_LITE0"
    assert table(evaluation) == table(run)


@pytest.mark.slow
def test_the_wresnet50_script_trains(rendered: Path, run_whole: RunScript, tmp_path: Path) -> None:
    small = (*SMALL_TRAINING, "--calibration", "none")
    trained = run_whole(FASTFLOW_WIDE, rendered, *small, CLASSES="metal_plate")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "results" / "fastflow_wresnet50" / "metal_plate" / "project" / "FFLOW_metal_plate_WR50"
    assert table(run) and (run / "models" / "mpdd_metal_plate").is_dir()


@pytest.mark.slow
def test_the_patch_script_whole(rendered: Path, run_whole: RunScript, tmp_path: Path) -> None:
    """Train on the demo set and score its images in tiles, then the same from the stored models."""
    small = shlex.split("--imagesize 64 --input_size 64 --patch_size 96 --patch_stride 32 --num_workers 0 --threads 1")
    flags = ["--offline", "--device", "cpu", *small, "--limit_test", "2"]
    training = ["--weights", "random", "--epochs", "1", "--limit_train", "4"]
    trained = run_whole(FASTFLOW_PATCH, rendered, *flags, *training, CLASSES="metal_plate")
    assert trained.returncode == 0, trained.stderr
    # What the model says of tiles and sizes holds; nothing of it is typed again.
    flags = shlex.split("--offline --device cpu --num_workers 0 --threads 1 --limit_test 2")
    evaluated = run_whole(FASTFLOW_EVALUATION, rendered, *flags, VARIANTS="fastflow_patch", CLASSES="metal_plate")
    assert evaluated.returncode == 0, evaluated.stderr
    run = tmp_path / "results" / "fastflow_patch" / "project" / "fastflow_patch_metal_plate_LITE0"
    evaluation = tmp_path / "evaluated_results" / "fastflow_patch" / "metal_plate" / "project" / "FFLOW_EVAL_LITE0"
    assert table(evaluation) == table(run)
