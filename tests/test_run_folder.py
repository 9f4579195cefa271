"""Names and life of run folders: never overwritten, whole or not at all, resumed to the same bytes."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, small_run, write_category
from in_process import Finished, invoke, read_rows

from patchcore.cli import run_patchcore
from patchcore.errors import ConfigurationError, DataError
from patchcore.storage import files, run_folder
from patchcore.storage.run_folder import (
    DEFECT_COLUMNS,
    FALSE_ALARM_COLUMNS,
    METRIC_COLUMNS,
    TIMING_COLUMNS,
    ClassResult,
    claim_folder,
    format_number,
    free_file,
    group_without_seed,
    is_unused,
    load_class_result,
    require_writable,
    save_class_result,
    seed_group,
    seed_statistics,
    write_seed_table,
    write_tables,
)

# ---------------------------------------------------------------- names


def test_a_taken_name_gets_the_next_number(tmp_path: Path) -> None:
    parent = tmp_path / "results" / "project"
    assert [claim_folder(parent, "g").name for _ in range(3)] == ["g", "g_0", "g_1"]
    (parent / "g_0").rmdir()
    assert claim_folder(parent, "g").name == "g_0"
    (parent / "file").touch()
    assert claim_folder(parent, "file").name == "file_0"
    assert [free_file(parent, "t", ".csv").name, free_file(parent, "file", "").name] == ["t.csv", "file_1"]


@pytest.mark.parametrize(
    ("group", "expected"), [("run", "run_S4"), ("run_S0", "run_S4"), ("run_S12_S3", "run_S12_S4"), ("S0", "S0_S4")]
)
def test_seed_replaces_a_trailing_seed(group: str, expected: str) -> None:
    assert seed_group(group, 4) == expected
    assert group_without_seed(expected) == group_without_seed(group)


def test_writability_is_checked_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    require_writable(Path("relative") / "path")
    require_writable(Path("."))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            require_writable(path)
            claim_folder(path, "group")


# ---------------------------------------------------------------- files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / ("\u90e8" * 84)  # 252 bytes: nothing may be added to the name
    files.write_bytes(path, b"old")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "file", b"")
        files.write_folder(tmp_path / "folder", lambda folder: (folder / "x").touch())
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "m", lambda folder: (folder / "old").touch())

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_folder(tmp_path / "m", fail)
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "old"]
    files.write_folder(tmp_path / "m", lambda folder: (folder / "new").touch())
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "new"]


def test_csv_keeps_bytes_that_are_no_text_and_quotes_what_needs_it(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "t.csv", ["a", "b"], [["x,y", os.fsdecode(b"\xff")]])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n"x,y",\xff\n'


def test_numbers_are_no_formulas_and_rows_have_the_cells_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    files.write_csv(path, ["-0.5", "=a"], [["-3", "+1e-05"], ["-1.5.2", "-"]])
    assert path.read_text(encoding="utf-8") == "-0.5,'=a\n-3,+1e-05\n'-1.5.2,'-\n"
    assert files.read_csv(path)[1] == {"-0.5": "-1.5.2", "=a": "-"}
    path.write_text("a,b\n1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 has 1 cells, expected 2"):
        files.read_csv(path)


# ---------------------------------------------------------------- tables


def result(name: str, value: float | None) -> ClassResult:
    metrics = dict.fromkeys(METRIC_COLUMNS, value)
    defects = [{**dict.fromkeys(DEFECT_COLUMNS, value), "defect_type": "hole", "num_images": 3}]
    alarms = [{**dict.fromkeys(FALSE_ALARM_COLUMNS, value), "level": "image", "rule": "mean3std"}]
    return ClassResult(name, metrics, defects, dict.fromkeys(TIMING_COLUMNS, value), alarms)


def test_numbers_have_six_decimals_and_undefined_ones_are_blank() -> None:
    cells = [format_number(v) for v in (0.1234567, 1.0, 3, None, float("nan"), float("inf"), "x")]
    assert cells == ["0.123457", "1.000000", "3", "", "", "", "x"]


def test_without_thresholds_there_is_no_table_of_false_alarms_and_older_records_have_none(tmp_path: Path) -> None:
    whole = result("a", 0.5)
    bare = replace(whole, timings={**whole.timings, "train_images": 3, "test_images": 4}, false_alarms=[])
    write_tables(tmp_path, {"a": bare})
    assert not (tmp_path / "false_alarms.csv").exists()
    save_class_result(tmp_path, bare)
    path = run_folder.class_result_path(tmp_path, "a")
    older = json.loads(path.read_text())
    del older["false_alarms"]
    path.write_text(json.dumps(older))
    assert load_class_result(tmp_path, "a") == bare


def test_tables_with_blank_cells_and_failures(tmp_path: Path) -> None:
    write_tables(tmp_path, {"a": result("a", 0.5), "c": "no mask", "b": result("b", None)})
    rows = read_rows(tmp_path / "results.csv")
    assert [r["Row Names"] for r in rows] == ["a", "c", "b", "Mean"]
    assert [r["f1"] for r in rows] == ["0.500000", "", "", "0.500000"]  # c failed, b is undefined
    assert read_rows(tmp_path / "failures.csv") == [{"Row Names": "c", "reason": "no mask"}]
    assert [r["defect_type"] for r in read_rows(tmp_path / "results_by_defect.csv")] == ["hole", "hole"]
    assert [r["Row Names"] for r in read_rows(tmp_path / "timings.csv")] == ["a", "b"]
    alarms = read_rows(tmp_path / "false_alarms.csv")
    assert [(r["Row Names"], r["rule"], r["rate"]) for r in alarms] == [
        ("a", "mean3std", "0.500000"),
        ("b", "mean3std", ""),
    ]
    write_tables(tmp_path, {"a": result("a", 0.5)})
    assert not (tmp_path / "failures.csv").exists()
    write_tables(tmp_path, {"a": "no image"})
    assert not (tmp_path / "false_alarms.csv").exists()  # of a class that has failed since


def test_seed_table_by_hand(tmp_path: Path) -> None:
    runs = [[result("a", 0.1), result("b", None)], [result("a", 0.4), result("b", 0.8)], [result("a", 0.7)]]
    write_seed_table(tmp_path / "s.csv", seed_statistics(runs))
    a, b, mean = read_rows(tmp_path / "s.csv")
    assert (a["num_seeds"], a["f1_mean"], a["f1_std"]) == ("3", "0.400000", "0.300000")
    assert (b["num_seeds"], b["f1_mean"], b["f1_std"]) == ("2", "0.800000", "")  # one value has no deviation
    # b failed in one run: a mean over other classes there could not be compared
    assert (mean["num_seeds"], mean["f1_mean"], mean["f1_std"]) == ("3", "0.400000", "0.300000")


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_class_result(tmp_path, "a") is None
    record = result("a", 1 / 3)
    record.timings["train_images"] = 3
    save_class_result(tmp_path, record)
    assert load_class_result(tmp_path, "a") == record


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 200_000,
        "null",
        '{"row_name": 3}',
        '{"row_name": "a", "metrics": {}, "by_defect": [], "timings": {}}',
    ],
)
def test_a_damaged_record_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = run_folder.class_result_path(tmp_path, "a")
    files.write_bytes(path, content.encode())
    with pytest.raises(DataError, match="remove it") as error:
        load_class_result(tmp_path, "a")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["a\rb", "a\nb", "a\r\nb", "\r", 'a"b,c', " a", "caf\udce9", "=1+1", "'@a", "''-a", "'a"]
)
def test_a_cell_of_any_name_is_read_back_from_its_row(name: str, tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    files.write_csv(path, ["path", "score"], [[name, "1"], ["next", "2"]])
    assert files.read_csv(path) == [{"path": name, "score": "1"}, {"path": "next", "score": "2"}]
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, (cell, _), following = csv.reader(file)
    is_formula = name.lstrip("'")[0] in "=@-\r"
    assert (header, cell, following) == (["path", "score"], "'" * is_formula + name, ["next", "2"])
    assert path.read_bytes().endswith(b"\nnext,2\n") and b"\r\nnext" not in path.read_bytes()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("full_pro", "NaN", r"full_pro is nan, expected a number in \[0, 1\]"),
        ("pixel_f1_max", "7.0", r"pixel_f1_max is 7\.0, expected a number in \[0, 1\]"),
        ("precision", "true", "precision is True, expected a number"),
        ("latency_p50_ms", "-1", "latency_p50_ms is -1, expected a number from 0 up"),
        ("peak_memory_mb", "Infinity", "peak_memory_mb is inf, expected a number from 0 up"),
        ("train_images", "2.5", r"train_images is 2\.5, expected a whole number from 1 up"),
        ("defect_type", "3", "defect_type is 3, expected a text"),
        ("rule", "3", "rule is 3, expected a text"),
        ("interval_high", "1.5", r"interval_high is 1\.5, expected a number in \[0, 1\]"),
        ("num_flagged", "-1", "num_flagged is -1, expected a number from 0 up"),
    ],
)
def test_a_record_of_what_cannot_be_is_refused(column: str, value: str, message: str, tmp_path: Path) -> None:
    record = result("a", None)
    parts = (record.metrics, record.timings, record.by_defect[0], record.false_alarms[0])
    place = next(part for part in parts if column in part)
    place[column] = "spoiled"
    save_class_result(tmp_path, record)
    path = run_folder.class_result_path(tmp_path, "a")
    path.write_text(path.read_text().replace('"spoiled"', value))
    with pytest.raises(DataError, match=message):
        load_class_result(tmp_path, "a")


# ---------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume") / "data"
    for category in ("plate", "rod"):
        write_category(root, category)
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results path with the run folders `g` and, of two seeds, `s_S0` and `s_S1`, none of them interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out, "g", *small_run(data)).code == 0
    assert run(out, "s", "--seed", 0, "--seed", 1, *small_run(data, "rod")).code == 0
    return out / "project"


def run(out: Path, group: str, *args: object) -> Finished:
    options = ("--device", "cpu", "--threads", 1, "--log_group", group, "--skip_existing")
    return invoke(run_patchcore, out, *options, *args)


def test_skip_existing_does_only_what_is_missing(data: Path, whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "g", *small_run(data)).code == 0
    folder = tmp_path / "project" / "g"
    kept = folder / "class_results" / "mpdd_plate.json"
    before, config = kept.stat().st_mtime_ns, (folder / "config.json").read_bytes()
    (folder / "class_results" / "mpdd_rod.json").unlink()
    (folder / "results.csv").write_text("overwritten by an editor")
    done = run(tmp_path, "g", *small_run(data))
    assert done.code == 0
    assert done.err.count("finished before, skipped") == 1
    assert kept.stat().st_mtime_ns == before
    assert (folder / "config.json").read_bytes() == config
    assert (folder / "results.csv").read_bytes() == (whole / "g" / "results.csv").read_bytes()
    assert [p.name for p in folder.parent.iterdir()] == ["g"]
    # How many processes read how many images at a time is no part of what was asked for.
    faster = small_run(data, reading=("--batch_size", "3"))
    assert run(tmp_path, "g", *faster).err.count("finished before, skipped") == 2


def test_another_configuration_is_refused_with_the_differences(data: Path, whole: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(whole, project)
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*")}
    done = run(tmp_path, "g", "--seed", 3, *small_run(data, method=("--patchsize", "5")))
    assert done.code == 2 and len(done.error_lines) == 1 and done.out == ""
    assert "method_config.patchsize: 3 there, 5 now" in done.err and "seed: 0 there, 3 now" in done.err
    done = run(tmp_path, "g", *small_run(data, "rod"))
    assert done.code == 2 and "dataset.categories" in done.err
    assert before == {p: p.stat().st_mtime_ns for p in project.rglob("*")}
    # Of several seeds, one that differs is found before the first is worked on.
    config = project / "s_S1" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"seed": 1', '"seed": 8'), encoding="utf-8")
    done = run(tmp_path, "s", "--seed", 5, "--seed", 1, *small_run(data, "rod"))
    assert done.code == 2 and "seed: 8 there, 1 now" in done.err
    assert not (project / "s_S5").exists()


@pytest.mark.parametrize("content", [None, "not json", "[" * 200_000, "[]", '{"other": 1}'])
def test_a_folder_that_is_no_run_is_left_alone(content: str | None, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project" / "g"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    if content is not None:
        (folder / "config.json").write_text(content)
    done = run(tmp_path, "g", *small_run(data, "rod"))
    assert done.code == 2 and "no readable config.json" in done.err
    assert (folder / "notes.txt").read_text() == "mine" and len(list(folder.parent.iterdir())) == 1


def test_a_folder_from_before_the_first_file_is_used(tmp_path: Path, data: Path, whole: Path) -> None:
    folder = tmp_path / "project" / "g"
    folder.mkdir(parents=True)
    (folder / ".x3.part").touch()  # what a kill in the middle of config.json leaves
    assert is_unused(folder) and is_unused(tmp_path / "nothing")
    assert run(tmp_path, "g", *small_run(data)).code == 0
    assert not is_unused(folder)
    assert (folder / "results.csv").read_bytes() == (whole / "g" / "results.csv").read_bytes()


def test_a_damaged_record_fails_its_class_alone(tmp_path: Path, data: Path) -> None:
    assert run(tmp_path, "g", *small_run(data)).code == 0
    record = tmp_path / "project" / "g" / "class_results" / "mpdd_rod.json"
    record.write_text(record.read_text(encoding="utf-8")[:200], encoding="utf-8")
    done = run(tmp_path, "g", *small_run(data))
    assert done.code == 1 and str(record) in done.err and len([x for x in done.error_lines if "error: " in x]) == 1


def test_resumed_seeds_give_the_same_table(tmp_path: Path, data: Path, whole: Path) -> None:
    steps = small_run(data, "rod")
    assert run(tmp_path, "s", "--seed", 0, "--seed", 1, *steps).code == 0
    (tmp_path / "project" / "s_S1" / "class_results" / "mpdd_rod.json").unlink()
    assert run(tmp_path, "s", "--seed", 0, "--seed", 1, *steps).code == 0
    names = ["s_S0", "s_S1", "s_seeds.csv"]
    assert sorted(p.name for p in (tmp_path / "project").iterdir()) == names
    for name in ("s_seeds.csv", "s_S0/results.csv", "s_S1/results.csv"):
        assert (tmp_path / "project" / name).read_bytes() == (whole / name).read_bytes()


def kill_when(folder: Path, moment: float, out: Path, group: str, *args: object) -> None:
    """Start a run as a user does, and kill it so many seconds after a folder of it appears."""
    options = ["--device", "cpu", "--threads", "1", "--log_group", group, "--skip_existing"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "bin" / "run_patchcore.py"), str(out), *options, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not folder.exists():
        time.sleep(0.002)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_and_resume(out: Path, data: Path, moment: float) -> bytes:
    """Kill a run so many seconds after its folder appears, resume it, and return the result table."""
    folder = out / "project" / "g"
    kill_when(folder, moment, out, "g", "--save_patchcore_model", *small_run(data))
    for path in folder.rglob("*.json"):  # whatever has its name is whole
        json.loads(path.read_text(encoding="utf-8"))
    done = run(out, "g", "--save_patchcore_model", *small_run(data))
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"results: {folder}"
    return (folder / "results.csv").read_bytes()


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, data: Path, whole: Path) -> None:
    moment = random.Random(0).uniform(0, 0.6)
    assert kill_and_resume(tmp_path, data, moment) == (whole / "g" / "results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_run_killed_at_any_moment_resumes(seed: int, tmp_path: Path, data: Path, whole: Path) -> None:
    moment = random.Random(seed).uniform(0, 2.0)
    assert kill_and_resume(tmp_path, data, moment) == (whole / "g" / "results.csv").read_bytes()


def test_seeds_killed_in_the_second_of_them_resume_to_the_same_table(tmp_path: Path, data: Path, whole: Path) -> None:
    typed = ("--seed", 0, "--seed", 1, *small_run(data, "rod"))
    kill_when(tmp_path / "project" / "s_S1", 0.05, tmp_path, "s", *typed)
    assert not (tmp_path / "project" / "s_seeds.csv").exists()
    done = run(tmp_path, "s", *typed)
    assert done.code == 0 and "rod: finished before, skipped" in done.err
    for name in ("s_seeds.csv", "s_S0/results.csv", "s_S1/results.csv"):
        assert (tmp_path / "project" / name).read_bytes() == (whole / name).read_bytes()


def test_an_interrupted_resume_keeps_the_rows_of_finished_classes(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [tmp_path / "out", "--skip_existing", "--device", "cpu", "--threads", "1"]
    write_category(small_dataset, "tube")
    steps = small_run(small_dataset, "plate", "rod", "tube")
    assert invoke(run_patchcore, *command, *steps).code == 0
    folder = tmp_path / "out" / "project" / "group"
    before = (folder / "results.csv").read_text()
    run_folder.class_result_path(folder, "mpdd_rod").unlink()

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("patchcore.class_run.evaluate_class", interrupted)
        assert invoke(run_patchcore, *command, *steps).code == 130
    rows = (folder / "results.csv").read_text().splitlines()
    assert [rows[1], rows[3]] == [before.splitlines()[1], before.splitlines()[3]]  # plate and tube
    assert rows[2].strip(",") == "mpdd_rod"
    assert invoke(run_patchcore, *command, *steps).code == 0
    assert (folder / "results.csv").read_text() == before
    assert not (folder / "failures.csv").exists()
    log = (folder / "run.log").read_text()
    assert "rod finished" in log and "plate: finished before, skipped" in log
