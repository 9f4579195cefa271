"""The metal parts of the demo data set: what they are made of and how they are painted into a scene.

A part is a description, not a picture. A defect (see `demo_defects`) is a change of that description, so that
the sound and the defective part can be photographed on the same bench, by the same light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from patchcore.datasets.demo_scene import (
    Colour,
    FloatArray,
    Grid,
    Surface,
    box_distance,
    hexagon_distance,
    polyline_distance,
    ramp,
    value_noise,
)

Material = Literal["rust", "steel", "stain", "paint"]

THICKNESS = 0.020  # of sheet metal, image sides
BEVEL = 0.009
PAINT_SHININESS = 16.0
METAL_SHININESS = 18.0
ROUGH_SHININESS = 12.0
STEEL: Colour = (0.30, 0.30, 0.31)
ZINC: Colour = (0.42, 0.42, 0.41)
BRASS: Colour = (0.46, 0.30, 0.09)
BLACK_OXIDE: Colour = (0.035, 0.035, 0.040)
RUST_DARK: Colour = (0.070, 0.035, 0.020)
RUST_BRIGHT: Colour = (0.300, 0.115, 0.030)
STAIN: Colour = (0.38, 0.29, 0.15)
THICK_PAINT: Colour = (0.50, 0.46, 0.36)


@dataclass(frozen=True)
class Finish:
    """Surface of the sheet metal.

    Attributes:
        albedo: Diffuse reflectance.
        gloss: Strength of the highlight.
        shininess: Exponent of the highlight.
        brushed: Brushed along the part, or painted with a slight orange peel.
        unevenness: Relative amplitude of the texture in brightness.
        relief: Its amplitude in height, image sides.
    """

    albedo: Colour
    gloss: float
    shininess: float = PAINT_SHININESS
    brushed: bool = False
    unevenness: float = 0.05
    relief: float = 0.0010


@dataclass(frozen=True)
class Hole:
    """A drilled hole, or a slot when `half_length` exceeds `radius`; (u, v) in the frame of its plate."""

    u: float
    v: float
    radius: float
    half_length: float = 0.0


@dataclass(frozen=True)
class Plate:
    """A rounded rectangle of sheet metal that hangs on a pivot.

    Attributes:
        half_u: Half the length along the plate's own u axis.
        half_v: Half the width.
        radius: Corner radius.
        u: Horizontal position of the pivot on the part.
        v: Vertical position of the pivot on the part.
        angle: Direction of the plate's own u axis, radians, clockwise.
        centre: Middle of the rectangle along the plate's own u axis, from the pivot.
        level: Height of the lower face over the bench.
        fold: Where on its own u axis the plate is bent upwards; None leaves it flat.
        slope: Rise per length beyond the fold.
        holes: Holes in the plate's own frame.
    """

    half_u: float
    half_v: float
    radius: float
    u: float = 0.0
    v: float = 0.0
    angle: float = 0.0
    centre: float = 0.0
    level: float = 0.0
    fold: float | None = None
    slope: float = 0.0
    holes: tuple[Hole, ...] = ()


@dataclass(frozen=True)
class Fastener:
    """A bolt or screw with a washer.

    Attributes:
        u: Horizontal position on the part.
        v: Vertical position on the part.
        angle: Rotation of head and washer, radians.
        head: Kind of the head; "none" leaves the empty bore.
        radius: Radius of the head.
        head_albedo: Colour of the head.
        washer: Shape of the washer.
        washer_radius: Its radius, or half its side.
        washer_albedo: Its colour.
    """

    u: float
    v: float
    angle: float
    head: Literal["hex", "slotted", "none"]
    radius: float
    head_albedo: Colour
    washer: Literal["round", "square", "none"]
    washer_radius: float
    washer_albedo: Colour


@dataclass(frozen=True)
class Scratch:
    """A groove that cuts to the bare metal; `points` are (u, v) on the part."""

    points: tuple[tuple[float, float], ...]
    width: float
    strength: float
    albedo: Colour
    seed: int


@dataclass(frozen=True)
class Patch:
    """An irregular area where the surface is replaced.

    Attributes:
        u: Horizontal position on the part.
        v: Vertical position on the part.
        half_u: Half its length.
        half_v: Half its width.
        angle: Direction of its length, radians.
        irregularity: How far the outline strays from an ellipse, 0 not at all.
        softness: Width of the outline relative to the size of the patch.
        strength: Opacity in [0,1].
        relief: Height added (a paint run) or taken (a chip), image sides.
        material: What shows there.
        seed: Of outline and texture.
    """

    u: float
    v: float
    half_u: float
    half_v: float
    angle: float
    irregularity: float
    softness: float
    strength: float
    relief: float
    material: Material
    seed: int


@dataclass(frozen=True)
class Part:
    """A metal part: plates of one finish, fasteners on them, and the marks that defects leave."""

    finish: Finish
    plates: tuple[Plate, ...]
    fasteners: tuple[Fastener, ...] = ()
    scratches: tuple[Scratch, ...] = ()
    patches: tuple[Patch, ...] = ()

    def distance(self, frame: Grid, level: float | None = None) -> FloatArray:
        """Return the signed distance to the sheet metal, holes cut out, [H,W], negative inside.

        Args:
            frame: Part coordinates.
            level: Consider only the plates of this level; None takes all.
        """
        solid = np.full(frame.u.shape, np.inf, dtype=np.float32)
        empty = np.full(frame.u.shape, -np.inf, dtype=np.float32)
        for plate in self.plates:
            if level is not None and plate.level != level:
                continue
            own = frame.moved(plate.u, plate.v, plate.angle)
            body = box_distance(own.u - plate.centre, own.v, plate.half_u, plate.half_v, plate.radius)
            solid = np.minimum(solid, body)
            for hole in plate.holes:
                half_length = max(hole.half_length, hole.radius)
                bore = box_distance(own.u - hole.u, own.v - hole.v, half_length, hole.radius, hole.radius)
                empty = np.maximum(empty, -bore)
        return np.maximum(solid, empty)


def metal_texture(rng: np.random.Generator, frame: Grid, finish: Finish) -> FloatArray:
    """Return the fine structure of a finish, [H,W] around 0 in [-1,1].

    Args:
        rng: Source of the structure.
        frame: Part coordinates of every pixel.
        finish: Brushed metal is streaky along the part, paint has an orange peel.
    """
    if finish.brushed:
        fine = value_noise(rng, frame.u * 4.0, frame.v * 170.0)
        return 0.6 * fine + 0.4 * value_noise(rng, frame.u * 11.0, frame.v * 80.0)
    return value_noise(rng, frame.u * 45.0, frame.v * 45.0, octaves=2)


def draw_part(surface: Surface, frame: Grid, part: Part, texture: FloatArray) -> None:
    """Paint a part over the surface: its plates from below, then marks, then fasteners.

    Args:
        surface: The bench; changed in place.
        frame: Part coordinates of every pixel.
        part: What to paint.
        texture: Fine structure of its sheet metal from `metal_texture`, [H,W].
    """
    for level in sorted({plate.level for plate in part.plates}):
        _draw_sheet(surface, frame, part, level, texture)
    sheet = frame.coverage(part.distance(frame))
    for patch in part.patches:
        _draw_patch(surface, frame, patch, sheet)
    for scratch in part.scratches:
        _draw_scratch(surface, frame, scratch, sheet)
    for fastener in part.fasteners:
        _draw_fastener(surface, frame, fastener)


def _draw_sheet(surface: Surface, frame: Grid, part: Part, level: float, texture: FloatArray) -> None:
    """Paint the plates of one level as a single sheet with bevelled edges and folds."""
    finish = part.finish
    distance = part.distance(frame, level)
    edge = 0.6 + 0.4 * ramp(-distance, 0.0, BEVEL)
    height = level + THICKNESS * edge + finish.relief * texture
    for plate in part.plates:
        if plate.fold is not None and plate.level == level:
            own = frame.moved(plate.u, plate.v, plate.angle)
            inside = np.abs(own.v) < plate.half_v + frame.pixel
            # A bend has a radius: a softened ramp instead of a sharp crease.
            past_fold = 0.012 * np.logaddexp(0.0, (own.u - plate.fold) / 0.012)
            height = height + inside * plate.slope * past_fold
    tone = 1.0 + finish.unevenness * texture
    albedo = tone[..., None] * _colour(finish.albedo)  # [H,W,3]
    surface.cover(frame.coverage(distance), height, albedo, finish.gloss * tone, finish.shininess)


def _draw_patch(surface: Surface, frame: Grid, patch: Patch, sheet: FloatArray) -> None:
    """Replace an irregular area of the sheet's surface."""
    rng = np.random.default_rng(patch.seed)
    own = frame.moved(patch.u, patch.v, patch.angle)
    window = own.window((1.0 + patch.irregularity + patch.softness) * max(patch.half_u, patch.half_v))
    own, surface, sheet = own[window], surface[window], sheet[window]
    size = math.sqrt(patch.half_u * patch.half_v)
    outline = value_noise(rng, own.u / size, own.v / size, octaves=4)
    radius = np.sqrt((own.u / patch.half_u) ** 2 + (own.v / patch.half_v) ** 2)
    softness = max(patch.softness, own.pixel / size)
    coverage = sheet * ramp(1.0 - radius + patch.irregularity * outline, -softness, softness)
    # The outline bends the texture as well, which hides the lattice that both come from.
    bend = 0.9 * outline
    texture = value_noise(rng, own.u * 26.0 + bend, own.v * 26.0 - bend, octaves=3)
    albedo, gloss = _material(patch.material, texture)
    surface.cover(coverage * patch.strength, surface.height, albedo, gloss, ROUGH_SHININESS)
    surface.height += patch.relief * coverage
    if patch.material == "rust":
        surface.height += 0.003 * coverage * texture


