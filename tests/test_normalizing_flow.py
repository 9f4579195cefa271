"""Mathematics of the flows: inverse, log-determinant, likelihood; with new weights and with trained ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from patchcore.configs import BackboneConfig, FastFlowConfig, TrainingConfig
from patchcore.methods.normalizing_flow import (
    CouplingNet,
    FastFlowNet,
    FeatureFlow,
    FlowStep,
    bits_per_dimension,
    latent_bits,
    mean_probability,
)
from patchcore.methods.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = FastFlowConfig(BackboneConfig("any", ("a",)), flow_steps=3, training=TrainingConfig(30, 4, 2e-2))
SHAPE = (5, 4, 3)  # an odd number of channels, and height other than width
STANDARD_NORMAL_BITS = 0.5 * math.log2(2 * math.pi * math.e)


def features(count: int = 12, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    """Correlated, skewed features, of which each channel has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    x[:, 1] = x[:, 0].square() + 0.3 * x[:, 1]
    return x * torch.linspace(0.5, 3, shape[0]).view(1, -1, 1, 1) + 2


def new_net(config: FastFlowConfig = CONFIG, seed: int = 1) -> FastFlowNet:
    net = FastFlowNet([SHAPE], config, seed)
    net.standardise_by([features()])
    return net


def randomised(net: FastFlowNet, seed: int = 2) -> FastFlowNet:
    """Give every weight a random value: a new flow is the identity, whose log-determinant is nothing to test."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return net


def trained(config: FastFlowConfig = CONFIG) -> FastFlowNet:
    net = new_net(config)
    Training(net, net.mean_bits_per_dimension, config.training, 0, "x").run([features()])
    return net


def flow_of(net: FastFlowNet) -> FeatureFlow:
    flow = net.flows[0]
    assert isinstance(flow, FeatureFlow)
    return flow


def random_step(number: int) -> FlowStep:
    """Return a step of kernel 3 (number 0) or 1 (number 1) with random weights."""
    step = flow_of(randomised(new_net())).steps[number]
    assert isinstance(step, FlowStep)
    return step


KINDS: dict[str, Callable[[FastFlowConfig], FastFlowNet]] = {
    "new": new_net,
    "random": lambda config: randomised(new_net(config)),
    "trained": trained,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse(kind: str, dtype: torch.dtype) -> None:
    flow = flow_of(KINDS[kind](CONFIG).to(dtype))
    x = features(seed=7).to(dtype)
    with torch.no_grad():
        latent, _ = flow(x)
        assert latent.shape == x.shape
        torch.testing.assert_close(flow.inverse(latent), x, atol=1e-4, rtol=1e-4)
        z = torch.randn(3, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(flow(flow.inverse(z))[0], z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv3x3_only", [False, True])
def test_log_determinant_against_a_numerical_jacobian(kind: str, conv3x3_only: bool) -> None:
    """Central differences in float64, without autograd; the standardisation is taken out of the Jacobian."""
    flow = flow_of(KINDS[kind](replace(CONFIG, conv3x3_only=conv3x3_only)).double())
    x = features(1, seed=9).double()
    step = 1e-6
    columns = []
    with torch.no_grad():
        for direction in torch.eye(x.numel(), dtype=torch.float64):
            shift = step * direction.view_as(x)
            columns.append(((flow(x + shift)[0] - flow(x - shift)[0]) / (2 * step)).flatten())
        jacobian = torch.stack(columns, dim=1) * flow.std.expand_as(x).flatten()
        _, numerical = np.linalg.slogdet(jacobian.numpy())
        _, log_det = flow(x)
    assert log_det.shape == (1, *SHAPE[1:])
    assert float(log_det.sum()) == pytest.approx(float(numerical), abs=1e-5)
    if kind != "new":
        assert abs(numerical) > 0.5, "a log-determinant of zero proves nothing"


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_and_its_gradients_are_those_of_the_library(number: int) -> None:
    """`advance` against FrEIA's forward pass, through the same weights, in float64."""
    step = random_step(number).double()
    channels_last = features().double().contiguous(memory_format=torch.channels_last).requires_grad_()
    (expected,), expected_log_det = step((channels_last,))
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def gradients(result: torch.Tensor, log_det: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = (result * weights).sum() + (log_det * weights[:, 0]).sum()
        return torch.autograd.grad(loss, [channels_last, *step.parameters()])

    grid = len(expected), *SHAPE[1:]
    rows, log_det = step.advance(channels_last.transpose(0, 1).flatten(1), grid)
    result = rows.unflatten(1, grid).transpose(0, 1)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(log_det.view(grid), expected_log_det)
    found = gradients(result, log_det.view(grid))
    for mine, theirs in zip(found, gradients(expected, expected_log_det), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_layout_of_features_in_memory_changes_nothing() -> None:
    flow = flow_of(randomised(new_net()))
    x = features()
    with torch.no_grad():
        contiguous = flow(x)
        channels_last = flow(x.contiguous(memory_format=torch.channels_last))
    for one, other in zip(contiguous, channels_last, strict=True):
        torch.testing.assert_close(one, other)


def test_log_determinant_of_positions_adds_up_to_that_of_the_library() -> None:
    """The parts against FrEIA's own sum over positions, through the same weights and permutation."""
    step = random_step(0)
    x = features()
    (_,), by_position = step((x,))
    step.sum_dims = (1, 2, 3)
    (_,), coupling_and_one_scale = step((x,))  # FlowStep gives FrEIA the global part of one position alone
    global_part = step.global_scale_activation(step.global_scale).log().sum()
    num_positions = SHAPE[1] * SHAPE[2]
    total = coupling_and_one_scale + (num_positions - 1) * global_part
    torch.testing.assert_close(by_position.sum(dim=(1, 2)), total, atol=1e-3, rtol=1e-4)


def test_a_log_determinant_belongs_to_its_position() -> None:
    """With 1x1 convolutions alone, a change at one place changes neither latent nor log-determinant elsewhere."""
    step = random_step(1)
    x = features(1)
    changed = x.clone()
    changed[0, :, 2, 1] -= 3
    with torch.no_grad():
        difference = step((x,))[1] - step((changed,))[1]
    assert difference[0, 2, 1].abs() > 1e-3
    difference[0, 2, 1] = 0
    assert difference.abs().max() < 1e-6


# ---------------------------------------------------------------- likelihood


def test_a_new_flow_gives_the_density_of_the_standard_normal_distribution() -> None:
    """The identity but for a permutation: closed form, and torch's own density as an oracle."""
    net = new_net()
    x = features()
    latent, log_det = flow_of(net)(x)
    assert log_det.abs().max() < 1e-6
    standardised = (x - flow_of(net).mean) / flow_of(net).std
    density = torch.distributions.Normal(0.0, 1.0).log_prob(standardised).mean() / -math.log(2)
    loss = net.mean_bits_per_dimension([x]).detach()
    assert float(loss) == pytest.approx(float(density), rel=1e-5)
    # channels of mean 0 and variance 1: the mean of x^2 is 1
    assert float(loss) == pytest.approx(STANDARD_NORMAL_BITS, rel=1e-5)
    assert sorted(latent[0, :, 0, 0].tolist()) == pytest.approx(sorted(standardised[0, :, 0, 0].tolist()))


def test_likelihood_of_a_scaling_flow_worked_by_hand() -> None:
    """z = 2 x in each of 5 channels: -log2 p(x) = 0.5 log2(2 pi) + 0.5 * 4 x^2 / ln 2 - 1."""
    net = FastFlowNet([SHAPE], replace(CONFIG, flow_steps=1), seed=0)
    step = flow_of(net).steps[0]
    assert isinstance(step, FlowStep)
    step.global_scale.data.fill_(2.0 * math.log(math.exp(0.5 * 10 * 2) - 1))  # softplus(b, beta 0.5) / 10 = 2
    x = torch.full((1, *SHAPE), 0.3)
    bits = bits_per_dimension(*flow_of(net)(x))
    expected = 0.5 * math.log2(2 * math.pi) + 0.5 * 4 * 0.09 / math.log(2) - 1
    torch.testing.assert_close(bits, torch.full((1, 4, 3), expected))


def test_density_integrates_to_one() -> None:
    """Two channels at one position: sum the density of a randomised flow over a fine grid of the plane."""
    net = randomised(FastFlowNet([(2, 1, 1)], CONFIG, seed=0)).double()
    axis = torch.linspace(-40, 40, 501, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        bits = bits_per_dimension(*flow_of(net)(points)).flatten()
    assert float(torch.exp2(-2 * bits).sum()) * 0.16**2 == pytest.approx(1.0, abs=2e-3)


def test_latent_bits_and_probability_of_a_standard_normal_variable() -> None:
    squares = torch.randn(4, 200, 20, 20, generator=torch.Generator().manual_seed(0)).square().mean(dim=1)
    assert float(latent_bits(squares).mean()) == pytest.approx(STANDARD_NORMAL_BITS, abs=0.01)
    assert float(mean_probability(squares).mean()) == pytest.approx(math.exp(-0.5), abs=0.01)
    zero = torch.zeros(1, 2, 2)
    assert torch.equal(mean_probability(zero), torch.ones(1, 2, 2))
    torch.testing.assert_close(latent_bits(zero), bits_per_dimension(torch.zeros(1, 3, 2, 2), zero))


@pytest.mark.parametrize("kernels", ["mixed", "conv3x3_only"])
def test_mean_squares_are_those_of_the_latent_variable(kernels: str) -> None:
    net = randomised(FastFlowNet([SHAPE], replace(CONFIG, conv3x3_only=kernels == "conv3x3_only"), seed=0))
    x = features()
    before = x.clone()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            latent, _ = flow_of(net)(x.contiguous(memory_format=memory_format))
        found = flow_of(net).mean_squares(x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(found, latent.square().mean(dim=1))
    assert torch.equal(x, before), "the features are the caller's"


def test_training_raises_the_likelihood_of_images_it_has_not_seen() -> None:
    """Channel 1 is nearly the square of channel 0, which the flow finds out."""
    net = new_net()
    config = TrainingConfig(15, 32, 1e-2)
    Training(net, net.mean_bits_per_dimension, config, 0, "x").run([features(400)])
    with torch.no_grad():
        loss = float(net.mean_bits_per_dimension([features(100, seed=42)]))
    assert loss < STANDARD_NORMAL_BITS - 0.15
    assert not any("std" in name for name, _ in net.named_parameters()), "a trainable gain has no bound"


# ---------------------------------------------------------------- standardisation


def test_standardisation_is_that_of_each_channel_over_images_and_positions() -> None:
    x = features()
    flow = flow_of(new_net())
    torch.testing.assert_close(flow.mean.flatten(), x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(flow.std.flatten(), x.std(dim=(0, 2, 3), correction=0))


def test_a_channel_that_never_varies_is_not_blown_up() -> None:
    x = features()
    x[:, 3] = 1.5
    flow = FeatureFlow(SHAPE, CONFIG)
    flow.standardise_by(x)
    typical = x.var(dim=(0, 2, 3), correction=0).mean().sqrt()
    torch.testing.assert_close(flow.std[0, 3, 0, 0], 0.1 * typical)
    flow.standardise_by(torch.ones(3, *SHAPE))
    assert torch.equal(flow.std, torch.ones_like(flow.std))


# ---------------------------------------------------------------- options of the network


def test_noise_bounds_the_likelihood_of_features_on_a_line() -> None:
    """Channel 1 is channel 0: the density has no bound, but with noise of 0.2 it has.

    Per pair of channels and in units of their standard deviation the noisy features have the variances 2 + 0.04 along
    the line and 0.04 across it; no flow can give more than their entropy, which the noiseless one passes at once.
    """
    x = features(16, (2, 4, 4))
    x = x[:, :1].expand(-1, 2, -1, -1).contiguous()

    def final_loss(noise: float) -> float:
        net = FastFlowNet([(2, 4, 4)], replace(CONFIG, feature_noise=noise, conv3x3_only=True), seed=0)
        net.standardise_by([x])
        history = Training(net, net.mean_bits_per_dimension, TrainingConfig(120, 16, 3e-2), 0, "x").run([x])
        return history[-1].loss

    entropy = 0.25 * math.log2((2 * math.pi * math.e) ** 2 * 2.04 * 0.04)
    with_noise, without = final_loss(0.2), final_loss(0.0)
    assert with_noise > entropy - 0.2 > without


def test_noise_is_for_training_alone() -> None:
    net = new_net(replace(CONFIG, feature_noise=0.2))
    x = [features(300)]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(123)  # another seed than that of the features, which would be their own noise
        noisy, noisy_again = (float(net.train().mean_bits_per_dimension(x)) for _ in range(2))
        clean, clean_again = (float(net.eval().mean_bits_per_dimension(x)) for _ in range(2))
    assert noisy != noisy_again and clean == clean_again
    # the identity: noise adds its own variance to that of the standardised features
    assert noisy - clean == pytest.approx(0.5 * 0.2**2 / math.log(2), abs=0.01)


def test_kernels_take_turns_or_are_all_of_side_three() -> None:
    def kernels(config: FastFlowConfig) -> list[int]:
        return [m.kernel_size[0] for m in FeatureFlow(SHAPE, config).modules() if isinstance(m, nn.Conv2d)]

    assert kernels(replace(CONFIG, flow_steps=4)) == [3, 3, 1, 1, 3, 3, 1, 1]
    assert kernels(replace(CONFIG, flow_steps=2, conv3x3_only=True)) == [3, 3, 3, 3]


def test_hidden_channels() -> None:
    def hidden(ratio: float) -> int:
        first = CouplingNet(6, 8, 3, replace(CONFIG, hidden_ratio=ratio))[0]
        assert isinstance(first, nn.Conv2d)
        return first.out_channels

    assert [hidden(1.0), hidden(0.5), hidden(1.2), hidden(0.01)] == [6, 3, 7, 1]


def test_clamp_bounds_the_scale() -> None:
    for clamp in (0.5, 2.0):
        step = FlowStep(SHAPE, 3, replace(CONFIG, clamp=clamp))
        nn.init.constant_(step.subnet[-1].bias, 1e4)
        _, log_det = step((torch.zeros(1, *SHAPE),))
        assert float(log_det[0, 1, 1].detach()) == pytest.approx(clamp * (SHAPE[0] // 2), rel=1e-4)


def test_bfloat16_changes_little_and_keeps_the_flow_invertible() -> None:
    exact = trained()
    fast = new_net(replace(CONFIG, precision="bfloat16"))
    fast.load_state_dict(exact.state_dict())
    x = features(seed=7)
    with torch.no_grad():
        latent, _ = flow_of(fast)(x)
        expected, _ = flow_of(exact)(x)
        assert latent.dtype == torch.float32
        assert not torch.equal(latent, expected)
        torch.testing.assert_close(latent, expected, atol=0.1, rtol=0.05)
        torch.testing.assert_close(flow_of(fast).inverse(latent), x, atol=0.1, rtol=0.05)


def test_seeds_give_weights_and_permutations_and_leave_global_randomness_alone() -> None:
    def state(seed: int) -> dict[str, Any]:
        return FastFlowNet([(16, 2, 2)], CONFIG, seed).state_dict()

    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(3)
    torch.manual_seed(3)
    one, same, other = state(1), state(1), state(2)
    assert (np.random.rand(), torch.rand(1)) == expected
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["flows.0.steps.0.order"], other["flows.0.steps.0.order"])
    assert not torch.equal(one["flows.0.steps.0.subnet.0.weight"], other["flows.0.steps.0.subnet.0.weight"])
    assert not torch.equal(one["flows.0.steps.0.order"], one["flows.0.steps.1.order"])


def test_threads_that_build_flows_at_once_get_the_weights_of_their_seeds() -> None:
    """FrEIA draws from generators of the whole process."""

    def state(seed: int) -> dict[str, Any]:
        return FastFlowNet([(16, 2, 2)], CONFIG, seed).state_dict()

    seeds = range(40)
    expected = [state(seed) for seed in seeds]
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads take turns within the construction of a step
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(state, seeds))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# ---------------------------------------------------------------- joining scales


def test_grids_of_all_modes_worked_by_hand() -> None:
    """Two new flows, one channel pair each: latent values are the features in some order."""
    net = FastFlowNet([(2, 2, 2), (4, 1, 1)], CONFIG, seed=0)
    net.spread.copy_(torch.tensor([0.5, 4.0]))
    fine = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    coarse = torch.full((1, 4, 1, 1), 3.0)
    with torch.no_grad():
        grids = {mode: net.anomaly_grid([fine, coarse], mode)[0] for mode in ("prob", "nll", "weighted")}
    squares = torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    constant = 0.5 * math.log2(2 * math.pi)
    fine_bits, coarse_bits = 0.5 * squares / math.log(2) + constant, 4.5 / math.log(2) + constant
    torch.testing.assert_close(grids["prob"], -((torch.exp(-0.5 * squares) + math.exp(-4.5)) / 2).log2())
    torch.testing.assert_close(grids["nll"], (fine_bits + coarse_bits) / 2)
    torch.testing.assert_close(grids["weighted"], (fine_bits / 0.5 + coarse_bits / 4.0) / 2)


def test_spread_is_the_standard_deviation_of_each_map() -> None:
    shapes = [(4, 3, 3), (6, 2, 2)]
    net = FastFlowNet(shapes, CONFIG, seed=0)
    maps = [features(7, shape) for shape in shapes]
    net.measure_spread(maps, batch_size=3)
    squares = [flow(x)[0].square().mean(dim=1) for flow, x in zip(net.flows, maps, strict=True)]
    expected = [latent_bits(of_flow).std(correction=0) for of_flow in squares]
    torch.testing.assert_close(net.spread, torch.stack(expected).detach())
    net.measure_spread([torch.ones(2, *shape) for shape in shapes], batch_size=1)
    assert net.spread.isfinite().all() and (net.spread > 0).all()


@pytest.mark.parametrize("map_mode", ["prob", "nll", "weighted"])
def test_one_image_of_one_position_has_a_spread_and_a_map(map_mode: str) -> None:
    """There is one value, which has no sample standard deviation."""
    net = FastFlowNet([(4, 1, 1)], CONFIG, seed=0)
    only = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    net.standardise_by([only])
    net.measure_spread([only], batch_size=8)
    assert net.spread.isfinite().all() and (net.spread > 0).all()
    with torch.no_grad():
        assert net.anomaly_grid([only + 1], map_mode).isfinite().all()
