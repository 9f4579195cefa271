"""Tests of token models: their grids against hooks and against timm, their sizes, their position embeddings."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
from safetensors.torch import save_file
from timm.models import SwinTransformer
from torch import nn

from patchcore.configs import BackboneConfig
from patchcore.errors import ConfigurationError
from patchcore.features import backbones
from patchcore.features import extractor as extractor_module
from patchcore.features.backbones import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneEntry, load_backbone
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.features.tokens import MapLayout, block_aliases, map_layout, require_imagesize

TINY = "timm:test_vit"  # six blocks, patches of 16 px, 0.4 M weights
SWIN = "narrow_swin"  # as Swin-T in all but its channels
SEED = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def narrow_swin(pretrained: bool, imagesize: int = 224) -> nn.Module:
    return SwinTransformer(imagesize, embed_dim=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), num_classes=10)


@pytest.fixture(autouse=True)
def narrow_swin_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, SWIN, BackboneEntry(narrow_swin, (), made_for_imagesize=True))


@functools.lru_cache(maxsize=2)  # tests of one network follow each other
def whole_network(name: str, imagesize: int) -> nn.Module:
    """The network as timm makes it, with the weights that the seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if name == SWIN:
            return narrow_swin(False, imagesize).eval()
        return timm.create_model(name.removeprefix("timm:"), img_size=imagesize).eval()


def random_images(imagesize: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, imagesize, imagesize), generator=generator, dtype=torch.uint8)


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def hooked(network: nn.Module, modules: Sequence[str], images: torch.Tensor) -> list[torch.Tensor]:
    """Run the whole network and return a copy of what each module gave."""
    outputs: dict[str, torch.Tensor] = {}
    named = dict(network.named_modules())
    handles = [
        named[name].register_forward_hook(lambda _, __, output, n=name: outputs.__setitem__(n, output.clone()))
        for name in modules
    ]
    with torch.no_grad():
        network(normalized(images))
    for handle in handles:
        handle.remove()
    return [outputs[name] for name in modules]


