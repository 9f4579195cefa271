"""Image files of every kind a camera or an annotation tool leaves, and the geometry of resize and crop."""

from __future__ import annotations

import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from patchcore.cli.grammar import quiet_libraries
from patchcore.configs import RESIZE_MODES, PreprocessingConfig
from patchcore.datasets.images import (
    EXIF_ORIENTATION,
    IGNORED,
    PADDING_RGB,
    Placement,
    crop_image,
    crop_labels,
    map_on_image,
    place,
    read_image,
    read_mask,
    upright_size,
)
from patchcore.errors import DataError

RAMP = np.tile(np.arange(256, dtype=np.uint8), (2, 1))  # [2, 256]
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
BLACK_IS_ZERO = 1

# Where (first row, first column) of the stored pixels lie in the upright image, from the EXIF standard:
# 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom, 8 left bottom.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


def write_tiff(path: Path, values: np.ndarray, sample_format: int, bits: int | None = None) -> Path:
    """Write a gray TIFF of a depth and sign that Pillow does not write; the values' byte order becomes the file's."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    pixels = values.tobytes() if bits is None else pack_twelve_bits(values)
    height, width = values.shape
    fields = [(256, width), (257, height), (258, bits or 8 * values.dtype.itemsize), (259, 1), (262, BLACK_IS_ZERO)]
    fields += [(273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, height), (279, len(pixels)), (339, sample_format)]
    header = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8)
    directory = struct.pack(order + "H", len(fields))
    directory += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in fields)
    path.write_bytes(header + directory + struct.pack(order + "I", 0) + pixels)
    return path


def pack_twelve_bits(values: np.ndarray) -> bytes:
    """Pack rows of an even length: three bytes hold two values, the high bits first."""
    first, second = values.astype(np.uint16).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


def gradient(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth colour image without any symmetry, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(4, 9) + columns / rng.uniform(5, 11) + rng.uniform(0, 6)) for _ in range(3)]
    slope = (rows + 2 * columns) / (height + 2 * width)
    return (255 * (0.3 * np.stack(waves, axis=-1) + 0.3 + 0.4 * slope[..., None])).clip(0, 255).astype(np.uint8)


def assert_reads_as_ramp(path: Path, tolerance: int = 0) -> None:
    pixels = np.asarray(read_image(path)).astype(int)
    assert pixels.shape == (2, 256, 3)
    assert np.abs(pixels - RAMP[..., None]).max() <= tolerance


# Depth


@pytest.mark.parametrize("name", ["gray.png", "gray.bmp", "gray.tif", "GRAY.TIFF", "gray.PNG"])
def test_gray_8_bit(tmp_path: Path, name: str) -> None:
    Image.fromarray(RAMP).save(tmp_path / name)
    assert_reads_as_ramp(tmp_path / name)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_ramp_reads_as_the_8_bit_ramp(tmp_path: Path, name: str) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert_reads_as_ramp(tmp_path / name)


@pytest.mark.parametrize(
    ("dtype", "sample_format", "largest"),
    [
        ("<u2", UNSIGNED, 2**16 - 1),
        (">u2", UNSIGNED, 2**16 - 1),
        ("<i2", SIGNED, 2**15 - 1),
        (">i2", SIGNED, 2**15 - 1),
        ("<u4", UNSIGNED, 2**32 - 1),
        ("<i4", SIGNED, 2**31 - 1),
        (">i4", SIGNED, 2**31 - 1),
        ("<f4", FLOAT, 1),
        (">f4", FLOAT, 1),
    ],
)
def test_tiff_is_scaled_by_its_depth(tmp_path: Path, dtype: str, sample_format: int, largest: int) -> None:
    exact = RAMP.astype(np.float64) * largest / 255
    values = exact.astype(dtype) if sample_format == FLOAT else np.rint(exact).astype(dtype)
    assert_reads_as_ramp(write_tiff(tmp_path / "ramp.tif", values, sample_format))


def test_12_bit_tiff_is_scaled_by_its_depth(tmp_path: Path) -> None:
    values = np.rint(RAMP * (4095 / 255)).astype(np.uint16)
    assert_reads_as_ramp(write_tiff(tmp_path / "ramp.tif", values, UNSIGNED, bits=12))


def test_negative_values_read_as_black(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "signed.tif", np.full((4, 4), -5, dtype="<i2"), SIGNED)
    assert np.asarray(read_image(path)).max() == 0


def test_nothing_brightens_a_dark_16_bit_image(tmp_path: Path) -> None:
    # Scaling by the image's own maximum would make the brightness of a part depend on its brightest pixel.
    Image.fromarray(np.array([[0, 257, 2570]], dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_image(tmp_path / "dark.png"))[0, :, 0].tolist() == [0, 1, 10]


@pytest.mark.parametrize("outlier", [-0.01, 1.01, 200.0, np.nan, np.inf])
def test_float_outside_unit_interval_is_refused(tmp_path: Path, outlier: float) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.array([[0.0, 0.5], [1.0, outlier]], dtype=np.float32)).save(path)
    with pytest.raises(DataError, match=r"float image with values from .* expected \[0, 1\]") as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")


# Colour


def test_alpha_is_dropped(tmp_path: Path) -> None:
    colours = gradient(20, 30)
    Image.fromarray(np.dstack([colours, np.zeros((20, 30), dtype=np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([colours[..., 0], colours[..., 1]])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "rgba.png")), colours)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "la.png"))[..., 1], colours[..., 0])


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_reads_as_its_colours(tmp_path: Path, transparency: int | bytes | None) -> None:
    indexed = Image.fromarray(gradient(20, 30)).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    indexed.save(tmp_path / "palette.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one line for each image would bury the log
        pixels = np.asarray(read_image(tmp_path / "palette.png"))
    np.testing.assert_array_equal(pixels, np.asarray(indexed.convert("RGB")))


def test_one_bit_image(tmp_path: Path) -> None:
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "binary.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "binary.png"))[..., 0], np.eye(8) * 255)


def test_cmyk_jpeg_has_its_colours(tmp_path: Path) -> None:
    colours = gradient(40, 60)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    difference = np.abs(np.asarray(read_image(tmp_path / "print.jpg")).astype(int) - colours)
    assert difference.mean() < 3


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".bmp", ".tiff", ".png"])
def test_formats_and_uppercase_suffixes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "line 3, camera 2" / f"part 01{suffix}"
    path.parent.mkdir()
    Image.fromarray(gradient(40, 60)).save(path, quality=95)
    difference = np.abs(np.asarray(read_image(path)).astype(int) - gradient(40, 60))
    assert difference.mean() < 4
    assert upright_size(path) == (40, 60)


@pytest.mark.parametrize("file_format", ["TIFF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(tmp_path: Path, file_format: str) -> None:
    red, green = (Image.new("RGB", (16, 12), colour) for colour in ("red", "green"))
    path = tmp_path / "animated.png"  # what a file holds counts, not what its name says
    red.save(path, file_format, save_all=True, append_images=[green])
    assert read_image(path).getpixel((8, 6))[0] > 240
    assert upright_size(path) == (12, 16)


# Orientation

ORIENTED = [
    ("turned.jpg", {"quality": 100, "subsampling": 0}),
    ("turned.png", {}),
    ("turned.webp", {"lossless": True}),
    ("turned.tif", {}),
    ("turned.tif", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("name", "options"), ORIENTED, ids=["jpg", "png", "webp", "tif", "tif-lzw"])
def test_exif_orientation(tmp_path: Path, name: str, options: dict[str, object], orientation: int) -> None:
    upright, path = gradient(48, 80), tmp_path / name
    save_oriented(path, upright, orientation, options)
    assert upright_size(path) == (48, 80)
    difference = np.asarray(read_image(path)).astype(int) - upright
    assert np.abs(difference).max() <= (8 if name.endswith(".jpg") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_exif_orientation_of_16_bit_images(tmp_path: Path, name: str, orientation: int) -> None:
    upright, path = gradient(24, 40)[..., 0], tmp_path / name
    save_oriented(path, upright.astype(np.uint16) * 257, orientation, {})
    assert upright_size(path) == (24, 40)
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["turned_mask.png", "turned_mask.tif"])
def test_exif_orientation_of_a_mask(tmp_path: Path, name: str, orientation: int) -> None:
    upright, path = np.zeros((24, 40), dtype=np.uint8), tmp_path / name
    upright[2:9, 5:30] = 255
    save_oriented(path, upright, orientation, {})
    assert upright_size(path) == (24, 40)
    np.testing.assert_array_equal(read_mask(path), upright // 255)


def save_oriented(path: Path, upright: np.ndarray, orientation: int, options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [0, 9, 42])
def test_unknown_orientation_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / "odd.png"
    Image.fromarray(gradient(24, 40)).save(path, exif=exif)
    assert upright_size(path) == (24, 40)
    np.testing.assert_array_equal(np.asarray(read_image(path)), gradient(24, 40))


def test_size_comes_from_the_header(tmp_path: Path) -> None:
    # Decoding every PNG of a factory folder before training would take minutes.
    path = tmp_path / "large.png"
    Image.fromarray(gradient(300, 400)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert upright_size(path) == (300, 400)
    with pytest.raises(DataError):
        read_image(path)


# Masks


@pytest.mark.parametrize("value", [1, 127, 254, 255])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_any_value_but_zero_is_a_defect(tmp_path: Path, square: np.ndarray, value: int, suffix: str) -> None:
    Image.fromarray(square * np.uint8(value)).save(tmp_path / f"mask{suffix}")
    mask = read_mask(tmp_path / f"mask{suffix}")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, square)


@pytest.fixture
def square() -> np.ndarray:
    """A mask with a rectangular defect, uint8 [40, 60] in {0, 1}."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 15:45] = 1
    return mask


