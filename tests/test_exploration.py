"""Exploration of a data set: its facts by hand, and its verdict against what a run does with the same files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGE_PX, write_category, write_mask, write_texture
from PIL import Image

from patchcore.configs import RESIZE_MODES, DatasetConfig, PreprocessingConfig
from patchcore.datasets.exploration import ClassFacts, CropLoss, crop_window, duplicates, explore_class
from patchcore.datasets.exploration_summary import MAX_FILES, _quartiles, class_summary, problem_summary
from patchcore.datasets.images import crop_labels, place
from patchcore.datasets.inspection import DatasetSplit, InspectionDataset, resolve_categories
from patchcore.datasets.problems import ERROR, WARNING, Problem, find_problems
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.metrics import label_regions
from patchcore.evaluation.plots.exploration import (
    CROP_LINE,
    GROUPS,
    MAX_ROWS,
    ClassDistribution,
    Tile,
    contact_sheet,
    distributions_picture,
)
from patchcore.evaluation.plots.pictures import CONTOUR
from patchcore.exploration import explore_dataset, markdown, percent, printable, problem_text

SIZES = PreprocessingConfig(64, 64)
TOO_FEW = {"too few for k-NN", "few good test images"}  # of every set made here


def explore(root: Path, category: str = "plate", sizes: PreprocessingConfig = SIZES) -> ClassFacts:
    return explore_class(root, category, sizes, label_regions)


def problems_of(root: Path, category: str = "plate", sizes: PreprocessingConfig = SIZES) -> list[Problem]:
    return find_problems(explore(root, category, sizes), sizes)


def run_error(root: Path, category: str, sizes: PreprocessingConfig = SIZES) -> str | None:
    """Return the message at which a run stops that reads a class as `train_and_evaluate` does."""
    try:
        resolve_categories(DatasetConfig("folder", str(root), (category,)), ())
        splits = [InspectionDataset(root, category, s, sizes) for s in (DatasetSplit.TRAIN, DatasetSplit.TEST)]
        for dataset in splits:
            dataset.check_files()
        for dataset in splits:
            for index in range(len(dataset)):
                assert dataset[index]["image"] is not None
    except (ConfigurationError, DataError) as error:
        return str(error)
    return None


def save(path: Path, values: np.ndarray, **extra: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **extra)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# What is done to the folder of a class, the kind of the problem that it makes, and its severity.


def empty_file(plate: Path) -> None:
    (plate / "train/good/001.png").write_bytes(b"")


def truncated_image(plate: Path) -> None:
    path = plate / "test/spot/001.png"
    path.write_bytes(path.read_bytes()[:2000])


def broken_link(plate: Path) -> None:
    (plate / "test/good/link.png").symlink_to(plate / "gone.png")


def link_to_itself(plate: Path) -> None:
    (plate / "train/good/loop.png").symlink_to("loop.png")


def text_as_image(plate: Path) -> None:
    (plate / "train/good/notes.png").write_text("no picture")


def float_out_of_range(plate: Path) -> None:
    save(plate / "train/good/float.tif", np.full((64, 64), 300.0, dtype=np.float32))


def endless_line(plate: Path) -> None:
    save(plate / "train/good/line.png", np.zeros((1, 60_000, 3), dtype=np.uint8))


def missing_mask(plate: Path) -> None:
    (plate / "ground_truth/spot/001_mask.png").unlink()


def mask_without_image(plate: Path) -> None:
    (plate / "test/spot/001.png").unlink()


def masks_of_a_type_without_images(plate: Path) -> None:
    write_mask(plate / "ground_truth/dent/000_mask.png")


def two_masks(plate: Path) -> None:
    write_mask(plate / "ground_truth/spot/001.png")


def same_name(plate: Path) -> None:
    shutil.copy(plate / "train/good/001.png", plate / "train/good/001.bmp")


def small_mask(plate: Path) -> None:
    save(plate / "ground_truth/spot/001_mask.png", np.full((8, 8), 255, dtype=np.uint8))


def unreadable_mask(plate: Path) -> None:
    (plate / "ground_truth/spot/001_mask.png").write_bytes(b"")


def truncated_mask(plate: Path) -> None:
    path = plate / "ground_truth/spot/001_mask.png"
    path.write_bytes(path.read_bytes()[:60])


def no_training_images(plate: Path) -> None:
    shutil.rmtree(plate / "train")


def no_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test")


def good_in_capitals(plate: Path) -> None:
    (plate / "test/good").rename(plate / "test/Good")


ERRORS: dict[Callable[[Path], None], str] = {
    empty_file: "unusable image",
    truncated_image: "unusable image",
    broken_link: "unusable image",
    link_to_itself: "unusable image",
    text_as_image: "unusable image",
    float_out_of_range: "unusable image",
    endless_line: "unusable image",
    missing_mask: "missing mask",
    mask_without_image: "mask without image",
    masks_of_a_type_without_images: "mask without image",
    two_masks: "two masks",
    same_name: "same name",
    small_mask: "unusable mask",
    unreadable_mask: "unusable mask",
    truncated_mask: "unusable mask",
    no_training_images: "incomplete class",
    no_test_images: "incomplete class",
    good_in_capitals: "incomplete class",
}


@pytest.mark.parametrize("break_class", ERRORS, ids=lambda f: f.__name__)
def test_an_error_is_what_a_run_stops_at_in_its_words(break_class: Callable[[Path], None], small_dataset: Path) -> None:
    assert run_error(small_dataset, "plate") is None
    break_class(small_dataset / "plate")
    stopped_at = run_error(small_dataset, "plate")
    errors = [p for p in problems_of(small_dataset) if p.severity == ERROR]
    assert stopped_at is not None
    assert ERRORS[break_class] in {p.kind for p in errors}
    assert stopped_at in {p.found for p in errors}
    assert [p for p in problems_of(small_dataset, "rod") if p.severity == ERROR] == [], "the other class is sound"


def empty_mask(plate: Path) -> None:
    save(plate / "ground_truth/spot/001_mask.png", np.zeros((IMAGE_PX, IMAGE_PX), dtype=np.uint8))


def soft_mask(plate: Path) -> None:
    path = plate / "ground_truth/spot/001_mask.png"
    values = pixels(path).copy()
    values[20, 24:40] = 100
    save(path, values)


def inverted_mask(plate: Path) -> None:
    path = plate / "ground_truth/spot/001_mask.png"
    save(path, 255 - pixels(path))


def mask_of_a_good_image(plate: Path) -> None:
    write_mask(plate / "ground_truth/good/001_mask.png")


def no_truth(plate: Path) -> None:
    shutil.rmtree(plate / "ground_truth")


def training_image_in_test(plate: Path) -> None:
    Image.open(plate / "train/good/001.png").save(plate / "test/good/copy.bmp")


def defect_in_training(plate: Path) -> None:
    shutil.copy(plate / "test/spot/001.png", plate / "train/good/copy.png")


def repeated_test_image(plate: Path) -> None:
    shutil.copy(plate / "test/good/001.png", plate / "test/good/copy.png")


def one_image_with_two_labels(plate: Path) -> None:
    shutil.copy(plate / "test/spot/001.png", plate / "test/good/copy.png")


def repeated_training_image(plate: Path) -> None:
    shutil.copy(plate / "train/good/001.png", plate / "train/good/copy.png")


def another_size(plate: Path) -> None:
    save(plate / "train/good/large.png", np.arange(80 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(80, 80, 3))


def tiny_image(plate: Path) -> None:
    save(plate / "train/good/tiny.png", np.arange(20 * 20 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 20, 3))


def long_image(plate: Path) -> None:
    save(plate / "train/good/long.png", np.arange(64 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 200, 3))


def gray_image(plate: Path) -> None:
    Image.open(plate / "train/good/001.png").convert("L").save(plate / "train/good/001.png")


def dark_image(plate: Path) -> None:
    save(plate / "test/good/001.png", pixels(plate / "test/good/001.png") // 16)


def flat_image(plate: Path) -> None:
    save(plate / "train/good/flat.png", np.full((64, 64, 3), 120, dtype=np.uint8))


def transparent_image(plate: Path) -> None:
    image = Image.open(plate / "train/good/001.png").convert("RGBA")
    image.putpixel((3, 3), (9, 9, 9, 0))
    image.save(plate / "train/good/001.png")


def other_light(plate: Path) -> None:
    for path in (plate / "test/good").iterdir():
        save(path, np.clip(pixels(path) + np.array([60, 0, 0]), 0, 255).astype(np.uint8))


def no_good_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test/good")


def no_anomalous_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test/spot")
    shutil.rmtree(plate / "ground_truth")


def one_training_image(plate: Path) -> None:
    for path in sorted((plate / "train/good").iterdir())[1:]:
        path.unlink()


def folder_in_a_folder(plate: Path) -> None:
    (plate / "train/good/more").mkdir()


def other_suffix(plate: Path) -> None:
    (plate / "test/spot/003.heic").write_bytes(b"x")


def loose_image(plate: Path) -> None:
    shutil.copy(plate / "train/good/001.png", plate / "test/loose.png")


def training_on_other_types(plate: Path) -> None:
    shutil.copytree(plate / "train/good", plate / "train/bad")


WARNINGS: dict[Callable[[Path], None], str] = {
    empty_mask: "empty mask",
    soft_mask: "mask not binary",
    inverted_mask: "mask nearly full",
    mask_of_a_good_image: "mask of a good image",
    no_truth: "no masks",
    training_image_in_test: "test image in training",
    defect_in_training: "defect in training",
    repeated_test_image: "repeated test image",
    repeated_training_image: "repeated training image",
    another_size: "mixed sizes",
    tiny_image: "small images",
    long_image: "crop of long images",
    gray_image: "mixed modes",
    dark_image: "dark image",
    flat_image: "image of one colour",
    transparent_image: "transparent image",
    other_light: "shift between splits",
    no_good_test_images: "no good test images",
    no_anomalous_test_images: "no anomalous test images",
    one_training_image: "one training image",
    one_image_with_two_labels: "one image, two types",
    folder_in_a_folder: "not read",
    other_suffix: "not read",
    loose_image: "not read",
    training_on_other_types: "not read",
}


def test_a_sound_class_has_no_problems_but_its_few_images(small_dataset: Path) -> None:
    assert {p.kind for p in problems_of(small_dataset)} == TOO_FEW


@pytest.mark.parametrize("change", WARNINGS, ids=lambda f: f.__name__)
def test_a_warning_stops_no_run(change: Callable[[Path], None], small_dataset: Path) -> None:
    change(small_dataset / "plate")
    found = problems_of(small_dataset)
    assert run_error(small_dataset, "plate") is None
    assert {p.severity for p in found} == {WARNING}
    assert WARNINGS[change] in {p.kind for p in found}
    assert all(p.found and p.consequence and p.remedy for p in found)


def test_every_problem_of_a_class_is_found_not_only_the_first(small_dataset: Path) -> None:
    for change in (empty_file, truncated_image, missing_mask, repeated_test_image):
        change(small_dataset / "plate")
    found = problems_of(small_dataset)
    kinds = [p.kind for p in found]
    assert {"unusable image", "missing mask", "repeated test image"} <= set(kinds)
    (unusable,) = (p for p in found if p.kind == "unusable image")
    assert [p.name for p in unusable.files] == ["001.png", "001.png"]
    severities = [p.severity for p in found]
    assert severities == sorted(severities), "errors come first"


def test_k_nearest_neighbours_need_51_training_images(tmp_path: Path) -> None:
    for number, warned in ((50, True), (51, False)):
        write_category(tmp_path / str(number), "plate", num_train=number, num_test=1)
        kinds = {p.kind for p in problems_of(tmp_path / str(number))}
        assert ("too few for k-NN" in kinds) == warned


def test_what_the_crop_cuts_off_by_hand(small_dataset: Path) -> None:
    # 64 px resized to 64 and cropped to 32 keep rows and columns 16 to 47.
    sizes = PreprocessingConfig(64, 32)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[0:4, 0:4] = 255  # 16 px, all lost
    mask[14:20, 20:24] = 255  # 24 px, of which two rows of four are lost
    truth = small_dataset / "plate/ground_truth/spot"
    save(truth / "000_mask.png", mask)
    mask[14:20] = 0
    save(truth / "001_mask.png", mask)
    facts = explore(small_dataset, sizes=sizes)
    first, second, third = (i.mask for i in facts.images if i.mask is not None)
    assert first is not None and second is not None and third is not None
    assert (first.defect_px, first.region_areas) == (40, {16: 1, 24: 1})
    assert first.defect_fraction == 40 / 64**2 and first.num_values == 1
    assert set(first.crops) == set(RESIZE_MODES)
    for mode in RESIZE_MODES:
        assert first.crops[mode] == CropLoss(24, 1, is_emptied=False)
        assert second.crops[mode] == CropLoss(16, 1, is_emptied=True)
        assert third.crops[mode] == CropLoss(0, 0, is_emptied=False)  # rows 20 to 35, columns 24 to 39
    summary = class_summary(facts, sizes, small_dataset)
    assert summary["crops"]["square"]["defect_px_lost_fraction"] == (24 + 16) / (40 + 16 + 256)
    assert (summary["crops"]["square"]["num_regions"], summary["crops"]["square"]["num_regions_lost"]) == (4, 2)
    assert summary["crops"]["square"]["num_masks_emptied"] == 1
    assert summary["crops"]["square"]["area_lost_fraction"] == 0.75
    kinds = {p.kind: p for p in find_problems(facts, sizes)}
    assert [p.name for p in kinds["defect cropped away"].files] == ["001.png"]
    assert [p.name for p in kinds["regions cropped away"].files] == ["000.png"]


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(64, 64), (90, 61), (61, 200), (1000, 37), (33, 33)])
def test_crop_window_agrees_with_the_crop_of_a_run(mode: str, size: tuple[int, int]) -> None:
    placement = place(*size, PreprocessingConfig(80, 64, mode))
    top, left, bottom, right = crop_window(*size, placement)
    rows, columns = np.indices(size)
    kept_rows, kept_columns = (crop_labels(indices, placement, padding=-1) for indices in (rows, columns))
    kept = kept_rows >= 0
    # A pixel of the resized image shows the pixel whose area holds its centre: within one of our edges.
    slack = 1 + np.ceil(np.array(size) / (placement.height, placement.width))
    assert abs(kept_rows[kept].min() - top) <= slack[0] and abs(kept_rows[kept].max() - (bottom - 1)) <= slack[0]
    assert abs(kept_columns[kept].min() - left) <= slack[1] and abs(kept_columns[kept].max() - (right - 1)) <= slack[1]
    share = (bottom - top) * (right - left) / (size[0] * size[1])
    assert share == pytest.approx(1 - placement.lost_fraction, abs=2 / min(size))


def test_copies_are_found_by_content_in_any_lossless_format(small_dataset: Path) -> None:
    source = small_dataset / "plate/train/good/001.png"
    image = Image.open(source)
    image.save(small_dataset / "plate/test/good/copy.bmp")
    image.save(small_dataset / "plate/test/good/other.tif", compression="tiff_lzw")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(small_dataset / "plate/test/good/mirrored.png")
    image.save(small_dataset / "plate/test/good/lossy.jpg")
    groups = duplicates(explore(small_dataset).images)
    assert [[i.record.path.name for i in group] for group in groups] == [["001.png", "copy.bmp", "other.tif"]]
    assert [group[0].split for group in groups] == ["train"]


def test_equal_bytes_of_another_shape_are_no_copy(tmp_path: Path) -> None:
    write_category(tmp_path, "plate")
    values = np.arange(32 * 64 * 3, dtype=np.uint32).astype(np.uint8)
    save(tmp_path / "plate/train/good/wide.png", values.reshape(32, 64, 3))
    save(tmp_path / "plate/train/good/high.png", values.reshape(64, 32, 3))
    assert duplicates(explore(tmp_path).images) == []


def test_the_form_of_a_file_is_told_before_it_becomes_rgb(tmp_path: Path) -> None:
    write_category(tmp_path, "plate", num_train=1)
    train = tmp_path / "plate/train/good"
    image = Image.open(train / "000.png")
    image.convert("P").save(train / "palette.png")
    image.convert("CMYK").save(train / "cmyk.tif")
    save(train / "deep.png", (np.arange(64 * 64, dtype=np.uint16) * 13).reshape(64, 64))
    turned = image.crop((0, 0, 64, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(train / "turned.jpg", exif=exif)
    forms = {i.record.path.name: i.pixels for i in explore(tmp_path).of("train")}
    assert {name: p.form.mode for name, p in forms.items() if p} == {
        "000.png": "RGB", "palette.png": "P", "cmyk.tif": "CMYK", "deep.png": "I;16", "turned.jpg": "RGB",
    }  # fmt: skip
    upright = forms["turned.jpg"]
    assert upright is not None and upright.form.is_turned and (upright.height, upright.width) == (64, 40)
    summary = class_summary(explore(tmp_path), SIZES, tmp_path)
    assert summary["num_turned_by_exif"] == 1 and summary["sizes"]["40x64"] == 1


def test_colours_by_hand(tmp_path: Path) -> None:
    write_category(tmp_path, "plate", num_train=1)
    values = np.zeros((2, 2, 3), dtype=np.uint8)
    values[0, 0] = (40, 80, 120)
    save(tmp_path / "plate/train/good/000.png", values)
    (facts,) = explore(tmp_path).of("train")
    assert facts.pixels is not None
    assert facts.pixels.mean_rgb == (10, 20, 30) and facts.pixels.brightness == 20
    assert (facts.pixels.darkest, facts.pixels.brightest) == (0, 120)


def test_quartiles_against_numpy() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 4, 5, 100):
        values = rng.integers(0, 12, size)
        counts = {int(v): int((values == v).sum()) for v in values}
        expected = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), method="inverted_cdf")
        assert _quartiles(counts) == expected.tolist()
    assert _quartiles({}) is None


def test_named_files_are_limited_and_counted(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{i:04d}.png" for i in range(1000))
    summary = problem_summary(Problem(WARNING, "kind", "plate", "found", "then", "do", files), tmp_path)
    assert summary["num_files"] == 1000
    assert summary["files"] == [f"{i:04d}.png" for i in range(MAX_FILES)]
    text = problem_text(summary)
    assert text.splitlines()[-1].strip() == "0000.png, 0001.png, 0002.png, 997 more"


def hostile_dataset(root: Path) -> str:
    """Write a class whose name has a line break, a cell border, HTML, and a byte that is no UTF-8."""
    name = os.fsdecode(b"pl|ate\n<b>\xe9`$x$")
    write_category(root, "plate")
    (root / "plate").rename(root / name)
    return name


def test_hostile_names_break_neither_table_nor_terminal(tmp_path: Path) -> None:
    name = hostile_dataset(tmp_path / "data")
    lines: list[str] = []
    dataset = DatasetConfig("folder", str(tmp_path / "data"), preprocessing=SIZES)
    assert explore_dataset(dataset, tmp_path / "out", lines.append)
    content = (tmp_path / "out/exploration.json").read_bytes().decode("utf-8")
    json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8
    assert "\\udce9" in "".join(json.loads(content)["classes"])
    assert "\x1b" not in printable("\x1b[2J") and "\n" not in printable(name)
    text = (tmp_path / "out/exploration.md").read_text(encoding="utf-8", errors="surrogateescape")
    assert "<b>" not in text.replace("\\<b\\>", "")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables}
    assert len(tables) > 6 and widths == {13, 9, 7, 8}, "overview, defect types, crops, problems"


def test_markdown_says_so_where_nothing_is_wrong() -> None:
    content = {
        "dataset": "folder",
        "path": "/data",
        "preprocessing": {"resize_px": 64, "imagesize_px": 64, "resize_mode": "shorter"},
        "classes": {},
        "problems": [],
    }
    assert markdown(content).endswith("## Problems\n\nNone found.\n")


def test_shares_keep_two_digits() -> None:
    assert [percent(f) for f in (None, 0.0, 0.00041, 0.0213, 0.257, 1.0)] == [
        "", "0 %", "0.041 %", "2.1 %", "26 %", "100 %",
    ]  # fmt: skip


def tile(mask: np.ndarray | None, window: tuple[int, int, int, int]) -> Tile:
    return Tile("a.png", np.full((50, 100, 3), 90, dtype=np.uint8), mask, window)


def has_colour(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    below_the_key = np.asarray(picture)[60:]
    return bool((below_the_key == colour).all(axis=2).any())


def test_contact_sheet_outlines_masks_and_crops() -> None:
    mask = np.zeros((50, 100), dtype=np.uint8)
    whole = (0, 0, 50, 100)
    plain = contact_sheet("plate", [("train / good", [tile(None, whole)]), ("test / spot", [tile(mask, whole)])])
    assert plain.mode == "RGB"
    assert not has_colour(plain, CONTOUR) and not has_colour(plain, CROP_LINE)
    mask[20, 30] = 1  # a single pixel must be seen
    marked = contact_sheet("plate", [("test / spot", [tile(mask, (0, 25, 50, 75))])])
    assert has_colour(marked, CONTOUR) and has_colour(marked, CROP_LINE)
    many = contact_sheet("x" * 300, [(f"test / {i}", []) for i in range(MAX_ROWS + 5)])
    assert many.height == contact_sheet("x", [(f"test / {i}", []) for i in range(MAX_ROWS)]).height


def test_distributions_of_any_number_of_classes() -> None:
    full = ClassDistribution(
        "pl$ate",
        counts=dict.fromkeys(GROUPS, 3),
        sizes={(64, 64): 5, (80, 40): 1},
        defect_fractions=[0.0, 0.01, 0.2],
        brightness={group: [10.0, 20.0] for group in GROUPS},
        warmth={group: [-1.0, 4.0] for group in GROUPS},
        crop_losses=dict.fromkeys(RESIZE_MODES, 0.02),
    )
    nothing: dict[str, Any] = {group: [] for group in GROUPS}
    bare = replace(
        full, counts=dict.fromkeys(GROUPS, 0), sizes={}, defect_fractions=[], brightness=nothing, warmth=nothing,
        crop_losses=dict.fromkeys(RESIZE_MODES),
    )  # fmt: skip
    heights = [distributions_picture(classes).height for classes in ([bare], [full, bare], [full] * 50)]
    assert heights[0] < heights[1] < heights[2] < 5000


def test_folders_without_permission_become_problems(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = small_dataset / "plate/test/spot"
    listing = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return listing(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    (problem,) = (p for p in problems_of(small_dataset) if p.severity == ERROR)
    assert problem.kind == "incomplete class" and "Permission denied" in problem.found
    assert {p.severity for p in problems_of(small_dataset, "rod")} == {WARNING}


def test_write_texture_makes_the_images_that_these_tests_compare(tmp_path: Path) -> None:
    """Images of different seeds differ; else every set made here would be full of copies."""
    for seed in range(2):
        write_texture(tmp_path / f"{seed}.png", seed)
    assert not np.array_equal(pixels(tmp_path / "0.png"), pixels(tmp_path / "1.png"))
