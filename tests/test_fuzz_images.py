"""Generated image files: each is read as the image that it holds, or refused in one line that names it."""

from __future__ import annotations

import functools
import io
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzzing import Cases, damaged, generated, require_one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchcore.configs import RESIZE_MODES, PreprocessingConfig
from patchcore.datasets.images import (
    crop_image,
    place_of_file,
    read_image,
    read_image_and_form,
    read_mask,
    upright_size,
)
from patchcore.errors import DataError

pytestmark = pytest.mark.slow

CASES = Cases(at_least=550)

HEIGHT, WIDTH = 18, 27
READERS: tuple[Callable[[Path], object], ...] = (read_image, read_image_and_form, read_mask, upright_size)


def pixels(seed: int = 0) -> np.ndarray:
    """Return uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Return one file of each kind that decoders treat differently."""
    colour, gray = Image.fromarray(pixels()), Image.fromarray(pixels()[..., 0])
    deep = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)
    real = Image.fromarray((pixels()[..., 0] / 255).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(pixels(i)) for i in (1, 2)]
    return {
        "png": encoded(colour, "PNG"),
        "png turned": encoded(colour, "PNG", exif=exif),
        "png 16": encoded(deep, "PNG"),
        "png palette": encoded(colour.convert("P"), "PNG", transparency=3),
        "png transparent": encoded(colour.convert("RGBA"), "PNG"),
        "png animated": encoded(colour, "PNG", save_all=True, append_images=frames),
        "jpeg": encoded(colour, "JPEG", exif=exif),
        "jpeg progressive": encoded(colour, "JPEG", progressive=True),
        "jpeg cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "tiff": encoded(colour, "TIFF", exif=exif),
        "tiff lzw": encoded(colour, "TIFF", compression="tiff_lzw"),
        "tiff deflate 16": encoded(deep, "TIFF", compression="tiff_deflate"),
        "tiff float": encoded(real, "TIFF"),
        "tiff jpeg": encoded(colour, "TIFF", compression="jpeg"),
        "tiff pages": encoded(gray, "TIFF", save_all=True, append_images=frames),
        "webp": encoded(colour, "WEBP", lossless=True, exif=exif.tobytes()),
        "bmp": encoded(gray, "BMP"),
    }


