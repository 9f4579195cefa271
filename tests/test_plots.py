"""Pictures: their parts, what the colours say, and names of any kind."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from patchcore.evaluation.plots.pictures import (
    CONTOUR,
    FOOTER_PX,
    GAP_PX,
    HEADER_PX,
    PANEL_PX,
    SCALE_PX,
    Caption,
    HeatScale,
    colour_table,
    heat_panel,
    picture_names,
    png_bytes,
    segmentation_picture,
)

SIDE = 64
SCALE = HeatScale(low=1.0, high=4.0, threshold=3.0)
IMAGE = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
MASK = np.zeros((SIDE, SIDE), dtype=np.uint8)
MASK[16:32, 16:32] = 1
CAPTION = Caption("spot/000.png", "spot", 2.5, 3.0)


def anomaly_map(inside: float, outside: float = 1.0) -> np.ndarray:
    return np.where(MASK == 1, inside, outside).astype(np.float32)


def panel(picture: Image.Image, number: int) -> np.ndarray:
    """Return one panel, counted from the left, as float [P, P, 3]."""
    left = GAP_PX + number * (PANEL_PX + GAP_PX)
    return np.asarray(picture.crop((left, HEADER_PX, left + PANEL_PX, HEADER_PX + PANEL_PX))).astype(float)


def inside_defect(array: np.ndarray, margin: int = 12) -> np.ndarray:
    """Return the part of a panel that lies well inside the defect."""
    start, end = 16 * PANEL_PX // SIDE + margin, 32 * PANEL_PX // SIDE - margin
    return array[start:end, start:end]


def is_contour(array: np.ndarray) -> np.ndarray:
    return (array == np.array(CONTOUR)).all(axis=-1)


def test_size_and_panels() -> None:
    three = segmentation_picture(IMAGE, MASK, anomaly_map(5), SCALE, CAPTION)
    two = segmentation_picture(IMAGE, None, anomaly_map(5), SCALE, CAPTION)
    assert three.mode == "RGB"
    assert three.size == (4 * GAP_PX + 3 * PANEL_PX + SCALE_PX, HEADER_PX + PANEL_PX + FOOTER_PX)
    assert two.width == three.width - PANEL_PX - GAP_PX and two.height == three.height
    assert (panel(three, 0) == 128).all()
    assert np.array_equal(panel(three, 2), panel(two, 1))


def test_a_normal_image_looks_cold_and_a_defect_hot() -> None:
    # Reference: the same image with the map at either end of the scale.
    cold = panel(segmentation_picture(IMAGE, None, anomaly_map(1.0), SCALE, CAPTION), 1)
    hot = panel(segmentation_picture(IMAGE, None, anomaly_map(4.0, 4.0), HeatScale(1, 4, None), CAPTION), 1)
    normal = panel(segmentation_picture(IMAGE, None, anomaly_map(1.6, 1.2), SCALE, CAPTION), 1)
    defect = panel(segmentation_picture(IMAGE, None, anomaly_map(9.0, 1.2), SCALE, CAPTION), 1)
    assert normal.mean() < cold.mean() + 12 < hot.mean() - 60
    assert not is_contour(normal).any()
    np.testing.assert_allclose(inside_defect(defect).mean(axis=(0, 1)), hot.mean(axis=(0, 1)), atol=3)
    red, _, blue = inside_defect(defect).mean(axis=(0, 1))
    assert red > blue + 50


def test_every_tenth_of_the_scale_has_a_colour_of_its_own() -> None:
    scale = HeatScale(0, 10, None)
    pictures = [segmentation_picture(IMAGE, None, anomaly_map(v, v), scale, CAPTION) for v in range(11)]
    colours = np.array([panel(picture, 1).mean(axis=(0, 1)) for picture in pictures])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(11)
    assert distances.min() > 10


def test_the_contour_encloses_what_exceeds_the_threshold() -> None:
    drawn = is_contour(panel(segmentation_picture(IMAGE, None, anomaly_map(5.0), SCALE, CAPTION), 1))
    rows, columns = np.nonzero(drawn)
    # The map passes the threshold of 3 half-way between 1 and 5, at the edge of the mask.
    for positions in (rows, columns):
        assert abs(positions.min() - 16 * PANEL_PX / SIDE) <= 2 and abs(positions.max() - 32 * PANEL_PX / SIDE) <= 2
    assert not inside_defect(drawn).any()  # a line, no filled area
    below = segmentation_picture(IMAGE, None, anomaly_map(2.99), SCALE, CAPTION)
    assert not is_contour(panel(below, 1)).any()
    without = segmentation_picture(IMAGE, None, anomaly_map(5.0), HeatScale(1, 4, None), CAPTION)
    assert not is_contour(panel(without, 1)).any()


def test_the_ground_truth_panel_marks_the_mask_and_no_padding() -> None:
    mask = MASK.copy()
    mask[:, 50:] = 255  # padding
    truth = panel(segmentation_picture(IMAGE, mask, anomaly_map(1.0), SCALE, CAPTION), 1)
    changed = (truth != 128).any(axis=-1)
    assert changed.mean() == pytest.approx((MASK == 1).mean(), rel=0.02)
    assert inside_defect(changed).all()


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (1, 500)])
def test_an_oblong_image_keeps_its_shape_in_the_middle_of_its_panel(shape: tuple[int, int]) -> None:
    height, width = (max(1, round(PANEL_PX * side / max(shape))) for side in shape)
    top, left = (PANEL_PX - height) // 2, (PANEL_PX - width) // 2
    image = np.zeros((*shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[:, : shape[1] // 2] = 1
    picture = segmentation_picture(image, mask, mask.astype(np.float32), HeatScale(0, 1, 0.5), CAPTION)
    for number in range(3):
        drawn = (panel(picture, number) != 255).any(axis=-1)
        expected = np.zeros((PANEL_PX, PANEL_PX), dtype=bool)
        expected[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(drawn, expected)
    tinted = (panel(picture, 1) != 0).any(axis=-1)[top : top + height, left : left + width]
    assert tinted[:, : width // 2].all() and not tinted[:, width // 2 + 1 :].any()


def test_a_scale_without_width_and_maps_outside_it() -> None:
    flat = segmentation_picture(IMAGE, None, np.zeros((SIDE, SIDE), np.float32), HeatScale(0, 0, 0), CAPTION)
    assert np.isfinite(panel(flat, 1)).all()
    np.testing.assert_array_equal(SCALE.levels(np.array([-9.0, 1.0, 2.5, 4.0, 99.0])), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "W" * 300,
        "\u90e8\u54c1\u691c\u67fb " * 60,
        "\u0447\u0435\u0440\u0442\u0451\u0436",
        os.fsdecode(b"\xff\xfe.png"),
        "two\nlines\tand\x00more",
        "",
    ],
)
def test_names_of_any_kind_stay_on_the_picture(name: str) -> None:
    for score in (float("inf"), 1e-12, 123456.789):
        plain = segmentation_picture(IMAGE, None, anomaly_map(1.0), SCALE, Caption("", "", score, None))
        named = segmentation_picture(IMAGE, None, anomaly_map(1.0), SCALE, Caption(name, name, score, None))
        assert named.size == plain.size
        # One line: below the first row of text, and in the margin on the right, nothing changes.
        differs = (np.asarray(named) != np.asarray(plain)).any(axis=-1)
        assert not differs[28:].any() and not differs[:, -GAP_PX:].any()


def test_the_verdict_follows_the_threshold() -> None:
    def header(score: float) -> np.ndarray:
        picture = segmentation_picture(IMAGE, None, anomaly_map(1.0), SCALE, Caption("a", "b", score, 3.0))
        return np.asarray(picture)[28:HEADER_PX].astype(int)

    red = [(h[..., 0] - h[..., 1]).max() for h in (header(3.0), header(3.1))]
    assert red[0] < 60 < 120 < red[1]  # at the threshold an image is still normal


def test_picture_names() -> None:
    assert picture_names([("hole", "000"), ("good", "000")]) == ["hole_000.png", "good_000.png"]
    colliding = [("a", "b_c"), ("a_b", "c"), ("A", "B_C"), ("a", "b_c_0")]
    names = picture_names(colliding)
    assert names[0] == "a_b_c.png" and len({n.casefold() for n in names}) == 4
    long = picture_names([("x" * 200, "y" * 200), ("x" * 200, "y" * 201), ("\u90e8" * 80, "\u90e8" * 80)])
    assert len(set(long)) == 3 and all(len(os.fsencode(n)) <= 255 for n in long)
    assert picture_names([("good", os.fsdecode(b"\xff"))]) == [os.fsdecode(b"good_\xff.png")]


def test_png_bytes_come_back_exactly() -> None:
    picture = segmentation_picture(IMAGE, MASK, anomaly_map(5), SCALE, CAPTION)
    with Image.open(io.BytesIO(png_bytes(picture))) as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(picture))


def test_heat_panel_at_own_size_leaves_alone_what_was_not_inspected() -> None:
    values = anomaly_map(4.0)
    values[:, :8] = np.nan
    panel_of_all = np.asarray(heat_panel(IMAGE, anomaly_map(4.0), SCALE, SIDE))
    panel_of_part = np.asarray(heat_panel(IMAGE, values, SCALE, SIDE))
    assert panel_of_part.shape == (SIDE, SIDE, 3)
    assert (panel_of_part[:, :8] == 128).all()
    np.testing.assert_array_equal(panel_of_part[:, 8:], panel_of_all[:, 8:])


def test_scale_up_to_the_threshold() -> None:
    scale = HeatScale.up_to_threshold(1.0, 3.0)
    np.testing.assert_allclose(scale.levels(np.array([0.0, 1.0, 3.0, 4.0, 9.0])), [0, 0, 2 / 3, 1, 1])
    assert scale.threshold == 3.0


def test_the_heat_map_is_blended_as_the_formula_says() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (PANEL_PX, PANEL_PX, 3), dtype=np.uint8)
    values = rng.uniform(0, 5, (PANEL_PX, PANEL_PX)).astype(np.float32)
    values[:20] = np.nan  # not inspected
    scale = HeatScale(1, 4, None)
    gray = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    level = np.clip((values - 1) / 3, 0, 1)
    opacity = np.where(np.isnan(values), 0, 0.25 + 0.55 * level)[..., None]
    colours = colour_table()[(255 * np.nan_to_num(level)).astype(int)]
    expected = (1 - opacity) * gray[..., None] + np.nan_to_num(opacity) * colours
    assert np.abs(np.asarray(heat_panel(image, values, scale)) - expected).max() < 2.5