def mask_images(square: np.ndarray) -> dict[str, Image.Image]:
    """Return the same mask in every mode that tools write."""
    indexed = Image.fromarray(square)
    indexed.putpalette([0, 0, 0, 128, 0, 0])
    opaque = np.full_like(square, 255)
    blue = np.stack([square * 0, square * 0, square * 255], axis=-1)
    white = np.full((*square.shape, 3), 255, dtype=np.uint8)
    return {
        "1": Image.fromarray(square > 0),
        "I;16": Image.fromarray(square.astype(np.uint16)),
        "I": Image.fromarray(square.astype(np.int32)),
        "F": Image.fromarray(square.astype(np.float32)),
        "P": indexed,
        "LA": Image.fromarray(np.dstack([square * 255, opaque])),
        "RGB": Image.fromarray(blue),
        "RGBA": Image.fromarray(np.dstack([blue, opaque])),
        "white on transparent white": Image.fromarray(np.dstack([white, square * 255])),
    }


@pytest.mark.parametrize("mode", list(mask_images(np.zeros((2, 2), dtype=np.uint8))))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_mask_modes(tmp_path: Path, square: np.ndarray, mode: str, suffix: str) -> None:
    if mode in ("I", "F") and suffix == ".png":
        pytest.skip("PNG has neither floats nor 32 bits")
    mask_images(square)[mode].save(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"mask{suffix}"), square)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3)])
