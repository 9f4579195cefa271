"""Normalizing flows on feature maps: the network of FastFlow, with its likelihood at every position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from FrEIA.modules import AllInOneBlock
from torch import nn

from patchcore.configs import FastFlowConfig
from patchcore.errors import ConfigurationError
from patchcore.methods.coupling import Couple, CouplingNet, as_rows, couple_
from patchcore.methods.training import seeded
from patchcore.process_group import ALONE, Processes

RELATIVE_STD_FLOOR = 0.1  # of the root mean square over channels; see FeatureFlow.standardise_by
MIN_SPREAD_BITS = 1e-6  # a flow whose map is flat, as on equal images, is left in its own unit
LOG_2 = math.log(2.0)
COEFFICIENT_SCALE = 0.1  # by which FrEIA scales what a subnet gives, for stability


class FlowStep(AllInOneBlock):
    """FrEIA's coupling, global scale and permutation, with a log-determinant for each position.

    The log-determinant of a step is a sum over positions, of the coupling's log-scales and of the global ones. FrEIA
    returns the sum; a map of likelihoods needs its parts. The permutation is done by index: the product with a
    permutation matrix, as FrEIA has it, costs as much as a 1x1 convolution of all channels, and the matrices may
    take more memory than the weights.

    Args:
        shape: Channels, height and width of the feature map.
        kernel: Side of the convolutions, 3 or 1.
        config: Clamp, hidden channels and precision.
    """

    order: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], kernel: int, config: FastFlowConfig) -> None:
        super().__init__(
            [shape],
            subnet_constructor=lambda i, o: CouplingNet(i, o, kernel, config),
            affine_clamping=config.clamp,
            permute_soft=False,
        )
        self.sum_dims = (1,)  # over channels alone: FrEIA gives [B, H, W] then
        order = self.w_perm[:, :, 0, 0].argmax(dim=1)
        del self.w_perm, self.w_perm_inv
        self.register_buffer("order", order)  # [C]

    def _permute(self, x: torch.Tensor, rev: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and permute, or undo both; the log-determinant is that of one position."""
        scale = self.global_scale_activation(self.global_scale)
        log_det = scale.log().sum() / x[0, 0].numel()  # FrEIA multiplies by the number of positions again
        if rev:
            return (x[:, self.order.argsort()] - self.global_offset) / scale, log_det
        return (x * scale + self.global_offset)[:, self.order], log_det

    def advance(self, x: torch.Tensor, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `forward` does, on a matrix and in a third of its passes over memory.

        Args:
            x: [C, B * H * W].
            grid: B, H, W.

        Returns:
            The transformed matrix, and the log-determinant of each position [B * H * W].
        """
        passive, active = x.split(self.splits)
        scale, offset, log_scale, gain, bias = self._global()
        result, log_det = Couple.apply(
            passive,
            active,
            self.subnet.affine(passive, grid, gain, bias),
            scale,
            offset,
            log_scale[len(passive) :],
            self.order,
            float(self.clamp),
        )
        return result, log_det + log_scale.sum()

    @torch.no_grad()
    def folded(self) -> FoldedStep:
        """Return what a step computes with once its weights are fixed."""
        scale, offset, log_scale, gain, bias = (value.flatten() for value in self._global())
        first, first_bias, last, last_bias = self.subnet.weights(gain, bias)
        changed = slice(len(scale), None)
        return FoldedStep(
            first, first_bias, last, last_bias, scale, offset, float(self.clamp), log_scale[changed], self.order
        )

    @property
    def order_with_ones(self) -> torch.Tensor:
        """`order` for matrices with a row of ones behind the passive half; int64 [C + 1]."""
        num_passive = self.splits[0]
        shifted = self.order + (self.order >= num_passive)
        return torch.cat((shifted[:num_passive], shifted.new_full((1,), num_passive), shifted[num_passive:]))

    def couple_(self, x: torch.Tensor, grid: tuple[int, int, int], memory: Memory) -> None:
        """Write what `advance` makes of a matrix into `memory.result`, without the permutation or gradients.

        Args:
            x: [C + 1, B * H * W], with a row of ones behind the passive half.
            grid: B, H, W.
            memory: Overwritten.
        """
        num_passive = self.splits[0]
        scale, offset, log_scale, gain, bias = self._global()
        self.subnet.affine_(x[: num_passive + 1], grid, gain, bias, memory.hidden, memory.coefficients)
        couple_(x, memory.coefficients, scale, offset, log_scale[num_passive:], float(self.clamp), memory.result)

    def _global(self) -> tuple[torch.Tensor, ...]:
        """Return scale and offset [P, 1] of the passive half, log-scale [C, 1], gain and bias [2 A] of the subnet.

        The global scale and offset of the changed half are those of its coefficients.
        """
        scale = self.global_scale_activation(self.global_scale).flatten()  # [C]
        passive_scale, active_scale = scale.split(self.splits)
        passive_offset, active_offset = self.global_offset.flatten().split(self.splits)
        gain = COEFFICIENT_SCALE * torch.cat((torch.ones_like(active_scale), active_scale))
        bias = torch.cat((torch.zeros_like(active_offset), active_offset))
        return passive_scale[:, None], passive_offset[:, None], scale.log()[:, None], gain, bias


@dataclass(frozen=True)
class FoldedStep:
    """A flow step as two convolutions and what belongs to channels: P that pass, A that are changed, C = P + A.

    Attributes:
        first: [hidden, P, k, k], the convolution before the ReLU.
        first_bias: [hidden].
        last: [2 A, hidden, k, k], the convolution that gives log-factors before their tanh, then shifts.
        last_bias: [2 A].
        scale: [P], of the channels that pass.
        offset: [P].
        clamp: Bound of the log-factors.
        log_scale: [A], added to the log-factors.
        order: int64 [C], the permutation that ends the step.
    """

    first: torch.Tensor
    first_bias: torch.Tensor
    last: torch.Tensor
    last_bias: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    clamp: float
    log_scale: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True)
class Memory:
    """What the steps of a flow write into in turn, where no gradients are kept.

    Attributes:
        hidden: [hidden channels + 1, N], the last row one.
        coefficients: [2 A, N].
        result: [C + 1, N], a row of ones behind the passive half.
    """

    hidden: torch.Tensor
    coefficients: torch.Tensor
    result: torch.Tensor


class FeatureFlow(nn.Module):
    """An invertible network from one feature map to a standard normal variable of the same shape.

    Args:
        shape: Channels, height and width of the feature map.
        config: Steps, kernels and all that a step needs.

    Source: Yu et al., "FastFlow" (2021), section 3.2. Theirs normalises the features by a trainable LayerNorm before
        the flow. Its gain is left out of the log-determinant, so that the likelihood grows without bound as the gain
        falls; here the statistics of the training features take its place and are not trained.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], config: FastFlowConfig) -> None:
        super().__init__()
        self.shape = shape
        channels = shape[0]
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        kernels = [3 if config.conv3x3_only or number % 2 == 0 else 1 for number in range(config.flow_steps)]
        self.steps = nn.ModuleList([FlowStep(shape, kernel, config) for kernel in kernels])

    def standardise_by(self, features: torch.Tensor, processes: Processes = ALONE) -> None:
        """Take mean and standard deviation of each channel over images and positions of features [N, C, H, W].

        Each of several processes gives the features that it has.

        A channel that hardly varies on normal images would turn a small deviation into a huge one, and one that does
        not vary at all has a likelihood without bound. Channels are scaled by no less than a tenth of the typical
        standard deviation.
        """
        of_image = features.new_empty(features.shape[:2], dtype=torch.float64)  # [N, C]
        for number, image in enumerate(features):
            of_image[number] = image.double().mean(dim=(1, 2))
        mean = processes.mean(of_image.sum(dim=0), len(features))  # [C]
        for number, image in enumerate(features):
            of_image[number] = (image.double() - mean[:, None, None]).square().mean(dim=(1, 2))
        variance = processes.mean(of_image.sum(dim=0), len(features))  # [C]
        floor = RELATIVE_STD_FLOOR * variance.mean().sqrt()
        std = variance.sqrt().clamp(min=float(floor) or 1.0)
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.view_as(self.std))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform features.

        Args:
            features: float [B, C, H, W].

        Returns:
            The latent variable [B, C, H, W], and the log-determinant with respect to the standardised features at
            each position [B, H, W], in nats.
        """
        grid = features.shape[0], features.shape[2], features.shape[3]
        x = (as_rows(features) - self.mean.view(-1, 1)) / self.std.view(-1, 1)  # [C, B * H * W]
        log_det = x.new_zeros(x.shape[1])
        for step in self.steps:
            assert isinstance(step, FlowStep)
            x, step_log_det = step.advance(x, grid)
            log_det = log_det + step_log_det
        return x.unflatten(1, grid).transpose(0, 1), log_det.view(grid)  # [B, C, H, W], [B, H, W]

    @torch.no_grad()
    def mean_squares(self, features: torch.Tensor) -> torch.Tensor:
        """Return the mean square over channels of the latent variable that `forward` gives, in less time.

        Args:
            features: float [B, C, H, W].

        Returns:
            [B, H, W].
        """
        grid = features.shape[0], features.shape[2], features.shape[3]
        first = self.steps[0]
        assert isinstance(first, FlowStep)
        num_passive, num_active = first.splits
        rows = as_rows(features)
        x = rows.new_ones(rows.shape[0] + 1, rows.shape[1])
        offset, factor = -(self.mean / self.std).view(-1, 1), 1 / self.std.view(-1, 1)
        torch.addcmul(offset[:num_passive], rows[:num_passive], factor[:num_passive], out=x[:num_passive])
        torch.addcmul(offset[num_passive:], rows[num_passive:], factor[num_passive:], out=x[num_passive + 1 :])
        memory = Memory(
            hidden=x.new_ones(first.subnet[0].out_channels + 1, x.shape[1]),
            coefficients=x.new_empty(2 * num_active, x.shape[1]),
            result=torch.ones_like(x),
        )
        last = len(self.steps) - 1
        for number, step in enumerate(self.steps):
            assert isinstance(step, FlowStep)
            step.couple_(x, grid, memory)
            if number < last:  # a sum over channels does not mind their order
                torch.index_select(memory.result, 0, step.order_with_ones, out=x)
        memory.result[num_passive] = 0
        return memory.result.square_().sum(dim=0).div_(len(rows)).view(grid)

    def inverse(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the features [B, C, H, W] that `forward` maps to a latent variable."""
        for step in list(self.steps)[::-1]:
            (latent,), _ = step((latent,), rev=True)
        return latent * self.std + self.mean