def grid_by_hand(tokens: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Put tokens [B, L, C] one by one on their places of the map [B, C, H, W]."""
    side = math.isqrt(tokens.shape[1] - num_prefix_tokens)
    feature_map = torch.full((len(tokens), tokens.shape[2], side, side), torch.nan)
    for row in range(side):
        for column in range(side):
            feature_map[:, :, row, column] = tokens[:, num_prefix_tokens + row * side + column]
    return feature_map


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def build(name: str, layers: Sequence[str], imagesize: int, normalization: str = "imagenet") -> FeatureExtractor:
    return build_extractor(BackboneConfig(name, tuple(layers), "random", normalization, SEED), imagesize)


TOKEN_MODELS = [  # name, image sizes, prefix tokens at the blocks
    (TINY, (96, 224, 320), 1),
    ("timm:gmlp_ti16_224", (96,), 0),
    ("timm:deit_tiny_distilled_patch16_224", (96,), 2),  # class and distillation token
    ("timm:vit_small_patch14_reg4_dinov2.lvd142m", (98,), 5),  # class and four register tokens
    ("timm:eva02_tiny_patch14_224", (98,), 1),  # rotary embeddings: blocks take a second argument
    ("timm:cait_xxs24_224", (96,), 0),  # the class token joins behind the blocks
    ("timm:vit_tiny_r_s16_p8_224", (256,), 1),  # a convolutional stem
    pytest.param("timm:beit_base_patch16_224", (96,), 1, marks=pytest.mark.slow),
    pytest.param("vit_r50", (96,), 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "imagesizes", "num_prefix_tokens"), TOKEN_MODELS)
def test_maps_equal_hooks_on_the_whole_network_and_the_intermediates_of_timm(
    name: str, imagesizes: tuple[int, ...], num_prefix_tokens: int
) -> None:
    for imagesize in imagesizes:
        images = random_images(imagesize)
        timm_name = "vit_large_r50_s32_224" if name == "vit_r50" else name
        network = whole_network(timm_name, imagesize)
        layers = ["blocks.3", "blocks.1"]
        extractor = build(name, layers, imagesize)
        found = extractor(images)
        assert list(found) == layers
        with torch.no_grad():
            by_timm = network.forward_intermediates(
                normalized(images), indices=[1, 3], norm=False, output_fmt="NCHW", intermediates_only=True
            )
        for layer, tokens, by_timm_map in zip(layers, hooked(network, layers, images), by_timm[::-1], strict=True):
            assert found[layer].dtype == torch.float32
            assert extractor.feature_shapes[layer] == tuple(found[layer].shape[1:])
            assert_close(found[layer], grid_by_hand(tokens, num_prefix_tokens))
            assert_close(found[layer], by_timm_map)


def test_blocks_of_swin_are_counted_through_the_stages() -> None:
    imagesize = 96
    images = random_images(imagesize)
    modules = ["layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.2", "layers.3.blocks.1"]
    expected = hooked(whole_network(SWIN, imagesize), modules, images)
    found = build(SWIN, ["blocks.6", "blocks.1", "blocks.2", "blocks.11"], imagesize)(images)
    for layer, by_hook in zip(["blocks.1", "blocks.2", "blocks.6", "blocks.11"], expected, strict=True):
        assert_close(found[layer], by_hook.permute(0, 3, 1, 2))
    assert [tuple(m.shape[1:]) for m in found.values()] == [(64, 6, 6), (16, 24, 24), (32, 12, 12), (128, 3, 3)]


def test_names_of_blocks_and_of_modules_may_be_mixed() -> None:
    maps = build(SWIN, ["blocks.3", "layers.1", "layers.1.blocks.1", "layers.0"], 96)(random_images(96))
    assert list(maps) == ["blocks.3", "layers.1", "layers.1.blocks.1", "layers.0"]
    assert torch.equal(maps["blocks.3"], maps["layers.1"])  # the last block of a stage gives what the stage gives
    assert torch.equal(maps["blocks.3"], maps["layers.1.blocks.1"])


def test_swin_of_timm_agrees_on_the_maps_of_its_stages() -> None:
    images = random_images(96)
    network = whole_network(SWIN, 96)
    with torch.no_grad():
        expected = network.forward_intermediates(
            normalized(images), indices=[1, 2], norm=False, output_fmt="NCHW", intermediates_only=True
        )
    found = build(SWIN, ["layers.1", "blocks.9"], 96)(images)
    for feature_map, by_timm in zip(found.values(), expected, strict=True):
        assert_close(feature_map, by_timm)


@pytest.mark.parametrize("name", [TINY, "timm:cait_xxs24_224"])
def test_no_block_behind_the_last_one_needed_runs_or_is_held(name: str) -> None:
    imagesize = 96
    needed = ("blocks.0.", "blocks.1.", "blocks.2.")
    for layers in (["blocks.1", "blocks.2"], ["blocks.2", "blocks.1"]):
        backbone = load_backbone(name, "random", SEED, imagesize)
        parameters = {id(p): n for n, p in backbone.module.named_parameters()}
        extractor = FeatureExtractor(backbone, layers, "imagenet", imagesize)
        called: set[str] = set()
        for part_name, part in backbone.module.named_modules():
            part.register_forward_hook(lambda _, __, ___, n=part_name, called=called: called.add(f"{n}."))
        extractor(random_images(imagesize))
        assert {*needed, "patch_embed."} <= called
        held = {parameters[id(p)] for p in extractor.parameters()}
        for used in called | held:
            assert used == "blocks." or used.startswith(needed) or not used.startswith("blocks"), used
            assert not used.startswith(("head", "norm.", "fc_norm")), used
        assert {n for n in parameters.values() if n.startswith(needed)} <= held


def test_the_backbone_stays_whole_for_other_extractors() -> None:
    backbone = load_backbone(TINY, "random", SEED, 96)
    images = random_images(96)
    first = FeatureExtractor(backbone, ["blocks.0"], "imagenet", 96)
    second = FeatureExtractor(backbone, ["blocks.4", "blocks.0"], "imagenet", 96)
    expected = hooked(whole_network(TINY, 96), ["blocks.0", "blocks.4"], images)
    for _ in range(2):
        assert_close(first(images)["blocks.0"], grid_by_hand(expected[0], 1))
        assert_close(second(images)["blocks.4"], grid_by_hand(expected[1], 1))
    with torch.no_grad():
        torch.testing.assert_close(backbone.module(normalized(images)), whole_network(TINY, 96)(normalized(images)))


@pytest.mark.parametrize("name", [TINY, SWIN])
def test_an_image_gives_the_same_maps_in_any_batch_and_order_of_layers(name: str) -> None:
    images = random_images(96, batch=3)
    together = build(name, ["blocks.1", "blocks.3"], 96)(images)
    alone = build(name, ["blocks.3", "blocks.1"], 96)(images[2:])
    for layer in together:
        assert_close(together[layer][2:], alone[layer])


def test_threads_get_the_maps_of_their_own_images() -> None:
    extractor = build(TINY, ["blocks.1", "blocks.3"], 96)
    images = [random_images(96, seed=1), random_images(96, seed=2)]
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
            assert all(torch.equal(maps[layer], alone[number][layer]) for layer in maps)


def test_parts_of_blocks_and_the_patch_embedding_are_layers_too() -> None:
    images = random_images(96)
    name = "timm:deit_tiny_patch16_224"
    layers = ["blocks.2.attn", "patch_embed", "blocks.1.mlp"]
    found = build(name, layers, 96)(images)
    for layer, tokens in zip(layers, hooked(whole_network(name, 96), layers, images), strict=True):
        assert_close(found[layer], grid_by_hand(tokens, 0 if layer == "patch_embed" else 1))


@pytest.mark.parametrize(
    ("name", "mean"),
    [("vit_small", (0.5, 0.5, 0.5)), ("dinov2_small", IMAGENET_MEAN), ("vit_swin_base", IMAGENET_MEAN)],
)
def test_own_normalization(name: str, mean: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "sha256_of_tensors", lambda tensors: "")  # there are none on this device
    with torch.device("meta"):
        backbone = load_backbone(name, "random")
    assert backbone.mean == mean
    extractor = build(TINY, ["blocks.0"], 96, normalization="backbone")
    torch.testing.assert_close(extractor.mean.flatten(), torch.full((3,), 127.5))


# Layers and image sizes that do not exist


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*arguments: object) -> Backbone:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(extractor_module, "load_backbone", fetched)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "layer", "near"),
    [
        ("vit_small", "blocks.12", r"blocks\.0 to blocks\.11 exist"),
        ("vit_large", "blocks.99", r"blocks\.0 to blocks\.23 exist"),
        ("vit_swin_base", "blocks.24", r"blocks\.0 to blocks\.23 exist"),
        ("vit_swin_base", "layers.2.blocks.18", r"layers\.2\.blocks\.0 to layers\.2\.blocks\.17 exist"),
        ("vit_swin_base", "layers.4", r"layers\.0 to layers\.3 exist"),
        ("vit_small", "block.5", r"did you mean .*blocks\.5"),
        ("dinov2_small", "blocks5", r"did you mean .*blocks\.5"),
        ("vit_small", "layer2", "known: blocks, blocks.0"),
        ("vit_small", "blocks.-1", "has no layer 'blocks.-1'"),
    ],
)
def test_wrong_layers_are_found_before_weights_are_fetched(name: str, layer: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"'{name}' has no layer '{layer}': .*{near}|{near}") as caught:
        build_extractor(BackboneConfig(name, ("blocks.1", layer)), 224)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "imagesize", "sizes"),
    [
        ("vit_small", 230, "patches of 16 px, .*use --imagesize 224 or 240$"),
        ("dinov2_small", 320, "patches of 14 px, .*use --imagesize 308 or 322$"),
        ("vit_r50", 240, "patches of 32 px, .*use --imagesize 224 or 256$"),
        ("vit_swin_base", 226, "patches of 4 px, .*use --imagesize 224 or 228$"),
        ("vit_small", 8, "use --imagesize 16$"),
    ],
)
def test_wrong_image_sizes_name_the_next_ones_before_weights_are_fetched(name: str, imagesize: int, sizes: str) -> None:
    with pytest.raises(ConfigurationError, match=sizes) as caught:
        build_extractor(BackboneConfig(name, ("blocks.1",)), imagesize)
    assert "\n" not in str(caught.value)


def test_networks_that_leave_a_margin_out_are_refused_by_the_extractor_too() -> None:
    with pytest.raises(ConfigurationError, match="use --imagesize 96 or 112"):
        FeatureExtractor(load_backbone(TINY, "random", imagesize=100), ["blocks.1"], "imagenet", 100)
    with torch.device("meta"):
        mixer = timm.create_model("gmlp_ti16_224")  # its patch embedding has another name
    with pytest.raises(ConfigurationError, match="use --imagesize 96 or 112"):
        require_imagesize("gmlp", mixer, 100)


def test_a_size_for_which_timm_cannot_make_the_network_is_one_line() -> None:
    with pytest.raises(
        ConfigurationError, match=r"cannot be made for images of 100 px \(.*even.*--imagesize"
    ) as caught:
        load_backbone("timm:xcit_nano_12_p16_224", "random", imagesize=100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("imagesize", [64, 100])  # grids that windows of 7 do not divide, or do not fit in
def test_swin_takes_any_multiple_of_its_patch(imagesize: int) -> None:
    images = random_images(imagesize)
    (expected,) = hooked(whole_network(SWIN, imagesize), ["layers.2.blocks.1"], images)
    found = build(SWIN, ["blocks.5"], imagesize)(images)["blocks.5"]
    assert_close(found, expected.permute(0, 3, 1, 2))
    assert found.shape[2:] == (-(-imagesize // 16), -(-imagesize // 16))


@pytest.mark.parametrize(
    ("name", "layer", "found"),
    [
        (SWIN, "layers.0.blocks.0.attn", r"gives \(16, 49, 16\)"),  # windows, not images
        (TINY, "norm_pre.", "has no layer"),
        (TINY, "head", r"gives \(1, 1000\)"),
        ("timm:hiera_tiny_224", "blocks.1", r"gives \(1, 784, 192\)"),  # tokens in the order of windows
    ],
)
def test_layers_without_a_grid_are_refused(name: str, layer: str, found: str) -> None:
    imagesize = 224 if "hiera" in name else 96
    with pytest.raises(ConfigurationError, match=found):
        build(name, [layer], imagesize)


# Layouts


class Announced(nn.Module):
    """A network that says how its outputs are laid out, as those of timm do."""

    def __init__(self, output_fmt: str, num_prefix_tokens: int) -> None:
        super().__init__()
        self.output_fmt = output_fmt
        self.num_prefix_tokens = num_prefix_tokens


@pytest.mark.parametrize(
    ("shape", "output_fmt", "num_prefix_tokens", "layout"),
    [
        ((1, 5, 7, 7), "NCHW", 0, MapLayout("NCHW")),
        ((1, 5, 7, 7), "NHWC", 0, MapLayout("NCHW")),  # a convolution inside
        ((1, 7, 7, 5), "NHWC", 0, MapLayout("NHWC")),
        ((1, 7, 7, 5), "NCHW", 0, MapLayout("NHWC")),
        ((1, 7, 7, 7), "NHWC", 0, MapLayout("NHWC")),  # as many channels as places: the network says it
        ((1, 7, 7, 7), "NCHW", 0, MapLayout("NCHW")),
        ((1, 5, 8, 6), "NCHW", 0, MapLayout("NCHW")),
        ((1, 17, 3), "NCHW", 1, MapLayout("NLC", 1)),
        ((1, 16, 3), "NCHW", 1, MapLayout("NLC", 0)),
        ((1, 9, 3), "NCHW", 5, MapLayout("NLC", 5)),  # four places, as announced, and not nine
        ((1, 1, 3), "NCHW", 1, MapLayout("NLC", 0)),
        ((1, 15, 3), "NCHW", 1, None),
        ((4, 16, 3), "NCHW", 0, None),
        ((1, 10), "NCHW", 0, None),
    ],
)
def test_layouts(shape: tuple[int, ...], output_fmt: str, num_prefix_tokens: int, layout: MapLayout | None) -> None:
    network = Announced(output_fmt, num_prefix_tokens)
    assert map_layout(torch.zeros(shape), network) == layout
    assert map_layout((torch.zeros(shape),), network) is None


def test_tokens_on_their_places() -> None:
    tokens = torch.arange(2 * 5 * 2).view(2, 5, 2)
    feature_map = MapLayout("NLC", 1).feature_map(tokens)
    assert feature_map[0].tolist() == [[[2, 4], [6, 8]], [[3, 5], [7, 9]]]
    assert feature_map[1].tolist() == [[[12, 14], [16, 18]], [[13, 15], [17, 19]]]


def test_aliases() -> None:
    stages = nn.ModuleDict(
        {"layers": nn.Sequential(*(nn.ModuleDict({"blocks": nn.Sequential(*d)}) for d in _stages()))}
    )
    assert block_aliases(stages) == {
        "blocks.0": "layers.0.blocks.0",
        "blocks.1": "layers.0.blocks.1",
        "blocks.2": "layers.1.blocks.0",
    }
    assert block_aliases(nn.ModuleDict({"blocks": nn.Sequential(nn.Identity())})) == {}


def _stages() -> list[list[nn.Module]]:
    return [[nn.Identity(), nn.Identity()], [nn.Identity()]]


# Networks that do not run without their last parts


class NeedsItsHead(nn.Module):
    """A network with a function between its layers, which looks into the part behind the last one."""

    def __init__(self, look: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x) ** 2)
        if self.look == "attribute":
            return self.head(x.mean(dim=(2, 3))) * self.head.weight.mean()
        y = self.head(x.mean(dim=(2, 3)))
        return y @ torch.ones(2, 1)  # fails with the four channels that went in


@pytest.mark.parametrize("look", ["attribute", "shape"])
def test_a_network_that_does_not_run_without_its_head_runs_whole(look: str) -> None:
    network = NeedsItsHead(look).eval()
    backbone = Backbone("made for a test", network, IMAGENET_MEAN, IMAGENET_STD, ())
    images = random_images(32)
    extractor = FeatureExtractor(backbone, ["second"], "imagenet", 32)
    (expected,) = hooked(network, ["second"], images)
    assert_close(extractor(images)["second"], expected)


# Weights for other image sizes


def random_state(name: str, imagesize: int) -> dict[str, torch.Tensor]:
    """Weights of a network for one image size, with position embeddings that are far from zero everywhere."""
    state = load_backbone(name, "random", seed=11, imagesize=imagesize).module.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        if "pos_embed" in key or "bias_table" in key:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return state


@pytest.mark.parametrize(("trained", "imagesize"), [(224, 320), (320, 224), (224, 96), (96, 96)])
def test_position_embeddings_of_a_file_are_resampled(trained: int, imagesize: int, tmp_path: Path) -> None:
    state = random_state(TINY, trained)
    save_file(state, tmp_path / "vit.safetensors")
    loaded = load_backbone(TINY, str(tmp_path / "vit.safetensors"), imagesize=imagesize).module.state_dict()
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [imagesize // 16] * 2, num_prefix_tokens=1)
    assert loaded["pos_embed"].shape[1] == 1 + (imagesize // 16) ** 2
    torch.testing.assert_close(loaded["pos_embed"], expected)
    assert all(torch.equal(loaded[key], state[key]) for key in state if key != "pos_embed")


def test_resampled_position_embeddings_reach_the_maps(tmp_path: Path) -> None:
    torch.save(random_state(TINY, 224), tmp_path / "vit.pth")
    extractor = build_extractor(BackboneConfig(TINY, ("blocks.1",), str(tmp_path / "vit.pth")), 320)
    network = timm.create_model("test_vit", img_size=224).eval()
    network.load_state_dict(torch.load(tmp_path / "vit.pth"))
    network.set_input_size(320)  # another way of timm to the same
    images = random_images(320)
    (tokens,) = hooked(network, ["blocks.1"], images)
    assert_close(extractor(images)["blocks.1"], grid_by_hand(tokens, 1))


def test_windows_of_swin_that_do_not_fit_have_their_tables_resampled(tmp_path: Path) -> None:
    state = random_state(SWIN, 224)
    torch.save(state, tmp_path / "swin.pth")
    module = load_backbone(SWIN, str(tmp_path / "swin.pth"), imagesize=64).module
    for block, window in (("layers.0.blocks.0", 7), ("layers.2.blocks.0", 4)):  # grids of 16 and 4
        key = f"{block}.attn.relative_position_bias_table"
        table = module.state_dict()[key]
        assert table.shape[0] == (2 * window - 1) ** 2
        expected = timm.layers.resize_rel_pos_bias_table(state[key], (window, window), table.shape)
        torch.testing.assert_close(table, expected)


def test_a_file_without_a_head_or_as_dinov2_is_published(tmp_path: Path) -> None:
    name = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
    state = random_state(name, 98)
    published = {key: tensor for key, tensor in state.items() if key not in ("reg_token", "cls_token", "pos_embed")}
    published["register_tokens"] = state["reg_token"]
    published["mask_token"] = torch.zeros(1, 384)
    published["cls_token"] = state["cls_token"]
    published["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)  # one for the class token
    torch.save(published, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    loaded = load_backbone(name, str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"), imagesize=98).module.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)

    body = {key: tensor for key, tensor in random_state(TINY, 96).items() if not key.startswith("head.")}
    torch.save(body, tmp_path / "body.pth")
    loaded = load_backbone(TINY, str(tmp_path / "body.pth"), imagesize=96).module.state_dict()
    assert all(torch.equal(loaded[key], body[key]) for key in body)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pos_embed": torch.zeros(1, 200, 64)}, "do not fit"),  # no square
        ({"pos_embed": torch.zeros(3)}, "do not fit"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(2, 2)}, r"tensor blocks\.1\.attn\.qkv\.weight has shape \(2, 2\)"),
        ({"layer1.weight": torch.zeros(2)}, r"1\s+unknown \(first: layer1\.weight\)"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    change: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    torch.save({**random_state(TINY, 96), **change}, tmp_path / "w.pth")
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load_backbone(TINY, str(tmp_path / "w.pth"), imagesize=160)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "w.pth") in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(random_state(TINY, 96), tmp_path / "w.pth")
    for name in (SWIN, "timm:eva02_tiny_patch14_224"):
        imagesize = 98 if "patch14" in name else 96
        with pytest.raises(ConfigurationError, match="do not fit") as caught:
            load_backbone(name, str(tmp_path / "w.pth"), imagesize=imagesize)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hub_name", "imagesize"),
    [
        ("vit_small", "timm/vit_small_patch16_224.augreg_in21k_ft_in1k", 160),
        ("dinov2_small", "timm/vit_small_patch14_dinov2.lvd142m", 98),
    ],
)
def test_pretrained_position_embeddings_are_resampled(
    name: str, hub_name: str, imagesize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state(name, 224)
    asked: list[str] = []

    def from_hub(model_id: str, *arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        asked.append(model_id)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", from_hub)
    module = load_backbone(name, imagesize=imagesize).module
    assert asked == [hub_name]
    loaded = module.state_dict()
    expected = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], list(module.patch_embed.grid_size), num_prefix_tokens=1
    )
    torch.testing.assert_close(loaded["pos_embed"], expected)
    assert torch.equal(loaded["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
