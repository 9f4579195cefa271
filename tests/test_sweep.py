"""Sweeps: what a file may say, what is missing of its runs, how long that may take, and the comparison over all."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL_METHOD, write_category
from in_process import Finished, invoke, read_rows

from patchcore.cli import run_sweep
from patchcore.configs import RunConfig
from patchcore.configs.data import DatasetConfig
from patchcore.configs.typed import TypedRun
from patchcore.errors import ConfigurationError
from patchcore.storage.run_folder import ClassResult, write_run_config
from patchcore.sweep.definition import PRESETS, Sweep, Variant, read_sweep, split_words
from patchcore.sweep.plan import PlannedRun, plan_table, seconds_of

METHOD = " ".join(SMALL_METHOD)
TINY = f"""
dataset: mpdd
seeds: [0, 1]
comparison: {{image_metrics_only: true}}
variants:
  half:
    script: run_patchcore
    arguments:
      - &method {METHOD} --anomaly_scorer_num_nn 1
      - sampler -p 0.5 approx_greedy_coreset
      - &reading dataset --resize 64 --imagesize 64 --num_workers 0
  tenth: {{script: run_patchcore, arguments: [*method, sampler -p 0.1 approx_greedy_coreset, *reading]}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep") / "data"
    for category in ("plate", "rod"):
        write_category(root, category, num_train=3, num_test=2)
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def sweep(path: object, data: Path, out: Path, *args: object) -> Finished:
    return invoke(run_sweep, path, "--data", data, "--out", out, "--device", "cpu", "--threads", 1, *args)


def plan(done: Finished) -> dict[str, list[str]]:
    """Return the cells of each line of the plan."""
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("variant "))
    rows = [line.split() for line in lines[start + 2 :]]
    return {row[0]: row[1:] for row in rows[: [row[0] for row in rows].index("all") + 1]}


