"""Whole FastFlow runs on small images: files, stored models of every kind, and what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_category
from in_process import Finished, invoke, read_rows

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow
from patchcore.storage.torch_export import read_torch_file

COMMON = ("--device", "cpu", "--threads", "1")
LAYERS = ("--layers", "blocks.1", "--layers", "blocks.2")
MODEL = ("--backbone", "efficientnet_lite0", "--weights", "random", *LAYERS, "--flow_steps", "2")
SIZES = ("--resize", "64", "--imagesize", "64")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fastflow") / "data set"
    for category in ("plate", "rod"):
        write_category(root, category)
    return root


def train(out: Path, data: Path, *flags: object, of_dataset: tuple[str, ...] = ("--category", "plate")) -> Finished:
    name = () if "--category" in of_dataset else ("mpdd",)
    dataset = ("dataset", *SIZES, "--num_workers", 0, *of_dataset, *name, data)
    return invoke(run_fastflow, out, *COMMON, *dataset, "fastflow", *MODEL, "--epochs", 4, *flags)


def evaluate(out: Path, data: Path, model: Path, *flags: object, sizes: tuple[str, ...] = ()) -> Finished:
    dataset = ("dataset", *sizes, "--num_workers", 0, "-d", "plate", "mpdd", data)
    return invoke(load_and_evaluate_fastflow, out, *COMMON, "fastflow_loader", "-p", model, *flags, *dataset)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    out = tmp_path_factory.mktemp("run")
    return out / "project" / "group", train(out, data, "--save_model", "--eval_every", 2, "--checkpoint_every", 2)


@pytest.fixture(scope="module")
def export(finished: tuple[Path, Finished]) -> Path:
    return finished[0] / "models" / "mpdd_plate" / "fastflow_group_final.pth"


def test_a_run_leaves_table_curve_model_and_export(finished: tuple[Path, Finished], export: Path) -> None:
    folder, terminal = finished
    assert terminal.code == 0, terminal.err
    training = folder / "training" / "mpdd_plate"
    rows = read_rows(training / "training_log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (training / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "checkpoints").glob("*")), "a finished class needs no checkpoint"
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert log.count("on TEST images, which select nothing") == 2
    content = torch.load(export, weights_only=True)
    assert content["model"]["config"]["flow_steps"] == 2 and content["model"]["source"]["category"] == "plate"


@pytest.mark.parametrize("kind", ["folder", "export", "bare"])
def test_every_kind_of_model_gives_the_numbers_of_the_run(
    kind: str, finished: tuple[Path, Finished], export: Path, data: Path, tmp_path: Path
) -> None:
    path, flags, sizes = (export.parent if kind == "folder" else export), (), ()
    if kind == "bare":
        path, flags, sizes = tmp_path / "bare.pth", MODEL, SIZES
        torch.save(read_torch_file(export).tensors, path)
    terminal = evaluate(tmp_path / "out", data, path, *flags, sizes=sizes)
    assert terminal.code == 0, terminal.err
    (row, *_), (trained, *_) = (read_rows(f / "results.csv") for f in (tmp_path / "out", finished[0]))
    columns = ("instance_auroc", "full_pixel_auroc", "full_pro")
    assert [row[c] for c in columns] == [trained[c] for c in columns]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--flow_steps", "3"), "--flow_steps 3 was typed, but model"),
        (("--backbone", "resnet18"), "--backbone resnet18 was typed, but model"),
        (("--layers", "blocks.1"), "was trained with blocks.1 blocks.2: leave --layers out"),
        (("--input_size", "32"), "--input_size 32 was typed"),
    ],
)
def test_contradictions_name_both_values(
    flags: tuple[str, ...], message: str, export: Path, data: Path, tmp_path: Path
) -> None:
    terminal = evaluate(tmp_path / "out", data, export, *flags)
    assert terminal.code == 2 and message in terminal.error_lines[-1], terminal.err


def test_bare_state_dict_needs_a_description_that_fits(export: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pth"
    torch.save(read_torch_file(export).tensors, bare)
    undescribed = evaluate(tmp_path / "out", data, bare)
    assert undescribed.code == 2 and "type the options of its model, such as --backbone" in undescribed.err
    misfit = evaluate(tmp_path / "out", data, bare, *MODEL, "--flow_steps", "3", sizes=SIZES)
    assert misfit.code == 2 and "flows.0.steps.2.global_scale is missing" in misfit.err


def test_damaged_file_is_one_line(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no model")
    terminal = evaluate(tmp_path / "out", data, broken)
    assert terminal.code == 2 and "cannot be read as plain values and tensors" in terminal.err
    assert len(terminal.error_lines) == 1


def test_configuration_of_each_class_is_recorded(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "patchcore.cli.typed_fastflow.fastflow_preset",
        lambda backbone, category: type("Preset", (), {"settings": {"clamp": 1.0 if category == "rod" else 3.0}}),
    )
    flags = ("--use_class_specific", "--epochs", "1")
    terminal = train(tmp_path, data, *flags, of_dataset=("-d", "plate", "-d", "rod"))
    assert terminal.code == 0, terminal.err
    recorded = json.loads((tmp_path / "project" / "group" / "config.json").read_text(encoding="utf-8"))
    assert "'clamp': 1.0" in str(recorded) and "'clamp': 3.0" in str(recorded)


def test_killed_training_resumes_to_the_same_weights(
    finished: tuple[Path, Finished], export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("patchcore.class_run._announce_epoch", killed)
        flags = ("--save_model", "--checkpoint_every", "2")
        assert train(tmp_path, data, *flags, "--eval_every", "3").code == 130
    assert (tmp_path / "project" / "group" / "checkpoints" / "mpdd_plate.pt").exists()
    resumed = train(tmp_path, data, *flags, "--resume")
    assert resumed.code == 0, resumed.err
    other = tmp_path / "project" / "group" / "models" / "mpdd_plate" / "fastflow_group_final.pth"
    expected, found = read_torch_file(export).tensors, read_torch_file(other).tensors
    assert all(torch.equal(expected[name], found[name]) for name in expected)
