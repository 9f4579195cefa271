"""Which run folders make one column, and what it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import small_run
from in_process import invoke
from synthetic_runs import write_run

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore
from patchcore.comparison import compare
from patchcore.comparison.methods import Method, enter_classes, fewshot_family, fewshot_label, group_runs
from patchcore.comparison.runs import NOT_KNOWN, read_classes, read_runs
from patchcore.errors import ConfigurationError


def columns(*folders: Path) -> dict[str, list[str]]:
    """Return the folders of each method by its label."""
    return {m.label: [run.folder.name for run in m.runs] for m in group_runs(read_runs(folders))}


def test_seeds_outputs_and_classes_make_no_other_method(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "PC_IM224_S0", ["plate", "rod"]),
        write_run(tmp_path, "PC_IM224_S1", ["plate"], seed=1, save_maps=False),
        write_run(tmp_path, "PC_IM224_S2_0", ["rod"], seed=2),
    ]
    assert columns(*folders) == {"PC_IM224": ["PC_IM224_S0", "PC_IM224_S1", "PC_IM224_S2_0"]}


def test_what_a_configuration_says_makes_another_method(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "PC"),
        write_run(tmp_path, "PC3", method_config={"num_nn": 3}),
        write_run(tmp_path, "PC_N4", limit_train=4),
        write_run(tmp_path, "PC_uncalibrated", calibrated=False),
        write_run(tmp_path, "FF", method="fastflow"),
    ]
    assert len(columns(*folders)) == 5


def test_presets_of_classes_in_folders_of_their_own_are_one_method_by_name(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, f"{category}_fastflow_S{seed}", [category], method_config={"lr": len(category)}, seed=seed)
        for category in ("metal_plate", "bottle")
        for seed in (0, 1)
    ]
    assert list(columns(*folders)) == ["fastflow"]
    presets = {"metal_plate": {"lr": 11}, "bottle": {"lr": 6}}
    together = write_run(tmp_path, "all", ["metal_plate", "bottle"], config_of_class=presets, seed=2)
    assert columns(*folders, together)["fastflow"][-1] == "all"
    other = write_run(tmp_path, "metal_plate_fastflow", ["metal_plate"], method_config={"lr": 3}, seed=5)
    assert list(columns(*folders, other)) == ["fastflow (lr 11)", "fastflow (lr 3)"]


def test_labels_are_unique_and_say_what_differs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "group"),
        write_run(tmp_path / "b", "group", method_config={"num_nn": 3}),
        write_run(tmp_path / "c", "group_0", method="fastflow", method_config={"steps": 8}),
    ]
    assert list(columns(*folders)) == ["patchcore (num_nn 1)", "patchcore (num_nn 3)", "fastflow"]


def test_a_label_holds_no_table(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "group", method_config={"head": None, "parts": [1, 2], "members": [{"k": 1}]}),
        write_run(tmp_path / "b", "group", method_config={"head": {"k": 1}, "parts": [1], "members": [{"k": 2}]}),
    ]
    assert list(columns(*folders)) == ["patchcore (parts [1, 2])", "patchcore (parts [1])"]
    alike = [write_run(tmp_path / str(k), "group", method_config={"members": [{"k": k}]}) for k in (3, 4)]
    assert list(columns(*alike)) == ["patchcore", "patchcore #2"]


def test_a_class_and_seed_in_two_folders_is_an_error(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "PC_S0", ["plate", "rod"]), write_run(tmp_path, "rod_PC", ["rod"])]
    runs = read_runs(folders)
    finished = [found for run in runs for found in read_classes(run)[0]]
    with pytest.raises(ConfigurationError, match=r"PC_S0' and .*rod_PC' are both PC on mpdd_rod with seed 0"):
        enter_classes(group_runs(runs), finished)


def test_methods_that_differ_in_the_number_of_training_images_are_a_family(tmp_path: Path) -> None:
    few = [write_run(tmp_path, f"PC_N{n}_S0", limit_train=n) for n in (2, 16)]
    other = write_run(tmp_path, "PC3_N2", limit_train=2, method_config={"num_nn": 3})
    methods = group_runs(read_runs([*few, other]))
    assert [m.label for m in methods] == ["PC_N2", "PC_N16", "PC3_N2"]
    assert fewshot_family(methods[0]) == fewshot_family(methods[1]) != fewshot_family(methods[2])
    assert [fewshot_label(m) for m in methods] == ["PC", "PC", "PC3"]


@pytest.mark.parametrize(
    ("label", "limit", "expected"),
    [
        ("IM224_WR50_N50", 50, "IM224_WR50"),
        ("IM224_WR50", 50, "IM224_WR50"),
        ("IM224_N2_R2", 2, "IM224_R2"),
        ("FEWSHOT_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_N1", 1, "FEWSHOT_IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1"),
        ("N4_PC", 4, "PC"),
        ("PC_16", 16, "PC"),
        ("PC_16_R18", 16, "PC_16_R18"),
        ("N4", 4, "N4"),
        ("PC_N4 #2", 4, "PC #2"),
        ("patchcore (limit_train 4)", 4, "patchcore"),
        ("patchcore (num_nn 3, limit_train 4)", 4, "patchcore (num_nn 3)"),
        ("WR50", None, "WR50"),
    ],
)
def test_the_number_of_training_images_goes_out_of_a_label(
    label: str, limit: int | None, expected: str, tmp_path: Path
) -> None:
    runs = read_runs([write_run(tmp_path, "run", limit_train=limit)])
    assert fewshot_label(Method(label, runs)) == expected


def test_an_evaluation_of_a_stored_model_is_a_run_of_its_method(small_dataset: Path, tmp_path: Path) -> None:
    run = ["--device", "cpu", "--threads", 1, "--save_patchcore_model", "--log_group", "PC", "--seed", 3]
    steps = small_run(small_dataset, "plate", reading=("--limit_train", "4"))
    assert invoke(run_patchcore, *run, tmp_path / "results", *steps).code == 0
    trained = tmp_path / "results" / "project" / "PC"
    model = trained / "models" / "mpdd_plate"
    reading = ["dataset", "--num_workers", 0, "-d", "plate", "mpdd", small_dataset]
    command = ["--device", "cpu", tmp_path / "evaluated", "patch_core_loader", "-p", model, *reading]
    assert invoke(load_and_evaluate_patchcore, *command).code == 0
    evaluated = tmp_path / "evaluated"
    runs = read_runs([trained, evaluated])
    assert runs[1].seeds == {"mpdd_plate": 3} and len(group_runs(runs)) == 1
    assert runs[1].settings == runs[0].settings and runs[1].settings["mpdd_plate"].limit_train == 4
    # A model that lies elsewhere, or in a run that did not make it, was trained on a number that is not known.
    (trained / "config.json").rename(trained / "kept.json")
    assert read_runs([evaluated])[0].settings["mpdd_plate"].limit_train == NOT_KNOWN
    kept = json.loads((trained / "kept.json").read_text())
    kept["config"]["seed"] = 4
    (trained / "config.json").write_text(json.dumps(kept))
    (elsewhere,) = read_runs([evaluated])
    assert elsewhere.settings["mpdd_plate"].limit_train == NOT_KNOWN == elsewhere.settings["mpdd_plate"].train_val_split
    assert compare.make_comparison([evaluated], compare.ComparisonOptions()).fewshot == {}
    (trained / "kept.json").replace(trained / "config.json")
    # Where the model has gone, seed and configuration are not known.
    config = json.loads((evaluated / "config.json").read_text())
    config["config"]["models"]["plate"] = "/nowhere"
    (evaluated / "config.json").write_text(json.dumps(config))
    (run_alone,) = read_runs([evaluated])
    assert run_alone.seeds == {"mpdd_plate": None}
    assert list(columns(trained, evaluated)) == ["PC", "evaluated"]
