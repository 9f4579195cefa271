"""The categories of the demo data set: four sound parts, and the defect types each of them can have.

A category is one entry of `CATALOGUE`; its name and those of its defect types become folder names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patchcore.datasets.demo_defects import (
    Defect,
    bend_and_parts_mismatch,
    defective_painting,
    hole,
    major_rust,
    parts_mismatch,
    scratches,
    total_rust,
)
from patchcore.datasets.demo_parts import BRASS, STEEL, ZINC, Fastener, Finish, Hole, Part, Plate


@dataclass(frozen=True)
class Category:
    """One kind of part.

    Attributes:
        make: Makes a sound part; the generator draws what varies between sound parts.
        defects: Defect types by name.
    """

    make: Callable[[np.random.Generator], Part]
    defects: dict[str, Defect]


def metal_plate(rng: np.random.Generator) -> Part:
    """Return a sound brushed steel plate with a bore in the middle and a drilled hole in each corner."""
    corners = tuple(Hole(u, v, radius=0.018) for u in (-0.235, 0.235) for v in (-0.145, 0.145))
    body = Plate(half_u=0.285, half_v=0.195, radius=0.018, holes=(Hole(0.0, 0.0, radius=0.052), *corners))
    finish = Finish(STEEL, gloss=0.3, shininess=26.0, brushed=True, unevenness=0.2, relief=0.0004)
    return Part(finish, (body,))


def bracket_black(rng: np.random.Generator) -> Part:
    """Return a sound L-shaped bracket, painted black, its shorter leg bent upwards."""
    long_leg = Plate(
        v=0.125,
        half_u=0.27,
        half_v=0.085,
        radius=0.03,
        holes=(Hole(0.04, 0.0, radius=0.034), Hole(0.195, 0.0, radius=0.024)),
    )
    short_leg = Plate(
        u=-0.185,
        v=0.125,
        angle=-math.pi / 2,
        centre=0.15,
        half_u=0.2,
        half_v=0.085,
        radius=0.03,
        fold=0.15,
        slope=0.28,
        holes=(Hole(0.245, 0.0, radius=0.022, half_length=0.045),),
    )
    return Part(Finish((0.022, 0.022, 0.024), gloss=0.09), (long_leg, short_leg))


def bracket_brown(rng: np.random.Generator) -> Part:
    """Return a sound bracket, painted red-brown, with two arms, two bolts and two screws."""
    plates = (
        Plate(half_u=0.15, half_v=0.165, radius=0.03),
        _arm(u=0.12, v=0.045, angle=0.0),
        _arm(u=-0.12, v=-0.045, angle=math.pi),
    )
    turns = rng.uniform(-math.pi, math.pi, size=4).tolist()  # nobody aligns the heads
    fasteners = (
        _bolt(-0.07, 0.085, turns[0]),
        _bolt(0.07, -0.085, turns[1]),
        _screw(0.085, 0.105, turns[2]),
        _screw(-0.085, -0.105, turns[3]),
    )
    return Part(Finish((0.150, 0.058, 0.034), gloss=0.07), plates, fasteners)


def _arm(u: float, v: float, angle: float) -> Plate:
    """Return an arm of the brown bracket, rounded at its end and drilled there."""
    end = Hole(0.185, 0.0, radius=0.022)
    return Plate(u=u, v=v, angle=angle, centre=0.11, half_u=0.13, half_v=0.048, radius=0.046, holes=(end,))


def _bolt(u: float, v: float, angle: float) -> Fastener:
    """Return a large hexagon bolt of the brown bracket."""
    return Fastener(
        u, v, angle, head="hex", radius=0.032, head_albedo=ZINC,
        washer="round", washer_radius=0.050, washer_albedo=ZINC,
    )  # fmt: skip


def _screw(u: float, v: float, angle: float) -> Fastener:
    """Return a small slotted screw of the brown bracket."""
    return Fastener(
        u, v, angle, head="slotted", radius=0.020, head_albedo=ZINC,
        washer="round", washer_radius=0.029, washer_albedo=BRASS,
    )  # fmt: skip


def bracket_white(rng: np.random.Generator) -> Part:
    """Return a sound channel, painted white, with two raised flanges, a slot and two holes."""
    holes = (
        Hole(0.0, 0.0, radius=0.024, half_length=0.07),
        Hole(-0.2, 0.0, radius=0.026),
        Hole(0.17, 0.0, radius=0.026),
    )
    plates = (
        Plate(half_u=0.31, half_v=0.125, radius=0.03, fold=0.225, slope=0.3, holes=holes),
        Plate(v=0.105, centre=-0.03, half_u=0.25, half_v=0.018, radius=0.008, level=0.022),
        Plate(v=-0.105, centre=-0.03, half_u=0.25, half_v=0.018, radius=0.008, level=0.022),
    )
    return Part(Finish((0.60, 0.60, 0.58), gloss=0.06), plates)


CATALOGUE: dict[str, Category] = {
    "metal_plate": Category(
        metal_plate,
        {"scratches": scratches(bare=(0.75, 0.75, 0.75)), "major_rust": major_rust, "total_rust": total_rust},
    ),
    "bracket_black": Category(bracket_black, {"hole": hole, "scratches": scratches(bare=(0.45, 0.45, 0.46))}),
    "bracket_brown": Category(
        bracket_brown,
        {"bend_and_parts_mismatch": bend_and_parts_mismatch, "parts_mismatch": parts_mismatch},
    ),
    "bracket_white": Category(
        bracket_white,
        {"defective_painting": defective_painting, "scratches": scratches(bare=(0.09, 0.09, 0.10))},
    ),
}
