"""MVTec AD (Bergmann et al., CVPR 2019): 15 classes of objects and textures."""

from __future__ import annotations

from typing import ClassVar

from patchcore.datasets.inspection import InspectionDataset


class MVTecDataset(InspectionDataset):
    """One class of MVTec AD."""

    name: ClassVar[str] = "mvtec"
    categories: ClassVar[tuple[str, ...]] = (
        "bottle",
        "cable",
        "capsule",
        "carpet",
        "grid",
        "hazelnut",
        "leather",
        "metal_nut",
        "pill",
        "screw",
        "tile",
        "toothbrush",
        "transistor",
        "wood",
        "zipper",
    )
