"""A rendered data set in the MPDD layout: four metal parts with defects and exact masks, no download."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage.morphology import closing, disk

from patchcore.configs import MAX_SEED, DemoConfig
from patchcore.datasets.demo_catalogue import CATALOGUE
from patchcore.datasets.demo_parts import Part, draw_part, metal_texture
from patchcore.datasets.demo_scene import (
    FloatArray,
    Grid,
    Light,
    Surface,
    draw_bench,
    draw_light,
    image_grid,
    photograph,
    shade,
)
from patchcore.errors import ConfigurationError
from patchcore.runtime import derive_seed, progress

LOGGER = logging.getLogger(__name__)

CONFIG_NAME = "demo.json"
GOOD = "good"
MIN_SIZE_PX = 64
MAX_SIZE_PX = 4096  # far more than a detector sees; the memory grows with the square
MAX_COUNT = 100_000  # of images, days of rendering
FINE_EVERY = 3  # every third example of a defect type is a small or faint one
VISIBLE_CHANGE = 6  # grey levels; what changes less is the tail of a blur or a soft shadow
MIN_MASK_FRACTION = 20 / 256**2  # a defect that hides in a highlight is drawn again
MAX_ATTEMPTS = 50


@dataclass(frozen=True)
class DemoItem:
    """One image of the set: where it belongs and its number there."""

    category: str
    split: str
    defect_type: str
    index: int


@dataclass(frozen=True)
class DemoSample:
    """One rendered photograph, and the same one without its defect.

    Attributes:
        image: Photograph, [H,W,3], uint8.
        sound_image: Photograph of the sound part: same bench, pose, light and noise.
        mask: Where the defect changed the picture, [H,W], bool.
    """

    image: npt.NDArray[np.uint8]
    sound_image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Scene:
    """Everything in a photograph but the part."""

    bench: Surface
    light: Light
    grid: Grid
    pose: Grid
    texture: FloatArray
    camera_seed: int

    def photograph(self, part: Part) -> npt.NDArray[np.uint8]:
        """Return the picture of a part in this scene, [H,W,3], uint8."""
        surface = self.bench.copy()
        draw_part(surface, self.pose, part, self.texture)
        return photograph(shade(surface, self.light, self.grid), np.random.default_rng(self.camera_seed))


def render_sample(item: DemoItem, image_size_px: int, seed: int) -> DemoSample:
    """Render one image of the set, independent of all others.

    Args:
        item: Which image.
        image_size_px: Side of the image.
        seed: Seed of the set.

    Returns:
        The photograph, its sound counterpart and the mask, which is empty for a sound part.
    """
    names = (item.category, item.split, item.defect_type, item.index)
    sound_part = CATALOGUE[item.category].make(np.random.default_rng(derive_seed(seed, *names, "part")))
    scene = _draw_scene(sound_part, image_size_px, seed, names)
    sound_image = scene.photograph(sound_part)
    if item.defect_type == GOOD:
        return DemoSample(sound_image, sound_image, np.zeros(sound_image.shape[:2], dtype=bool))
    add_defect = CATALOGUE[item.category].defects[item.defect_type]
    fine = item.index % FINE_EVERY == 1
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng(derive_seed(seed, *names, "defect", attempt))
        image = scene.photograph(add_defect(sound_part, rng, fine))
        mask = _changed(image, sound_image)
        if _central(mask).sum() >= MIN_MASK_FRACTION * mask.size:
            return DemoSample(image, sound_image, mask)
    raise RuntimeError(f"{'/'.join(map(str, names))}: no visible defect in {MAX_ATTEMPTS} draws")


def _draw_scene(part: Part, image_size_px: int, seed: int, names: tuple[str | int, ...]) -> _Scene:
    """Draw bench, light, pose and camera of one image, and the texture of its part."""
    rng = np.random.default_rng(derive_seed(seed, *names, "scene"))
    grid = image_grid(image_size_px)
    pose = grid.moved(
        u=rng.uniform(-0.03, 0.03),
        v=rng.uniform(-0.03, 0.03),
        angle=math.radians(rng.uniform(-15.0, 15.0)),
        scale=rng.uniform(1.0, 1.1),
    )
    return _Scene(
        bench=draw_bench(rng, grid),
        light=draw_light(rng),
        grid=grid,
        pose=pose,
        texture=metal_texture(rng, pose, part.finish),
        camera_seed=derive_seed(seed, *names, "camera"),
    )


def _changed(image: npt.NDArray[np.uint8], sound_image: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return where two photographs differ visibly, [H,W]; gaps of a pixel, left by chance, are closed."""
    difference = np.abs(image.astype(np.int16) - sound_image).max(axis=2)  # [H,W]
    return closing(difference >= VISIBLE_CHANGE, disk(1)).astype(bool)