@pytest.mark.slow  # draws the comparison of two seeds
def test_a_sweep_does_what_is_missing_and_compares_all(data: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = sweep(tiny, data, out, "--dry_run")
    assert planned.code == 0 and not out.exists()
    assert plan(planned) == {"half": ["0", "4", "?"], "tenth": ["0", "4", "?"], "all": ["0", "8", "?"]}

    assert sweep(tiny, data, out, "--only", "half", "--seed", 0).code == 0
    partly = plan(sweep(tiny, data, out, "--dry_run"))
    assert partly["half"][:2] == ["2", "2"] and partly["half"][2] != "?" and partly["tenth"] == ["0", "4", "?"]
    assert partly["all"][2] == ">"  # and the time that is known

    first = out / "tiny" / "half_S0" / "class_results" / "mpdd_plate.json"
    before = first.stat().st_mtime_ns
    done = sweep(tiny, data, out)
    assert done.code == 0 and first.stat().st_mtime_ns == before
    assert {p.name for p in (out / "tiny").iterdir()} == {
        *("half_S0", "half_S1", "tenth_S0", "tenth_S1", "half_seeds.csv", "tenth_seeds.csv", "comparison")
    }
    rows = read_rows(out / "tiny" / "comparison" / "comparison.csv")
    assert {row["method"] for row in rows} == {"half", "tenth"}
    assert plan(sweep(tiny, data, out, "--dry_run"))["all"] == ["8", "0", "0:00:00"]


def test_a_variant_that_fails_loses_no_other(data: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.write_text(TINY.replace("      - sampler -p 0.5", "      - -le nowhere sampler -p 0.5"))
    done = sweep(tiny, data, out, "--seed", 0, "-d", "rod")
    assert done.code == 1
    assert "error: variant half: " in done.err and "nowhere" in done.err
    assert read_rows(out / "tiny" / "tenth_S0" / "results.csv")[0]["Row Names"] == "mpdd_rod"
    assert (out / "tiny" / "comparison" / "comparison.csv").exists()


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_folder_of_another_run_is_found_before_the_first_training(
    data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr("patchcore.sweep.run.train_and_evaluate", lambda *_: pytest.fail("a training has begun"))
    taken = tmp_path / "out" / "tiny" / "tenth_S1"  # the last of all runs
    taken.mkdir(parents=True)
    (taken / "results.txt").write_text("something else")
    for config, expected in (
        (None, "tenth_S1' holds no readable config.json"),
        ({"method": "fastflow"}, "method: 'fastflow' there, 'patchcore' now"),
    ):
        if config is not None:
            write_run_config(taken, config, {})
        done = sweep(tiny, data, tmp_path / "out", *flags)
        assert done.code == 2 and len(done.error_lines) == 1 and not done.out
        assert done.err.startswith("error: variant tenth: ") and expected in done.err and "another --out" in done.err
        assert [p.name for p in (tmp_path / "out" / "tiny").iterdir()] == ["tenth_S1"]


def test_the_offline_preset_downloads_nothing() -> None:
    offline = read_sweep("offline")
    for name, variant in offline.variants.items():
        words = split_words(variant.arguments)
        chosen = [words[i + 1] for i, word in enumerate(words) if word in ("-b", "--backbone")]
        assert chosen == ([] if name == "Autoencoder" else ["efficientnet_lite0"])
    assert len(offline.variants) == 6


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_a_sweep_whose_commands_can_be_read(path: Path, tmp_path: Path) -> None:
    content = read_sweep(path.stem)
    classes = content.classes or ("bottle",)
    for category in classes:
        write_category(tmp_path / "data", category, num_train=1, num_test=1)
    done = sweep(path.stem, tmp_path / "data", tmp_path / "out", "--dry_run")
    num_tasks = len(content.seeds) * len(classes)
    assert done.code == 0 and done.err == ""
    assert {name: cells[:2] for name, cells in plan(done).items() if name != "all"} == {
        name: ["0", str(num_tasks)] for name in content.variants
    }


def result(name: str, seconds: float) -> ClassResult:
    timings = {"train_seconds": seconds - 3, "calibration_seconds": 1.0, "test_images": 10, "images_per_second": 5.0}
    return ClassResult(name, {}, [], timings)


def test_the_estimate_takes_a_class_by_its_other_seeds_and_else_the_mean_by_hand() -> None:
    assert seconds_of(result("plate", 10).timings) == 10
    run = TypedRun("patchcore", lambda _: None, RunConfig("out", seeds=(0, 1, 2)), DatasetConfig("mpdd", "data"))
    folders = {seed: Path(f"S{seed}") for seed in (0, 1, 2)}
    earlier = {
        0: {"plate": result("plate", 10), "rod": result("rod", 40)},
        1: {"plate": result("plate", 20), "rod": None},  # its files are gone
        2: {"plate": "damaged"},
    }
    planned = PlannedRun("v", run, ("plate", "rod", "tube"), folders, dict(earlier))
    assert planned.missing == [(0, "tube"), (1, "rod"), (1, "tube"), (2, "plate"), (2, "rod"), (2, "tube")]
    usual = (15 + 40) / 2
    assert planned.seconds_left() == 3 * usual + 2 * 40 + 15
    assert plan_table([planned]).splitlines()[-1].split() == ["all", "3", "6", "0:02:58"]


MISTAKES = [
    (TINY.replace("run_patchcore", "run_patchcor"), "run_patchcor"),
    (TINY.replace("sampler", "sampl"), "variant half: "),
    (TINY.replace("--num_workers", "--num_worker"), "variant half: dataset has no option '--num_worker'"),
    (TINY.replace("-p 0.1", "-p 1.5"), "variant tenth: "),
    (TINY.replace("dataset: mpdd", "data: mpdd"), "unknown name 'data'"),
    (TINY.replace("seeds: [0, 1]", "seeds: 3"), "seeds: found int, expected a list"),
    (TINY.replace("seeds: [0, 1]", "seeds: []"), "no seed"),
    (TINY.replace("seeds: [0, 1]", "seeds: [0, 0]"), "a seed is named twice"),
    (TINY.replace("  half:", "  a/b:"), "variant 'a/b'"),
    (TINY.replace("  tenth:", "  half:"), "'half' is there twice"),
    (TINY.replace("-p 0.5", "-p 0.5 'open"), "mind the quotes"),
    ("variants: {}\ndataset: mpdd", "no variant"),
    ("[1, 2]", "found list"),
    ("a: [", "cannot be read"),
    ("a: !!python/object/apply:os.system [echo]", "cannot be read"),
]


@pytest.mark.parametrize(("content", "expected"), MISTAKES, ids=lambda text: text.strip()[-30:])
def test_a_mistake_in_the_file_is_one_line_before_any_work(
    data: Path, tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    done = sweep(tmp_path / "sweep.yaml", data, tmp_path / "out")
    assert done.code == 2 and len(done.error_lines) == 1 and expected in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("--only", "hal"), "did you mean half"),
        (("--log_group", "g"), "--log_group is set by the sweep"),
        (("--log_project=g",), "--log_project is set by the sweep"),
        (("--colour",), "has no option '--colour'"),
        (("--workers", 0), "--workers"),
    ],
)
def test_a_wrong_option_is_one_line(
    data: Path, tiny: Path, tmp_path: Path, typed: tuple[object, ...], expected: str
) -> None:
    done = sweep(tiny, data, tmp_path / "out", *typed)
    assert done.code == 2 and len(done.error_lines) == 1 and expected in done.err


def test_an_unknown_sweep_and_a_missing_data_folder_are_one_line(tiny: Path, tmp_path: Path) -> None:
    done = sweep("mpdd_pape", tmp_path, tmp_path / "out")
    assert done.code == 2 and "did you mean mpdd_paper" in done.err
    done = sweep(tiny, tmp_path / "gone", tmp_path / "out")
    assert done.code == 2 and len(done.error_lines) == 1 and "gone" in done.err


def test_the_command_of_a_variant_is_what_a_user_would_type() -> None:
    content = Sweep(
        "mpdd", {"v": Variant("run_patchcore", ("patch_core -b 'a b'", "dataset"))}, (3, 4), ("c",), "--save_model"
    )
    typed = content.command_line("v", "data", "out", (), (), ("--device", "cpu"))
    assert " ".join(typed) == (
        "out --log_project sweep --log_group v_S3 --skip_existing --seed 3 --seed 4 --save_model "
        "patch_core -b a b dataset -d c mpdd data --device cpu"
    )
    assert typed[typed.index("-b") + 1] == "a b"
    assert "-d d" in " ".join(content.command_line("v", "data", "out", ("d",), (7,), ()))
    with pytest.raises(ConfigurationError, match="--only 'w'"):
        content.chosen(("w",))