@pytest.fixture(scope="module", autouse=True)
def small_bombs() -> Iterator[None]:
    """Let Pillow refuse images from 200,000 pixels on, so that a damaged header takes no gigabyte of the machine."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 100_000
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def read_all(path: Path) -> Image.Image | None:
    """Read a file in every way there is, and return the image; None if it is refused."""
    found: dict[Callable[[Path], object], object] = {}
    for read in READERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, which commands silence
                found[read] = read(path)
        except DataError as error:
            require_one_line(str(error))
            assert str(path) in str(error)
    image = found.get(read_image)
    if image is None:
        assert read_image_and_form not in found
        return None
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    assert found[upright_size] == (image.height, image.width)
    mask = found[read_mask]
    assert isinstance(mask, np.ndarray) and mask.shape == (image.height, image.width) and mask.max() <= 1
    return image


@given(st.sampled_from(sorted(whole_files())), st.integers(0, 2**32))
@generated(400)
def test_damaged_files(folder: Path, kind: str, seed: int) -> None:
    path = folder / f"damaged.{kind.split()[0]}"
    path.write_bytes(damaged(whole_files()[kind], seed))
    with CASES():
        read_all(path)


def test_bombs(folder: Path) -> None:
    """Headers that announce far more pixels than the file has, and texts that unpack to far more than it holds."""
    whole = whole_files()
    png = bytearray(whole["png"])
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    black = encoded(Image.new("1", (3_000, 3_000)), "PNG")
    text = zlib.compress(b"\0" * 2**26, 9)
    chunk = b"zTXt" + b"Comment\0\0" + text
    packed = len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    bitmap = bytearray(whole["bmp"])
    bitmap[18:26] = (60_000).to_bytes(4, "little") * 2
    jpeg = bytearray(whole["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    tiff = encoded(Image.new("1", (3_000, 3_000)), "TIFF", compression="group4")
    bombs = {
        "header.png": bytes(png), "black.png": black, "text.png": whole["png"][:33] + packed + whole["png"][33:],
        "header.bmp": bytes(bitmap), "header.jpg": bytes(jpeg), "black.tif": tiff,
    }  # fmt: skip
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
        with CASES():
            assert read_all(folder / name) is None, name


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (20_000, 50), (50, 20_000), (2, 40_000)])
def test_extreme_sizes(folder: Path, mode: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)
    path = folder / "extreme.png"
    Image.new("RGB", (width, height), (10, 200, 30)).save(path)
    with CASES():
        image = read_image(path)
        assert image.size == (width, height)
        config = PreprocessingConfig(64, 56, mode)
        cropped = crop_image(image, place_of_file(path, height, width, config))
        assert cropped.shape == (56, 56, 3) and (cropped[28, 28] == (10, 200, 30)).all()


def test_a_line_is_too_long_for_its_shorter_side(folder: Path) -> None:
    with CASES(), pytest.raises(DataError, match="too long to be resized"):
        place_of_file(folder / "line.png", 1, 100_000, PreprocessingConfig(256, 224))


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def colours(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def written(array: np.ndarray, way: str) -> tuple[bytes, np.ndarray]:
    """Return a file that holds colours in the way named, and the RGB values that it has to be read as."""
    image, gray = Image.fromarray(array), Image.fromarray(array[..., 0])
    as_gray = np.repeat(array[..., :1], 3, axis=-1)
    deep = array[..., 0].astype(np.uint16) * 257
    match way:
        case "png":
            return encoded(image, "PNG"), array
        case "alpha":
            image.putalpha(gray)
            return encoded(image, "PNG"), array
        case "gray alpha":
            return encoded(Image.merge("LA", (gray, gray)), "PNG"), as_gray
        case "palette":
            few = Image.fromarray(array // 86 * 86)
            return encoded(few.quantize(64), "PNG"), array // 86 * 86
        case "palette tiff":
            few = Image.fromarray(array // 86 * 86)
            return encoded(few.quantize(64), "TIFF"), array // 86 * 86
        case "one bit":
            bits = array[..., 0] > 127
            return encoded(Image.fromarray(bits), "PNG"), np.repeat(bits[..., None] * np.uint8(255), 3, axis=-1)
        case "16 bits":
            return encoded(Image.fromarray(deep), "PNG"), as_gray
        case "16 bits tiff":
            return encoded(Image.fromarray(deep), "TIFF", compression="tiff_lzw"), as_gray
        case "big endian":
            return encoded(Image.frombytes("I;16B", gray.size, deep.astype(">u2").tobytes()), "TIFF"), as_gray
        case "float":
            return encoded(Image.fromarray((array[..., 0] / 255).astype(np.float32)), "TIFF"), as_gray
        case "cmyk":
            ink = image.convert("CMYK")
            return encoded(ink, "TIFF"), np.asarray(ink.convert("RGB"))
        case "webp":
            return encoded(image, "WEBP", lossless=True), array
        case "bmp":
            return encoded(image, "BMP"), array
        case "frames":
            others = [Image.fromarray(255 - array)]
            return encoded(image, "TIFF", save_all=True, append_images=others), array
        case "animated png":
            return encoded(image, "PNG", save_all=True, append_images=[Image.fromarray(255 - array)]), array
        case "animated webp":
            others = [Image.fromarray(255 - array)]
            return encoded(image, "WEBP", save_all=True, append_images=others, lossless=True), array
    raise AssertionError(way)


WAYS = (
    "png", "alpha", "gray alpha", "palette", "palette tiff", "one bit", "16 bits", "16 bits tiff", "big endian",
    "float", "cmyk", "webp", "bmp", "frames", "animated png", "animated webp",
)  # fmt: skip


@given(st.sampled_from(WAYS), SHAPES, st.integers(0, 2**32))
@generated(80)
def test_every_mode_gives_the_colours_of_the_clean_image(
    folder: Path, way: str, shape: tuple[int, int], seed: int
) -> None:
    content, expected = written(colours(shape, seed), way)
    path = folder / "mode.png"  # whatever the suffix says
    path.write_bytes(content)
    with CASES():
        image = read_all(path)
        assert image is not None
        np.testing.assert_array_equal(np.asarray(image), expected)


@given(SHAPES, st.integers(0, 10**6), st.floats(width=32))
@generated(60)
def test_float_images_with_any_value(folder: Path, shape: tuple[int, int], place: int, value: float) -> None:
    values = np.full(shape, 0.25, np.float32)
    values.flat[place % values.size] = value
    path = folder / "float.tif"
    path.write_bytes(encoded(Image.fromarray(values), "TIFF"))
    with CASES():
        image = read_all(path)
        if not (np.isfinite(value) and 0 <= value <= 1):
            assert image is None
        else:
            assert image is not None
            np.testing.assert_array_equal(np.asarray(image)[..., 0], np.rint(values.astype(np.float64) * 255))


def test_animations_of_other_formats_are_refused(folder: Path) -> None:
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    for name, form in (("a.png", "GIF"), ("a.tif", "GIF"), ("a.webp", "ICO"), ("a.jpg", "TGA"), ("a.bmp", "PPM")):
        options = {"save_all": True, "append_images": frames} if form == "GIF" else {}
        (folder / name).write_bytes(encoded(frames[0], form, **options))
        with CASES():
            assert read_all(folder / name) is None


def unreadable(folder: Path, kind: str) -> Path:
    path = folder / f"{kind.replace(' ', '_')}.png"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link to a pipe":
            os.mkfifo(folder / "pipe_of_the_link")
            path.symlink_to(folder / "pipe_of_the_link")
        case "dangling link":
            path.symlink_to(folder / "gone")
        case "link to itself":
            path.symlink_to(path)
        case "links in a circle":
            other = folder / "other_link.png"
            path.symlink_to(other)
            other.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "terminal":
            path.symlink_to("/dev/tty")
        case "process":
            path.symlink_to("/proc/self/mem")
        case "empty":
            path.touch()
        case "missing":
            pass
        case "below a file":
            path.touch()
            path = path / "a.png"
        case "long":
            path = folder / ("a" * 300 + ".png")
        case "nul":
            path = folder / "a\0.png"
        case _:
            raise AssertionError(kind)
    return path


UNREADABLE = (
    "folder", "pipe", "link to a pipe", "dangling link", "link to itself", "links in a circle", "device", "terminal",
    "process", "empty", "missing", "below a file", "long", "nul",
)  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_readable_file(tmp_path: Path, kind: str) -> None:
    path = unreadable(tmp_path, kind)
    with CASES(seconds=5):
        assert read_all(path) is None


def test_permissions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in, since the user root may read everything."""
    path = folder / "secret.png"
    path.write_bytes(whole_files()["png"])

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with CASES():
        assert read_all(path) is None


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)