def _central(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the central 7/8 of a mask: what a 224 px crop of a 256 px image keeps."""
    margin = mask.shape[0] // 16
    return mask[margin:-margin, margin:-margin]


def render_demo_dataset(out: Path, config: DemoConfig) -> Path:
    """Render the demo data set into a folder that is there whole or not at all.

    Args:
        out: Folder of the set. If it holds a set of exactly this configuration, nothing is rendered.
        config: What to render.

    Returns:
        The folder, with `<category>/train/good`, `<category>/test/<defect type>` and
        `<category>/ground_truth/<defect type>` below it.

    Raises:
        ConfigurationError: The configuration is invalid, `out` cannot be written or holds something else.
    """
    check_demo_config(config)
    out = Path(out).expanduser().resolve()
    if _is_rendered(out, config):
        LOGGER.info("%s holds this demo data set already: nothing rendered", out)
        return out
    partial = _make_partial_folder(out)
    try:
        for item in progress(list(_items(config)), "rendering the demo data set"):
            _write_sample(partial, item, render_sample(item, config.image_size_px, config.seed))
        (partial / CONFIG_NAME).write_text(_config_text(config), encoding="utf-8")
        _publish(partial, out, config)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_demo_config(config: DemoConfig) -> None:
    """Check a configuration before any work.

    Args:
        config: What shall be rendered.

    Raises:
        ConfigurationError: A category is unknown or missing, or a size, count or seed is out of range.
    """
    known = ", ".join(CATALOGUE)
    unknown = [name for name in config.categories if name not in CATALOGUE]
    if unknown:
        raise ConfigurationError(f"unknown demo category {', '.join(unknown)}: choose from {known}")
    if not config.categories or len(set(config.categories)) < len(config.categories):
        raise ConfigurationError(
            f"demo categories {list(config.categories)}: name each category once, at least one of {known}"
        )
    for option, name, minimum, maximum in (
        ("--size", "image_size_px", MIN_SIZE_PX, MAX_SIZE_PX),
        ("--num_train", "num_train", 1, MAX_COUNT),
        ("--num_test_good", "num_test_good", 0, MAX_COUNT),
        ("--num_test_defect", "num_test_defect", 0, MAX_COUNT),
        ("--seed", "seed", 0, MAX_SEED),
    ):
        value = getattr(config, name)
        if value < minimum:
            raise ConfigurationError(f"{option} is {value}, expected at least {minimum}: give a larger value")
        if value > maximum:
            raise ConfigurationError(f"{option} is {value}, expected at most {maximum}: give a smaller value")


def _config_text(config: DemoConfig) -> str:
    """Return the configuration as it stands in the set's folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _holds_set(out: Path, config: DemoConfig) -> bool:
    """Tell whether a folder holds a finished set of this configuration."""
    path = out / CONFIG_NAME
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") == _config_text(config)


def _is_rendered(out: Path, config: DemoConfig) -> bool:
    """Tell whether `out` holds the set already; raise unless it does or can become a new folder."""
    try:
        if _holds_set(out, config):
            return True
        if out.exists() and not out.is_dir():
            raise ConfigurationError(f"{out} is a file, expected a folder: give another path")
        occupied = out.is_dir() and any(out.iterdir())
        stale = (out / CONFIG_NAME).is_file()
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be read ({error.strerror}): give another path") from error
    if occupied:
        found = "a demo data set of another configuration" if stale else "other files"
        raise ConfigurationError(
            f"{out} holds {found}, expected no folder or an empty one: delete it or give another path"
        )
    return False


def _make_partial_folder(out: Path) -> Path:
    """Create the folder beside `out` that is renamed when it is complete."""
    # The process id keeps simultaneous runs apart; a folder with our own id was left by a process now dead.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"{out} cannot be written ({error.strerror}): give a path in a writable folder"
        ) from error
    return partial


def _publish(partial: Path, out: Path, config: DemoConfig) -> None:
    """Give the complete set its name."""
    try:
        os.replace(partial, out)
    except OSError as error:
        if not _holds_set(out, config):  # else a simultaneous run of the same configuration was faster
            raise ConfigurationError(
                f"{out} cannot be replaced by the rendered set ({error.strerror}): give a new path"
            ) from error


def _items(config: DemoConfig) -> Iterator[DemoItem]:
    """Yield every image of a set."""
    for category in config.categories:
        groups = [("train", GOOD, config.num_train), ("test", GOOD, config.num_test_good)]
        groups += [("test", defect_type, config.num_test_defect) for defect_type in CATALOGUE[category].defects]
        for split, defect_type, count in groups:
            for index in range(count):
                yield DemoItem(category, split, defect_type, index)


def _write_sample(folder: Path, item: DemoItem, sample: DemoSample) -> None:
    """Write an image, and for a defective part its mask."""
    _write_png(folder / item.category / item.split / item.defect_type / f"{item.index:03d}.png", sample.image)
    if item.defect_type != GOOD:
        mask = sample.mask.astype(np.uint8) * 255
        _write_png(folder / item.category / "ground_truth" / item.defect_type / f"{item.index:03d}_mask.png", mask)


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write 8-bit pixels, [H,W] or [H,W,3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Sensor noise hardly compresses: the default level takes twice the time for a tenth of the bytes.
    Image.fromarray(pixels).save(path, compress_level=1)
