"""The sample shell scripts: which commands they run, and, slowly, what these leave."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunCommand
from shell_scripts import (
    FEWSHOT,
    MPDD_EVALUATION,
    MPDD_TRAINING,
    MVTEC_EVALUATION,
    MVTEC_TRAINING,
    PATH_VARIABLES,
    SMALL,
    Desk,
    RunScript,
    group,
    render_demo_set,
    run_whole_script,
    values,
    without,
)

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore

TRAININGS = {MPDD_TRAINING: "MPDD_PATH", MVTEC_TRAINING: "MVTEC_PATH"}
EVALUATIONS = {MPDD_EVALUATION: MPDD_TRAINING, MVTEC_EVALUATION: MVTEC_TRAINING}

SAVED = "--save_patchcore_model --save_segmentation_images --save_anomaly_scores"
MPDD_CLASSES = "-d metal_plate -d bracket_white -d bracket_brown -d bracket_black"
SINGLE = "-b wideresnet50 -le layer2 -le layer3 --pretrain_embed_dimension 1024 --target_embed_dimension 1024"
ENSEMBLE = (
    "-b wideresnet101 -b resnext101 -b densenet201 -le 0.layer2 -le 0.layer3 -le 1.layer2 -le 1.layer3 "
    "-le 2.features.denseblock2 -le 2.features.denseblock3 "
    "--pretrain_embed_dimension 1024 --target_embed_dimension 384"
)
PUBLISHED = {
    "IM224_WR50": f"--gpu 0 --seed 0 {SAVED} --log_group MPDD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0 results "
    f"patch_core {SINGLE} --anomaly_scorer_num_nn 1 --patchsize 3 sampler -p 0.1 approx_greedy_coreset "
    f"dataset --resize 256 --imagesize 224 {MPDD_CLASSES} mpdd",
    "IM224_Ensemble": f"--gpu 0 --seed 3 {SAVED} --log_group MPDD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3 "
    f"results patch_core {ENSEMBLE} --anomaly_scorer_num_nn 1 --patchsize 3 sampler -p 0.01 approx_greedy_coreset "
    f"dataset --resize 256 --imagesize 224 {MPDD_CLASSES} mpdd",
    "IM320_WR50": f"--gpu 0 --seed 22 {SAVED} --log_group MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22 results "
    f"patch_core {SINGLE} --anomaly_scorer_num_nn 1 --patchsize 3 sampler -p 0.01 approx_greedy_coreset "
    f"dataset --resize 366 --imagesize 320 {MPDD_CLASSES} mpdd",
    "IM320_Segmentation": f"--gpu 0 --seed 39 {SAVED} "
    f"--log_group MPDD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39 results "
    f"patch_core {SINGLE} --anomaly_scorer_num_nn 3 --patchsize 5 sampler -p 0.01 approx_greedy_coreset "
    f"dataset --resize 366 --imagesize 320 {MPDD_CLASSES} mpdd",
}
MVTEC_GROUPS = {
    "IM224_WR50": "MVTecAD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0",
    "IM224_Ensemble": "MVTecAD_IM224_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S3",
    "IM320_WR50": "MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-3_AN-1_S22",
    "IM320_Ensemble": "MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-3_AN-1_S40",
    "IM320_Segmentation": "MVTecAD_IM320_WR50_L2-3_P001_D1024-1024_PS-5_AN-3_S39",
    "IM320_SegmentationEnsemble": "MVTecAD_IM320_Ensemble_L2-3_P001_D1024-384_PS-5_AN-5_S88",
}
LITE = {
    "LITE0": "-b efficientnet_lite0 -le blocks.2 -le blocks.4",
    "LiteEnsemble": "-b efficientnet_lite0 -b efficientnet_lite1 -b efficientnet_lite2 "
    "-le 0.blocks.2 -le 0.blocks.4 -le 1.blocks.2 -le 1.blocks.4 -le 2.blocks.2 -le 2.blocks.4",
}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_every_script_is_tested() -> None:
    found = [*REPOSITORY.glob("*.sh"), *REPOSITORY.glob("bash/*.sh")]
    assert {str(p.relative_to(REPOSITORY)) for p in found} == {*PATH_VARIABLES, "bash/arguments.sh"}


@pytest.mark.parametrize("script", [*PATH_VARIABLES, "bash/arguments.sh"])
def test_bash_can_read_the_script(script: str) -> None:
    path = REPOSITORY / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    if script in PATH_VARIABLES:
        assert os.access(path, os.X_OK)
        assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.skipif(shutil.which("dash") is None, reason="there is no shell but bash")
@pytest.mark.parametrize("script", PATH_VARIABLES)
def test_another_shell_is_refused_in_one_line(script: str) -> None:
    ran = subprocess.run(["dash", str(REPOSITORY / script)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", "error: run this with bash\n")


def test_the_mpdd_trainings_are_the_published_commands(desk: Desk) -> None:
    expected = [[*shlex.split(command), str(desk.data)] for command in PUBLISHED.values()]
    assert desk.train(MPDD_TRAINING) == expected


def test_the_mvtec_trainings_are_six_on_15_classes(desk: Desk) -> None:
    commands = desk.train(MVTEC_TRAINING)
    assert [group(c) for c in commands] == list(MVTEC_GROUPS.values())
    for command in commands:
        assert len(set(values(command, "-d"))) == 15
        assert command[-2:] == ["mvtec", str(desk.data)]
    data_options = ("--log_group", "-d", "mpdd", "mvtec")
    same = [without(c, *data_options) for c in (*commands[:3], commands[4])]
    assert same == [without(c, *data_options) for c in desk.train(MPDD_TRAINING)]


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("offline", [(), ("--offline",)])
def test_a_group_is_named_after_its_options(script: str, offline: tuple[str, ...], desk: Desk) -> None:
    for command in desk.train(script, *offline):
        _, size, network, _, share, dimensions, patchsize, num_nn, seed = group(command).split("_")
        assert values(command, "--imagesize") == [size.removeprefix("IM")]
        assert values(command, "--resize") == [{"IM224": "256", "IM320": "366"}[size]]
        assert values(command, "-p") == [{"P01": "0.1", "P001": "0.01"}[share]]
        dimension_options = ("--pretrain_embed_dimension", "--target_embed_dimension")
        assert [values(command, o) for o in dimension_options] == [[d] for d in dimensions.removeprefix("D").split("-")]
        assert [f"PS-{v}" for v in values(command, "--patchsize")] == [patchsize]
        assert [f"AN-{v}" for v in values(command, "--anomaly_scorer_num_nn")] == [num_nn]
        assert [f"S{v}" for v in values(command, "--seed")] == [seed]
        assert len(values(command, "-b")) == (3 if "Ensemble" in network else 1)


@pytest.mark.parametrize("script", TRAININGS)
def test_offline_changes_the_backbones_and_the_name_alone(script: str, desk: Desk) -> None:
    published, offline = desk.train(script), desk.train(script, "--offline")
    changed = ("-b", "-le", "--log_group")
    assert [without(c, *changed) for c in offline] == [without(c, *changed) for c in published]
    for before, after in zip(published, offline, strict=True):
        names = (("WR50_L2-3", "LITE0_B2-4"), ("_Ensemble_L2-3", "_LiteEnsemble_B2-4"))
        old, new = next(pair for pair in names if pair[0] in group(before))
        assert group(after) == group(before).replace(old, new)
        start = after.index("patch_core") + 1
        network = shlex.split(LITE[group(after).split("_")[2]])
        assert after[start : start + len(network)] == network


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("args", [("{data}", "--offline"), ("--offline", "{data}"), ("--offline",), ()])
def test_the_path_comes_first_or_from_the_variable(script: str, args: tuple[str, ...], desk: Desk) -> None:
    typed = [a.format(data=desk.data) for a in args]
    variable = {} if str(desk.data) in typed else {TRAININGS[script]: desk.data}
    ran = desk.run(script, *typed, "--seed", "7", "--device=cpu", **variable)
    assert ran.code == 0, ran.err
    assert len(ran.commands) == {MPDD_TRAINING: 4, MVTEC_TRAINING: 6}[script]
    for command in ran.commands:
        assert command[-4:] == [str(desk.data), "--seed", "7", "--device=cpu"]
        assert ("efficientnet_lite0" in command) == ("--offline" in args)


def test_a_typed_path_wins_over_the_variable(desk: Desk) -> None:
    assert desk.train(MPDD_TRAINING, MPDD_PATH="/nowhere")[0][-1] == str(desk.data)


def test_variants_classes_and_results_are_chosen_by_variables(desk: Desk) -> None:
    commands = desk.train(MPDD_TRAINING, VARIANTS="IM320_WR50\n IM224_WR50", CLASSES="tubes  rod", RESULTS="my results")
    assert [group(c).split("_")[1] for c in commands] == ["IM320", "IM224"]
    for command in commands:
        assert values(command, "-d") == ["tubes", "rod"]
        assert command[command.index("patch_core") - 1] == "my results"
    assert desk.train(MPDD_TRAINING, VARIANTS=" ", CLASSES="") == desk.train(MPDD_TRAINING)


@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS])
@pytest.mark.parametrize("name", ["IM224_WR5", "*", "ls"])
def test_an_unknown_variant_is_refused_before_any_work(script: str, name: str, desk: Desk) -> None:
    ran = desk.run(script, desk.data, VARIANTS=f"IM224_WR50 {name}")
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert len(ran.err.splitlines()) == 1
    assert f"'{name}'" in ran.err and "IM224_WR50 IM224_Ensemble IM320_WR50" in ran.err


@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS])
@pytest.mark.parametrize(("variable", "name"), [("VARIANTS", "IM320_WR50"), ("CLASSES", "rod")])
def test_a_name_given_twice_is_refused_before_any_work(script: str, variable: str, name: str, desk: Desk) -> None:
    ran = desk.run(script, desk.data, **{variable: f"{name} IM224_WR50  {name}"})
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert ran.err.startswith(f"error: {variable} has '{name}' more than once") and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("flags", [("--log_group", "mine"), ("--log_group=mine",)])
def test_a_training_refuses_the_group_that_it_names_itself(script: str, flags: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(script, desk.data, "--threads", 1, *flags)
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert ran.err.startswith("error: --log_group is set by this script: ") and len(ran.err.splitlines()) == 1


def test_no_folder_is_taken_for_an_option(desk: Desk) -> None:
    (desk.folder / "-data").mkdir()
    variables = {"MPDD_PATH": "-data", "RESULTS": "-results", "EVALUATED": "--out", "VARIANTS": "IM224_WR50"}
    (training,) = desk.run(MPDD_TRAINING, **variables).commands
    assert training[training.index("patch_core") - 1] == "./-results" and training[-1] == "./-data"
    models = desk.folder / "-results" / "project" / group(training) / "models" / "mpdd_metal_plate"
    models.mkdir(parents=True)
    (evaluation,) = desk.run(MPDD_EVALUATION, **variables).commands
    assert evaluation[evaluation.index("patch_core_loader") - 1] == f"./--out/{group(training)}"
    assert values(evaluation, "-p") == [f"./{models.relative_to(desk.folder)}"] and evaluation[-1] == "./-data"


@pytest.mark.parametrize("script", PATH_VARIABLES)
@pytest.mark.parametrize("args", [(), ("--offline",), ("--seed", "3"), ("--seed", "3", "{data}"), ("",)])
def test_without_a_path_the_script_says_where_the_data_set_is(script: str, args: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(script, *(a.format(data=desk.data) for a in args))
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert "first argument, before other options" in ran.err.splitlines()[0]
    where = {"MPDD_PATH": "https://github.com/stepanje/MPDD", "MVTEC_PATH": "https://www.mvtec.com/company/research"}
    assert PATH_VARIABLES[script] in ran.err and where[PATH_VARIABLES[script]] in ran.err
    assert "usage: " in ran.err and "unbound" not in ran.err


@pytest.mark.parametrize("script", PATH_VARIABLES)
def test_a_wrong_path_or_interpreter_is_one_line(script: str, desk: Desk) -> None:
    for ran, expected in [
        (desk.run(script, "no such folder"), "'no such folder' is no folder"),
        (desk.run(script, **{PATH_VARIABLES[script]: desk.stub}), "python stub' is no folder"),
        (desk.run(script, desk.data, PYTHON="no-such-python"), "no command no-such-python"),
        (desk.run(script, desk.data, PROBE_CODE=1), "python stub cannot import patchcore: activate the environment"),
    ]:
        assert (ran.code, ran.commands, ran.out) == (2, [], "")
        assert expected in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("script", PATH_VARIABLES)
def test_help_explains_the_arguments(script: str, desk: Desk) -> None:
    for args in (["--help"], [desk.data, "-h"]):
        ran = desk.run(script, *args)
        assert (ran.code, ran.commands, ran.err) == (0, [], "")
        assert ran.out.startswith("usage: ") and PATH_VARIABLES[script] in ran.out


@pytest.mark.parametrize("fail_code", [1, 2, 137])
def test_a_failed_variant_stops_no_other_and_is_named(fail_code: int, desk: Desk) -> None:
    ran = desk.run(MPDD_TRAINING, desk.data, FAIL_WITH="_S3 ", FAIL_CODE=fail_code)
    assert ran.code == 1 and len(ran.commands) == 4
    assert ran.err.strip() == "error: failed: IM224_Ensemble"


def test_an_interrupt_stops_the_script(desk: Desk) -> None:
    ran = desk.run(MPDD_TRAINING, desk.data, FAIL_WITH="_S3 ", FAIL_CODE=130)
    assert ran.code == 130 and len(ran.commands) == 2


@pytest.mark.parametrize("script", EVALUATIONS)
@pytest.mark.parametrize("offline", [(), ("--offline",)])
def test_each_evaluation_reads_the_models_of_its_training(script: str, offline: tuple[str, ...], desk: Desk) -> None:
    trained = desk.train(EVALUATIONS[script], *offline)
    dataset = trained[0][-2]
    folders = [desk.pretend_models(group(c), dataset, *values(c, "-d")) for c in trained]
    ran = desk.run(script, desk.data, *offline, "--device", "cpu")
    assert ran.code == 0, ran.err
    for folder, training, command in zip(folders, trained, ran.commands, strict=True):
        size = [f"{o} {values(training, o)[0]}" for o in ("--resize", "--imagesize")]
        classes = values(training, "-d")
        models = [part for c in classes for part in ("-p", f"{folder}/models/{dataset}_{c}")]
        assert command == [
            "load_and_evaluate_patchcore.py",
            *shlex.split(f"--gpu 0 --seed 0 --save_segmentation_images evaluated_results/{folder.name}"),
            *["patch_core_loader", *models, "--faiss_on_gpu"],
            *shlex.split(" ".join(["dataset", *size, *(f"-d {c}" for c in classes), dataset])),
            *[str(desk.data), "--device", "cpu"],
        ]


FIRST = "MPDD_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0"


def test_the_newest_run_with_models_is_evaluated(desk: Desk) -> None:
    for suffix in ("", "_0", "_2", "_10", "_10_seeds", "_old"):
        desk.pretend_models(FIRST + suffix, "mpdd", "metal_plate")
    (desk.folder / "results/project" / f"{FIRST}_11" / "anomaly_scores").mkdir(parents=True)
    ran = desk.run(MPDD_EVALUATION, desk.data, VARIANTS="IM224_WR50", EVALUATED="my evaluation")
    assert ran.code == 0, ran.err
    newest = f"results/project/{FIRST}_10"
    assert f"models: {newest}\n" in ran.out
    assert values(ran.commands[0], "-p") == [f"{newest}/models/mpdd_metal_plate"]
    assert f"my evaluation/{FIRST}_10" in ran.commands[0]


def test_the_classes_evaluated_are_those_with_a_model(desk: Desk) -> None:
    desk.pretend_models(FIRST, "mpdd", "tubes", "bracket_black", "metal_plate")
    found = desk.run(MPDD_EVALUATION, desk.data).commands[0]
    assert values(found, "-d") == ["metal_plate", "bracket_black", "tubes"]
    assert [Path(p).name for p in values(found, "-p")] == ["mpdd_metal_plate", "mpdd_bracket_black", "mpdd_tubes"]
    chosen = desk.run(MPDD_EVALUATION, desk.data, CLASSES="tubes").commands[0]
    assert values(chosen, "-d") == ["tubes"]


def test_what_was_never_trained_is_skipped_unless_it_was_asked_for(desk: Desk) -> None:
    nothing = desk.run(MPDD_EVALUATION, desk.data)
    assert nothing.code == 1 and nothing.commands == []
    desk.pretend_models(FIRST, "mpdd", "metal_plate")
    some = desk.run(MPDD_EVALUATION, desk.data)
    assert some.code == 0 and len(some.commands) == 1
    assert len(some.err.splitlines()) == 3 and "train them with sample_training_mpdd.sh" in some.err
    assert some.out.splitlines()[-1] == "skipped, never trained: IM224_Ensemble IM320_WR50 IM320_Segmentation"
    named = desk.run(MPDD_EVALUATION, desk.data, VARIANTS="IM320_WR50 IM224_WR50")
    assert named.code == 1 and len(named.commands) == 1
    assert "error: without models: IM320_WR50" in named.err and "never trained" not in named.out
    broken = desk.run(MPDD_EVALUATION, desk.data, FAIL_WITH="IM224_WR50", FAIL_CODE=1)
    assert broken.code == 1 and "error: failed: IM224_WR50" in broken.err


@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS, FEWSHOT])
def test_the_headings_tell_of_the_offline_backbones(script: str, desk: Desk) -> None:
    for args, end in (((), ""), (("--offline",), " (offline backbones)")):
        ran = desk.run(script, desk.data, *args, VARIANTS="IM224_WR50", SHOTS="4")
        title = "4 training image(s)" if script == FEWSHOT else "IM224_WR50"
        assert ran.out.splitlines()[0] == f"== {title}{end}"


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("typed", [("--seed", "5"), ("--seed=5",), ("--seed", "05"), ("--seed", "5", "--seed", "6")])
def test_a_typed_seed_names_the_runs(evaluation: str, typed: tuple[str, ...], desk: Desk) -> None:
    flags = (*typed, "--gpu", "1")
    recipes = desk.train(EVALUATIONS[evaluation])
    trained = desk.train(EVALUATIONS[evaluation], *flags)
    assert [group(c) for c in trained] == [group(c).rpartition("_S")[0] + "_S5" for c in recipes]
    seeds = (5, 6) if "6" in typed else (5,)
    for command in trained:
        assert command[-len(flags) :] == list(flags)
        assert run_patchcore.make_context("run_patchcore", list(command)).params.items() >= {
            ("seeds", seeds),
            ("gpus", (1,)),
            ("log_group", group(command)),
        }
    folders = [desk.pretend_models(group(c), c[-2 - len(flags)], "carpet") for c in trained]
    ran = desk.run(evaluation, desk.data, *flags)
    assert ran.code == 0, ran.err
    assert [Path(values(c, "-p")[0]).parents[1] for c in ran.commands] == folders
    for command in ran.commands:
        context = load_and_evaluate_patchcore.make_context("load_and_evaluate_patchcore", command[1:])
        assert context.params["gpus"] == (1,)
    others = desk.run(evaluation, desk.data, "--seed", "7")
    assert others.code == 1 and others.commands == []


@pytest.mark.parametrize(
    "flags", [("--seed",), ("--seed", "many"), ("--seed=",), ("--seed", "-1"), ("--seed", "--gpu")]
)
def test_a_seed_that_is_no_number_is_left_to_python(flags: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(MPDD_TRAINING, desk.data, *flags)
    assert (ran.code, ran.err) == (0, "")
    assert [group(c) for c in ran.commands] == [group(c) for c in desk.train(MPDD_TRAINING)]
    assert all(tuple(c[-len(flags) :]) == flags for c in ran.commands)


RECIPE = "FEWSHOT_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1"


def pretend_fewshot_run(desk: Desk, name: str) -> str:
    folder = desk.folder / "results" / "fewshot" / name
    folder.mkdir(parents=True)
    (folder / "results.csv").touch()
    return str(folder.relative_to(desk.folder))


def test_fewshot_trains_on_each_number_and_draws_the_newest_runs(desk: Desk) -> None:
    older = pretend_fewshot_run(desk, f"{RECIPE}_N1_S0")
    newest = [pretend_fewshot_run(desk, f"{RECIPE}_N{n}") for n in ("1_S0_0", "1_S5", "16_S0", "16_S5")]
    ran = desk.run(FEWSHOT, desk.data, "--batch_size", 8, SHOTS="1 16", SEEDS="0 5", CLASSES="tubes")
    assert ran.code == 0, ran.err
    *trainings, curve = ran.commands
    for num_images, command in zip(("1", "16"), trainings, strict=True):
        assert command[1:] == [
            *shlex.split(
                f"--gpu 0 --seed 0 --seed 5 --log_project fewshot --log_group {RECIPE}_N{num_images}_S0 results"
            ),
            *shlex.split(f"patch_core {SINGLE} --anomaly_scorer_num_nn 1 --patchsize 3"),
            *shlex.split("sampler -p 0.1 approx_greedy_coreset dataset --resize 256 --imagesize 224"),
            *shlex.split(f"--limit_train {num_images} -d tubes mpdd"),
            *[str(desk.data), "--batch_size", "8"],
        ]
    assert curve == ["fewshot_curve.py", *newest, "--out", f"results/fewshot/{RECIPE}_curve"]
    assert older not in curve


def test_fewshot_leaves_an_earlier_curve_alone(desk: Desk) -> None:
    pretend_fewshot_run(desk, f"{RECIPE}_N1_S0")
    for expected in ("curve", "curve_0", "curve_1"):
        ran = desk.run(FEWSHOT, desk.data, SHOTS="1", SEEDS="0")
        assert ran.commands[-1][-1] == f"results/fewshot/{RECIPE}_{expected}"
        (desk.folder / "results" / "fewshot" / f"{RECIPE}_{expected}").mkdir()


def test_fewshot_draws_no_number_that_failed(desk: Desk) -> None:
    runs = [pretend_fewshot_run(desk, f"{RECIPE}_N{n}_S0") for n in (1, 2, 4)]
    ran = desk.run(FEWSHOT, desk.data, SHOTS="1 2 4", SEEDS="0", FAIL_WITH="--limit_train 2", FAIL_CODE=1)
    assert ran.code == 1 and "failed: 2 training image(s)" in ran.err
    assert ran.commands[-1][1:3] == [runs[0], runs[2]] and runs[1] not in ran.commands[-1]


def test_fewshot_has_defaults_and_an_offline_recipe(desk: Desk) -> None:
    ran = desk.run(FEWSHOT, desk.data, "--offline")
    assert ran.code == 1 and len(ran.commands) == 6  # the stub leaves no runs to draw
    assert [values(c, "--limit_train")[0] for c in ran.commands] == ["1", "2", "4", "8", "16", "50"]
    assert all(values(c, "--seed") == ["0", "1", "2"] for c in ran.commands)
    assert group(ran.commands[0]) == "FEWSHOT_IM224_LITE0_B2-4_P01_D1024-1024_PS-3_AN-1_N1_S0"
    assert values(ran.commands[0], "-b") == ["efficientnet_lite0"]


@pytest.mark.parametrize("flags", [("--seed", "3"), ("--limit_train=3",), ("--log_group", "x"), ("--log_project", "x")])
def test_fewshot_refuses_flags_that_it_sets_itself(flags: tuple[str, ...], desk: Desk) -> None:
    ran = desk.run(FEWSHOT, desk.data, "--threads", 1, *flags)
    assert (ran.code, ran.commands) == (2, [])
    assert len(ran.err.splitlines()) == 1 and "SHOTS, SEEDS and RESULTS" in ran.err


@pytest.mark.parametrize("variable", ["SHOTS", "SEEDS"])
@pytest.mark.parametrize("value", ["1,2", "1 -2", "many"])
def test_fewshot_numbers_are_checked(variable: str, value: str, desk: Desk) -> None:
    ran = desk.run(FEWSHOT, desk.data, **{variable: value})
    assert (ran.code, ran.commands) == (2, [])
    assert len(ran.err.splitlines()) == 1 and variable in ran.err and "separated by blanks" in ran.err


@pytest.mark.parametrize(
    ("variable", "value"), [("SHOTS", "4 0"), ("SHOTS", "00"), ("SHOTS", "4 2 04"), ("SEEDS", "0 00")]
)
def test_fewshot_numbers_are_of_use_and_differ(variable: str, value: str, desk: Desk) -> None:
    ran = desk.run(FEWSHOT, desk.data, **{variable: value})
    assert (ran.code, ran.commands, ran.out) == (2, [], "")
    assert len(ran.err.splitlines()) == 1 and ran.err.startswith(f"error: {variable} has ")


def test_fewshot_numbers_lose_their_leading_zeros(desk: Desk) -> None:
    ran = desk.run(FEWSHOT, desk.data, SHOTS="08 10", SEEDS="00 09")
    assert [values(c, "--limit_train") for c in ran.commands] == [["8"], ["10"]]
    assert all(values(c, "--seed") == ["0", "9"] for c in ran.commands)
    assert [group(c) for c in ran.commands] == [f"{RECIPE}_N8_S0", f"{RECIPE}_N10_S0"]


# A larger share of so few patches, for the recipes with several neighbours.
SMALL_TRAINING = ["-p", "0.2", "--weights", "random", "--limit_train", "6", *SMALL]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo_set(tmp_path_factory.mktemp("rendered") / "demo data")


@pytest.fixture
def run_whole(tmp_path: Path) -> RunScript:
    return partial(run_whole_script, tmp_path)


def assert_equal_tables(folder: Path, count: int) -> None:
    trained = sorted((folder / "results" / "project").glob("*/results.csv"))
    assert len(trained) == count
    for path in trained:
        evaluated = folder / "evaluated_results" / path.parent.name / "results.csv"
        assert evaluated.read_bytes() == path.read_bytes()


EVALUATION_OF = {training: evaluation for evaluation, training in EVALUATIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variables", "num_variants"), [(MPDD_TRAINING, {}, 4), (MVTEC_TRAINING, {"CLASSES": "metal_plate"}, 6)]
)
def test_offline_recipes_train_and_evaluate_whole(
    script: str, variables: dict[str, str], num_variants: int, rendered: Path, run_whole: RunScript, tmp_path: Path
) -> None:
    trained = run_whole(script, rendered, "--offline", *SMALL_TRAINING, **variables)
    assert trained.returncode == 0, trained.stderr
    evaluated = run_whole(EVALUATION_OF[script], rendered, "--offline", *SMALL, **variables)
    assert evaluated.returncode == 0, evaluated.stderr
    assert_equal_tables(tmp_path, num_variants)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variants"),
    [
        (MPDD_TRAINING, "IM224_WR50 IM224_Ensemble IM320_WR50 IM320_Segmentation"),
        (MVTEC_TRAINING, "IM224_WR50 IM320_SegmentationEnsemble"),
    ],
)
def test_published_recipes_train_and_evaluate_whole(
    script: str, variants: str, rendered: Path, run_whole: RunScript, tmp_path: Path
) -> None:
    evaluation = EVALUATION_OF[script]
    variables = {"CLASSES": "metal_plate", "VARIANTS": variants}
    small = [*SMALL, "--limit_test", "1"]
    trained = run_whole(script, rendered, *SMALL_TRAINING, *small, "--limit_train", "2", **variables)
    assert trained.returncode == 0, trained.stderr
    evaluated = run_whole(evaluation, rendered, *small, **variables)
    assert evaluated.returncode == 0, evaluated.stderr
    assert_equal_tables(tmp_path, len(variants.split()))


@pytest.mark.slow
def test_fewshot_whole(rendered: Path, run_whole: RunScript, run_command: RunCommand, tmp_path: Path) -> None:
    small = ["--weights", "random", *SMALL]
    ran = run_whole(FEWSHOT, rendered, "--offline", *small, SHOTS="1 2 4", SEEDS="0 1", CLASSES="metal_plate")
    assert ran.returncode == 0, ran.stderr
    recipe = RECIPE.replace("WR50_L2-3", "LITE0_B2-4")
    folder = tmp_path / "results" / "fewshot"
    assert all((folder / f"{recipe}_N{n}_S{s}" / "results.csv").is_file() for n in (1, 2, 4) for s in (0, 1))
    curve = (folder / f"{recipe}_curve" / "fewshot.csv").read_text()
    # The README's way to draw it again, from everything that the script has left there.
    runs = sorted(folder.glob("FEWSHOT_*_S[0-9]"))
    again = run_command("fewshot_curve.py", *runs, "--out", tmp_path / "curve")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "curve" / "fewshot.csv").read_text() == curve
