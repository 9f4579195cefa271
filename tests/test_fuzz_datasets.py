"""Generated data sets: a run gives the results of their images, or says in one line what is wrong with which file."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_METHOD
from fuzzing import (
    Cases,
    damaged,
    file_names,
    generated,
    nothing_outside,
    require_clear,
    require_no_formula,
    require_refused,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from in_process import Finished
from PIL import Image
from sklearn.metrics import roc_auc_score

from patchcore.cli import explore_dataset, run_patchcore
from patchcore.storage.files import read_csv

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = Cases(at_least=190)

SIDE = 40
OUTPUTS = ("--save_patchcore_model", "--save_segmentation_images", "--save_anomaly_scores")
READING = ("--resize", "32", "--imagesize", "32")


def picture(seed: int, defect: bool = False) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    if defect:
        pixels[10:22, 14:26] = (250, 240, 20)
    return Image.fromarray(pixels)


def mask(defect: bool = True) -> Image.Image:
    values = np.zeros((SIDE, SIDE), np.uint8)
    if defect:
        values[10:22, 14:26] = 255
    return Image.fromarray(values)


def write_class(root: Path, category: str = "plate", defect_type: str = "spot", stem: str = "000") -> Path:
    """Write two training images and, for the test, two good and two defective ones with masks."""
    folder = root / category
    parts = ("train/good", "test/good", f"test/{defect_type}", f"ground_truth/{defect_type}")
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate((stem, "001")):
        picture(i).save(folder / parts[0] / f"{name}.png")
        picture(10 + i).save(folder / parts[1] / f"{name}.png")
        picture(20 + i, True).save(folder / parts[2] / f"{name}.png")
        mask().save(folder / parts[3] / f"{name}.png")
    return folder


def steps(root: Path, *reading: str) -> list[str]:
    """Return the steps of a run whose scores do not depend on names, as those of a coreset do, which they seed."""
    method = [*SMALL_METHOD, "--anomaly_scorer_num_nn", "1", "sampler", "identity"]
    return [*method, "dataset", *READING, "--num_workers", "0", *reading, "mpdd", str(root)]


def train(root: Path, out: Path, *arguments: str, reading: tuple[str, ...] = ()) -> Finished:
    with nothing_outside(root.parent, out):
        return run(run_patchcore, out, "--device", "cpu", "--threads", 1, *arguments, *steps(root, *reading))


def table(out: Path, name: str = "results.csv") -> list[dict[str, str]]:
    return read_csv(out / "project" / "group" / name)


def scores_of(out: Path, category: str = "plate") -> list[dict[str, str]]:
    return table(out, f"anomaly_scores/mpdd_{category}.csv")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for cases of hypothesis, which clear it before they begin."""
    return tmp_path_factory.mktemp("data sets")


