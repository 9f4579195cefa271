"""Presets: the data file, its reader, and what beats what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchcore.configs import BackboneConfig, FastFlowConfig
from patchcore.errors import ConfigurationError
from patchcore.presets import FASTFLOW_FILE, SOURCES, fastflow_preset, read_presets, with_settings

BASE = FastFlowConfig(BackboneConfig("resnet18", ("layer2", "layer3")))


def write(folder: Path, content: Any) -> Path:
    path = folder / "presets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def entry(**settings: Any) -> dict[str, Any]:
    return {"resnet18": {"default": {"source": "ours", **settings}}}


def test_default_then_preset_then_typed_flag() -> None:
    preset = fastflow_preset("resnet18", "metal_plate")
    by_preset = with_settings(BASE, preset.settings)
    typed = with_settings(by_preset, {"epochs": 3, "flow_steps": 5})
    assert (BASE.training.lr, BASE.training.epochs, BASE.flow_steps, BASE.clamp) == (1e-3, 50, 8, 2.0)
    assert (by_preset.training.lr, by_preset.training.epochs, by_preset.flow_steps) == (1e-2, 6, 2)
    assert (typed.training.lr, typed.training.epochs, typed.flow_steps) == (1e-2, 3, 5)
    assert by_preset.clamp == BASE.clamp, "what a preset does not name keeps its default"
    assert FastFlowConfig(BASE.backbone) == BASE, "the configuration that was given is left alone"


@pytest.mark.parametrize(
    ("backbone", "category", "expected"),
    [  # learning rate, epochs, weight decay, steps, hidden ratio
        ("resnet18", "metal_plate", (1e-2, 6, 1e-4, 2, 1.0)),
        ("resnet18", "bracket_white", (1e-3, 8, 1e-4, 2, 0.8)),
        ("resnet18", "bracket_brown", (1e-3, 10, 1e-4, 2, 0.8)),
        ("resnet18", "bracket_black", (1e-3, 25, 1e-4, 4, 1.0)),
        ("resnet18", "tubes", (1e-3, 50, 1e-3, 2, 1.0)),
        ("wideresnet50", "metal_plate", (1e-3, 30, 1e-3, 2, 0.8)),
        ("wideresnet50", "bracket_white", (1e-3, 40, 1e-3, 2, 0.8)),
        ("wideresnet50", "bracket_brown", (1e-4, 40, 1e-3, 2, 1.2)),
        ("wideresnet50", "bracket_black", (1e-4, 10, 1e-3, 2, 1.2)),
        ("wideresnet50", "tubes", (1e-3, 30, 1e-3, 2, 0.8)),
    ],
)
def test_inherited_values(backbone: str, category: str, expected: tuple[float, ...]) -> None:
    preset = fastflow_preset(backbone, category)
    names = ("lr", "epochs", "weight_decay", "flow_steps", "hidden_ratio")
    assert tuple(preset.settings[name] for name in names) == expected
    assert preset.settings["schedule"] == "cosine"
    assert preset.source == "inherited, chosen on test results"


def test_every_entry_says_where_it_comes_from() -> None:
    presets = read_presets(FASTFLOW_FILE)
    assert {p.source for of_backbone in presets.values() for p in of_backbone.values()} == set(SOURCES)
    assert all("default" in of_backbone for of_backbone in presets.values())
    assert {p.source for p in presets["efficientnet_lite0"].values()} == {"ours"}


@pytest.mark.parametrize("larger", ["efficientnet_lite1", "efficientnet_lite2"])
def test_the_larger_siblings_of_the_offline_backbone_take_its_values_over(larger: str) -> None:
    ours, taken = fastflow_preset("efficientnet_lite0", "bottle"), fastflow_preset(larger, "bottle")
    assert (taken.settings, taken.source) == (ours.settings, "ours")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 200_000, "cannot be read"),
        ([], "found list, expected an object"),
        ({"resnet18": 3}, "resnet18: found int"),
        ({"resnet18": {"default": {"lr": 1e-3}}}, "source is None, expected one of"),
        (entry(learning_rate=1e-3), "resnet18.default: unknown name 'learning_rate'"),
        (entry(epoch=3), "did you mean epochs"),
        (entry(epochs="many"), "epochs: found 'many', expected int"),
        (entry(epochs=0), "presets.json: resnet18.default: --epochs is 0"),
        (entry(backbone="resnet50"), "unknown name 'backbone'"),
    ],
)
def test_damaged_files_are_refused_by_entry(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_presets(write(tmp_path, content))


def test_a_backbone_or_class_without_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'resnet81' \(did you mean resnet18"):
        fastflow_preset("resnet81", "plate")
    content = {"resnet18": {"plate": {"source": "ours", "epochs": 3}}}
    with pytest.raises(ConfigurationError, match="neither a preset of class 'rod' nor a default"):
        fastflow_preset("resnet18", "rod", write(tmp_path, content))
    assert fastflow_preset("resnet18", "plate", write(tmp_path, content)).settings == {"epochs": 3}
