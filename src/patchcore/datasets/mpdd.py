"""MPDD, Metal Parts Defect Detection (Jezek et al., ICUMT 2021): six classes of painted metal parts."""

from __future__ import annotations

from typing import ClassVar

from patchcore.datasets.inspection import InspectionDataset


class MPDDDataset(InspectionDataset):
    """One class of MPDD."""

    name: ClassVar[str] = "mpdd"
    categories: ClassVar[tuple[str, ...]] = (
        "bracket_black",
        "bracket_brown",
        "bracket_white",
        "connector",
        "metal_plate",
        "tubes",
    )