def _material(material: Material, texture: FloatArray) -> tuple[FloatArray, float]:
    """Return albedo, [H,W,3], and gloss of what shows in a patch.

    Args:
        material: What shows.
        texture: Its unevenness, [H,W] around 0.
    """
    uneven = texture[..., None]  # [H,W,1]
    if material == "rust":
        share = ramp(uneven, -0.35, 0.45)
        return _colour(RUST_DARK) * (1.0 - share) + _colour(RUST_BRIGHT) * share, 0.02
    if material == "steel":
        return _colour(STEEL) * (0.5 + 0.2 * uneven), 0.2
    if material == "stain":
        return _colour(STAIN) * (1.0 + 0.25 * uneven), 0.03
    return _colour(THICK_PAINT) * (1.0 + 0.05 * uneven), 0.08


def _colour(colour: Colour) -> FloatArray:
    """Return a colour that broadcasts over pixels, [3]."""
    return np.asarray(colour, dtype=np.float32)


def _draw_scratch(surface: Surface, frame: Grid, scratch: Scratch, sheet: FloatArray) -> None:
    """Cut a groove whose pressure varies along its length and fades towards both ends."""
    rng = np.random.default_rng(scratch.seed)
    points = np.asarray(scratch.points)
    middle_u, middle_v = points.mean(axis=0).tolist()
    reach = np.abs(points - (middle_u, middle_v)).max().item() + scratch.width + 2.0 * frame.pixel
    window = frame.moved(middle_u, middle_v, angle=0.0).window(reach)
    frame, surface, sheet = frame[window], surface[window], sheet[window]
    distance, along = polyline_distance(frame, points)
    pressure = 0.8 + 0.4 * value_noise(rng, along * 14.0, np.zeros_like(along))
    pressure = pressure * ramp(along, -0.02, 0.12) * ramp(-along, -1.02, -0.88)
    # A groove narrower than a pixel still darkens it in proportion to the share it covers.
    core = np.clip((scratch.width * pressure / 2 - distance) / frame.pixel + 0.5, 0.0, 1.0)
    coverage = sheet * core * np.minimum(pressure, 1.0) * scratch.strength
    surface.cover(coverage, surface.height, _colour(scratch.albedo), 0.25, ROUGH_SHININESS)
    surface.height -= 0.0015 * coverage


