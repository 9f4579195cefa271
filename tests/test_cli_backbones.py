"""What is typed for backbones, and the configuration that comes of it."""

from __future__ import annotations

import os

import click
import pytest

from patchcore.cli.backbones import typed_backbones
from patchcore.configs import BackboneConfig


def test_the_published_ensemble() -> None:
    names = ("wideresnet101", "resnext101", "densenet201")
    layers = ("0.layer2", "0.layer3", "1.layer2", "1.layer3", "2.features.denseblock2", "2.features.denseblock3")
    assert typed_backbones(names, layers, (), "imagenet") == [
        (BackboneConfig("wideresnet101", ("layer2", "layer3")), None),
        (BackboneConfig("resnext101", ("layer2", "layer3")), None),
        (BackboneConfig("densenet201", ("features.denseblock2", "features.denseblock3")), None),
    ]


def test_layers_come_in_any_order_and_keep_that_of_their_backbone() -> None:
    typed = typed_backbones(("resnet18", "vgg11"), ("1.features.15", "0.layer3", "1.features.10"), (), "backbone")
    assert [backbone.layers for backbone, _ in typed] == [("layer3",), ("features.15", "features.10")]
    assert {backbone.normalization for backbone, _ in typed} == {"backbone"}


def test_a_single_backbone_takes_its_layers_as_typed() -> None:
    assert typed_backbones(("vgg11",), ("features.10",), (), "imagenet")[0][0].layers == ("features.10",)


def test_seeds_behind_names() -> None:
    typed = typed_backbones(("resnet18.seed-3", "resnet18.seed-12", "resnet18"), ("0.a", "1.a", "2.a"), (), "imagenet")
    assert [(backbone.name, backbone.seed, seed) for backbone, seed in typed] == [
        ("resnet18", 0, 3), ("resnet18", 0, 12), ("resnet18", 0, None),
    ]  # fmt: skip
    # Pretrained members share one network whatever their seeds; random ones are drawn by them.
    typed = typed_backbones(("resnet18.seed-3", "resnet18"), ("0.a", "1.a"), ("random",), "imagenet")
    assert [(backbone.weights, backbone.seed) for backbone, _ in typed] == [("random", 3), ("random", 0)]


def test_weights_for_all_or_for_each() -> None:
    names, layers = ("a", "b"), ("0.x", "1.x")
    for weights, expected in [
        ((), ["pretrained", "pretrained"]),
        (("random",), ["random", "random"]),
        (("random", "pretrained"), ["random", "pretrained"]),
        (("w.pth", "random"), [os.path.abspath("w.pth"), "random"]),
    ]:
        typed = typed_backbones(names, layers, weights, "imagenet")
        assert [backbone.weights for backbone, _ in typed] == expected


@pytest.mark.parametrize(
    ("names", "layers", "weights", "message"),
    [
        ((), ("layer2",), (), "no backbone named"),
        (("a", "b"), ("layer2", "1.layer3"), (), "-le layer2: with 2 backbones .* 0 to 1, as in 0.layer2"),
        (("a", "b"), ("0.layer2", "2.layer3"), (), "-le 2.layer3: with 2 backbones"),
        (("a", "b"), ("0.layer2", "1."), (), "-le 1.: with 2"),
        (("a", "b"), ("0.layer2", "-1.layer2"), (), "-le -1.layer2: with 2"),
        (("a", "b"), ("0.layer2", "\u0663.layer2"), (), "with 2 backbones"),
        (("a", "b"), ("0.layer2",), (), r"backbone 1 \(b\) has no layer: .* -le 1.LAYER"),
        (("a", "b", "c"), ("0.x", "1.x", "2.x"), ("random", "random"), "2 --weights for 3 backbone"),
        (("a",), ("x",), ("random", "random"), "2 --weights for 1 backbone"),
        (("a.seed-x",), ("x",), (), "found the seed 'x', expected a whole number, as in a.seed-3"),
        (("a.seed-",), ("x",), (), "found the seed ''"),
        (("a.seed--1",), ("x",), (), "found the seed '-1'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    names: tuple[str, ...], layers: tuple[str, ...], weights: tuple[str, ...], message: str
) -> None:
    with pytest.raises(click.UsageError, match=message):
        typed_backbones(names, layers, weights, "imagenet")
