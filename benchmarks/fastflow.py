"""Speed of FastFlow's training and inference beside the straightforward loop, in one process.

The straightforward loop stands below as one would write it from the paper: FrEIA's AllInOneBlock, float32, images
through the backbone in every epoch. Both sides take turns, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from FrEIA.modules import AllInOneBlock
from torch import nn
from torchvision.models import resnet18

from patchcore.configs import BackboneConfig, FastFlowConfig, TrainingConfig
from patchcore.features.backbones import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from patchcore.features.extractor import build_extractor
from patchcore.methods.normalizing_flow import FastFlowNet
from patchcore.methods.training import Training
from patchcore.runtime import over_threads

LAYERS = ("layer1", "layer2", "layer3")
LEARNING_RATE = 1e-3
BACKBONE_SEED = BackboneConfig("resnet18", LAYERS).seed


class Straightforward(nn.Module):
    """Frozen ResNet18 and flows of 3x3 and 1x1 subnets in turn, in contiguous float32.

    Args:
        imagesize: Side of the images, px.
        flow_steps: Steps of each flow.
    """

    def __init__(self, imagesize: int, flow_steps: int) -> None:
        super().__init__()
        self.backbone = resnet18(weights=None).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        shapes = [tuple(m.shape[1:]) for m in self.features(torch.zeros(1, 3, imagesize, imagesize))]
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)  # as published, trained with the flows
        self.flows = nn.ModuleList(
            nn.ModuleList(
                AllInOneBlock([shape], subnet_constructor=_subnet(3 if step % 2 == 0 else 1), permute_soft=False)
                for step in range(flow_steps)
            )
            for shape in shapes
        )

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps [B, C, H, W] of images [B, 3, S, S] in [0, 255]."""
        net = self.backbone
        x = (images.float() / 255 - self.mean) / self.std
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = []
        for layer in LAYERS:
            x = getattr(net, layer)(x)
            maps.append(x)
        return maps

    def transform(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return latent variable and log-determinant [B] of each feature map."""
        results = []
        for norm, steps, x in zip(self.norms, self.flows, features, strict=True):
            x = norm(x)
            total = x.new_zeros(len(x))
            for step in steps:
                (x,), log_det = step((x,))
                total = total + log_det
            results.append((x, total))
        return results

    def train_batch(self, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take one step on 0.5 * sum(z^2) - log det."""
        optimizer.zero_grad()
        results = self.transform(self.features(images))
        loss = sum((0.5 * z.square().sum(dim=(1, 2, 3)) - log_det).mean() for z, log_det in results)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def anomaly_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the negative mean probability [B, S, S]."""
        maps = [
            F.interpolate(
                -torch.exp(-0.5 * z.square().mean(dim=1, keepdim=True)),
                size=images.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            for z, _ in self.transform(self.features(images))
        ]
        return torch.stack(maps).mean(dim=0)[:, 0]


def _subnet(kernel: int) -> Callable[[int, int], nn.Module]:
    def build(channels_in: int, channels_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_in, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, kernel, padding="same"),
        )

    return build


class Toolkit:
    """What the toolkit does: features of each image once, then epochs on them.

    Args:
        imagesize: Side of the images, px.
        flow_steps: Steps of each flow.
        batch_size: Images per step.
    """

    def __init__(self, imagesize: int, flow_steps: int, batch_size: int) -> None:
        backbone = BackboneConfig("resnet18", LAYERS, weights="random")
        training = TrainingConfig(10_000, batch_size, LEARNING_RATE)
        config = FastFlowConfig(backbone, flow_steps=flow_steps, training=training)
        self.batch_size = batch_size
        self.extractor = build_extractor(backbone, imagesize)
        shapes = [self.extractor.feature_shapes[layer] for layer in LAYERS]
        self.flows = FastFlowNet([(shape[0], shape[1], shape[2]) for shape in shapes], config, seed=0)
        self.training = Training(self.flows, self.flows.mean_bits_per_dimension, training, 0, "benchmark")

    def cache(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps [N, C, H, W] of all images."""
        batches = [list(self.extractor(batch).values()) for batch in images.split(self.batch_size)]
        return [torch.cat(maps).contiguous(memory_format=torch.channels_last) for maps in zip(*batches, strict=True)]

    def train_epoch(self, features: list[torch.Tensor]) -> None:
        """Train one epoch more."""
        self.training.run(features, stop_after=len(self.training.history) + 1)

    def anomaly_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean probability [B, S, S] as a negative logarithm to base 2, computed as by FastFlow.predict."""
        return over_threads(self._maps_of_part, images, torch.device("cpu"))

    @torch.inference_mode()
    def _maps_of_part(self, images: torch.Tensor) -> torch.Tensor:
        grid = self.flows.anomaly_grid(list(self.extractor(images).values()), "prob")
        return F.interpolate(grid[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def straightforward_like(toolkit: Toolkit, imagesize: int) -> Straightforward:
    """Return the straightforward loop with the backbone, permutations and weights of the toolkit's."""
    reference = Straightforward(imagesize, len(toolkit.flows.flows[0].steps))
    reference.backbone.load_state_dict(load_backbone("resnet18", "random", BACKBONE_SEED).module.state_dict())
    for steps, flow in zip(reference.flows, toolkit.flows.flows, strict=True):
        for theirs, mine in zip(steps, flow.steps, strict=True):
            weights = dict(mine.state_dict())
            permutation = torch.eye(theirs.in_channels)[weights.pop("order")][:, :, None, None]
            theirs.load_state_dict({**weights, "w_perm": permutation, "w_perm_inv": permutation.transpose(0, 1)})
    return reference


def measure(
    images: torch.Tensor, flow_steps: int, batch_size: int, epochs: int, rounds: int
) -> Mapping[str, tuple[float, float]]:
    """Time both sides in turn.

    Args:
        images: uint8 [N, 3, S, S].
        flow_steps: Steps of each flow.
        batch_size: Images per step.
        epochs: Epochs that share the time of the features.
        rounds: Repetitions, of which the median counts.

    Returns:
        {what: images per second of the toolkit and of the straightforward loop}.
    """
    toolkit = Toolkit(images.shape[-1], flow_steps, batch_size)
    reference = straightforward_like(toolkit, images.shape[-1])
    optimizer = torch.optim.Adam([*reference.norms.parameters(), *reference.flows.parameters()], lr=LEARNING_RATE)
    batches = images.split(batch_size)
    features = toolkit.cache(images)
    work: dict[str, Callable[[], object]] = {
        "cache": lambda: toolkit.cache(images),
        "our epoch": lambda: toolkit.train_epoch(features),
        "their epoch": lambda: [reference.train_batch(batch, optimizer) for batch in batches],
        "our inference": lambda: [toolkit.anomaly_maps(batch) for batch in batches],
        "their inference": lambda: [reference.anomaly_maps(batch) for batch in batches],
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if number > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = {name: len(images) / value for name, value in median.items()}
    amortised = len(images) / (median["our epoch"] + median["cache"] / epochs)
    return {
        f"training, features shared by {epochs} epochs": (amortised, rate["their epoch"]),
        "training, an epoch alone": (rate["our epoch"], rate["their epoch"]),
        "inference": (rate["our inference"], rate["their inference"]),
    }


def main() -> None:
    """Print images per second of both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="training images")
    parser.add_argument("--imagesize", type=int, default=224, help="px")
    parser.add_argument("--flow_steps", type=int, default=8, help="steps of each flow")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--epochs", type=int, default=10, help="epochs that share the time of the features")
    parser.add_argument("--rounds", type=int, default=5, help="alternating repetitions, of which the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randint(256, (options.images, 3, options.imagesize, options.imagesize), dtype=torch.uint8)
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{options.threads} threads, {options.images} images of {options.imagesize} px, batch {options.batch_size}")
    rates = measure(images, options.flow_steps, options.batch_size, options.epochs, options.rounds)
    print(f"{'images per second':40s} {'toolkit':>8s} {'loop':>8s} {'ratio':>6s}")
    for what, (ours, theirs) in rates.items():
        print(f"{what:40s} {ours:8.2f} {theirs:8.2f} {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
