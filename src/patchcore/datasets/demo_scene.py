"""A small height-field renderer: bench, light, camera and procedural noise of the demo images.

Lengths are in image sides, so that one scene description gives the same picture at every size in pixels.
Colours are linear reflectances until `photograph` turns them into 8-bit values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from skimage.filters import gaussian

FloatArray = npt.NDArray[np.float32]
Colour = tuple[float, float, float]

LATTICE_CELLS = 128  # a power of two: indices wrap with a bit mask
CAMERA_DISTANCE = 3.0  # image sides; far enough for an almost orthographic view
MAX_SLOPE = 1.5  # a vertical wall has an infinite slope; its rim shall shine, not burn out
HIGHEST = 0.09  # image sides; no part is higher, so that the reach of shadows is the same for all of them
SHADOW_STEPS = 22
GAMMA = 2.2


@dataclass(frozen=True)
class Grid:
    """Coordinates of every pixel in one frame of reference.

    Attributes:
        u: Horizontal coordinate, [H,W], in image sides.
        v: Vertical coordinate, [H,W], downwards.
        pixel: Side of a pixel in the same unit.
    """

    u: FloatArray
    v: FloatArray
    pixel: float

    def moved(self, u: float, v: float, angle: float, scale: float = 1.0) -> Grid:
        """Return the coordinates as seen from an object at (u, v), turned by `angle` and enlarged by `scale`.

        Args:
            u: Horizontal position of the object in this frame.
            v: Vertical position of the object in this frame.
            angle: Rotation in radians, clockwise on the image.
            scale: Size of the object relative to this frame, > 0.
        """
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        shifted_u, shifted_v = self.u - u, self.v - v
        return Grid(
            u=cosine * shifted_u + sine * shifted_v,
            v=cosine * shifted_v - sine * shifted_u,
            pixel=self.pixel / scale,
        )

    def window(self, reach: float) -> tuple[slice, slice]:
        """Return the rows and columns that hold every point closer than `reach` to the origin."""
        near = (np.abs(self.u) <= reach) & (np.abs(self.v) <= reach)
        rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        if rows.size == 0:
            return slice(0, 0), slice(0, 0)
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def __getitem__(self, window: tuple[slice, slice]) -> Grid:
        """Return the coordinates of a window of the image."""
        return Grid(self.u[window], self.v[window], self.pixel)

    def coverage(self, distance: FloatArray) -> FloatArray:
        """Return the share of each pixel inside a shape, [H,W] in [0,1], from its signed distance."""
        return np.clip(0.5 - distance / self.pixel, 0.0, 1.0)


def image_grid(size_px: int) -> Grid:
    """Return pixel centres of a square image with the origin in the middle and sides of length 1."""
    line = ((np.arange(size_px) + 0.5) / size_px - 0.5).astype(np.float32)
    u, v = np.meshgrid(line, line)  # [H,W]
    return Grid(u=u, v=v, pixel=1.0 / size_px)


def box_distance(u: FloatArray, v: FloatArray, half_u: float, half_v: float, radius: float) -> FloatArray:
    """Return the signed distance to a box with rounded corners around the origin, negative inside.

    Args:
        u: Horizontal coordinate, [H,W].
        v: Vertical coordinate, [H,W].
        half_u: Half the width, corners included.
        half_v: Half the height, corners included.
        radius: Corner radius, at most the smaller half side; equal to it gives a slot, to both a circle.
    """
    outside_u = np.abs(u) - (half_u - radius)
    outside_v = np.abs(v) - (half_v - radius)
    corner = np.sqrt(np.maximum(outside_u, 0.0) ** 2 + np.maximum(outside_v, 0.0) ** 2)
    return corner + np.minimum(np.maximum(outside_u, outside_v), 0.0) - radius


def hexagon_distance(u: FloatArray, v: FloatArray, apothem: float) -> FloatArray:
    """Return the signed distance to the sides of a regular hexagon (a bound outside, beyond its corners)."""
    third = math.pi / 3
    sides = [u * math.cos(k * third) + v * math.sin(k * third) for k in range(3)]
    return np.maximum.reduce([np.abs(side) for side in sides]) - apothem


def polyline_distance(grid: Grid, points: npt.NDArray[np.float64]) -> tuple[FloatArray, FloatArray]:
    """Return the distance to a polyline and how far along it the nearest point lies.

    Args:
        grid: Where to measure.
        points: Vertices, [N,2] as (u, v), N >= 2.

    Returns:
        Distance [H,W], and position along the line [H,W] in [0,1].
    """
    nearest = np.full(grid.u.shape, np.inf, dtype=np.float32)
    position = np.zeros_like(nearest)
    num_segments = len(points) - 1
    for k in range(num_segments):
        (start_u, start_v), (step_u, step_v) = points[k].tolist(), (points[k + 1] - points[k]).tolist()
        from_u, from_v = grid.u - start_u, grid.v - start_v
        squared_length = max(step_u**2 + step_v**2, 1e-12)
        along = np.clip((from_u * step_u + from_v * step_v) / squared_length, 0.0, 1.0)
        distance = np.sqrt((from_u - along * step_u) ** 2 + (from_v - along * step_v) ** 2)
        closer = distance < nearest
        nearest = np.where(closer, distance, nearest)
        position = np.where(closer, (k + along) / num_segments, position)
    return nearest, position


def ramp(x: FloatArray, start: float, stop: float) -> FloatArray:
    """Return a smooth step from 0 at `start` to 1 at `stop`."""
    t = np.clip((x - start) / (stop - start), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def value_noise(rng: np.random.Generator, u: FloatArray, v: FloatArray, octaves: int = 1) -> FloatArray:
    """Return smooth noise over a plane: random values on an integer lattice, interpolated between them.

    Args:
        rng: Source of the lattice; the noise at a point does not depend on the image size.
        u: Horizontal coordinate in lattice cells, [H,W].
        v: Vertical coordinate in lattice cells, [H,W].
        octaves: Layers of noise, each at twice the frequency and half the amplitude of the one before.

    Returns:
        Noise [H,W] around 0 in [-1,1].
    """
    total = np.zeros_like(u)
    for octave in range(octaves):
        lattice = rng.random((LATTICE_CELLS, LATTICE_CELLS), dtype=np.float32)
        total += _interpolate(lattice, u * 2**octave, v * 2**octave) * 0.5**octave
    return (2.0 * total - (2.0 - 0.5 ** (octaves - 1))) / (2.0 - 0.5 ** (octaves - 1))


def _interpolate(lattice: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
    """Read a periodic lattice between its points, with a smooth weight that hides the cells."""
    floor_u, floor_v = np.floor(u), np.floor(v)
    weight_u, weight_v = u - floor_u, v - floor_v
    weight_u *= weight_u * (3.0 - 2.0 * weight_u)
    weight_v *= weight_v * (3.0 - 2.0 * weight_v)
    column, row = floor_u.astype(np.intp) & (LATTICE_CELLS - 1), floor_v.astype(np.intp) & (LATTICE_CELLS - 1)
    cell = row * LATTICE_CELLS + column
    periodic = np.pad(lattice, ((0, 1), (0, 1)), mode="wrap")
    corner = periodic[:-1, :-1]
    # Differences are taken on the small lattice, so that each pixel gathers four numbers only.
    step_u, step_v = periodic[:-1, 1:] - corner, periodic[1:, :-1] - corner
    twist = periodic[1:, 1:] - periodic[1:, :-1] - step_u
    along_u = corner.take(cell) + weight_u * step_u.take(cell)
    return along_u + weight_v * (step_v.take(cell) + weight_u * twist.take(cell))


@dataclass
class Surface:
    """What the camera sees from above: one height, colour and gloss per pixel.

    Attributes:
        height: Height over the bench, [H,W], in image sides.
        albedo: Diffuse reflectance, [H,W,3] in [0,1].
        gloss: Strength of the highlight, [H,W] in [0,1].
        shininess: Exponent of the highlight, [H,W]; larger is narrower.
    """

    height: FloatArray
    albedo: FloatArray
    gloss: FloatArray
    shininess: FloatArray

    def cover(
        self,
        coverage: FloatArray,
        height: FloatArray,
        albedo: FloatArray,
        gloss: FloatArray | float,
        shininess: float,
    ) -> None:
        """Lay material over the surface in place, in proportion to `coverage`, [H,W] in [0,1]."""
        self.height += coverage * (height - self.height)
        self.albedo += coverage[..., None] * (albedo - self.albedo)
        self.gloss += coverage * (gloss - self.gloss)
        self.shininess += coverage * (shininess - self.shininess)

    def __getitem__(self, window: tuple[slice, slice]) -> Surface:
        """Return a window of the surface that shares its memory."""
        return Surface(self.height[window], self.albedo[window], self.gloss[window], self.shininess[window])

    def copy(self) -> Surface:
        """Return a surface that can be painted without changing this one."""
        return Surface(self.height.copy(), self.albedo.copy(), self.gloss.copy(), self.shininess.copy())


@dataclass(frozen=True)
class Light:
    """A lamp beside the camera.

    Attributes:
        azimuth: Direction towards the lamp on the image, radians, clockwise from the right.
        elevation: Angle over the bench, radians.
        distance: From the middle of the bench, image sides.
        strength: Brightness of the lamp, 1 exposes a white part just below saturation.
        ambient: Share of light that comes from everywhere, in [0,1].
        tint: Colour of the light, near (1, 1, 1).
    """

    azimuth: float
    elevation: float
    distance: float
    strength: float
    ambient: float
    tint: Colour

    @property
    def position(self) -> Colour:
        """Return (u, v, height) of the lamp."""
        reach = self.distance * math.cos(self.elevation)
        return (
            reach * math.cos(self.azimuth),
            reach * math.sin(self.azimuth),
            self.distance * math.sin(self.elevation),
        )


def draw_light(rng: np.random.Generator) -> Light:
    """Draw a lamp somewhere above the upper edge of the image, brighter or dimmer, warmer or cooler."""
    warmth = rng.uniform(-0.05, 0.05)
    return Light(
        azimuth=math.radians(rng.uniform(-150.0, -90.0)),
        elevation=math.radians(rng.uniform(48.0, 62.0)),
        distance=rng.uniform(1.6, 2.2),
        strength=rng.uniform(0.72, 1.18),
        ambient=rng.uniform(0.3, 0.42),
        tint=(1.0 + warmth, 1.0, 1.0 - warmth),
    )


def draw_bench(rng: np.random.Generator, grid: Grid) -> Surface:
    """Draw the surface a part lies on: a rubber mat, a grey laminate or a wooden board."""
    kind = rng.choice(["mat", "laminate", "wood"])
    board = grid.moved(rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(-0.12, 0.12))
    tone = rng.uniform(0.8, 1.2)
    stain = value_noise(rng, board.u * 3, board.v * 3, octaves=2)
    if kind == "mat":
        base, gloss = (0.050, 0.075, 0.072), 0.03
        grain = 0.30 * value_noise(rng, board.u * 90, board.v * 90)
    elif kind == "laminate":
        base, gloss = (0.28, 0.29, 0.30), 0.06
        grain = 0.16 * value_noise(rng, board.u * 60, board.v * 60, octaves=2)
    else:
        base, gloss = (0.34, 0.21, 0.12), 0.05
        rings = value_noise(rng, board.u * 1.2, board.v * 14, octaves=2)
        grain = 0.14 * np.sin(9.0 * rings) + 0.12 * value_noise(rng, board.u * 8, board.v * 110)
    colour = np.float32(tone) * np.asarray(base, np.float32)
    albedo = colour * (1.0 + grain + 0.1 * stain)[..., None]  # [H,W,3]
    return Surface(
        height=0.0012 * grain.astype(np.float32),
        albedo=albedo.astype(np.float32),
        gloss=np.full(grid.u.shape, gloss, np.float32),
        shininess=np.full(grid.u.shape, 10.0, np.float32),
    )


def _unit(vector: FloatArray) -> FloatArray:
    """Scale [3,H,W] vectors to length 1."""
    return vector / np.sqrt(np.einsum("chw,chw->hw", vector, vector))


def _cast_shadow(height: FloatArray, light: Light) -> FloatArray:
    """Return how much each pixel lies in the shadow of higher ones, [H,W] in [0,1]."""
    size_px = height.shape[0]
    rise = math.tan(light.elevation)
    reach = HIGHEST / rise
    shadow = np.zeros_like(height)
    for step in range(1, SHADOW_STEPS + 1):
        length = reach * step / SHADOW_STEPS
        shift = (
            -round(length * math.sin(light.azimuth) * size_px),
            -round(length * math.cos(light.azimuth) * size_px),
        )
        towards_lamp = np.roll(height, shift, axis=(0, 1))
        shadow = np.maximum(shadow, np.clip((towards_lamp - length * rise - height) / 0.006, 0.0, 1.0))
    return gaussian(shadow, sigma=0.005 * size_px)


def shade(surface: Surface, light: Light, grid: Grid) -> FloatArray:
    """Return the light that each pixel sends to the camera, [H,W,3], linear, >= 0.

    Lambertian reflection plus a Blinn-Phong highlight, with cast shadows and darkened corners.

    Args:
        surface: What lies under the camera.
        light: The lamp.
        grid: Image coordinates of the pixels.
    """
    size_px = surface.height.shape[0]
    slope_v, slope_u = np.gradient(surface.height, grid.pixel)
    flat = np.ones_like(surface.height)
    normal = _unit(
        np.stack([-np.clip(slope_u, -MAX_SLOPE, MAX_SLOPE), -np.clip(slope_v, -MAX_SLOPE, MAX_SLOPE), flat])
    )  # [3,H,W]
    lamp_u, lamp_v, lamp_height = light.position
    to_lamp = np.stack([lamp_u - grid.u, lamp_v - grid.v, lamp_height * flat])  # [3,H,W]
    falloff = light.distance**2 / np.einsum("chw,chw->hw", to_lamp, to_lamp)
    to_lamp = _unit(to_lamp)
    to_camera = _unit(np.stack([-grid.u, -grid.v, CAMERA_DISTANCE * flat]))  # [3,H,W]
    diffuse = np.maximum(np.einsum("chw,chw->hw", normal, to_lamp), 0.0)
    highlight = np.maximum(np.einsum("chw,chw->hw", normal, _unit(to_lamp + to_camera)), 0.0)
    direct = falloff * (1.0 - 0.85 * _cast_shadow(surface.height, light))
    buried = np.maximum(gaussian(surface.height, sigma=0.012 * size_px) - surface.height, 0.0)
    ambient = light.ambient * np.exp(-25.0 * buried)
    matte = (ambient + (1.0 - light.ambient) * diffuse * direct)[..., None] * surface.albedo  # [H,W,3]
    shine = surface.gloss * highlight**surface.shininess * direct
    tint = np.asarray(light.tint, np.float32)
    return (light.strength * tint * (matte + shine[..., None])).astype(np.float32)


def photograph(radiance: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Turn linear light into an 8-bit picture: lens blur, vignetting, gamma and sensor noise.

    Args:
        radiance: Light per pixel, [H,W,3], linear.
        rng: Source of the noise; the same state gives the same noise whatever the picture shows.

    Returns:
        Picture [H,W,3], uint8.
    """
    size_px = radiance.shape[0]
    grid = image_grid(size_px)
    vignette = 1.0 - rng.uniform(0.1, 0.3) * (grid.u**2 + grid.v**2)
    blurred = gaussian(radiance, sigma=rng.uniform(0.0016, 0.0024) * size_px, channel_axis=-1)
    encoded = np.clip(blurred * vignette[..., None], 0.0, 1.0) ** (1.0 / GAMMA)
    noise = rng.uniform(0.006, 0.011) * rng.standard_normal(radiance.shape, dtype=np.float32)
    return np.round(np.clip(encoded + noise, 0.0, 1.0) * 255.0).astype(np.uint8)