def cleared(place: Path) -> tuple[Path, Path]:
    """Return where a case may put its data and its results."""
    shutil.rmtree(place)
    (place / "data").mkdir(parents=True)
    return place / "data", place / "out"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the class as `write_class` writes it."""
    root = tmp_path_factory.mktemp("clean")
    write_class(root / "data")
    assert train(root / "data", root / "out", *OUTPUTS).code == 0
    return root / "out"


# ---------------------------------------------------------------- names


@given(file_names(), file_names(), file_names(), st.booleans())
@generated(35)
def test_names(place: Path, clean: Path, category: str, defect_type: str, stem: str, explore: bool) -> None:
    """Whatever classes, defect types and images are called, the numbers are those of plain names."""
    root, out = cleared(place)
    if defect_type.lower() == "good":
        return
    write_class(root, category, defect_type, stem)
    with CASES():
        done = train(root, out, *OUTPUTS)
        require_clear(done)
        if done.code == 0:
            require_results(out, clean, root, category, defect_type, stem)
        if explore:
            require_clear(run(explore_dataset, "mpdd", root, "--out", out / "explored"))


def require_results(out: Path, clean: Path, root: Path, category: str, defect_type: str, stem: str) -> None:
    """Fail unless a run of hostile names left what the run of plain names left, under their names."""
    for path in (out / "project" / "group").rglob("*.csv"):
        require_no_formula(path)
    (row, mean), (expected, _) = table(out), table(clean)
    assert row["Row Names"] == f"mpdd_{category}" and mean["Row Names"] == "Mean"
    assert row["instance_auroc"] == expected["instance_auroc"] == "1.000000"
    assert float(row["full_pro"]) == pytest.approx(float(expected["full_pro"]), abs=1e-4)
    rows = scores_of(out, category)
    on_disk = {str(p.relative_to(root)) for p in (root / category / "test").rglob("*.png")}
    assert {r["path"] for r in rows} == on_disk and {r["defect_type"] for r in rows} == {"good", defect_type}
    found, expected_scores = (sorted(float(r["score"]) for r in table) for table in (rows, scores_of(clean)))
    np.testing.assert_allclose(found, expected_scores, rtol=1e-4)
    config = json.loads((out / "project" / "group" / "config.json").read_text(encoding="utf-8"))
    assert config["config"]["dataset"]["categories"] == [category]
    pictures = (out / "project" / "group" / "segmentation_images" / f"mpdd_{category}").iterdir()
    assert len(list(pictures)) == len(rows)


BAD_CLASSES = (
    "..", ".", "", " ", "/", "plate/", "plate/..", "../data/plate", "/etc", "~", "pl\nate", "plate\0", "<b>plate</b>",
    "x" * 300, "é" * 200, "\udcff", "*", "${HOME}", "$(touch pwned)", "=1+1", "-d", "%s%n", "{category}", "plate\n",
)  # fmt: skip


@pytest.mark.parametrize("category", BAD_CLASSES)
def test_classes_that_are_no_names_of_a_folder(tmp_path: Path, category: str) -> None:
    root = tmp_path / "data"
    write_class(root)
    with CASES(), nothing_outside(tmp_path):
        require_refused(train(root, tmp_path / "out", "-d", category))
        require_refused(run(explore_dataset, "mpdd", root, "--out", tmp_path / "explored", "-d", category))


@pytest.mark.parametrize("option", ["--log_group", "--log_project"])
@pytest.mark.parametrize("name", ["..", ".", "", " ", "a/b", "/a", "a\\b", "a\0", "x" * 300, "é" * 101])
def test_names_of_runs_that_are_no_names_of_a_folder(tmp_path: Path, option: str, name: str) -> None:
    write_class(tmp_path / "data")
    with CASES(), nothing_outside(tmp_path):
        require_refused(train(tmp_path / "data", tmp_path / "out", option, name))


# ---------------------------------------------------------------- masks and modes


MASKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "value 1": lambda m: m.point(lambda v: v // 255),
    "value 254": lambda m: m.point(lambda v: v // 255 * 254),
    "values 1 and 254": lambda m: Image.fromarray(np.asarray(m) // 255 * np.resize(np.uint8([1, 254]), m.size)),
    "three channels": lambda m: m.convert("RGB"),
    "red alone": lambda m: Image.merge("RGB", (m, Image.new("L", m.size), Image.new("L", m.size))),
    "four channels": lambda m: m.convert("RGBA"),
    "transparent": lambda m: Image.merge("LA", (Image.new("L", m.size, 255), m)),
    "one bit": lambda m: m.convert("1"),
    "palette": lambda m: m.convert("RGB").quantize(2),
    "16 bits": lambda m: Image.fromarray(np.asarray(m).astype(np.uint16)),
    "32 bits": lambda m: Image.fromarray(np.asarray(m).astype(np.int32)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_any_kind_give_the_metrics_of_the_clean_ones(tmp_path: Path, clean: Path, kind: str) -> None:
    folder = write_class(tmp_path / "data")
    for path in (folder / "ground_truth" / "spot").iterdir():
        MASKS[kind](mask()).save(path, "TIFF" if kind == "32 bits" else "PNG")
    with CASES():
        assert train(tmp_path / "data", tmp_path / "out", *OUTPUTS).code == 0
        assert table(tmp_path / "out") == table(clean) and scores_of(tmp_path / "out") == scores_of(clean)


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "alpha": lambda i: (i.putalpha(mask()), i)[1],
    "frames": lambda i: i,
    "palette": lambda i: i.quantize(256),
    "tiff in a png": lambda i: i,
    "lossless webp": lambda i: i,
}


@pytest.mark.parametrize("kind", MODES)
def test_images_of_any_mode_give_the_scores_of_the_clean_ones(tmp_path: Path, kind: str) -> None:
    """The clean ones have few colours, so that a palette holds them."""
    scores = []
    for name in ("clean", "other"):
        folder = write_class(tmp_path / name / "data")
        for path in [*folder.glob("train/*/*.png"), *folder.glob("test/*/*.png")]:
            image = Image.fromarray(np.asarray(Image.open(path).convert("RGB")) // 64 * 64)
            if name == "other":
                image = MODES[kind](image)
            form = {"tiff in a png": "TIFF", "lossless webp": "WEBP"}.get(kind, "PNG") if name == "other" else "PNG"
            options = {"lossless": True} if form == "WEBP" else {}
            if name == "other" and kind == "frames":
                options = {"save_all": True, "append_images": [picture(99)]}
            image.save(path, form, **options)
        assert train(tmp_path / name / "data", tmp_path / name / "out", *OUTPUTS).code == 0
        scores.append(scores_of(tmp_path / name / "out"))
    with CASES():
        assert scores[0] == scores[1]


@given(st.lists(st.sampled_from(["empty", "full", "dot", "defect", "other place"]), min_size=2, max_size=2))
@generated(20)
def test_metrics_are_those_of_the_masks_that_are_there(place: Path, kinds: list[str]) -> None:
    """Swapped, empty and inverted masks are taken as they are; the oracle reads maps and masks that the run stored."""
    root, out = cleared(place)
    folder = write_class(root)
    for kind, path in zip(kinds, sorted((folder / "ground_truth" / "spot").iterdir()), strict=True):
        values = np.zeros((SIDE, SIDE), np.uint8)
        place_of = {
            "empty": slice(0, 0), "full": slice(0, SIDE), "dot": slice(20, 22), "defect": slice(12, 22),
            "other place": slice(25, 35),
        }[kind]  # fmt: skip
        values[place_of, place_of] = 255
        Image.fromarray(values).save(path)
    with CASES():
        done = train(root, out, *OUTPUTS)
        assert done.code == 0, done.err
        with np.load(out / "project" / "group" / "anomaly_scores" / "mpdd_plate.npz") as stored:
            maps, masks = stored["maps"], stored["masks"]
        row = table(out)[0]
        if masks.min() == masks.max():
            assert row["full_pixel_auroc"] == ""
        else:
            assert float(row["full_pixel_auroc"]) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=2e-6)
        assert (sum(int(r["defect_px"]) for r in scores_of(out))) == int((masks == 1).sum())


def test_masks_of_other_images_are_named(tmp_path: Path) -> None:
    """Two masks that were swapped between images of different sizes."""
    folder = write_class(tmp_path / "data")
    picture(5, True).resize((SIDE, 60)).save(folder / "test/spot/000.png")
    with CASES():
        done = train(tmp_path / "data", tmp_path / "out")
        require_clear(done, [1])
        assert "mask of 40 x 40 px for an image of 40 x 60 px" in done.err
    shutil.rmtree(tmp_path / "out")
    (folder / "ground_truth" / "spot").rename(folder / "masks")
    (folder / "test" / "spot").rename(folder / "ground_truth" / "spot")
    (folder / "masks").rename(folder / "test" / "spot")  # images and masks exchanged: black images, full masks
    with CASES():
        require_clear(train(tmp_path / "data", tmp_path / "out"), [0, 1])


# ---------------------------------------------------------------- files that are none


PLACES = ("train/good", "test/good", "test/spot", "ground_truth/spot")
KINDS = ("folder", "pipe", "dangling link", "link to itself", "empty", "text", "link to a folder", "device")


def plant(folder: Path, kind: str) -> Path:
    path = folder / "000.png"
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to(folder / "gone")
        case "link to itself":
            path.symlink_to(path)
        case "empty":
            path.touch()
        case "text":
            path.write_text("no image")
        case "link to a folder":
            path.symlink_to(folder, target_is_directory=True)
        case "device":
            path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PLACES)
def test_what_is_no_image_costs_its_class_at_most(tmp_path: Path, kind: str, part: str) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    path = plant(write_class(root) / part, kind)
    write_class(root, "whole")
    with CASES():
        done = train(root, out)
        require_clear(done, [0, 1])
        rows = {row["Row Names"]: row for row in table(out)}
        assert rows["mpdd_whole"]["instance_auroc"] and set(rows) == {"mpdd_plate", "mpdd_whole", "Mean"}
        if done.code == 1:
            assert rows["mpdd_plate"]["instance_auroc"] == "" and "plate" in done.err
            assert path.name in done.err or "no mask" in done.err
        require_clear(run(explore_dataset, "mpdd", root, "--out", tmp_path / "explored"), [0, 1])


@given(st.sampled_from(PLACES), st.integers(0, 2**32))
@generated(30)
def test_a_damaged_file_costs_its_class_at_most(place: Path, part: str, seed: int) -> None:
    root, out = cleared(place)
    path = write_class(root) / part / "000.png"
    path.write_bytes(damaged(path.read_bytes(), seed))
    write_class(root, "whole")
    with CASES():
        done = train(root, out, *OUTPUTS)
        require_clear(done, [0, 1])
        whole = next(row for row in table(out) if row["Row Names"] == "mpdd_whole")
        assert whole["instance_auroc"]
        if done.code:
            (failure,) = table(out, "failures.csv")
            assert failure["Row Names"] == "mpdd_plate" and str(path) in failure["reason"]
        assert (out / "project" / "group" / "models" / "mpdd_whole" / "model.json").exists()


def test_a_thousand_empty_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder = write_class(root)
    for i in range(1000):
        (folder / "train" / "good" / f"{i:04d}.txt").touch()
    with CASES():
        assert train(root, tmp_path / "out").code == 0
    for i in range(1000):
        (folder / "train" / "good" / f"e{i:04d}.png").touch()
    with CASES():
        done = train(root, tmp_path / "out2")
        require_clear(done, [1])
        assert "the file is empty" in done.err and len(done.error_lines) == 1
    with CASES():
        done = run(explore_dataset, "mpdd", root, "--out", tmp_path / "explored")
        require_clear(done, [1])


def test_links_in_a_circle(tmp_path: Path, clean: Path) -> None:
    root = tmp_path / "data"
    folder = write_class(root)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (folder / "test" / "loop").symlink_to(folder / "test", target_is_directory=True)
    (folder / "train" / "good" / "loop").symlink_to(folder / "train" / "good", target_is_directory=True)
    (root / "self").symlink_to(root / "self")
    with CASES():
        done = train(root, tmp_path / "out", *OUTPUTS)
        assert done.code == 0, done.err
        assert table(tmp_path / "out") == table(clean)
    with CASES():
        require_clear(run(explore_dataset, "mpdd", root, "--out", tmp_path / "explored"), [0, 1])


def test_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in, since the user root may read everything."""
    root = tmp_path / "data"
    secret = write_class(root) / "test" / "good" / "000.png"
    write_class(root, "whole")
    opened = Path.open

    def refuse(path: Path, *arguments: object, **options: object) -> object:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with CASES():
        done = train(root, tmp_path / "out")
        require_clear(done, [1])
        assert f"{secret}: not a readable image (Permission denied)" in done.err