def test_ringing_of_a_lossy_mask_is_no_defect(
    tmp_path: Path, square: np.ndarray, suffix: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / f"mask{suffix}"
    values = np.broadcast_to((square * 255).reshape(40, 60, *[1] * (len(shape) - 2)), shape)
    Image.fromarray(np.ascontiguousarray(values)).save(path, quality=60)
    assert (np.asarray(Image.open(path)) != 0).mean() > 1.2 * square.mean(), "this file does not ring"
    assert (read_mask(path) != square).mean() < 0.02


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".png"])
def test_empty_mask(tmp_path: Path, suffix: str) -> None:
    Image.new("L", (60, 40)).save(tmp_path / f"mask{suffix}")
    assert read_mask(tmp_path / f"mask{suffix}").sum() == 0


# Damaged files


@pytest.mark.parametrize("read", [read_image, read_mask, upright_size])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"version https://git-lfs\n", "unknown format"), (bytes(1000), "unknown format")],
)
def test_no_image_at_all(tmp_path: Path, read: object, content: bytes, reason: str) -> None:
    path = tmp_path / "bad file.png"
    path.write_bytes(content)
    assert callable(read)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a readable ")
    assert reason in message
    assert "\n" not in message


def test_missing_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="No such file") as caught:
        read_image(tmp_path / "link.png")
    assert str(caught.value).count("link.png") == 1


@pytest.mark.parametrize("read", [read_image, read_mask, upright_size])
def test_a_pipe_keeps_nobody_waiting(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device"):
        read(tmp_path / "link.png")


def test_commands_show_no_warnings_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 90 - 1)
    Image.fromarray(gradient(60, 90)).save(tmp_path / "large.png")
    with pytest.warns(Image.DecompressionBombWarning):
        read_image(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as shown:
        quiet_libraries()
        assert read_image(tmp_path / "large.png").size == (90, 60)
    assert not shown


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(gradient(60, 90)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (read_image, read_mask):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_flipped_bytes_raise_nothing_but_data_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged header may announce a huge image
    path, rng = tmp_path / f"flipped{suffix}", random.Random(0)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.fromarray(gradient(20, 30)).save(path, exif=exif) if suffix != ".bmp" else Image.new("L", (30, 20)).save(path)
    content = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 2, 5])):
            damaged[rng.randrange(min(len(damaged), rng.choice([60, 300, 10**6])))] = rng.randrange(256)
        path.write_bytes(damaged)
        for read in (read_image, read_mask, upright_size):
            try:
                read(path)
            except DataError as error:
                assert str(path) in str(error)
                assert "\n" not in str(error)


