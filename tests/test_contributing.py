"""The recipes of CONTRIBUTING.md, run as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_category
from test_detectors import check_contract

from patchcore.configs import BackboneConfig, DatasetConfig, PreprocessingConfig, RunConfig, RuntimeConfig
from patchcore.datasets.registry import DATASETS, dataset_class
from patchcore.detector import DETECTORS
from patchcore.features import backbones
from patchcore.features.extractor import build_extractor
from patchcore.pipeline import train_and_evaluate


def recipe(name: str) -> str:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# recipe: (.+?)\n(.*?)```", text, flags=re.DOTALL)
    return dict(blocks)[name]


@pytest.fixture(autouse=True)
def clean_registries() -> Iterator[None]:
    """Take back what a recipe entered."""
    saved = [(registry, dict(registry)) for registry in (DATASETS, DETECTORS, backbones.BACKBONES)]
    yield
    for registry, content in saved:
        registry.clear()  # type: ignore[attr-defined]
        registry.update(content)  # type: ignore[attr-defined]


def test_add_a_backbone() -> None:
    exec(compile(recipe("backbone"), "CONTRIBUTING.md", "exec", dont_inherit=True), vars(backbones))
    layers = backbones.BACKBONES["regnet"].good_layers
    extractor = build_extractor(BackboneConfig("regnet", layers, weights="random"), 64)
    maps = extractor(torch.randint(0, 256, (2, 3, 64, 64)))
    assert list(maps) == list(layers)
    assert all(m.ndim == 4 and m.isfinite().all() for m in maps.values())


def test_add_a_data_set(tmp_path: Path) -> None:
    exec(compile(recipe("data set"), "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": "recipe"})
    write_category(tmp_path, "02")
    dataset = dataset_class("btad")(tmp_path, "02", preprocessing=PreprocessingConfig(64, 64))
    assert dataset.name == "btad"
    assert len(dataset) == 6


def test_add_a_method(tmp_path: Path) -> None:
    names: dict[str, object] = {"__name__": "recipe_method"}
    exec(compile(recipe("method"), "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    config = names["MeanColourConfig"]()  # type: ignore[operator]
    check_contract("mean_colour", config, tmp_path / "model")

    write_category(tmp_path / "data", "plate")
    dataset = DatasetConfig("mpdd", str(tmp_path / "data"), num_workers=0, preprocessing=PreprocessingConfig(64, 64))
    run = RunConfig(str(tmp_path / "results"), runtime=RuntimeConfig(device="cpu"))
    lines: list[str] = []
    assert train_and_evaluate("mean_colour", lambda _: config, run, dataset, lines.append)
    results = (tmp_path / "results" / "project" / "group" / "results.csv").read_text(encoding="utf-8").splitlines()
    header, row = results[0].split(","), results[1].split(",")
    cells = dict(zip(header, row, strict=True))
    assert np.isclose(float(cells["instance_auroc"]), 1.0)
    assert cells["full_pixel_auroc"] == cells["full_pro"] == cells["pixel_ap"] == ""  # no map: blank, never 0.5
