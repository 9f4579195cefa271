"""Whole FastFlow runs on small images: files, stored models of every kind, and what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_category
from in_process import Finished, invoke, read_rows
from small_fastflow import COMMON, MODEL, SIZES, evaluate, same_weights, tensors_of, train

from patchcore.cli import run_fastflow
from patchcore.methods.fastflow import FastFlow
from patchcore.methods.normalizing_flow import FastFlowNet
from patchcore.presets import Preset
from patchcore.storage.model_folder import header_from_mapping
from patchcore.storage.torch_export import read_torch_file, torch_export_bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fastflow") / "data set"
    for category in ("plate", "rod"):
        write_category(root, category)
    return root


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


@pytest.fixture(scope="module")
def tiled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model scores tiles and smooths maps."""
    out = tmp_path_factory.mktemp("tiled")
    flags = ("--enable_patch_inference", "--patch_size", 40, "--training_tiles", 2, "--smoothing", "gaussian")
    terminal = train(out, data, "--save_model", "--epochs", 1, *flags)
    assert terminal.code == 0, terminal.err
    return out / "project" / "group"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--patch_size", 32), "--patch_size 32 was typed, but model"),
        (("--patch_stride", 40), "was trained with 20: leave --patch_stride out"),
        (("--training_tiles", 4), "was trained with 2: leave --training_tiles out"),
        (("--smoothing", "none"), "was trained with gaussian: leave --smoothing out"),
        (("--smoothing_px", 3), "was trained with 4.0: leave --smoothing_px out"),
        (("--adaptive_normalization",), "was trained without it: leave --adaptive_normalization out"),
        (("--multi_scale", 0.5, "--multi_scale", 1), "--multi_scale 0.5 1.0 was typed"),
        (("--precision", "bfloat16"), "was trained with float32: leave --precision out"),
        (("--preserve_high_res",), "was trained without it: leave --preserve_high_res out"),
        (("--max_side", 99), "was trained without it: leave --max_side out"),
    ],
)
def test_tiles_and_maps_of_a_stored_model_are_its_own(
    flags: tuple[object, ...], message: str, tiled: Path, data: Path, tmp_path: Path
) -> None:
    terminal = evaluate(tmp_path / "out", data, tiled / "models" / "mpdd_plate", *flags)
    assert terminal.code == 2 and message in terminal.err and len(terminal.error_lines) == 1, terminal.err


def test_a_model_of_images_that_keep_their_shape_knows_no_resize(data: Path, tmp_path: Path) -> None:
    tiles = ("--enable_patch_inference", "--patch_size", 32, "--training_tiles", 1, "--epochs", 1)
    of_dataset = ("--category", "plate", "--preserve_high_res", "--max_side", "60")
    assert train(tmp_path, data, "--save_model", *tiles, of_dataset=of_dataset).code == 0
    model = tmp_path / "project" / "group" / "models" / "mpdd_plate"
    agreed = ("--resize", "300", "--imagesize", "64", "--preserve_high_res", "--max_side", "60")
    assert evaluate(tmp_path / "out", data, model, sizes=agreed).code == 0
    for sizes, message in (
        (("--resize_mode", "shorter"), "was trained without it: leave --resize_mode out"),
        (("--imagesize", "48"), "was trained with 64: leave --imagesize out"),
        (("--max_side", "50"), "was trained with 60: leave --max_side out"),
    ):
        refused = evaluate(tmp_path / "out", data, model, sizes=sizes)
        assert refused.code == 2 and message in refused.err and len(refused.error_lines) == 1


def test_what_agrees_with_a_stored_model_may_be_typed(tiled: Path, data: Path, tmp_path: Path) -> None:
    agreed = ("--enable_patch_inference", "--patch_size", 40, "--smoothing", "gaussian", "--multi_scale", 1)
    terminal = evaluate(tmp_path / "out", data, tiled / "models" / "mpdd_plate", *agreed, sizes=SIZES)
    assert terminal.code == 0, terminal.err