# Resize and crop

SIZES = [(64, 64), (65, 64), (64, 65), (101, 67), (67, 101), (333, 97), (97, 1000), (700, 701), (31, 29), (1, 5)]
CROPS = [(64, 56), (65, 56), (64, 57), (256, 224), (64, 64)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("resize", "side"), CROPS)
def test_shorter_equals_torchvision(height: int, width: int, resize: int, side: int) -> None:
    image = Image.fromarray(gradient(height, width))
    resized = transforms.Resize(resize)(image)
    cropped = transforms.CenterCrop(side)(resized)
    placement = place(height, width, PreprocessingConfig(resize, side))
    assert (placement.height, placement.width) == (resized.height, resized.width)
    difference = crop_image(image, placement).astype(int) - np.asarray(cropped)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_square_resizes_both_sides(height: int, width: int) -> None:
    placement = place(height, width, PreprocessingConfig(64, 56, "square"))
    assert placement == Placement(64, 64, 4, 4, 56, 56)
    assert placement.lost_fraction == pytest.approx(1 - (56 / 64) ** 2)


def test_letterbox_by_hand() -> None:
    # 100 x 200 px: the longer side becomes 64 px and is cut to 56, the shorter one becomes 32 px: 12 px padded
    # above and below.
    config = PreprocessingConfig(64, 56, "letterbox")
    placement = place(100, 200, config)
    assert placement == Placement(32, 64, -12, 4, 56, 56)
    image = crop_image(Image.new("RGB", (200, 100), "red"), placement)
    labels = crop_labels(np.zeros((100, 200), dtype=np.uint8), placement)
    padded = np.ones((56, 56), dtype=bool)
    padded[12:44] = False
    np.testing.assert_array_equal(labels == IGNORED, padded)
    assert (labels[~padded] == 0).all()
    assert (image[padded] == PADDING_RGB).all()
    assert (image[~padded] == (255, 0, 0)).all()
    assert placement.lost_fraction == pytest.approx(1 - 56 / 64)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("resize", "side"), CROPS)
def test_letterbox_loses_no_more_than_a_square_image(height: int, width: int, resize: int, side: int) -> None:
    config = PreprocessingConfig(resize, side, "letterbox")
    square = place(100, 100, config).lost_fraction
    assert square == pytest.approx(1 - (side / resize) ** 2)
    assert place(height, width, config).lost_fraction <= square + 1e-12


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("resize", "side"), CROPS)
def test_lost_fraction_counts_pixels(mode: str, height: int, width: int, resize: int, side: int) -> None:
    placement = place(height, width, PreprocessingConfig(resize, side, mode))
    rows = [0 <= row - placement.top < side for row in range(placement.height)]
    columns = [0 <= column - placement.left < side for column in range(placement.width)]
    assert placement.lost_fraction == pytest.approx(1 - np.mean(rows) * np.mean(columns))


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("height", "width"), [(200, 200), (150, 333), (333, 150), (64, 64)])
def test_mask_lies_on_its_defect(mode: str, height: int, width: int) -> None:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 3 : height // 2, width // 3 : 3 * width // 5] = 1
    placement = place(height, width, PreprocessingConfig(64, 56, mode))
    labels = crop_labels(mask, placement)
    bright = crop_image(Image.fromarray(mask * 255).convert("RGB"), placement)[..., 0] > 127
    inside = labels != IGNORED
    assert set(np.unique(labels[inside])) == {0, 1}, "nearest keeps a mask binary"
    # Both round at the border: there they may differ by a pixel, never by a shift.
    for axis in (0, 1):
        spans = [np.flatnonzero((found & inside).any(axis=axis))[[0, -1]] for found in (bright, labels == 1)]
        assert np.abs(spans[0] - spans[1]).max() <= 1


def test_map_on_image_by_hand() -> None:
    values = np.array([[1, 2], [3, 4]], dtype=np.float32)
    nothing = float("nan")
    # The crop is the middle of an image that was not resized.
    middle = map_on_image(values, Placement(4, 4, 1, 1, 2, 2), 4, 4)
    expected = np.full((4, 4), nothing)
    expected[1:3, 1:3] = values
    np.testing.assert_array_equal(middle, expected)
    # The crop reaches a row beyond the image at the top and the bottom: those rows show padding.
    letterbox = map_on_image(np.array([[9, 9], [1, 2], [3, 4], [9, 9]]), Placement(2, 2, -1, 0, 4, 2), 2, 2)
    np.testing.assert_array_equal(letterbox, values)
    # Resized to half its size: every value stands for four pixels, mixed with its neighbours alone.
    doubled = map_on_image(values, Placement(2, 4, 0, 1, 2, 2), 4, 8)
    np.testing.assert_array_equal(np.isnan(doubled), [[True] * 2 + [False] * 4 + [True] * 2] * 4)
    np.testing.assert_allclose(doubled[0, 2:6], [1, 1.25, 1.75, 2])
    assert doubled.dtype == np.float32


