"""Tests of the pruned extractor against hooks on the whole network."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from patchcore.configs import BackboneConfig
from patchcore.errors import ConfigurationError
from patchcore.features import extractor as extractor_module
from patchcore.features.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, load_backbone
from patchcore.features.extractor import FeatureExtractor, build_extractor

IMAGESIZE = 64
SEED = 3

# The networks as their libraries make them, with their in-place activations.
WHOLE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: get_model("resnet18", weights=None),
    "densenet201": lambda: get_model("densenet201", weights=None),
    "vgg11": lambda: get_model("vgg11", weights=None),
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "timm:mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm:convnext_atto": lambda: timm.create_model("convnext_atto"),
    "timm:regnetx_002": lambda: timm.create_model("regnetx_002"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.lru_cache(maxsize=1)  # tests of one network follow each other; all of them at once fill the memory
def whole_network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return WHOLE_NETWORKS[name]().eval()


def random_images(batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, IMAGESIZE, IMAGESIZE), generator=generator, dtype=torch.uint8)


def hooked_maps(network: nn.Module, layers: Sequence[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the whole network and keep a copy of what each layer gave, before anything could change it."""
    maps: dict[str, torch.Tensor] = {}
    named = dict(network.named_modules())

    def keep(layer: str) -> Callable[..., None]:
        return lambda module, inputs, output: maps.__setitem__(layer, output.clone())

    handles = [named[layer].register_forward_hook(keep(layer)) for layer in layers]
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        network((images.float() / 255 - mean) / std)
    for handle in handles:
        handle.remove()
    return maps


def assert_same_maps(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for layer, feature_map in expected.items():
        scale = float(feature_map.abs().max())
        torch.testing.assert_close(found[layer], feature_map, rtol=0, atol=2e-5 * scale, msg=lambda m, x=layer: x + m)


def extractor_of(network: nn.Module, layers: Sequence[str]) -> FeatureExtractor:
    """An extractor of a network made for a test."""
    backbone = Backbone("made for a test", network.eval(), IMAGENET_MEAN, IMAGENET_STD, ())
    return FeatureExtractor(backbone, layers, "imagenet", IMAGESIZE)


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return load_backbone("resnet18", "random", SEED)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer2", "layer3"]),
        ("resnet18", ["layer3", "layer1", "layer2"]),
        ("resnet18", ["conv1"]),
        ("resnet18", ["layer2.0.conv1"]),
        ("resnet18", ["layer2.0", "layer3.1"]),
        ("resnet18", ["layer1.0.bn2", "layer2"]),  # the block adds its input to that output in place
        ("resnet18", ["layer1.0.relu"]),  # called twice in its block
        ("resnet18", ["layer3", "layer1.0.relu"]),
        ("resnet18", ["layer2.0.downsample"]),
        ("efficientnet_lite0", ["blocks.2", "blocks.4"]),
        ("efficientnet_lite0", ["blocks.3", "blocks.1.0.conv_dw"]),
        ("efficientnet_lite0", ["bn2"]),
        ("densenet201", ["features.denseblock2", "features.denseblock3"]),
        ("densenet201", ["features.transition1", "features.denseblock1.denselayer2.conv1"]),
        ("densenet201", ["features"]),  # the network goes on with an in-place function
        ("vgg11", ["features.10", "features.15"]),
        ("vgg11", ["features.8", "features.3"]),  # followed by in-place activations
        ("timm:mobilenetv3_small_050", ["blocks.3", "blocks.1"]),
        ("timm:mobilenetv3_small_050", ["blocks.2.0.se", "blocks.4"]),
        ("timm:convnext_atto", ["stages.1", "stages.2"]),
        ("timm:regnetx_002", ["s1", "s2.b1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_equals_hooks_on_the_whole_network(name: str, layers: list[str]) -> None:
    images = random_images()
    expected = hooked_maps(whole_network(name), layers, images)
    extractor = FeatureExtractor(load_backbone(name, "random", SEED), layers, "imagenet", IMAGESIZE)
    found = extractor(images)
    assert list(found) == layers
    assert_same_maps(found, expected)
    assert extractor.feature_shapes == {layer: tuple(m.shape[1:]) for layer, m in expected.items()}


@pytest.mark.parametrize(
    ("layers", "needed"),
    [
        (["layer1", "layer2"], ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]),
        (["layer2", "layer1"], ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]),
        (["layer1.0.conv2"], ["conv1", "bn1", "relu", "maxpool", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]),
        (["conv1"], ["conv1"]),
    ],
    ids=["layer2", "any order", "inside a block", "first"],
)
def test_nothing_behind_the_last_layer_is_run_or_held(layers: list[str], needed: list[str]) -> None:
    backbone = load_backbone("resnet18", "random", SEED)
    parameters = {name: id(parameter) for name, parameter in backbone.module.named_parameters()}
    extractor = FeatureExtractor(backbone, layers, "imagenet", IMAGESIZE)
    calls: list[str] = []
    for name, module in backbone.module.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    extractor(random_images())

    def is_needed(name: str) -> bool:
        return any(name == part or name.startswith(f"{part}.") for part in needed) or name == "layer1.0.relu"

    # Of a batch norm that became a part of its convolution, nothing of the backbone's own is left.
    convolutions = {name for name, module in backbone.module.named_modules() if isinstance(module, nn.Conv2d)}
    norms = {name for name, module in backbone.module.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(needed) - convolutions - norms <= set(calls)
    assert [name for name in calls if not is_needed(name)] == []
    num_convolutions = sum(map(is_needed, convolutions))
    assert sum(isinstance(module, nn.Conv2d) for module in extractor.modules()) == num_convolutions
    held = {id(parameter) for parameter in extractor.parameters()}
    assert not held & {parameters[name] for name in parameters if not is_needed(name)}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "timm:regnetx_002"])
