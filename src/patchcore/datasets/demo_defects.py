"""The defects of the demo data set: changes of a part's description, drawn at random.

Every defect type makes coarse and fine examples; `fine` asks for a small or faint one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from patchcore.datasets.demo_parts import (
    BLACK_OXIDE,
    BRASS,
    Colour,
    Fastener,
    Hole,
    Part,
    Patch,
    Plate,
    Scratch,
)
from patchcore.datasets.demo_scene import Grid

Defect = Callable[[Part, np.random.Generator, bool], Part]

MAX_ATTEMPTS = 1000


def _seed(rng: np.random.Generator) -> int:
    """Draw a seed for the texture of one mark."""
    return int(rng.integers(2**62))


def point_grid(u: float, v: float) -> Grid:
    """Return a grid of a single point."""
    return Grid(np.full((1, 1), u, np.float32), np.full((1, 1), v, np.float32), pixel=1.0)


def point_on_sheet(part: Part, rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """Draw a point of the part's sheet metal away from edges and holes.

    Args:
        part: Where to look.
        rng: Source of the point.
        margin: Least distance to the edges, image sides.

    Returns:
        The point (u, v) in part coordinates.
    """
    for _ in range(MAX_ATTEMPTS):
        u, v = rng.uniform(-0.36, 0.36), rng.uniform(-0.36, 0.36)
        if part.distance(point_grid(u, v)).item() < -margin:
            return u, v
    raise RuntimeError(f"no point of the part is {margin} away from its edges")


def _scratch(part: Part, rng: np.random.Generator, length: float, width: float, strength: float, bare: Colour) -> Part:
    """Add one slightly curved scratch around a random point of the sheet."""
    u, v = point_on_sheet(part, rng, margin=0.014)
    direction, bend = rng.uniform(0.0, math.pi), rng.uniform(-0.9, 0.9)
    along = length * np.linspace(-0.5, 0.5, 9)
    aside = bend * length * (np.linspace(-0.5, 0.5, 9) ** 2 - 0.08)
    points_u = u + along * math.cos(direction) - aside * math.sin(direction)
    points_v = v + along * math.sin(direction) + aside * math.cos(direction)
    points = tuple(zip(points_u.tolist(), points_v.tolist(), strict=True))
    mark = Scratch(points, width, strength, bare, _seed(rng))
    return replace(part, scratches=(*part.scratches, mark))


def scratches(bare: Colour) -> Defect:
    """Return the defect that scratches a part.

    Args:
        bare: Colour that shows in the groove.
    """

    def scratch(part: Part, rng: np.random.Generator, fine: bool) -> Part:
        if fine:
            width, strength = rng.uniform(0.004, 0.006), rng.uniform(0.7, 0.9)
            return _scratch(part, rng, rng.uniform(0.07, 0.13), width, strength, bare)
        for _ in range(int(rng.integers(2, 6))):
            width, strength = rng.uniform(0.006, 0.011), rng.uniform(0.85, 1.0)
            part = _scratch(part, rng, rng.uniform(0.1, 0.3), width, strength, bare)
        return part

    return scratch


def hole(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Drill an additional hole, small when fine; a coarse one may be a bore that was forgotten instead."""
    if not fine and rng.random() < 0.15:
        plate = int(rng.integers(len(part.plates)))
        drilled = part.plates[plate].holes
        forgotten = drilled[int(rng.integers(len(drilled)))]
        return _with_holes(part, plate, tuple(other for other in drilled if other != forgotten))
    radius = rng.uniform(0.009, 0.012) if fine else rng.uniform(0.014, 0.024)
    u, v = point_on_sheet(part, rng, margin=radius + 0.012)
    burr = rng.uniform(1.25, 1.5) * radius  # drilled after painting: bare metal around the bore
    bare = Patch(
        u, v, burr, burr, angle=0.0, irregularity=0.2, softness=0.08, strength=1.0, relief=0.0,
        material="steel", seed=_seed(rng),
    )  # fmt: skip
    first = part.plates[0]
    own = point_grid(u, v).moved(first.u, first.v, first.angle)
    added = Hole(own.u.item(), own.v.item(), radius)
    return _with_holes(replace(part, patches=(*part.patches, bare)), 0, (*first.holes, added))


def _with_holes(part: Part, plate: int, holes: tuple[Hole, ...]) -> Part:
    """Return the part with other holes in one plate."""
    return _with_plate(part, plate, replace(part.plates[plate], holes=holes))


def _with_plate(part: Part, index: int, plate: Plate) -> Part:
    """Return the part with one plate exchanged."""
    return replace(part, plates=(*part.plates[:index], plate, *part.plates[index + 1 :]))