def test_low_memory_replaces_the_value_of_a_stored_model_and_changes_no_number(
    tiled: Path, export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    scored = FastFlow._input_maps
    monkeypatch.setattr(
        FastFlow,
        "_input_maps",
        lambda self, flows, inputs, size: batches.append(len(inputs)) or scored(self, flows, inputs, size),
    )
    monkeypatch.setattr("patchcore.methods.tiles.TILES_AT_ONCE_LOW_MEMORY", 2)
    for number, flags in enumerate(((), ("--low_memory",))):
        batches.clear()
        assert evaluate(tmp_path / str(number), data, tiled / "models" / "mpdd_plate", *flags).code == 0
        assert set(batches) == ({2, 1} if flags else {9})
    tables = [(folder / "results.csv").read_text(encoding="utf-8") for folder in (tmp_path / "0", tmp_path / "1")]
    assert tables[0] == tables[1]
    refused = evaluate(tmp_path / "out", data, export, "--low_memory")
    assert refused.code == 2 and "--low_memory was typed" in refused.err and "was trained without it" in refused.err


def test_bare_state_dict_needs_a_description_that_fits(export: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pth"
    torch.save(read_torch_file(export).tensors, bare)
    undescribed = evaluate(tmp_path / "out", data, bare)
    assert undescribed.code == 2 and "type the options of its model, such as --backbone" in undescribed.err
    misfit = evaluate(tmp_path / "out", data, bare, *MODEL, "--flow_steps", "3", sizes=SIZES)
    assert misfit.code == 2 and "flows.0.steps.2.global_scale is missing" in misfit.err


def wrong_models(export: Path, folder: Path) -> dict[str, tuple[Path | str, str]]:
    """Return what a user may name instead of a model, and what is said of it."""
    whole = torch.load(export, weights_only=True)
    narrow = {
        name: tensor[:, :1] if name.endswith("2.weight") else tensor for name, tensor in whole["state_dict"].items()
    }
    (folder / "narrow.pth").write_bytes(torch_export_bytes(header_from_mapping(whole["model"], export), narrow))
    torch.save({**whole, "state_dict": narrow}, folder / "edited.pth")
    torch.save(torch.nn.Linear(1, 1), folder / "objects.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "values.pth")
    (folder / "text.pth").write_text("no model", encoding="utf-8")
    (folder / "cut.pth").write_bytes(export.read_bytes()[:5000])
    return {
        "missing": (folder / "missing.pth", "missing.pth' not found, expected a model folder"),
        "empty path": ("", "found an empty path, expected that of a model"),
        "another folder": (folder, "is no model folder: model.json is missing"),
        "text": (folder / "text.pth", "cannot be read as plain values and tensors"),
        "cut off": (folder / "cut.pth", "cannot be read as plain values and tensors"),
        "objects": (folder / "objects.pth", "cannot be read as plain values and tensors (UnpicklingError)"),
        "a list": (folder / "list.pth", "holds list, expected a dictionary"),
        "values": (folder / "values.pth", "holds epoch, expected an export of a model"),
        "edited": (folder / "edited.pth", "edited.pth' was edited or damaged after it was written"),
        "other shapes": (folder / "narrow.pth", "subnet.2.weight is [24, 1, 3, 3] instead of [24, 12, 3, 3]"),
    }


@pytest.mark.parametrize("command", ["run_fastflow", "load_and_evaluate_fastflow"])
def test_what_is_no_model_is_one_line(command: str, export: Path, data: Path, tmp_path: Path) -> None:
    for case, (path, message) in wrong_models(export, tmp_path).items():
        if command == "run_fastflow":
            dataset = ("dataset", "--num_workers", 0, "--category", "plate", data)
            flags = ("fastflow", "--eval_only", "--checkpoint", path)
            terminal = invoke(run_fastflow, tmp_path / "out", *COMMON, *dataset, *flags)
        else:
            terminal = evaluate(tmp_path / "out", data, path)
        assert terminal.code == 2 and message in terminal.err, (case, terminal.err)
        assert len(terminal.error_lines) == 1, (case, terminal.err)
    assert not (tmp_path / "out").exists()


def test_configuration_of_each_class_is_recorded(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "patchcore.cli.typed_fastflow.fastflow_preset",
        lambda backbone, category: Preset(backbone, category, {"clamp": 1.0 if category == "rod" else 3.0}, "ours"),
    )
    flags = ("--use_class_specific", "--epochs", "1", "--calibration", "none", "--seed", "0", "--seed", "1")
    terminal = train(tmp_path, data, *flags, of_dataset=("-d", "plate", "-d", "rod"))
    assert terminal.code == 0, terminal.err
    for seed in (0, 1):
        recorded = json.loads((tmp_path / "project" / f"group_S{seed}" / "config.json").read_text(encoding="utf-8"))
        assert "'clamp': 1.0" in str(recorded) and "'clamp': 3.0" in str(recorded)
    for category in ("plate", "rod"):  # once, however many seeds there are
        assert terminal.err.count(f"{category}: preset {category} of efficientnet_lite0, ours\n") == 1


def test_without_a_preset_none_is_named(finished: tuple[Path, Finished]) -> None:
    assert "preset" not in finished[1].err


# ---------------------------------------------------------------- options of runs


def test_test_metrics_between_epochs_change_no_weight(
    finished: tuple[Path, Finished], data: Path, tmp_path: Path
) -> None:
    assert finished[1].err.count("on TEST images, which select nothing: instance_auroc") == 2
    plain = train(tmp_path, data, "--save_model")
    assert plain.code == 0 and "TEST images" not in plain.err
    assert same_weights(tensors_of(tmp_path / "project" / "group"), tensors_of(finished[0]))


def test_thresholds_of_held_out_images(data: Path, tmp_path: Path) -> None:
    split = ("--calibration", "split")
    refused = train(tmp_path, data, *split)
    assert refused.code == 2 and "--calibration split needs 2 held-out images" in refused.err
    assert train(tmp_path, data, *split, "--save_model", "--train_val_split", 0.5).code == 0
    folder = tmp_path / "project" / "group"
    header = json.loads((folder / "models" / "mpdd_plate" / "model.json").read_text(encoding="utf-8"))
    assert header["calibration"]["method"] == "split"
    assert read_rows(folder / "results.csv")[0]["image_f1_max"] != ""
    rows = read_rows(folder / "training" / "mpdd_plate" / "training_log.csv")
    assert all(row["held_out_loss"] for row in rows), "held-out images are in the history as well"


def test_early_stopping_keeps_the_best_epoch(data: Path, tmp_path: Path) -> None:
    flags = ("--train_val_split", 0.5, "--patience", 1, "--epochs", 60, "--schedule", "constant", "--lr", 0.05)
    terminal = train(tmp_path, data, *flags)
    assert terminal.code == 0
    rows = read_rows(tmp_path / "project" / "group" / "training" / "mpdd_plate" / "training_log.csv")
    losses = [float(row["held_out_loss"]) for row in rows]
    last = len(losses)
    assert 1 < last < 60 and losses[-1] >= losses[-2] == min(losses)
    kept = f"plate: stopped after {last} of 60 epochs, the model has the weights of epoch {last - 1}\n"
    assert terminal.err.count(kept) == 1


@pytest.mark.parametrize(
    ("flags", "measured"), [(("--checkpoint_every", 1), 1), (("--checkpoint_every", 1, "--eval_every", 2), 3)]
)
def test_spread_is_measured_for_whom_it_matters_and_changes_no_weight(
    flags: tuple[object, ...],
    measured: int,
    finished: tuple[Path, Finished],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the model, and for each epoch whose test metrics are asked for; checkpoints need none."""
    calls: list[int] = []
    measure = FastFlowNet.measure_spread
    monkeypatch.setattr(
        FastFlowNet,
        "measure_spread",
        lambda self, *given: calls.append(1) or measure(self, *given),
    )
    assert train(tmp_path, data, "--save_model", "--calibration", "none", *flags).code == 0
    assert len(calls) == measured
    assert same_weights(tensors_of(tmp_path / "project" / "group"), tensors_of(finished[0]))


def test_the_export_is_called_after_the_group_also_in_a_folder_with_a_number(data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert (
            train(tmp_path, data, "--save_model", "--calibration", "none", "--epochs", 1, "--log_group", "g").code == 0
        )
    exports = sorted(path.relative_to(tmp_path / "project") for path in tmp_path.rglob("*.pth"))
    assert exports == [Path(f"{g}/models/mpdd_plate/fastflow_g_final.pth") for g in ("g", "g_0")]


def test_two_seeds_are_two_models_and_a_table(data: Path, tmp_path: Path) -> None:
    flags = ("--seed", 0, "--seed", 1, "--save_model", "--log_group", "g")
    assert train(tmp_path, data, *flags).code == 0
    first, second = (tensors_of(tmp_path / "project" / f"g_S{seed}") for seed in (0, 1))
    assert not same_weights(first, second)
    assert (tmp_path / "project" / "g_seeds.csv").exists()


def test_one_training_image_gives_a_model_without_threshold(tmp_path: Path) -> None:
    write_category(tmp_path / "data", "plate", num_train=1)
    terminal = train(tmp_path, tmp_path / "data", "--save_model")
    assert terminal.code == 0 and "one training image gives no threshold" in terminal.err
    folder = tmp_path / "project" / "group"
    (row, *_) = read_rows(folder / "results.csv")
    assert row["instance_auroc"] != "" and row["precision"] == ""
    header = json.loads((folder / "models" / "mpdd_plate" / "model.json").read_text(encoding="utf-8"))
    assert header["calibration"] is None


@pytest.mark.parametrize(
    ("of_dataset", "flags", "message"),
    [
        (("--category", "plat"), (), "'plat'"),
        (("-d", "plate", "-d", "rodd"), (), "'rodd'"),
        (("--category", "plate"), ("--backbone", "resnet81"), "unknown backbone 'resnet81': did you mean resnet18"),
        (("--category", "plate"), ("--layers", "blocks.9"), "blocks.9"),
        (("--category", "plate", "--imagesize", "80"), (), "--imagesize 80 is larger than --resize 64"),
    ],
)
def test_what_is_not_there_is_one_line(
    of_dataset: tuple[str, ...], flags: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    terminal = train(tmp_path / "out", data, *flags, of_dataset=of_dataset)
    assert terminal.code == 2 and message in terminal.err, terminal.err
    assert len(terminal.error_lines) == 1 and not (tmp_path / "out" / "project" / "group").exists()


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