def bits_per_dimension(latent: torch.Tensor, log_det: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each position, divided by its channels, in bits.

    Args:
        latent: float [B, C, H, W].
        log_det: float [B, H, W], nats.

    Returns:
        float [B, H, W]; the mean over positions is that of the image. 2.05 for standard normal features under the
        identity.

    Source: Yu et al. (2021), Eq. 3 and 4, by change of variables, per dimension as is usual for flows.
    """
    channels = latent.shape[1]
    energy = 0.5 * (latent.square().sum(dim=1) + channels * math.log(2 * math.pi))  # [B, H, W]
    return (energy - log_det) / (channels * LOG_2)


def latent_bits(mean_squares: torch.Tensor) -> torch.Tensor:
    """Return the negative log-density of the latent variable in bits per dimension, from its mean squares [B, H, W].

    Maps are made of it rather than of `bits_per_dimension`, as published. The density of the features has the
    log-determinant too, but follows how complex their neighbourhood is (Serra et al., "Input Complexity and
    Out-of-Distribution Detection", ICLR 2020): smooth defects would look normal, rich texture anomalous.
    """
    return (0.5 / LOG_2) * mean_squares + 0.5 * math.log2(2 * math.pi)


def mean_probability(mean_squares: torch.Tensor) -> torch.Tensor:
    """Return exp of the mean log-density over channels, up to its constant: mean squares [B, H, W] to (0, 1].

    Source: the maps of FastFlow, section 3.3 of Yu et al. (2021).
    """
    return torch.exp(-0.5 * mean_squares)


class FastFlowNet(nn.Module):
    """One flow for each feature map.

    Equal seeds give equal weights, and no global random state is changed.

    Args:
        shapes: Channels, height and width of each feature map.
        config: Steps, kernels and all that a step needs.
        seed: Gives permutations and weights.

    Attributes:
        spread: float32 [L], standard deviation of each flow's map on normal images; 1 before `measure_spread`.
    """

    spread: torch.Tensor

    def __init__(self, shapes: Sequence[tuple[int, int, int]], config: FastFlowConfig, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.flows = nn.ModuleList([FeatureFlow(shape, config) for shape in shapes])
        self.noise = config.feature_noise
        self.register_buffer("spread", torch.ones(len(shapes)))
        self.to(memory_format=torch.channels_last)

    def standardise_by(self, features: Sequence[torch.Tensor], processes: Processes = ALONE) -> None:
        """Take the statistics of the training features [N, C, H, W] of each layer, over all processes."""
        for flow, feature_maps in zip(self.flows, features, strict=True):
            assert isinstance(flow, FeatureFlow)
            flow.standardise_by(feature_maps, processes)

    def require_invertible(self) -> None:
        """Raise ConfigurationError if stored values make no flow: not finite, no permutation, no scale to divide by."""
        for name, tensor in self.state_dict().items():
            expected, valid = "finite numbers", bool(tensor.isfinite().all())
            if name.endswith(".order"):
                expected = "a permutation"
                valid = torch.equal(tensor.sort().values, torch.arange(len(tensor), device=tensor.device))
            elif name == "spread" or name.endswith(".std"):
                expected, valid = "positive numbers", valid and bool((tensor > 0).all())
            if not valid:
                raise ConfigurationError(f"{name} of the stored flows is not {expected}: train the model anew")

    def forward(self, features: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what each flow makes of its feature map: latent variable and log-determinant."""
        return [flow(feature_map) for flow, feature_map in zip(self.flows, features, strict=True)]

    def mean_bits_per_dimension(
        self, features: Sequence[torch.Tensor], randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like
    ) -> torch.Tensor:
        """Return the loss of training: negative log-likelihood per dimension, mean over images and flows, bits.

        The flows share no weights. Per dimension, none of them has the clipping of gradients to itself because its
        feature map is larger. While training, noise keeps the density from rising without bound where the features
        of few images lie on a line or a point; it is to real values what dequantisation is to whole ones (Ho et al.,
        "Flow++", ICML 2019).

        Args:
            features: [B, C, H, W] of each layer.
            randn_like: Draws the noise.
        """
        if self.training and self.noise > 0:
            features = [
                self._with_noise(flow, maps, randn_like(maps)) for flow, maps in zip(self.flows, features, strict=True)
            ]
        return torch.stack([bits_per_dimension(*given).mean() for given in self(features)]).mean()

    def _with_noise(self, flow: nn.Module, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        assert isinstance(flow, FeatureFlow)
        return torch.addcmul(features, noise, flow.std, value=self.noise)

    @torch.no_grad()
    def measure_spread(self, features: Sequence[torch.Tensor], batch_size: int, processes: Processes = ALONE) -> None:
        """Learn the standard deviation of each flow's likelihoods over the positions of normal images.

        Args:
            features: [N, C, H, W] of each layer; of several processes those that this one has.
            batch_size: Images at once.
            processes: Those that measure together.
        """
        grids: list[list[torch.Tensor]] = [[] for _ in self.flows]
        for first in range(0, len(features[0]), batch_size):
            part = [maps[first : first + batch_size].to(self.spread.device) for maps in features]
            for of_flow, grid in zip(grids, self._likelihoods(part), strict=True):
                of_flow.append(grid.cpu())
        spread = [_standard_deviation(of_flow, processes) for of_flow in grids]
        self.spread.copy_(torch.stack(spread).clamp(min=MIN_SPREAD_BITS))

    def _likelihoods(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [latent_bits(squares) for squares in self._mean_squares(features)]

    def _mean_squares(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        flows = [flow for flow in self.flows if isinstance(flow, FeatureFlow)]
        return [flow.mean_squares(feature_map) for flow, feature_map in zip(flows, features, strict=True)]

    def anomaly_grid(self, features: Sequence[torch.Tensor], map_mode: str) -> torch.Tensor:
        """Join what the flows say of each position.

        Args:
            features: [B, C, H, W] of each layer.
            map_mode: "prob": negative logarithm of the mean over flows of the probability, bits; the published map
                is this mean, which orders places alike but ends at 0, where no threshold fits above normal images.
                "nll": mean over flows of the latent variable's bits per dimension. "weighted": the same, each flow's
                in standard deviations over normal images, so that none drowns the others.

        Returns:
            float32 [B, h, w] on the finest of the grids, higher is more anomalous.
        """
        if map_mode == "prob":
            # In float32 all energies above 87 would be one probability, 0.
            exact = torch.float32 if self.spread.device.type == "mps" else torch.float64
            squares = [of_flow.to(exact) for of_flow in self._mean_squares(features)]
            mean = _mean_on_finest([mean_probability(of_flow) for of_flow in squares])
            return -mean.clamp(min=torch.finfo(exact).tiny).log2().to(self.spread.dtype)
        grids = self._likelihoods(features)
        if map_mode == "weighted":
            grids = [grid / spread for grid, spread in zip(grids, self.spread, strict=True)]
        return _mean_on_finest(grids)


def _standard_deviation(values: Sequence[torch.Tensor], processes: Processes) -> torch.Tensor:
    """Return the standard deviation of all numbers that the processes have, float64."""
    none = torch.zeros((), dtype=torch.float64)
    count = sum(part.numel() for part in values)
    mean = processes.mean(sum((part.double().sum() for part in values), none), count)
    squares = sum(((part.double() - mean).square().sum() for part in values), none)
    return processes.mean(squares, count).sqrt()


def _mean_on_finest(grids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of grids [B, h, w] on the finest of them."""
    finest = max((grid.shape[1:] for grid in grids), key=math.prod)
    aligned = [F.interpolate(grid[:, None], size=finest, mode="bilinear", align_corners=False)[:, 0] for grid in grids]
    return torch.stack(aligned).mean(dim=0)
