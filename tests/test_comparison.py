"""compare_results as a user types it, on run folders of every kind."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, small_run
from in_process import Finished, invoke, read_rows
from PIL import Image
from synthetic_runs import PREPROCESSING, write_run

from patchcore.cli import compare_results, run_patchcore
from patchcore.comparison import compare
from patchcore.comparison.runs import read_runs
from patchcore.errors import ConfigurationError
from patchcore.presets.published import published_numbers

TABLES = {
    "comparison.md",
    "comparison.csv",
    "comparison_speed.csv",
    "comparison_by_defect.csv",
    "comparison_by_size.csv",
}
SCORE_HEADER = b"path,defect_type,label,score,normalized_score,decision,defect_px\n"
PLOTS = {"performance_bars.png", "roc_curves.png", "pr_curves.png", "score_distributions.png", "pareto.png"}


@pytest.fixture
def drawn() -> None:
    """Asked for by tests that look at plots; drawing takes a second, which all others are spared."""


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        for name in (n for n in vars(compare) if n.endswith("_picture")):
            monkeypatch.setattr(compare, name, lambda *_: Image.new("RGB", (8, 8)))


def run_comparison(tmp_path: Path, *arguments: object) -> Finished:
    return invoke(compare_results, *arguments, "--out", tmp_path / "out")


def summary_of(tmp_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    return loaded


def compared(*folders: Path, **chosen: bool) -> dict[str, Any]:
    """Return the summary of a comparison that is not written: drawing takes a second."""
    found = compare.make_comparison(folders, compare.ComparisonOptions(**chosen))
    loaded: dict[str, Any] = json.loads(json.dumps(found.summary, allow_nan=False))
    return loaded


def results(summary: dict[str, Any], metric: str = "instance_auroc") -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["class"], row["method"]): row for row in summary["results"] if row["metric"] == metric}


def stored(folder: Path, row_name: str) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((folder / "class_results" / f"{row_name}.json").read_text())["metrics"]
    return metrics


def write_grid(root: Path) -> list[Path]:
    """Write two methods x two classes x two seeds, one of them with a run folder per class and preset."""
    folders = []
    for seed in (0, 1):
        folders.append(write_run(root, f"PC_WR50_S{seed}", ["plate", "rod"], seed=seed, quality=3.0))
        for category in ("plate", "rod"):
            folders.append(
                write_run(
                    root,
                    f"FLOW_{category}_R18_S{seed}",
                    [category],
                    method="fastflow",
                    method_config={"steps": len(category)},
                    seed=seed,
                    quality=0.5,
                    latency_ms=10.0,
                )
            )
    return folders


def test_two_methods_on_two_classes_with_two_seeds(tmp_path: Path, drawn: None) -> None:
    folders = write_grid(tmp_path)
    finished = run_comparison(tmp_path, *folders)
    assert (finished.code, finished.err) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == TABLES | PLOTS | {"summary.json"}
    summary = summary_of(tmp_path)
    assert [m["label"] for m in summary["methods"]] == ["PC_WR50", "FLOW_R18"]
    assert [m["seeds"] for m in summary["methods"]] == [[0, 1], [0, 1]]
    rows = results(summary)
    assert list(dict.fromkeys(name for name, _ in rows)) == ["mpdd_plate", "mpdd_rod", "Mean"]
    # The numbers are those of the runs.
    for label, name in (("PC_WR50", "PC_WR50"), ("FLOW_R18", "FLOW_plate_R18")):
        values = [stored(tmp_path / f"{name}_S{seed}", "mpdd_plate")["instance_auroc"] for seed in (0, 1)]
        assert rows["mpdd_plate", label]["mean"] == pytest.approx(np.mean(values))
        assert rows["mpdd_plate", label]["std"] == pytest.approx(np.std(values, ddof=1))
    means = [rows[name, "PC_WR50"]["mean"] for name in ("mpdd_plate", "mpdd_rod")]
    assert rows["Mean", "PC_WR50"]["mean"] == pytest.approx(np.mean(means))
    assert rows["Mean", "PC_WR50"]["classes"] == ["mpdd_plate", "mpdd_rod"]
    pro = results(summary, "full_pro")
    assert pro["Mean", "PC_WR50"]["status"] == "best" and pro["Mean", "FLOW_R18"]["status"] is None
    low, high = pro["Mean", "FLOW_R18"]["interval"]
    assert 0 < low < pro["Mean", "FLOW_R18"]["difference"] < high
    table = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| Mean of 2 | **" in table and "| class | PC\\_WR50 | FLOW\\_R18 |" in table
    csv_rows = read_rows(tmp_path / "out" / "comparison.csv")
    row = next(r for r in csv_rows if (r["class"], r["metric"], r["method"]) == ("Mean", "full_pro", "FLOW_R18"))
    assert float(row["interval_low"]) == pytest.approx(low, abs=1e-6) and row["source"] == "measured"
    (speed,) = [r for r in summary["speed"] if r["class"] is None and r["method"] == "FLOW_R18"]
    assert speed["latency_p50_ms"] == 10.5 and speed["train_seconds"] == 3.5  # medians of 10, 11 and 3, 4
    optimal = {row["method"]: row["optimal"] for row in summary["pareto"] if row["metric"] == "full_pro"}
    assert optimal == {"PC_WR50": True, "FLOW_R18": True}  # the better one is the slower one
    for name in PLOTS:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 700 and np.asarray(picture).std() > 0


def test_tables_over_seeds_beside_the_folders_are_passed_over(tmp_path: Path) -> None:
    project = tmp_path / "project"
    folders = [write_run(project, f"PC_S{seed}", seed=seed) for seed in (0, 1)]
    for name in ("PC_seeds.csv", "PC_seeds_0.csv"):
        (project / name).touch()
    assert run_comparison(tmp_path, *project.iterdir()).code == 0
    assert [len(m["folders"]) for m in summary_of(tmp_path)["methods"]] == [len(folders)]
    assert "only tables over seeds" in run_comparison(tmp_path, project / "PC_seeds.csv").err
    assert "it is a file" in run_comparison(tmp_path, folders[0] / "config.json").err


def test_the_same_folders_in_another_order_give_the_same_numbers(tmp_path: Path) -> None:
    folders = write_grid(tmp_path)
    first = results(compared(*folders), "full_pro")
    again = results(compared(*reversed(folders)), "full_pro")
    for key, row in first.items():
        assert again[key]["mean"] == pytest.approx(row["mean"]) and again[key]["status"] == row["status"]
        assert again[key]["interval"] == (row["interval"] and pytest.approx(row["interval"]))


def test_every_field_of_the_summary_is_documented_and_has_its_type(tmp_path: Path) -> None:
    folders = [*write_grid(tmp_path), write_run(tmp_path, "PC_WR50_N4", ["plate", "rod"], limit_train=4, quality=3.0)]
    summary = {**compared(*folders, write_run(tmp_path, "X", ["metal_plate"]), published=True), "files": []}
    schema = read_schema()
    seen: set[str] = set()
    check_fields(summary, "", schema, seen)
    assert seen == set(schema)


TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "integer/string": (int, str),
    "number": (int, float),
    "boolean": (bool,),
    "[string]": (list,),
    "[integer]": (list,),
    "[number]": (list,),
}


def read_schema() -> dict[str, str]:
    text = (REPOSITORY / "docs" / "summary_schema.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([^`]+)` \| ([^ |]+) \|", text, re.MULTILINE))


def check_fields(value: Any, name: str, schema: dict[str, str], seen: set[str]) -> None:
    """Follow a document down to the fields that the schema names."""
    if name in schema:
        seen.add(name)
        expected = schema[name]
        if value is None:
            assert expected.endswith("?"), name
            return
        assert isinstance(value, TYPES[expected.removesuffix("?")]), (name, value)
        assert expected.startswith("boolean") or not isinstance(value, bool), name
        if isinstance(value, list):
            element = TYPES[expected.removesuffix("?").strip("[]")]
            assert all(isinstance(v, element) for v in value), name
    elif isinstance(value, list):
        for element in value:
            check_fields(element, f"{name}[]", schema, seen)
    else:
        assert isinstance(value, dict), f"{name} is not documented"
        for key, inner in value.items():
            known = "<metric>" if name == "metrics" else key
            check_fields(inner, f"{name}.{known}" if name else known, schema, seen)


def test_a_method_without_maps_has_blank_pixel_cells(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "knn", ["plate", "rod"], method="resnet_knn", maps=False),
        write_run(tmp_path, "flow", ["plate", "rod"], method="fastflow"),
    ]
    finished = run_comparison(tmp_path, *folders)
    assert (finished.code, finished.err) == (0, "")  # nothing is missing that a run could give
    summary = summary_of(tmp_path)
    assert results(summary, "full_pro")["mpdd_plate", "knn"]["mean"] is None
    assert results(summary, "full_pro")["Mean", "flow"]["classes"] == ["mpdd_plate", "mpdd_rod"]
    assert results(summary)["Mean", "knn"]["mean"] is not None
    assert "| mpdd\\_plate |  | " in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_maps_that_were_not_stored_leave_intervals_blank_and_say_so(tmp_path: Path) -> None:
    with_maps = write_run(tmp_path, "with", quality=3.0)
    without = write_run(tmp_path, "without", method="fastflow", quality=0.1, save_maps=False)
    finished = run_comparison(tmp_path, with_maps, without)
    assert finished.code == 0 and f"run {without} with --save_anomaly_scores" in finished.err
    summary = summary_of(tmp_path)
    rows = results(summary, "full_pro")
    assert rows["mpdd_plate", "with"]["status"] == "highest" and rows["mpdd_plate", "without"]["interval"] is None
    assert rows["mpdd_plate", "without"]["mean"] == pytest.approx(stored(without, "mpdd_plate")["full_pro"])
    assert results(summary)["mpdd_plate", "without"]["interval"] is not None
    sizes = {row["method"]: row["full_pro"] for row in summary["by_size"] if row["quartile"] == 1}
    assert sizes["with"] is not None and sizes["without"] is None
    assert any("--save_anomaly_scores" in note for note in summary["notes"])


def test_by_defect_size_by_hand(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one", quality=1.0)
    scores = read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")
    sizes = sorted(int(row["defect_px"]) for row in scores if row["label"] == "1")
    rows = compared(folder)["by_size"]
    assert sum(row["num_images"] for row in rows) == len(sizes) == 12
    for row in rows:
        own = [r for r in scores if row["min_px"] <= int(r["defect_px"]) <= row["max_px"] and r["label"] == "1"]
        good = [float(r["score"]) for r in scores if r["label"] == "0"]
        assert len(own) == row["num_images"]
        assert row["recall"] == pytest.approx(np.mean([r["decision"] == "1" for r in own]))
        pairs = [(float(r["score"]) > g) + 0.5 * (float(r["score"]) == g) for r in own for g in good]
        assert row["instance_auroc"] == pytest.approx(np.mean(pairs))


def test_runs_of_an_older_version_have_no_table_by_size(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "old", defect_px=False)
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 0 and "no table by defect size, as no run recorded defect_px" in finished.err
    assert summary_of(tmp_path)["by_size"] == []
    newer = write_run(tmp_path, "newer", method="fastflow")  # knows the sizes of the same images
    assert {row["method"] for row in compared(folder, newer)["by_size"]} == {"old", "newer"}


def test_different_test_images_are_refused_or_intersected(tmp_path: Path) -> None:
    missing = [f"plate/test/good/{i:03d}.png" for i in range(5)]
    whole = write_run(tmp_path, "whole")
    partial = write_run(tmp_path, "partial", method="fastflow", leave_out=missing)
    refused = run_comparison(tmp_path, whole, partial)
    assert refused.code == 2 and len(refused.error_lines) == 1 and not (tmp_path / "out").exists()
    assert f"'{whole}' alone has {', '.join(missing[:3])} and 2 more" in refused.err and "--intersect" in refused.err
    assert run_comparison(tmp_path, whole, partial, "--intersect").code == 0
    summary = summary_of(tmp_path)
    assert summary["classes"] == [{"name": "mpdd_plate", "num_good": 3, "num_defective": 12}]
    # The whole run, on the images of the other one, is what a run without those images would have had.
    same = write_run(tmp_path / "again", "whole", leave_out=missing)
    for metric in ("instance_auroc", "full_pro", "image_f1_max"):
        measured = results(summary, metric)["mpdd_plate", "whole"]["mean"]
        assert measured == pytest.approx(stored(same, "mpdd_plate")[metric]), metric
    assert results(summary)["mpdd_plate", "whole"]["mean"] != stored(whole, "mpdd_plate")["instance_auroc"]
    recall = json.loads((same / "class_results" / "mpdd_plate.json").read_text())["by_defect"][0]["recall"]
    assert next(r["recall"] for r in summary["by_defect"] if r["method"] == "whole") == pytest.approx(recall)


def test_intersected_runs_without_maps_have_blank_pixel_cells(tmp_path: Path) -> None:
    whole = write_run(tmp_path, "whole", save_maps=False)
    partial = write_run(tmp_path, "partial", method="fastflow", leave_out=["plate/test/good/000.png"])
    rows = results(compared(whole, partial, intersect=True), "full_pro")
    assert rows["mpdd_plate", "whole"]["mean"] is None and rows["mpdd_plate", "partial"]["mean"] is not None


def test_another_resolution_is_refused_for_pixel_metrics_alone(tmp_path: Path) -> None:
    small = write_run(tmp_path, "small")
    large = write_run(tmp_path, "large", preprocessing={**PREPROCESSING, "resize_px": 48})
    refused = run_comparison(tmp_path, small, large)
    assert refused.code == 2 and f"'{small}' has resize 36" in refused.err and f"'{large}' has resize 48" in refused.err
    assert run_comparison(tmp_path, small, large, "--image_metrics_only").code == 0
    summary = summary_of(tmp_path)
    assert {r["mean"] for r in summary["results"] if r["metric"] == "full_pro"} == {None}
    assert all(r["mean"] is not None for r in results(summary).values()) and summary["by_size"] == []
    assert "## PRO" not in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_class_that_is_not_finished_is_named_and_left_out(tmp_path: Path) -> None:
    whole = write_run(tmp_path, "whole", ["plate", "rod"])
    interrupted = write_run(tmp_path, "cut", ["plate", "rod"], method="fastflow", unfinished=["rod"])
    finished = run_comparison(tmp_path, whole, interrupted)
    assert finished.code == 1
    assert finished.err.startswith(f"warning: mpdd_rod of {interrupted} is left out: not finished")
    rows = results(summary_of(tmp_path))
    assert ("mpdd_rod", "cut") not in rows and rows["Mean", "whole"]["classes"] == ["mpdd_plate"]
    nothing = write_run(tmp_path, "nothing", unfinished=["plate"])
    assert "no class is finished" in run_comparison(tmp_path, nothing).error_lines[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("anomaly_scores/mpdd_rod.csv", None, "is missing"),
        ("anomaly_scores/mpdd_rod.csv", b"path,label\n\xff", "is damaged"),
        ("anomaly_scores/mpdd_rod.csv", b"path,defect_type,label,score\na,good,0,nan\n", "no finite number"),
        ("anomaly_scores/mpdd_rod.csv", SCORE_HEADER + b"a,good,0,1.5,0.4,7,0\n", "a decision is neither 0 nor 1"),
        ("anomaly_scores/mpdd_rod.csv", SCORE_HEADER + b"a,good,0,1.5,1.4,0,0\n", "normalized_score is not in [0, 1]"),
        ("anomaly_scores/mpdd_rod.csv", SCORE_HEADER + b"a,good,0,1.5,0.4,0,-1\n", "a defect_px is negative"),
        ("class_results/mpdd_rod.json", b"{", "damaged"),
    ],
)
def test_damaged_files_cost_their_class_alone(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", ["plate", "rod"])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 1 and len(finished.error_lines) == 1
    assert f"mpdd_rod of {folder} is left out" in finished.err and message in finished.err
    assert [c["name"] for c in summary_of(tmp_path)["classes"]] == ["mpdd_plate"]


@pytest.mark.parametrize("value", ["NaN", "7.0", "true", "-0.5"])
@pytest.mark.parametrize("column", ["instance_auroc", "image_f1_max"])
def test_a_stored_metric_that_cannot_be_costs_its_class(column: str, value: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", ["plate", "rod"])
    path = folder / "class_results" / "mpdd_rod.json"
    content = json.loads(path.read_text())
    content["metrics"][column] = "spoiled"
    path.write_text(json.dumps(content).replace('"spoiled"', value))
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 1 and len(finished.error_lines) == 1
    assert f"mpdd_rod of {folder} is left out: {path}: damaged ({column} is " in finished.err
    assert [c["name"] for c in summary_of(tmp_path)["classes"]] == ["mpdd_plate"]


def spoil_maps(path: Path, how: str) -> None:
    """Replace a file of maps by one that cannot be read in a way of its own."""
    with np.load(path) as content:
        arrays = dict(content)
    if how == "no zip":
        path.write_bytes(b"PK\x03\x04 no zip")
    elif how == "npy":
        with path.open("wb") as file:
            np.save(file, arrays["maps"])
    elif how == "flipped bytes":
        np.savez_compressed(path, **arrays)
        content_bytes = bytearray(path.read_bytes())
        content_bytes[200:4000:7] = bytes(b ^ 0xFF for b in content_bytes[200:4000:7])
        path.write_bytes(content_bytes)
    elif how == "compression":
        np.savez(path, **arrays)
        data = path.read_bytes()
        headers = {b"PK\x03\x04": 8, b"PK\x01\x02": 10}  # position of the compression method behind each mark
        for mark, offset in headers.items():
            start = data.find(mark)
            while start >= 0:
                data = data[: start + offset] + b"\x63\x00" + data[start + offset + 2 :]
                start = data.find(mark, start + 4)
        path.write_bytes(data)
    elif how == "texts":
        np.savez(path, **{**arrays, "maps": arrays["maps"].astype("U3")})
    else:
        np.savez(path, **{**arrays, "sizes": np.zeros((1, 2))})


@pytest.mark.parametrize("how", ["no zip", "npy", "flipped bytes", "compression", "texts", "sizes"])
def test_damaged_maps_are_named_and_count_as_missing(how: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", ["plate", "rod"])
    path = folder / "anomaly_scores" / "mpdd_rod.npz"
    spoil_maps(path, how)
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 1 and len(finished.error_lines) == 1
    assert f"the maps of mpdd_rod of {folder} are left out: {path} is damaged or of other images" in finished.err
    summary = summary_of(tmp_path)
    assert results(summary, "full_pro")["mpdd_rod", "run"]["mean"] == stored(folder, "mpdd_rod")["full_pro"]
    assert {row["class"] for row in summary["by_size"] if row["full_pro"] is not None} == {"mpdd_plate"}
    assert not any("--save_anomaly_scores" in note for note in summary["notes"])


def test_images_of_their_own_size_are_intersected(tmp_path: Path) -> None:
    """One run has a larger image more, to whose size its maps are padded; the other one has not."""
    larger = "plate/test/good/000.png"
    preprocessing = {"resize_px": 0, "imagesize_px": 0, "resize_mode": "keep", "max_side_px": 64}
    whole = write_run(tmp_path, "whole", preprocessing=preprocessing)
    partial = write_run(tmp_path, "part", method="fastflow", preprocessing=preprocessing, leave_out=[larger])
    path = whole / "anomaly_scores" / "mpdd_plate.npz"
    with np.load(path) as content:
        arrays = dict(content)
    sizes = np.array([[40, 36] if name == larger.encode() else [32, 32] for name in arrays["paths"].tolist()])
    beyond = ((0, 0), (0, 8), (0, 4))
    arrays["maps"] = np.pad(arrays["maps"], beyond)
    arrays["masks"] = np.pad(arrays["masks"], beyond, constant_values=255)
    arrays["masks"][sizes[:, 0] == 40] = 0
    np.savez(path, **arrays, sizes=sizes)
    assert run_comparison(tmp_path, whole, partial, "--intersect").code == 0
    unpadded = write_run(tmp_path / "again", "whole", leave_out=[larger])
    found = results(summary_of(tmp_path), "full_pro")["mpdd_plate", "whole"]["mean"]
    assert found == pytest.approx(stored(unpadded, "mpdd_plate")["full_pro"])


def test_names_that_are_no_utf8_leave_strict_json(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe9_N%d" % n), ["pl\udcff"], limit_train=n)
        for n in (2, 4)
    ]
    assert run_comparison(tmp_path, *folders).code == 0
    text = (tmp_path / "out" / "summary.json").read_bytes().decode("utf-8")
    json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8
    summary = summary_of(tmp_path)
    assert [m["label"] for m in summary["methods"]] == ["caf\\udce9_N2", "caf\\udce9_N4"]
    assert {row["method"] for row in summary["results"]} == {m["label"] for m in summary["methods"]}
    assert summary["fewshot"][0]["class"] == "mpdd_pl\\udcff"


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path, "G_S0")
    twice = tmp_path / "G_S0_0"
    shutil.copytree(first, twice)
    cases = [
        ((first, first), "is given twice"),
        ((first, tmp_path / "." / "G_S0"), "is given twice"),
        ((first, twice), f"'{first}' and '{twice}' are both G on mpdd_plate with seed 0: name one of them"),
        ((first, tmp_path / "nowhere"), "there is no such folder"),
        ((first, tmp_path), "it has no config.json"),
        ((first, first / "config.json"), "it is a file"),
    ]
    for folders, message in cases:
        finished = run_comparison(tmp_path, *folders)
        assert (finished.code, finished.out, len(finished.error_lines)) == (2, "", 1)
        assert message in finished.err and not (tmp_path / "out").exists()
    assert invoke(compare_results, "--out", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    "config",
    [
        *("[]", "{}", "[" * 100_000, '{"config": {"dataset": []}}'),
        '{"config": {"dataset": {"categories": 3, "limit_train": 1}}}',
    ],
)
def test_a_damaged_configuration_is_one_line(config: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "G")
    (folder / "config.json").write_text(config)
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 2 and len(finished.error_lines) == 1 and "is no run folder" in finished.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config.dataset.categories", [], "categories [], expected a list of names"),
        ("config.dataset.categories", "plate", "categories 'plate', expected a list of names"),
        ("config.dataset.name", None, "name None and"),
        ("config.dataset.limit_train", 0, "limit_train 0, expected integers"),
        ("config.dataset.preprocessing", "crop", "preprocessing 'crop' is damaged"),
        ("config.dataset.train_val_split", None, "train_val_split None is damaged"),
        ("config.method", 3, "method 3 is damaged"),
        ("config.method_config", "num_nn", "method_config 'num_nn' is damaged"),
        ("config.calibration", {}, "calibration {} is damaged"),
        ("config.seed", "0", "seed '0' and"),
        ("environment", None, "environment None, expected"),
    ],
)
def test_every_value_of_a_configuration_is_checked(name: str, value: object, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "G")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    *above, last = name.split(".")
    part = content
    for step in above:
        part = part[step]
    part[last] = value
    path.write_text(json.dumps(content))
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 2 and len(finished.error_lines) == 1
    assert str(path) in finished.err and message in finished.err


def test_no_folder_at_all_is_said() -> None:
    for read in (lambda: compare.make_comparison([], compare.ComparisonOptions()), lambda: read_runs([])):
        with pytest.raises(ConfigurationError, match="no run folder is named, expected at least one"):
            read()


def test_other_masks_are_refused(tmp_path: Path) -> None:
    first, other = write_run(tmp_path, "first"), write_run(tmp_path, "other", method="fastflow")
    path = other / "anomaly_scores" / "mpdd_plate.csv"
    text = path.read_text()
    path.write_text(text.replace("plate/test/dent/000.png,dent,1", "plate/test/dent/000.png,dent,0"))
    finished = run_comparison(tmp_path, first, other)
    assert finished.code == 2 and "disagree on label or mask of 1 test image(s)" in finished.err
    path.write_text(text)
    maps_path = other / "anomaly_scores" / "mpdd_plate.npz"
    with np.load(maps_path) as content:
        arrays = dict(content)
    arrays["masks"] = arrays["masks"][:, ::-1]
    np.savez(maps_path, **arrays)
    finished = run_comparison(tmp_path, first, other)
    assert finished.code == 2 and "have different masks of mpdd_plate" in finished.err


def test_a_comparison_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    few = [write_run(tmp_path, f"PC_N{n}", limit_train=n) for n in (2, 4)]
    out = tmp_path / "out"
    assert run_comparison(tmp_path, *few).code == 0 and (out / "fewshot_curve.png").exists()
    (out / "mine.txt").write_text("kept")
    assert run_comparison(tmp_path, few[0]).code == 0
    assert not (out / "fewshot_curve.png").exists() and (out / "mine.txt").read_text() == "kept"
    (out / "fewshot_curve.png").write_text("of somebody else")
    assert run_comparison(tmp_path, few[0]).code == 0
    assert (out / "fewshot_curve.png").read_text() == "of somebody else"


def test_the_fewshot_curve_of_one_and_of_two_methods(tmp_path: Path, drawn: None) -> None:
    folders = [
        write_run(tmp_path, f"{name}_N{n}_S{s}", ["plate", "rod"], method=name, seed=s, limit_train=n, quality=0.2 * n)
        for name in ("patchcore", "fastflow")
        for n in (2, 8)
        for s in (0, 1)
    ]
    summary = compared(*folders[:4])
    rows = summary["fewshot"]
    assert {(r["method"], r["class"], r["limit_train"], r["num_seeds"]) for r in rows} == {
        ("patchcore", name, n, 2) for name in ("mpdd_plate", "mpdd_rod", "Mean") for n in (2, 8)
    }
    assert [m["label"] for m in summary["methods"]] == ["patchcore_N2", "patchcore_N8"]
    assert {r["method"] for r in compared(*folders)["fewshot"]} == {"patchcore", "fastflow"}
    assert run_comparison(tmp_path, *folders).code == 0 and (tmp_path / "out" / "fewshot_curve.png").exists()


def test_damaged_published_numbers_end_the_comparison_before_it_reads_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "published_numbers", lambda: published_numbers(tmp_path))
    finished = run_comparison(tmp_path, write_run(tmp_path, "PC"), "--published")
    assert finished.code == 2 and len(finished.error_lines) == 1 and "sources.json cannot be read" in finished.err
    assert not (tmp_path / "out").exists()


def test_published_numbers_stand_apart(tmp_path: Path, drawn: None) -> None:
    folder = write_run(tmp_path, "PC", ["bottle", "screw"], dataset="mvtec")
    assert run_comparison(tmp_path, folder, "--published").code == 0
    summary = summary_of(tmp_path)
    assert {row["row_name"] for row in summary["published"]} == {"mvtec_bottle", "mvtec_screw"}
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    measured, _, published = text.partition("## Published results, not measured here")
    assert "anomalib" not in measured and "compact re-implementation" in published
    assert "not MVTec AD's PRO" in published and "### Published: PRO" not in published
    rows = read_rows(tmp_path / "out" / "comparison.csv")
    sources = {row["source"].partition(":")[0] for row in rows}
    assert sources == {"measured", "published"}
    notes = compared(write_run(tmp_path, "other"), published=True)["notes"]
    assert notes == ["no published numbers of these classes are known"]


def test_hostile_names_break_no_table(tmp_path: Path, drawn: None) -> None:
    folder = write_run(tmp_path, "a|b`*_<b>", ["pl|ate <i>"])
    other = write_run(tmp_path, os.fsdecode(b"caf\xe9 $x$"), ["pl|ate <i>"], method="fastflow")
    finished = run_comparison(tmp_path, folder, other)
    assert finished.code == 0
    lines = (tmp_path / "out" / "comparison.md").read_bytes().decode("utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert all("<i>" not in line and "<b>" not in line.replace("\\<b\\>", "") for line in tables)
    heading = next(i for i, line in enumerate(lines) if line == "## image AUROC")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[heading + 2 : heading + 5]} == {4}


def test_what_fails_has_replaced_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no font")

    monkeypatch.setattr(compare, "roc_picture", fail)
    assert run_comparison(tmp_path, write_run(tmp_path, "run")).code == 1
    assert not (tmp_path / "out").exists()


def test_one_class_of_good_images_alone_and_no_calibration(tmp_path: Path, drawn: None) -> None:
    folder = write_run(tmp_path, "good", num_per_type=0, calibrated=False)
    finished = run_comparison(tmp_path, folder)
    assert finished.code == 0
    assert {row["mean"] for row in summary_of(tmp_path)["results"]} == {None}
    assert not {"performance_bars.png", "pareto.png"} & set(os.listdir(tmp_path / "out"))


def test_folders_of_real_runs(small_dataset: Path, tmp_path: Path) -> None:
    common = ["--device", "cpu", "--threads", 1, "--save_anomaly_scores"]
    for group, neighbours in (("one", "1"), ("three", "3")):
        method = ("--anomaly_scorer_num_nn", neighbours)
        steps = small_run(small_dataset, "plate", "rod", method=method)
        assert invoke(run_patchcore, *common, "--log_group", group, tmp_path, *steps).code == 0
    folders = [tmp_path / "project" / group for group in ("one", "three")]
    summary = compared(*folders)
    for group, folder in zip(("one", "three"), folders, strict=True):
        for row in read_rows(folder / "results.csv"):
            for metric in summary["metrics"]:
                assert results(summary, metric)[row["Row Names"], group]["mean"] == pytest.approx(
                    float(row[metric]), abs=1e-6
                )


def test_fewshot_numbers_are_those_of_the_images_compared(tmp_path: Path) -> None:
    missing = [f"plate/test/good/{i:03d}.png" for i in range(5)]
    folders = [
        write_run(tmp_path, "PC_N2_S0", limit_train=2, quality=1.0),
        write_run(tmp_path, "PC_N8_S0", limit_train=8, quality=1.0, leave_out=missing),
    ]
    summary = compared(*folders, intersect=True)
    for metric in ("instance_auroc", "full_pixel_auroc", "full_pro"):
        measured = results(summary, metric)
        for row in summary["fewshot"]:
            assert row[metric] == measured["mpdd_plate", f"PC_N{row['limit_train']}"]["mean"]
    assert results(summary)["mpdd_plate", "PC_N2"]["mean"] != stored(folders[0], "mpdd_plate")["instance_auroc"]
    without_pixels = compared(folders[0], write_run(tmp_path, "PC_N4_S0", limit_train=4), image_metrics_only=True)
    assert {row["full_pro"] for row in without_pixels["fewshot"]} == {None}
    assert {row["full_pixel_auroc"] for row in without_pixels["fewshot"]} == {None}


def test_value_and_interval_of_a_mean_are_over_the_same_seeds(tmp_path: Path) -> None:
    """Seed 1 has one class of two: its far better scores there enter neither the mean nor the interval."""
    both = ["plate", "rod"]
    flow = write_run(tmp_path, "flow_S0", both, method="fastflow", seed=0, quality=2.0)
    first = write_run(tmp_path, "PC_S0", both, seed=0, quality=0.3)
    second = write_run(tmp_path, "PC_S1", both, seed=1, quality=9.0, unfinished=["rod"])
    alone, together = compared(flow, first), compared(flow, first, second)
    for metric in ("instance_auroc", "full_pro"):
        key = ("Mean", "PC")
        assert results(together, metric)[key]["num_seeds"] == 1
        for field in ("mean", "difference", "interval"):
            assert results(together, metric)[key][field] == pytest.approx(results(alone, metric)[key][field])
        plate = results(together, metric)["mpdd_plate", "PC"]
        assert plate["num_seeds"] == 2 and plate["mean"] != results(alone, metric)["mpdd_plate", "PC"]["mean"]