def _draw_fastener(surface: Surface, frame: Grid, fastener: Fastener) -> None:
    """Paint bore, washer and head of a bolt, from below."""
    own = frame.moved(fastener.u, fastener.v, fastener.angle)
    window = own.window(1.5 * max(fastener.radius, fastener.washer_radius))
    own, surface = own[window], surface[window]
    bore = _disc_distance(own, 0.62 * fastener.radius)
    surface.cover(own.coverage(bore), np.zeros_like(own.u), 0.35 * surface.albedo, 0.0, ROUGH_SHININESS)
    if fastener.washer != "none":
        radius = fastener.washer_radius
        corner = radius if fastener.washer == "round" else 0.15 * radius
        rim = np.maximum(box_distance(own.u, own.v, radius, radius, corner), -bore)
        _draw_metal(surface, own, rim, THICKNESS + 0.007, fastener.washer_albedo)
    if fastener.head == "none":
        return
    top = THICKNESS + 0.022
    if fastener.head == "hex":
        outline = hexagon_distance(own.u, own.v, 0.92 * fastener.radius)
        _draw_metal(surface, own, outline, top, fastener.head_albedo)
        return
    _draw_metal(surface, own, _disc_distance(own, fastener.radius), top, fastener.head_albedo)
    slot = box_distance(own.u, own.v, 0.8 * fastener.radius, 0.18 * fastener.radius, 0.0)
    dark = 0.25 * surface.albedo
    surface.cover(own.coverage(slot), np.full_like(own.u, top - 0.006), dark, 0.05, ROUGH_SHININESS)


def _disc_distance(own: Grid, radius: float) -> FloatArray:
    """Return the signed distance to a disc around the origin, [H,W], negative inside."""
    return box_distance(own.u, own.v, radius, radius, radius)


def _draw_metal(surface: Surface, frame: Grid, distance: FloatArray, top: float, albedo: Colour) -> None:
    """Paint a small turned or pressed piece of bare metal with a bevelled rim."""
    height = top - 0.006 * (1.0 - ramp(-distance, 0.0, 0.008))
    surface.cover(frame.coverage(distance), height, _colour(albedo), 0.3, METAL_SHININESS)
