"""The data sets a command can name."""

from __future__ import annotations

from patchcore.configs import require_choice
from patchcore.datasets.inspection import InspectionDataset
from patchcore.datasets.mpdd import MPDDDataset
from patchcore.datasets.mvtec import MVTecDataset

DATASETS: dict[str, type[InspectionDataset]] = {
    dataset.name: dataset for dataset in (MVTecDataset, MPDDDataset, InspectionDataset)
}


def dataset_class(name: str) -> type[InspectionDataset]:
    """Return the class of a data set by name.

    Raises:
        ConfigurationError: The name is unknown; the message has near matches.
    """
    require_choice("data set", name, DATASETS)
    return DATASETS[name]