# ---------------------------------------------------------------- images that say nothing


SIZES = [(1, 1), (20_000, 50), (50, 20_000), (1, 400), (2, 2), (33, 32)]


@pytest.mark.parametrize("mode", ["shorter", "square", "letterbox"])
@pytest.mark.parametrize("size", SIZES)
def test_images_of_extreme_sizes(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    folder = write_class(root)
    for path in folder.rglob("*.png"):
        if path.name == "000.png":
            Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
    with CASES():
        done = train(root, out, *OUTPUTS, reading=("--resize_mode", mode))
        assert done.code == 0, done.err
        require_finite(out)


def require_finite(out: Path) -> None:
    """Fail if a table of a run holds a number that is none."""
    for path in (out / "project" / "group").rglob("*.csv"):
        require_no_formula(path)
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            cells = [cell.lower() for row in csv.reader(file) for cell in row]
        assert not {"nan", "inf", "-inf", "none"} & set(cells), path


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("parts", [("train",), ("test",), ("train", "test")])
def test_images_of_one_colour(tmp_path: Path, value: int, parts: tuple[str, ...]) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    folder = write_class(root)
    for part in parts:
        for path in (folder / part).rglob("*.png"):
            Image.new("RGB", (SIDE, SIDE), (value,) * 3).save(path)
    with CASES():
        done = train(root, out, *OUTPUTS)
        require_clear(done, [0, 1])
        require_finite(out)
        if parts == ("train", "test") and done.code == 0:
            assert float(table(out)[0]["instance_auroc"]) == 0.5  # all scores are equal


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)
