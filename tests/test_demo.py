"""The rendered demo set: geometry, exact masks, honest difficulty, layout, behaviour on existing folders."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.morphology import dilation, disk

from patchcore.configs import DEMO_CATEGORIES, DemoConfig
from patchcore.datasets import demo
from patchcore.datasets.demo import DemoItem, DemoSample, render_demo_dataset, render_sample
from patchcore.datasets.demo_catalogue import CATALOGUE
from patchcore.datasets.demo_parts import THICKNESS, Finish, Hole, Part, Plate, Scratch, draw_part
from patchcore.datasets.demo_scene import (
    Surface,
    box_distance,
    hexagon_distance,
    image_grid,
    polyline_distance,
    value_noise,
)
from patchcore.errors import ConfigurationError

DEFECT_TYPES = {
    "metal_plate": {"scratches", "major_rust", "total_rust"},
    "bracket_black": {"hole", "scratches"},
    "bracket_brown": {"bend_and_parts_mismatch", "parts_mismatch"},
    "bracket_white": {"defective_painting", "scratches"},
}
PAIRS = [(category, defect_type) for category, types in DEFECT_TYPES.items() for defect_type in sorted(types)]
BRACKETS = [category for category in DEFECT_TYPES if category.startswith("bracket")]
TINY = DemoConfig(image_size_px=64, num_train=2, num_test_good=1, num_test_defect=2, seed=3)


@cache
def sample(category: str, defect_type: str, index: int) -> DemoSample:
    """Render one test image of the default set."""
    return render_sample(DemoItem(category, "test", defect_type, index), DemoConfig.image_size_px, seed=0)


def change(rendered: DemoSample) -> np.ndarray:
    """Return the largest change of any channel by the defect, [H,W] in grey levels."""
    return np.abs(rendered.image.astype(int) - rendered.sound_image.astype(int)).max(axis=2)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo_dataset(tmp_path_factory.mktemp("demo") / "set", TINY)


# --- geometry and noise -------------------------------------------------------------------------------------


def test_signed_distances_by_hand() -> None:
    u, v = (np.array([values], dtype=np.float32) for values in ([0.0, 3.0, 3.0, 0.5], [0.0, 0.0, 3.0, 0.0]))
    np.testing.assert_allclose(box_distance(u, v, 1.0, 1.0, 1.0)[0], [-1, 2, math.sqrt(18) - 1, -0.5], rtol=1e-6)
    np.testing.assert_allclose(box_distance(u, v, 2.0, 1.0, 0.0)[0], [-1, 1, math.sqrt(5), -1], rtol=1e-6)
    np.testing.assert_allclose(hexagon_distance(u, v, 1.0)[0][[0, 1, 3]], [-1, 2, -0.5], atol=1e-6)


def test_polyline_distance_by_hand() -> None:
    grid = dataclasses.replace(
        image_grid(2), u=np.array([[0.25, 1.0, 3.0]], np.float32), v=np.array([[0.5, 0.5, 1.0]], np.float32)
    )
    distance, along = polyline_distance(grid, np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(distance[0], [0.5, 0.0, 2.0])
    np.testing.assert_allclose(along[0], [0.125, 0.75, 1.0])


def test_moved_grid_undoes_a_pose() -> None:
    angle, scale = 0.3, 1.2
    point = np.array([0.11, -0.07])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    u, v = scale * turn @ point + (0.05, 0.02)
    here = dataclasses.replace(image_grid(2), u=np.array([[u]]), v=np.array([[v]]))
    seen = here.moved(0.05, 0.02, angle, scale)
    np.testing.assert_allclose([seen.u.item(), seen.v.item()], point, atol=1e-7)
    assert seen.pixel == pytest.approx(here.pixel / scale)


def test_value_noise_is_bounded_and_the_same_at_every_resolution() -> None:
    small, large = image_grid(50), image_grid(150)  # centres of the small pixels are centres of large ones
    coarse = value_noise(np.random.default_rng(0), small.u * 7, small.v * 7, octaves=3)
    fine = value_noise(np.random.default_rng(0), large.u * 7, large.v * 7, octaves=3)
    np.testing.assert_allclose(coarse, fine[1::3, 1::3], atol=1e-4)
    assert np.abs(fine).max() <= 1.0
    assert abs(fine.mean()) < 0.2


def test_drawn_part_has_the_area_of_its_geometry() -> None:
    grid = image_grid(400)
    flat = np.zeros_like(grid.u)
    surface = Surface(flat.copy(), np.zeros((400, 400, 3), np.float32), flat.copy(), flat.copy())
    finish = Finish((0.5, 0.5, 0.5), gloss=0.1, relief=0.0)
    plate = Plate(half_u=0.3, half_v=0.2, radius=0.0, holes=(Hole(0.1, 0.0, radius=0.05),))
    draw_part(surface, grid, Part(finish, (plate,)), texture=flat)
    assert surface.albedo[..., 0].mean() / 0.5 == pytest.approx(0.6 * 0.4 - math.pi * 0.05**2, rel=2e-3)
    assert surface.height[200, 240] == 0.0, "the bench shows through the hole"
    assert surface.height[200, 120] == pytest.approx(THICKNESS)


def test_scratch_marks_the_sheet_and_not_the_bench() -> None:
    grid = image_grid(200)
    flat = np.zeros_like(grid.u)
    surface = Surface(flat.copy(), np.zeros((200, 200, 3), np.float32), flat.copy(), flat.copy())
    across = Scratch(((-0.45, 0.0), (0.45, 0.0)), width=0.02, strength=1.0, albedo=(1.0, 1.0, 1.0), seed=0)
    plate = Plate(half_u=0.2, half_v=0.2, radius=0.0)
    draw_part(surface, grid, Part(Finish((0.0, 0.0, 0.0), gloss=0.0), (plate,), scratches=(across,)), flat)
    rows, columns = np.nonzero(surface.albedo[..., 0] > 0.05)
    assert 97 <= rows.min() <= rows.max() <= 102
    assert (columns.min(), columns.max()) == (60, 139)


# --- one image ----------------------------------------------------------------------------------------------


def test_categories_have_the_defect_types_of_mpdd() -> None:
    assert {name: set(category.defects) for name, category in CATALOGUE.items()} == DEFECT_TYPES
    assert set(DEMO_CATEGORIES) == set(CATALOGUE)


@pytest.mark.parametrize(("category", "defect_type"), PAIRS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_mask_is_where_the_defect_changed_the_picture(category: str, defect_type: str, index: int) -> None:
    rendered = sample(category, defect_type, index)
    difference = change(rendered)
    assert difference[~rendered.mask].max() < demo.VISIBLE_CHANGE
    assert (difference[rendered.mask] >= 3).mean() > 0.9
    visible = difference >= demo.VISIBLE_CHANGE
    assert not (rendered.mask & ~dilation(visible, disk(2))).any()


@pytest.mark.parametrize(("category", "defect_type"), PAIRS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_centre_crop_keeps_the_defect(category: str, defect_type: str, index: int) -> None:
    mask = sample(category, defect_type, index).mask
    assert mask[16:-16, 16:-16].sum() >= 0.95 * mask.sum()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_mask_of_total_rust_has_the_area_of_the_plate(index: int) -> None:
    corners = (4 - math.pi) * 0.018**2
    holes = math.pi * (0.052**2 + 4 * 0.018**2)
    plate = 0.57 * 0.39 - corners - holes
    mask = sample("metal_plate", "total_rust", index).mask
    assert 0.95 * plate < mask.mean() < 1.1**2 * 1.05 * plate, "a pose enlarges by 1 to 1.1"


@pytest.mark.parametrize("category", DEFECT_TYPES)
def test_small_defects_are_among_them(category: str) -> None:
    smallest = min(sample(category, defect_type, 1).mask.mean() for defect_type in DEFECT_TYPES[category])
    assert smallest < 0.002


@pytest.mark.parametrize("category", ["metal_plate", "bracket_black", "bracket_white"])
def test_faint_scratches_are_among_them(category: str) -> None:
    fine, coarse = (sample(category, "scratches", index) for index in (1, 0))
    assert np.percentile(change(fine)[fine.mask], 90) < np.percentile(change(coarse)[coarse.mask], 90)


def test_sound_part_has_an_empty_mask() -> None:
    rendered = sample("bracket_brown", "good", 0)
    assert not rendered.mask.any()
    assert (rendered.image == rendered.sound_image).all()


@pytest.mark.parametrize("category", DEFECT_TYPES)
def test_size_changes_the_resolution_and_not_the_scene(category: str) -> None:
    item = DemoItem(category, "train", "good", 0)
    small, large = (render_sample(item, size, seed=0).image.astype(float) for size in (64, 192))
    shrunk = large.reshape(64, 3, 64, 3, 3).mean(axis=(1, 3))
    assert np.abs(small - shrunk).mean() < 8.0


# --- difficulty ---------------------------------------------------------------------------------------------


def mean_colour_auroc(train: np.ndarray, good: np.ndarray, defective: np.ndarray) -> float:
    """Return the AUROC of the distance between mean colours, [N,3] each, and the mean over training."""
    centre = train.mean(axis=0)
    normal, anomalous = (np.linalg.norm(colours - centre, axis=1) for colours in (good, defective))
    larger, equal = anomalous[:, None] > normal, anomalous[:, None] == normal
    return float((larger + 0.5 * equal).mean())


@pytest.mark.parametrize("category", BRACKETS)
def test_mean_colour_does_not_separate_brackets(category: str) -> None:
    config = DemoConfig()
    size = 128  # a mean colour needs no resolution; the slow test below reads the files of the default size

    def colours(split: str, defect_type: str, count: int) -> list[np.ndarray]:
        items = [DemoItem(category, split, defect_type, index) for index in range(count)]
        return [render_sample(item, size, config.seed).image.mean(axis=(0, 1)) for item in items]

    train = np.array(colours("train", "good", config.num_train))
    good = np.array(colours("test", "good", config.num_test_good))
    defective = [colours("test", defect, config.num_test_defect) for defect in sorted(DEFECT_TYPES[category])]
    assert mean_colour_auroc(train, good, np.concatenate(defective)) < 0.8


@pytest.mark.slow
def test_default_set(tmp_path: Path) -> None:
    """The default set as files: no mask is emptied by the crop, mean colours do not separate brackets."""
    root = render_demo_dataset(tmp_path / "set", DemoConfig())

    def colours(pattern: str) -> np.ndarray:
        return np.array([np.asarray(Image.open(p)).mean(axis=(0, 1)) for p in sorted(root.glob(pattern))])

    for path in root.glob("*/ground_truth/*/*.png"):
        mask = np.asarray(Image.open(path))
        assert mask[16:-16, 16:-16].any(), path
    for category in BRACKETS:
        train, good = colours(f"{category}/train/good/*.png"), colours(f"{category}/test/good/*.png")
        defective = np.concatenate([colours(f"{category}/test/{d}/*.png") for d in DEFECT_TYPES[category]])
        assert mean_colour_auroc(train, good, defective) < 0.8, category


# --- the folder ---------------------------------------------------------------------------------------------


def test_layout(tiny_set: Path) -> None:
    expected = {"demo.json"}
    for category, defect_types in DEFECT_TYPES.items():
        expected |= {f"{category}/train/good/000.png", f"{category}/train/good/001.png"}
        expected |= {f"{category}/test/good/000.png"}
        for defect_type in defect_types:
            expected |= {f"{category}/test/{defect_type}/{index:03d}.png" for index in range(2)}
            expected |= {f"{category}/ground_truth/{defect_type}/{index:03d}_mask.png" for index in range(2)}
    assert set(contents(tiny_set)) == expected
    assert json.loads((tiny_set / "demo.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(TINY)))


def test_images_and_masks_have_their_formats(tiny_set: Path) -> None:
    for path in tiny_set.rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            if path.stem.endswith("_mask"):
                assert picture.mode == "L"
                assert set(np.unique(picture)) == {0, 255}
            else:
                assert picture.mode == "RGB"


def test_same_seed_same_bytes_and_counts_change_no_other_image(tiny_set: Path, tmp_path: Path) -> None:
    subset = dataclasses.replace(
        TINY, categories=("bracket_white", "metal_plate"), num_train=1, num_test_good=2, num_test_defect=1
    )
    small, full = contents(render_demo_dataset(tmp_path / "set", subset)), contents(tiny_set)
    del small["demo.json"]
    shared = small.keys() & full.keys()
    assert small.keys() - shared == {"bracket_white/test/good/001.png", "metal_plate/test/good/001.png"}
    assert all(small[name] == full[name] for name in shared)


def test_every_image_is_different(tiny_set: Path) -> None:
    images = [data for name, data in contents(tiny_set).items() if "ground_truth" not in name]
    assert len(set(images)) == len(images)


def test_another_seed_gives_other_images() -> None:
    item = DemoItem("bracket_black", "train", "good", 0)
    assert (render_sample(item, 64, seed=0).image != render_sample(item, 64, seed=1).image).mean() > 0.5


def test_finished_set_is_not_rendered_again(
    tiny_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(demo, "render_sample", lambda *_: pytest.fail("rendered again"))
    with caplog.at_level(logging.INFO):
        assert render_demo_dataset(tiny_set, TINY) == tiny_set
    assert [record.message for record in caplog.records] == [
        f"{tiny_set} holds this demo data set already: nothing rendered"
    ]


def test_set_of_another_configuration_is_refused_and_kept(tiny_set: Path) -> None:
    before = contents(tiny_set)
    with pytest.raises(ConfigurationError, match=r"another configuration.*delete it or give another path"):
        render_demo_dataset(tiny_set, dataclasses.replace(TINY, seed=4))
    assert contents(tiny_set) == before


def test_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other files"):
        render_demo_dataset(tmp_path, TINY)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_file_in_the_way_and_unwritable_parent_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigurationError, match="is a file"):
        render_demo_dataset(file, TINY)
    with pytest.raises(ConfigurationError, match="cannot be"):
        render_demo_dataset(file / "set", TINY)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "name with spaces"
    out.mkdir()
    config = dataclasses.replace(TINY, categories=("metal_plate",), num_train=1, num_test_defect=0)
    render_demo_dataset(out, config)
    assert set(contents(out)) == {
        "demo.json",
        "metal_plate/train/good/000.png",
        "metal_plate/test/good/000.png",
    }


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, item: DemoItem, rendered: DemoSample) -> None:
        (folder / "half.png").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_demo_dataset(tmp_path / "set", TINY)
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_run_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.os, "getpid", lambda: 7)
    leftover = tmp_path / ".set.partial-7" / "metal_plate"
    leftover.mkdir(parents=True)
    (leftover / "half.png").write_bytes(b"half")
    config = dataclasses.replace(TINY, categories=("metal_plate",), num_train=1, num_test_defect=0)
    render_demo_dataset(tmp_path / "set", config)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert "metal_plate/half.png" not in contents(tmp_path / "set")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size_px": 63}, "--size is 63, expected at least 64"),
        ({"image_size_px": 10**30}, "expected at most 4096"),
        ({"num_train": 10**30}, "expected at most 100000"),
        ({"num_train": 0}, "num_train is 0, expected at least 1"),
        ({"num_test_good": -1}, "num_test_good is -1, expected at least 0"),
        ({"num_test_defect": -1}, "num_test_defect is -1, expected at least 0"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"categories": ("bottle",)}, "unknown demo category bottle: choose from metal_plate, bracket_black"),
        ({"categories": ()}, "name each category once"),
        ({"categories": ("metal_plate", "metal_plate")}, "name each category once"),
    ],
)
def test_invalid_configuration_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        render_demo_dataset(tmp_path / "set", dataclasses.replace(DemoConfig(), **changes))
    assert not (tmp_path / "set").exists()