@pytest.mark.parametrize("mode", [*RESIZE_MODES, "whole"])
@pytest.mark.parametrize(("height", "width"), [(120, 120), (121, 83), (60, 200), (200, 61)])
def test_map_lies_on_what_it_was_computed_from(mode: str, height: int, width: int) -> None:
    config = PreprocessingConfig(64, 56, max_side_px=96) if mode == "whole" else PreprocessingConfig(64, 56, mode)
    placement = place(height, width, config)
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    crop = crop_image(Image.fromarray(np.stack([rows, columns, rows], axis=-1)), placement).astype(np.float32)
    for scale in (1, 2):  # over the image itself, and over a copy of half its size
        size = height // scale, width // scale
        of_rows, of_columns = (map_on_image(crop[..., channel], placement, *size) for channel in (0, 1))
        inspected = ~np.isnan(of_rows)
        assert inspected.mean() == pytest.approx(1 - placement.lost_fraction, abs=2 / min(size))
        wanted = [(np.arange(n)) * full / n for n, full in zip(size, (height, width), strict=True)]
        blur_px = max(height / placement.height, width / placement.width) + scale
        assert np.abs(of_rows - wanted[0][:, None])[inspected].max() <= blur_px
        assert np.abs(of_columns - wanted[1][None])[inspected].max() <= blur_px


def test_map_of_a_part_too_thin_to_be_shown() -> None:
    nothing = map_on_image(np.ones((64, 64)), place(64, 20_000, PreprocessingConfig(64, 64)), 1, 10)
    assert np.isnan(nothing).all()


def test_labels_keep_their_numbers() -> None:
    labels = np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    cropped = crop_labels(labels, place(64, 64, PreprocessingConfig(64, 56)), padding=0)
    assert cropped.dtype == np.int32
    np.testing.assert_array_equal(cropped, labels[4:60, 4:60])


# Own resolution


@pytest.mark.parametrize(
    ("size", "longest", "scored"),
    [
        ((100, 200), 64, (32, 64)),
        ((200, 100), 64, (64, 32)),
        ((64, 30), 64, (64, 30)),
        ((31, 29), 64, (31, 29)),
        ((65, 64), 64, (64, 63)),
        ((3, 1000), 64, (1, 64)),
        ((700, 701), 100, (100, 100)),
    ],
)
def test_longer_side_is_bounded_and_nothing_enlarged(
    size: tuple[int, int], longest: int, scored: tuple[int, int]
) -> None:
    for mode in RESIZE_MODES:
        placement = place(*size, PreprocessingConfig(64, 56, mode, max_side_px=longest))
        assert placement == Placement(*scored, 0, 0, *scored)
        assert placement.lost_fraction == 0


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_own_resolution_keeps_the_pixels(height: int, width: int) -> None:
    pixels = gradient(height, width)
    labels = np.arange(height * width, dtype=np.int32).reshape(height, width)
    placement = place(height, width, PreprocessingConfig(max_side_px=1000))
    np.testing.assert_array_equal(crop_image(Image.fromarray(pixels), placement), pixels)
    np.testing.assert_array_equal(crop_labels(labels, placement), labels)


def test_mask_of_a_rectangle_is_scaled_with_its_image() -> None:
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[20:40, 100:160] = 1
    placement = place(100, 200, PreprocessingConfig(max_side_px=100))
    image = crop_image(Image.fromarray(mask * 255).convert("RGB"), placement)
    labels = crop_labels(mask, placement)
    assert image.shape == (50, 100, 3) and labels.shape == (50, 100)
    expected = np.zeros((50, 100), dtype=np.int32)
    expected[10:20, 50:80] = 1
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(image[..., 0] > 127, expected == 1)


@pytest.mark.slow
def test_real_images_are_cropped_as_torchvision_does(real_data: Path) -> None:
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    paths = sorted(real_data.glob("*/*/test/*/000.png"))
    assert paths
    for path in paths:
        image = read_image(path)
        pixels = crop_image(image, place(image.height, image.width, PreprocessingConfig()))
        np.testing.assert_array_equal(pixels, np.asarray(reference(Image.open(path).convert("RGB"))))