def test_batch_norms_become_part_of_their_convolutions(name: str) -> None:
    """The maps stay those of the whole network (above and here), with norms of their own that are no identity."""
    backbone = load_backbone(name, "random", SEED)
    generator = torch.Generator().manual_seed(0)
    for norm in backbone.module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (norm.bias.data, norm.running_mean):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
    layers = {"resnet18": ["layer1", "layer2"], "efficientnet_lite0": ["blocks.1", "blocks.2"]}.get(name, ["s1", "s2"])
    expected = hooked_maps(backbone.module, layers, random_images())
    extractor = FeatureExtractor(backbone, layers, "imagenet", IMAGESIZE)
    assert_same_maps(extractor(random_images()), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.module.modules()), "the backbone is shared"


def test_a_convolution_that_is_read_twice_keeps_its_batch_norm() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.last(self.norm(x) + x)

    network = Network().eval()
    network.norm.bias.data.fill_(2.0)
    expected = hooked_maps(network, ["last"], random_images())
    extractor = extractor_of(network, ["last"])
    assert_same_maps(extractor(random_images()), expected)
    assert any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("efficientnet_lite0", ("blocks.5", "blocks.6", "conv_head", "bn2", "classifier")),
        ("densenet201", ("features.transition3", "features.denseblock4", "features.norm5", "classifier")),
    ],
)
def test_good_layers_leave_the_rest_of_the_network_out(name: str, behind: tuple[str, ...]) -> None:
    backbone = load_backbone(name, "random")
    parameters = {id(p): n for n, p in backbone.module.named_parameters()}
    extractor = FeatureExtractor(backbone, backbone.good_layers, "imagenet", IMAGESIZE)
    held = {parameters[id(p)] for p in extractor.parameters() if id(p) in parameters}  # others: folded convolutions
    assert not any(name.startswith(tuple(f"{part}." for part in behind)) for name in held)
    dropped = sum(isinstance(m, nn.Conv2d) for n, m in backbone.module.named_modules() if n.startswith(behind))
    total = sum(isinstance(module, nn.Conv2d) for module in backbone.module.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in extractor.modules()) == total - dropped


class FunctionalInPlace(nn.Module):
    """A network that changes what one layer gave, in place, before the next layer sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.third = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(F.relu(self.first(x), inplace=True)))


class KeywordArgument(nn.Module):
    """A network whose second layer gets more than the output of the first."""

    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            return x * factor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.scale = self.Scale()
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.scale(self.first(x), factor=3.0))


class ChangesItsInput(nn.Module):
    """A network with a layer that changes what it was given."""

    class AddOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1).clone()

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.add = self.AddOne()
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.add(self.first(x)))


class Functional(nn.Module):
    """A network with a function between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.avg_pool2d(self.first(x), 2) ** 2)