def _rust(part: Part, rng: np.random.Generator, half_u: float, half_v: float, strength: float) -> Part:
    """Add one patch of rust around a random point of the sheet."""
    u, v = point_on_sheet(part, rng, margin=0.02)
    patch = Patch(
        u, v, half_u, half_v, rng.uniform(0.0, math.pi), irregularity=1.1, softness=0.12, strength=strength,
        relief=0.0, material="rust", seed=_seed(rng),
    )  # fmt: skip
    return replace(part, patches=(*part.patches, patch))


def major_rust(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Let rust eat into a part: one thin patch when fine, else one to three large ones."""
    if fine:
        return _rust(part, rng, rng.uniform(0.03, 0.05), rng.uniform(0.02, 0.035), rng.uniform(0.55, 0.75))
    for _ in range(int(rng.integers(1, 4))):
        part = _rust(part, rng, rng.uniform(0.08, 0.2), rng.uniform(0.06, 0.12), rng.uniform(0.85, 1.0))
    return part


def total_rust(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Cover the whole part with rust, thin when fine."""
    patch = Patch(
        0.0, 0.0, half_u=2.0, half_v=2.0, angle=0.0, irregularity=0.4, softness=0.1,
        strength=0.6 if fine else 0.95, relief=0.0, material="rust", seed=_seed(rng),
    )  # fmt: skip
    return replace(part, patches=(*part.patches, patch))


def parts_mismatch(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Mount a wrong or no part in place of one bolt or screw; a wrong detail of a screw when fine."""
    smallest = min(fastener.radius for fastener in part.fasteners)
    candidates = [k for k, fastener in enumerate(part.fasteners) if not fine or fastener.radius == smallest]
    index = candidates[int(rng.integers(len(candidates)))]
    mounted = _mismatched(part.fasteners[index], rng, fine)
    return replace(part, fasteners=(*part.fasteners[:index], mounted, *part.fasteners[index + 1 :]))


def _mismatched(right: Fastener, rng: np.random.Generator, fine: bool) -> Fastener:
    """Return a fastener that differs from the right one."""
    changes: tuple[Fastener, ...]
    if fine:
        changes = (
            replace(right, washer="none"),
            replace(right, head="slotted" if right.head == "hex" else "hex"),
            replace(right, washer_albedo=BRASS if right.washer_albedo != BRASS else BLACK_OXIDE),
        )
    else:
        changes = (
            replace(right, head="none", washer="none"),
            replace(right, head="none"),
            replace(right, washer="square", washer_radius=1.1 * right.washer_radius),
            replace(right, head_albedo=BLACK_OXIDE, washer_albedo=BLACK_OXIDE),
            replace(right, washer_radius=1.5 * right.washer_radius),
        )
    return changes[int(rng.integers(len(changes)))]


def bend_and_parts_mismatch(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Bend an arm about its root, a little when fine, and mount a wrong part as well."""
    arms = [index for index, plate in enumerate(part.plates) if plate.holes]
    index = arms[int(rng.integers(len(arms)))]
    bend = math.radians(rng.uniform(8.0, 12.0) if fine else rng.uniform(14.0, 28.0)) * rng.choice([-1.0, 1.0])
    bent = replace(part.plates[index], angle=part.plates[index].angle + float(bend))
    return parts_mismatch(_with_plate(part, index, bent), rng, fine)


def defective_painting(part: Part, rng: np.random.Generator, fine: bool) -> Part:
    """Let paint chip off, run or discolour: one small fault when fine, else several of one kind."""
    kind = str(rng.choice(["chip", "stain", "run"]))
    for _ in range(1 if fine else int(rng.integers(2, 5))):
        u, v = point_on_sheet(part, rng, margin=0.02)
        size = rng.uniform(0.014, 0.02) if fine else rng.uniform(0.022, 0.045)
        part = replace(part, patches=(*part.patches, _paint_fault(kind, u, v, size, rng)))
    return part


def _paint_fault(kind: str, u: float, v: float, size: float, rng: np.random.Generator) -> Patch:
    """Return one chip, stain or run of paint."""
    turn, seed = rng.uniform(0.0, math.pi), _seed(rng)
    if kind == "chip":
        return Patch(
            u, v, size, 0.7 * size, turn, irregularity=0.7, softness=0.05, strength=1.0, relief=-0.003,
            material="steel", seed=seed,
        )  # fmt: skip
    if kind == "stain":
        return Patch(
            u, v, 1.6 * size, 1.1 * size, turn, irregularity=0.6, softness=0.5, relief=0.0,
            strength=rng.uniform(0.75, 1.0), material="stain", seed=seed,
        )  # fmt: skip
    return Patch(
        u, v, 2.2 * size, 0.6 * size, turn, irregularity=0.25, softness=0.5, strength=rng.uniform(0.6, 1.0),
        relief=0.005, material="paint", seed=seed,
    )  # fmt: skip
