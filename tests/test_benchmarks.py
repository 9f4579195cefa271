"""The two sides of the benchmarks compute the same; what they take is nothing to test."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_category

from patchcore.configs import INDEXES, BackboneConfig, PreprocessingConfig
from patchcore.datasets.inspection import DatasetSplit
from patchcore.errors import ConfigurationError
from patchcore.evaluation.summary import class_metrics
from patchcore.features.patches import PooledEmbedding
from patchcore.memory.points import Points
from patchcore.memory.sampler import ApproximateGreedyCoresetSampler

BENCHMARKS = REPOSITORY / "benchmarks"
MAP_TOLERANCE = 0.03
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fastflow")


def test_both_sides_of_the_fastflow_benchmark_agree(benchmark: object) -> None:
    toolkit = benchmark.Toolkit(32, 2, 2)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in toolkit.flows.parameters():  # a new flow is the identity
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    reference = benchmark.straightforward_like(toolkit, 32)  # type: ignore[attr-defined]
    reference.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in reference.norms)  # ours are fixed statistics
    images = torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    features = toolkit.cache(images)
    with torch.no_grad():
        ours, theirs = toolkit.flows(features), reference.transform(reference.features(images))
        bits = toolkit.flows.mean_bits_per_dimension(features)
    losses = []
    for (latent, log_det), (their_latent, their_log_det) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(latent, their_latent, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(log_det.sum(dim=(1, 2)), their_log_det, rtol=1e-3, atol=1e-2)
        nats = 0.5 * their_latent.square().sum(dim=(1, 2, 3)) - their_log_det
        losses.append(nats.mean() / their_latent[0].numel() / math.log(2) + 0.5 * math.log2(2 * math.pi))
    torch.testing.assert_close(torch.stack(losses).mean(), bits, rtol=1e-4, atol=1e-4)
    # The toolkit joins the scales on the finest grid, the loop on the image.
    maps = -torch.exp2(-toolkit.anomaly_maps(images)), reference.anomaly_maps(images)
    assert maps[0].shape == maps[1].shape == (3, 32, 32)
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=MAP_TOLERANCE)
    other_images = (maps[0] - maps[1].roll(1, dims=0)).abs().amax(dim=(1, 2))
    assert other_images.min() > 2 * MAP_TOLERANCE, "a tolerance that maps of other images meet would show nothing"


def test_the_fastflow_benchmark_runs() -> None:
    sizes = {"images": 2, "imagesize": 32, "flow_steps": 1, "batch_size": 2, "rounds": 1, "threads": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fastflow.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split()[-3:] for line in done.stdout.splitlines()[3:]]
    assert len(rows) == 3 and all(float(cell) > 0 for row in rows for cell in row)


def test_the_benchmark_of_tiles_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the size of a thumbnail, and in threads of the test where each way has a process of its own otherwise."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiles = importlib.import_module("fastflow_tiles")
    monkeypatch.setattr(tiles, "INPUT_PX", 32)
    monkeypatch.setattr(tiles.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
    sizes = {"side": 80, "patch_size": 32, "patch_stride": 16, "threads": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["fastflow_tiles.py", *arguments])
    tiles.main()
    title, usual, frugal, difference = capsys.readouterr().out.splitlines()
    assert title == "resnet18, 80 x 80 px, 16 tiles, 1 threads"
    assert re.fullmatch(r"usual +peak +\d+ MB, of it +\d+ MB for the image; +\d+\.\d s", usual)
    assert re.fullmatch(r"--low_memory +peak +\d+ MB, of it +\d+ MB for the image; +\d+\.\d s", frugal)
    found = re.fullmatch(r"largest difference of the maps: (\S+), maps up to (\S+)", difference)
    assert found is not None and float(found[2]) > 0 and float(found[1]) <= 1e-5 * float(found[2])


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import modules of the benchmarks by name, as their scripts import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A class of four images in thumbnail size, and a backbone with random weights."""
    root = tmp_path_factory.mktemp("tiny")
    write_category(root / "data", "plate", num_train=2, num_test=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        material = importlib.import_module("material")
    settings = material.Settings(
        root / "data",
        "plate",
        "tiny/plate",
        threads=1,
        rounds=1,
        backbone=BackboneConfig("efficientnet_lite0", ("blocks.1", "blocks.2"), "random"),
        preprocessing=PreprocessingConfig(72, 64),
        reference_steps=20,
    )
    return material.Material(settings, root / "out")


@pytest.fixture
def small_sizes(load: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the stages with maps of a thumbnail, measuring in this process."""
    stages: ModuleType = load("stages")
    monkeypatch.setattr(stages, "EMBEDDED_MAPS", ((24, 8), (48, 4)))
    monkeypatch.setattr(stages, "LARGE_IMAGES", 3)
    monkeypatch.setattr(stages, "in_own_process", lambda function, *arguments: function(*arguments))
    return stages


@pytest.mark.parametrize("shapes", [((24, 8), (48, 4)), ((512, 6), (1024, 3)), ((40, 7),)])
def test_the_published_embedding_is_the_toolkits(shapes: tuple[tuple[int, int], ...], load: Any) -> None:
    reference = load("reference")
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, channels, side, side, generator=generator) for channels, side in shapes]
    ours = PooledEmbedding([channels for channels, _ in shapes], (3,), 1024, 1024)(maps)
    theirs = np.asarray(reference.as_arrays(reference.embed(maps)))
    assert theirs.shape == (2 * shapes[0][1] ** 2, 1024)
    np.testing.assert_allclose(theirs, ours.flatten(0, 2).numpy(), rtol=0, atol=1e-5)


def test_the_published_coreset_is_the_toolkits_and_that_of_float64(load: Any) -> None:
    reference, oracles = load("reference"), load("oracles")
    points = torch.randn(600, 16, generator=torch.Generator().manual_seed(3))
    sampler = ApproximateGreedyCoresetSampler(0.25)
    ours = sampler.select_reduced(Points(points), torch.Generator().manual_seed(4)).numpy()
    starts = reference.start_rows(len(points), torch.Generator().manual_seed(4))
    np.testing.assert_array_equal(ours, reference.greedy_coreset(points, starts, 150))
    np.testing.assert_array_equal(ours, oracles.greedy_in_float64(points, starts, 150))
    assert oracles.overlap(ours[:75], ours) == 0.5


def test_a_coreset_by_hand(load: Any) -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0]])
    starts = torch.tensor([0])
    # From 0, the point at 10 is farthest; then the one at 4, at 4 from 0 and 6 from 10; then the one at 1.
    assert load("reference").greedy_coreset(points, starts, 3).tolist() == [2, 3, 1]
    assert load("oracles").greedy_in_float64(points, starts, 3).tolist() == [2, 3, 1]


def test_both_sides_read_the_same_images_and_masks(tiny: Any) -> None:
    theirs, ours = tiny.reference_images(DatasetSplit.TEST), tiny.dataset(DatasetSplit.TEST)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for i in range(len(ours)):
        image, mask = theirs[i]
        torch.testing.assert_close(255 * (image * std + mean), ours[i]["image"].float(), rtol=0, atol=1e-3)
        np.testing.assert_array_equal(mask.numpy(), ours[i]["mask"].numpy())
    assert any(theirs[i][1].any() for i in range(len(ours)))


def test_scores_maps_and_metrics_of_the_published_loop_are_the_toolkits(tiny: Any, load: Any) -> None:
    published = load("runs").reference_detector(tiny)
    draws = tiny.generator("coreset"), tiny.generator("selection")
    published.fit(tiny.reference_images(DatasetSplit.TRAIN), tiny.settings.percentage, *draws)
    found = published.predict(tiny.reference_images(DatasetSplit.TEST))
    np.testing.assert_allclose(found.scores, tiny.prediction.scores, rtol=1e-4)
    np.testing.assert_allclose(found.maps, tiny.maps, rtol=1e-3, atol=1e-4 * tiny.maps.max())
    theirs = load("reference").all_metrics(found.scores, tiny.labels, found.maps, found.masks)
    ours = class_metrics(tiny.prediction.scores, tiny.labels, tiny.maps, tiny.masks, None)
    for name in ("instance_auroc", "full_pixel_auroc", "full_pro"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-3)
    assert published.stages.seconds.keys() == {"decode", "backbone", "embedding", "search", "maps"}


def test_metrics_of_scikit_learn_are_the_toolkits(load: Any) -> None:
    """With ties, regions of several sizes, one that touches another at a corner, and a good image."""
    generator = np.random.default_rng(5)
    masks = np.zeros((3, 16, 16), dtype=np.uint8)
    masks[0, 2:5, 2:5] = masks[0, 5, 5] = masks[0, 10:12, 1:9] = masks[1, 3, 7] = 1
    maps = np.round(generator.random(masks.shape) + 0.4 * masks, 2).astype(np.float32)
    scores, labels = np.array([0.3, 0.9, 0.3]), np.array([True, True, False])
    theirs = load("reference").all_metrics(scores, labels, maps, masks)
    ours = class_metrics(scores, labels, maps, masks, None)
    assert len(theirs) == 9
    for name, value in theirs.items():
        assert value == pytest.approx(ours[name], abs=1e-9), name


FAST_GROUPS = ("calibration", "coreset", "embedding", "fit", "metrics", "pictures", "search")
SLOW_GROUPS = ("coreset_large", "predict", "start")


@pytest.mark.parametrize("group", [*FAST_GROUPS, *(pytest.param(g, marks=pytest.mark.slow) for g in SLOW_GROUPS)])
def test_rows_of_a_group_hold_their_conditions(group: str, tiny: Any, load: Any, small_sizes: ModuleType) -> None:
    run = load("run")
    rows = run.GROUPS[group](tiny)
    assert {row.name for row in rows} <= set(run.ORDER)
    for row in rows:
        assert row.ours > 0 and row.reference > 0 and math.isfinite(row.ratio)
        assert row.holds or "memory" in row.condition, row  # that of a thumbnail is less than what is read of it


def test_every_group_is_tested(load: Any) -> None:
    assert set(load("run").GROUPS) == {*FAST_GROUPS, *SLOW_GROUPS}


def a_row(load: Any, name: str = "coreset", **changes: Any) -> Any:
    """Return a row that meets its goal."""
    row = {"stage": "a stage", "unit": "s", "ours": 0.5, "reference": 6.0, "compared_with": "the loop", "ratio": 12.0}
    return load("results").Row(name, **{**row, "at_least": 10.0, "condition": "equal", "measured": "0", **changes})


def test_a_partial_run_replaces_its_rows_alone(load: Any, tmp_path: Path) -> None:
    results = load("results")
    path = tmp_path / "results.json"
    first = results.environment("set/one", 1)
    second = {**first, "data": "set/two"}
    results.update_results([a_row(load), a_row(load, "fit")], first, path)
    rows = results.update_results([a_row(load, "fit", ours=2.0, ratio=3.0)], second, path)
    assert rows == results.read_results(path)
    assert rows["coreset"]["on"]["data"] == "set/one" and rows["coreset"]["meets_goal"] is True
    assert rows["fit"]["on"]["data"] == "set/two" and rows["fit"]["meets_goal"] is False
    table = results.markdown_table(rows, ("fit", "coreset"))
    assert table.splitlines()[2].startswith("| a stage [1] | 2 s | 6 s (the loop) | 3x, **missed** | >= 10x |")
    assert "[1] Measured on" in table and "set/two;" in table and "[2] Measured on" in table


def test_what_is_no_number_or_no_result_is_refused(load: Any, tmp_path: Path) -> None:
    results = load("results")
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="'coreset' has no finite ratio"):
        results.update_results([a_row(load, ratio=math.inf)], results.environment("set", 1), path)
    assert not path.exists()
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="not the results of an earlier benchmark"):
        results.read_results(path)


def test_a_name_with_the_marks_of_a_table_leaves_the_table_whole(load: Any, tmp_path: Path) -> None:
    results = load("results")
    rows = results.update_results(
        [a_row(load, measured="a | b\nc", holds=False)], results.environment("x|y", 1), tmp_path / "r.json"
    )
    lines = results.markdown_table(rows, ("coreset",)).splitlines()
    assert lines[2].endswith("| a \\| b c, **does not hold** |")
    assert lines[3] == ""


def test_the_table_of_the_readme_stands_between_its_markers(load: Any, tmp_path: Path) -> None:
    results = load("results")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table begins -->\nold\n<!-- table ends -->\nafter\n", encoding="utf-8")
    results.write_between_markers("new", "table", page)
    results.write_between_markers("newer", "table", page)
    assert page.read_text(encoding="utf-8") == (
        "before\n<!-- table begins -->\n\nnewer\n\n<!-- table ends -->\nafter\n"
    )
    with pytest.raises(ConfigurationError, match="expected the lines '<!-- shares begins -->'"):
        results.write_between_markers("new", "shares", page)
    own = results.README.read_text(encoding="utf-8")
    assert all(own.count(f"<!-- {name} {end} -->") == 1 for name in ("table", "shares") for end in ("begins", "ends"))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--rows", "coreset,speed"], "--rows 'speed' is unknown, expected some of coreset,"),
        (["--threads", "1000"], "--threads is 1000, this machine has"),
        (["--rounds", "0"], "--rounds is 0, expected 1 or more"),
        (["--data", "nowhere"], "found no metal_plate/train/good in 'nowhere'"),
        (["--category", "bottle"], "--category 'bottle' is none of the demo set (metal_plate,"),
    ],
)
def test_wrong_arguments_are_one_line(
    typed: list[str], said: str, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = [] if "--threads" in typed else ["--threads", "1"]
    assert load("run").main([*typed, *threads, "--results", str(tmp_path / "r.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_measurement_is_kept_shown_and_put_into_the_readme(
    tiny: Any, load: Any, small_sizes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "README.md", tmp_path / "r.json"
    page.write_text("<!-- table begins -->\n<!-- table ends -->\n", encoding="utf-8")
    options = ["--data", tiny.settings.data, "--category", "plate", "--threads", 1, "--rounds", 1]
    chosen = ["--rows", "embedding", "--results", results, "--readme", page]
    assert load("run").main([str(part) for part in [*options, *chosen]]) == 0
    assert set(load("results").read_results(results)) == {"embedding"}
    table = capsys.readouterr().out.strip()
    assert "| embedding, 512x28x28" in table and "data/plate;" in table
    assert table in page.read_text(encoding="utf-8")


def test_shares_of_every_stage(tiny: Any, load: Any) -> None:
    shares = load("stage_shares")
    sides = shares.reference_shares(tiny), shares.toolkit_shares(tiny)
    for side in sides:
        assert set(side["fit"]) | set(side["test"]) == set(shares.STAGES)
        assert all(seconds > 0 for part in side.values() for seconds in part.values())
    cells = [line.split(" | ") for line in shares.markdown_shares(*sides).splitlines()[2:-1]]
    for column in range(1, 5):
        percent = [int(found[1]) for row in cells if (found := re.search(r"(\d+)%", row[column]))]
        assert abs(sum(percent) - 100) <= len(percent) / 2


PEER = """#!{python}
import json, sys, zipfile
typed = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert typed["--backbone"] == "tf_efficientnet_lite0" and typed["--imagesize"] == "64", typed
assert sys.argv[sys.argv.index("--layers") + 1:] == ["blocks.1", "blocks.2"]
assert zipfile.is_zipfile(typed["--weights"])
metrics = {{"image_AUROC": 1.0, "pixel_AUROC": 0.9, "pixel_AUPRO": 0.8}}
found = {{"fit_seconds": 500.0, "test_seconds": 50.0, "bank": 12, "metrics": metrics, "version": "0"}}
open(typed["--out"], "w").write(json.dumps(found))
"""


def test_rows_beside_another_library(tiny: Any, load: Any, tmp_path: Path) -> None:
    """With a program in the place of the interpreter that has anomalib."""
    peers = load("peers")
    with pytest.raises(ConfigurationError, match="not found: make bench-peers makes it"):
        peers.measure_anomalib(tmp_path / "python", tiny)
    program = tmp_path / "program"
    program.write_text(PEER.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    theirs = peers.measure_anomalib(program, tiny)
    ours = peers.measure_toolkit(tiny, 1)
    fit, test = peers.peer_rows(ours, theirs, len(tiny.labels))
    assert fit.ratio == pytest.approx(500 / ours["fit_seconds"]) and fit.ratio > 1
    assert test.ratio == pytest.approx(50 / ours["test_seconds"]) == test.ours / test.reference
    assert "full_pro" in test.measured and "and 0.8000" in test.measured
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no such class')", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="exit code 1: no such class"):
        peers.measure_anomalib(program, tiny)


def test_make_hands_data_and_category_on() -> None:
    """In words of the shell, of which one may have blanks; nothing is run."""
    for target, script in {"bench": "run", "bench-full": "fastflow", "bench-peers": "peers"}.items():
        shown = subprocess.run(
            ["make", "--dry-run", "--assume-old=.venv/.installed", target, "DATA=/a b/mpdd", "CATEGORY=rod"],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
        ).stdout
        assert f"benchmarks/{script}.py" in shown
        if target != "bench-full":
            assert '--data "/a b/mpdd" --category "rod"' in shown
    assert (BENCHMARKS / "requirements-peers.txt").read_text(encoding="utf-8").splitlines()[1] == "anomalib==2.7.0"


@pytest.mark.slow
def test_the_table_of_exported_files(tiny: Any, load: Any) -> None:
    toolkit, exact, int8 = (
        [cell.strip() for cell in line.split("|")] for line in load("export").export_table(tiny).splitlines()[4:]
    )
    assert [toolkit[1], exact[1], int8[1]] == ["toolkit", "float32", "int8"]
    assert float(exact[5]) < 1e-5
    assert exact[6] == toolkit[6]
    assert float(int8[2]) < float(exact[2])
    own_size, odd_size = load("export").resize_table(tiny).splitlines()[2:]
    assert own_size.startswith("| their own size") and odd_size.startswith("| 700 x 500 px")
    assert all(0 <= float(line.split("|")[3]) < 0.1 for line in (own_size, odd_size))


def test_the_table_of_indexes_has_a_line_for_each(tiny: Any, load: Any) -> None:
    lines = load("search").index_table(tiny).splitlines()[4:]
    assert [line.split("`")[1] for line in lines] == list(INDEXES)
    cells = {line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")] for line in lines}
    assert {len(row) for row in cells.values()} == {8}
    assert cells["flat"][1] == "1.0000"
    assert float(cells["sq8"][4]) <= float(cells["fp16"][4]) <= float(cells["flat"][4])
    assert "needs 19968" in cells["ivfpq"][1]