class CalledTwice(nn.Module):
    """A network that runs the same layers two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.first(self.activation(self.first(x))))


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (FunctionalInPlace, ["second"]),
        (FunctionalInPlace, ["first", "second"]),
        (FunctionalInPlace, ["first"]),
        (KeywordArgument, ["last"]),
        (KeywordArgument, ["last", "scale"]),
        (ChangesItsInput, ["first", "last"]),
        (ChangesItsInput, ["add"]),
        (Functional, ["last", "first"]),
        (CalledTwice, ["first"]),
        (CalledTwice, ["activation", "first"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value.__name__,
)
def test_networks_that_are_no_plain_chain(network: type[nn.Module], layers: list[str]) -> None:
    module = network().eval()
    images = random_images()
    expected = hooked_maps(module, layers, images)
    assert_same_maps(extractor_of(module, layers)(images), expected)


def test_in_place_activation_behind_a_layer_leaves_its_map_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    extractor = extractor_of(network, ["0", "2"])
    assert float(extractor(random_images())["0"].min()) < 0
    assert not any(getattr(m, "inplace", False) for m in load_backbone("resnet18", "random").module.modules())


def test_two_extractors_share_a_backbone(resnet: Backbone) -> None:
    layers = ["layer1.0", "layer2"]
    first = FeatureExtractor(resnet, layers, "imagenet", IMAGESIZE)
    second = FeatureExtractor(resnet, layers, "imagenet", IMAGESIZE)
    expected = hooked_maps(whole_network("resnet18"), layers, random_images())
    results: list[dict[str, torch.Tensor]] = []
    for extractor in (first, second):  # in threads of their own, where the other has never run
        thread = threading.Thread(target=lambda e=extractor: results.append(e(random_images())))
        thread.start()
        thread.join()
    assert len(results) == 2
    for maps in results:
        assert_same_maps(maps, expected)


def test_threads_get_the_maps_of_their_own_images(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer1.0", "layer2"], "imagenet", IMAGESIZE)
    images = [random_images(seed=1), random_images(seed=2)]
    alone = [extractor(batch) for batch in images]
    barrier = threading.Barrier(2)
    found: list[list[dict[str, torch.Tensor]]] = [[], []]

    def work(number: int) -> None:
        for _ in range(15):
            barrier.wait(timeout=60)
            found[number].append(extractor(images[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 15
        for maps in found[number]:
            assert_same_maps(maps, alone[number])


def test_an_extractor_keeps_no_maps_of_the_last_batch(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer1.0", "layer2"], "imagenet", IMAGESIZE)
    extractor(random_images())
    assert extractor._inner.maps is None


def test_maps_are_free_of_gradients_and_train_what_follows(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer1.0", "layer2"], "imagenet", IMAGESIZE)
    maps = extractor(random_images().float().requires_grad_())
    assert not any(m.requires_grad or m.is_inference() for m in maps.values())
    assert not any(p.requires_grad for p in extractor.parameters())
    head = nn.Conv2d(128, 2, 1)
    head(maps["layer2"]).square().mean().backward()
    assert float(head.weight.grad.abs().sum()) > 0


def test_an_extractor_made_or_used_in_inference_mode_works(resnet: Backbone) -> None:
    with torch.inference_mode():
        extractor = FeatureExtractor(resnet, ["layer1.0", "layer2"], "imagenet", IMAGESIZE)
        inside = extractor(random_images())
    assert_same_maps(extractor(random_images()), dict(inside))


def test_the_order_of_layers_changes_nothing_but_the_order(resnet: Backbone) -> None:
    orders = (["layer1", "layer2.0", "layer3"], ["layer3", "layer1", "layer2.0"])
    first, second = (FeatureExtractor(resnet, order, "imagenet", IMAGESIZE)(random_images()) for order in orders)
    assert list(second) == orders[1]
    for layer in first:
        assert torch.equal(first[layer], second[layer])


def test_an_image_gives_the_same_maps_in_any_batch(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer2"], "imagenet", IMAGESIZE)
    images = random_images(batch=5)
    together, alone = extractor(images)["layer2"], extractor(images[3:4])["layer2"]
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-4)


def test_uint8_and_float_images_give_the_same_maps(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer1"], "imagenet", IMAGESIZE)
    images = random_images()
    floats = images.float()
    assert torch.equal(extractor(images)["layer1"], extractor(floats)["layer1"])
    assert torch.equal(floats, images.float())  # the input is left alone


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [("imagenet", IMAGENET_MEAN, IMAGENET_STD), ("backbone", (0.5, 0.4, 0.3), (0.1, 0.2, 0.25))],
)
def test_normalization(normalization: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    backbone = Backbone("identity", nn.Sequential(nn.Identity()), (0.5, 0.4, 0.3), (0.1, 0.2, 0.25), ())
    extractor = FeatureExtractor(backbone, ["0"], normalization, IMAGESIZE)
    images = random_images()
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(extractor(images)["0"], expected, rtol=0, atol=1e-5)


def test_build_extractor_follows_the_configuration() -> None:
    config = BackboneConfig("efficientnet_lite0", ("blocks.1",), weights="random", normalization="backbone", seed=SEED)
    extractor = build_extractor(config, IMAGESIZE)
    assert extractor.layers == ("blocks.1",)
    torch.testing.assert_close(extractor.mean.flatten(), torch.full((3,), 127.5))
    first_weight = next(whole_network("efficientnet_lite0").parameters())
    # the norm behind, which has learned nothing and is part of it, divides by sqrt(1 + 0.001)
    torch.testing.assert_close(next(extractor.parameters()), first_weight / 1.001**0.5)


@pytest.mark.parametrize(
    ("layer", "near"), [("layer22", "layer2"), ("layer2.0.conv3", "layer2.0.conv"), ("Layer3", "layer3")]
)
def test_unknown_layer_names_near_ones(resnet: Backbone, layer: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"no layer '{layer}': did you mean .*{near}") as caught:
        FeatureExtractor(resnet, ["layer2", layer], "imagenet", IMAGESIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["", "fc.weight", "."])
def test_odd_layer_names_are_refused(resnet: Backbone, layer: str) -> None:
    with pytest.raises(ConfigurationError, match="has no layer"):
        FeatureExtractor(resnet, [layer], "imagenet", IMAGESIZE)


def test_layer_without_a_map_is_refused_and_names_better_ones(resnet: Backbone) -> None:
    with pytest.raises(ConfigurationError, match=r"'fc' of 'resnet18' gives \(1, 1000\).*layer2 and layer3"):
        FeatureExtractor(resnet, ["layer2", "fc"], "imagenet", IMAGESIZE)


def test_layer_that_is_never_called_is_refused() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3)])
            self.only_in_training = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x)

    for layer in ("blocks", "only_in_training"):
        with pytest.raises(ConfigurationError, match=f"'{layer}'.* never calls it"):
            extractor_of(Network(), [layer])


@pytest.mark.parametrize(
    ("name", "layer", "imagesize"), [("alexnet", "features.2", 32), ("timm:vit_tiny_patch16_224", "blocks.1", 64)]
)
def test_imagesize_that_the_network_cannot_take_is_refused(name: str, layer: str, imagesize: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"does not run on images of {imagesize} px .*--imagesize") as caught:
        FeatureExtractor(load_backbone(name, "random"), [layer], "imagenet", imagesize)
    assert "\n" not in str(caught.value)


def test_a_mistyped_layer_is_found_before_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*arguments: object) -> Backbone:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(extractor_module, "load_backbone", fetched)
    with pytest.raises(ConfigurationError, match="did you mean layer2"):
        extractor_module.build_extractor(BackboneConfig("wideresnet50", ("layer22",)), 64)


# ---------------------------------------------------------------- activations in place


def test_activations_behind_folded_norms_work_in_place(resnet: Backbone) -> None:
    extractor = FeatureExtractor(resnet, ["layer1", "layer2"], "imagenet", IMAGESIZE)
    activations = [m for m in extractor.modules() if isinstance(m, nn.ReLU)]
    assert activations and all(m.inplace for m in activations)
    assert not any(m.inplace for m in resnet.module.modules() if isinstance(m, nn.ReLU)), "they are shared"
    first = extractor(random_images())
    kept = {layer: maps.clone() for layer, maps in first.items()}
    extractor(random_images(1))
    assert_same_maps(first, kept)


def test_an_activation_leaves_alone_what_a_layer_gave() -> None:
    """The container returns the norm's own tensor, which the activation behind it must not change."""
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network = nn.Sequential(inner, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    extractor = extractor_of(network, ["0", "2"])
    assert float(extractor(random_images())["0"].min()) < 0


class UsesANormTwice(nn.Module):
    """A network that an activation in place would change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.activation = nn.ReLU(inplace=False)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(self.conv(x))
        return self.last(self.activation(normed) - normed)


def test_a_norm_that_is_used_twice_is_folded_but_not_overwritten() -> None:
    torch.manual_seed(0)
    network = UsesANormTwice().eval()
    extractor = extractor_of(network, ["last"])
    images = random_images()
    assert_same_maps(extractor(images), hooked_maps(network, ["last"], images))
    assert not any(getattr(m, "inplace", False) for m in extractor.modules())
