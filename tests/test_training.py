"""The gradient loop, on a problem with a known answer."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from patchcore.configs import TrainingConfig
from patchcore.errors import ConfigurationError, DataError
from patchcore.methods.training import EpochRecord, Training, load_weights, schedule_factor

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainingConfig(epochs=6, batch_size=4, lr=0.05)
PATIENT = TrainingConfig(epochs=40, batch_size=4, lr=0.05, patience=3)


class Regression:
    """A line through points, with dropout, so that the network draws random numbers of its own."""

    def __init__(self, count: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(count, 3, generator=generator)
        self.data = [x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return (self.module(x) - y).square().mean()

    def training(self, config: TrainingConfig = CONFIG, seed: int = 3) -> Training:
        return Training(self.module, self.loss, config, seed, "plate: line")

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])


def of_another_line(problem: Regression) -> list[torch.Tensor]:
    """Held-out points that learning the first line makes worse after a few epochs."""
    x, y = problem.data
    return [x, y + 0.3 - x[:, :1]]


def trained(config: TrainingConfig = CONFIG, seed: int = 3) -> torch.Tensor:
    problem = Regression()
    problem.training(config, seed).run(problem.data)
    return problem.weights()


# ---------------------------------------------------------------- what is learned


def test_finds_the_known_answer() -> None:
    problem = Regression()
    problem.module = nn.Sequential(nn.Linear(3, 1))
    config = TrainingConfig(300, 5, 0.1, weight_decay=0.0)
    history = problem.training(config).run(problem.data)
    torch.testing.assert_close(problem.weights(), torch.tensor([1.0, -2.0, 0.5, 0.25]), atol=1e-3, rtol=0)
    assert history[-1].loss < 1e-5 < history[0].loss


def test_first_step_worked_by_hand() -> None:
    """Adam's first step has the length of the learning rate in each weight, and the decay goes before it."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    config = TrainingConfig(1, 1, 0.1, 0.5, "constant", None)
    Training(module, lambda b: 3 * module(b[0]).mean(), config, 0, "x").run([torch.ones(1, 1)])
    assert module.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_history_tells_each_epoch() -> None:
    problem = Regression()
    history = problem.training().run(problem.data, held_out=problem.data)
    assert [r.epoch for r in history] == [1, 2, 3, 4, 5, 6]
    assert all(r.seconds > 0 and r.grad_norm > 0 and r.held_out_loss is not None for r in history)
    assert history[2].lr == 0.05 * schedule_factor("one_cycle", 8, 18)
    alone = Regression()
    assert all(r.held_out_loss is None for r in alone.training().run(alone.data))


def test_mean_loss_counts_images_not_batches() -> None:
    """The last batch is smaller; a constant learning rate near zero leaves the first loss to compare with."""
    problem = Regression()
    problem.module.eval()
    exact = float(problem.loss(problem.data).detach())
    training = problem.training(TrainingConfig(1, 4, 1e-12, 0.0, "constant", None))
    assert training.mean_loss(problem.data) == pytest.approx(exact, rel=1e-5)


def test_equal_seeds_give_equal_weights_and_leave_global_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trained()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, trained())
    assert not torch.equal(first, trained(seed=4))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 7},
        {"batch_size": 5},
        {"lr": 0.04},
        {"weight_decay": 0.1},
        {"schedule": "cosine"},
        {"schedule": "constant"},
        {"grad_clip": 0.1},
        {"grad_clip": None},
    ],
)
def test_every_option_changes_the_weights(change: dict[str, Any]) -> None:
    base = {"epochs": 6, "batch_size": 4, "lr": 0.05, "grad_clip": 1.0}
    assert not torch.equal(trained(TrainingConfig(**base)), trained(TrainingConfig(**{**base, **change})))  # type: ignore[arg-type]


# ---------------------------------------------------------------- schedules


def test_schedules() -> None:
    steps = range(100)
    assert {schedule_factor("constant", s, 100) for s in steps} == {1.0}
    cosine = [schedule_factor("cosine", s, 100) for s in steps]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)
    cycle = [schedule_factor("one_cycle", s, 100) for s in steps]
    assert cycle[0] == pytest.approx(1 / 25) and cycle[30] == max(cycle) == 1.0 and cycle[-1] < 2e-3
    assert cycle[:31] == sorted(cycle[:31]) and cycle[30:] == sorted(cycle[30:], reverse=True)


@pytest.mark.parametrize("num_steps", [10, 37, 300])
def test_one_cycle_is_near_that_of_torch(num_steps: int) -> None:
    """torch counts from the first to the last step inclusive: the curves differ by at most one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=num_steps + 1)
    for step in range(num_steps):
        (expected,) = oracle.get_last_lr()
        assert schedule_factor("one_cycle", step, num_steps) == pytest.approx(expected, abs=6 / num_steps)
        optimizer.step()
        oracle.step()


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("interrupted_after", [1, 3, 5])
@pytest.mark.parametrize("patience", [None, 1])
def test_resume_gives_the_weights_of_an_uninterrupted_run(interrupted_after: int, patience: int | None) -> None:
    """Bit by bit, through a file, with dropout and a state of Adam."""
    config = TrainingConfig(6, 4, 0.05, patience=patience)
    whole = Regression()
    expected = whole.training(config).run(whole.data, whole.data)

    first = Regression()
    training = first.training(config)
    training.run(first.data, first.data, stop_after=interrupted_after)
    file = io.BytesIO()
    torch.save(training.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)  # whatever happened in between
    second = Regression()
    nn.init.zeros_(second.module[0].weight)  # type: ignore[arg-type]
    resumed = second.training(config)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    history = resumed.run(second.data, second.data)

    assert torch.equal(second.weights(), whole.weights())
    without_time = [{**vars(r), "seconds": 0} for r in history]
    assert without_time == [{**vars(r), "seconds": 0} for r in expected]


@pytest.mark.parametrize("through_a_file", [False, True])
def test_early_stopping_that_is_paused_stops_where_it_would_have(through_a_file: bool) -> None:
    """After each epoch in turn: before the best one, at it, while patience runs out, and after the stop."""
    whole = Regression()
    uninterrupted = whole.training(PATIENT)
    history = uninterrupted.run(whole.data, of_another_line(whole))
    best, last = uninterrupted.weights_epoch, len(history)
    assert 2 < best == last - 3
    for paused_after in range(1, last + 1):
        problem = Regression()
        training = problem.training(PATIENT)
        training.run(problem.data, of_another_line(problem), stop_after=paused_after)
        if through_a_file:
            file = io.BytesIO()
            torch.save(training.state_dict(), file)
            file.seek(0)
            problem = Regression()
            training = problem.training(PATIENT)
            training.load_state_dict(torch.load(file, weights_only=True))
        resumed = training.run(problem.data, of_another_line(problem))
        assert torch.equal(problem.weights(), whole.weights()), paused_after
        assert training.weights_epoch == best
        assert [{**vars(r), "seconds": 0} for r in resumed] == [{**vars(r), "seconds": 0} for r in history]


def test_a_pause_leaves_the_weights_of_the_last_epoch() -> None:
    """Not the best ones: the remaining epochs go on from the last."""
    problem = Regression()
    training = problem.training(PATIENT)
    last: list[torch.Tensor] = []
    training.run(problem.data, of_another_line(problem), lambda *_: last.append(problem.weights()))
    best = training.weights_epoch
    other = Regression()
    other.training(PATIENT).run(other.data, of_another_line(other), stop_after=best + 1)
    assert torch.equal(other.weights(), last[best])
    assert not torch.equal(other.weights(), last[best - 1])


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the checkpoint holds no 'best_epoch', expected the state of a"):
        Regression().training().load_state_dict({"module": {}, "epoch": 3})


def test_a_checkpoint_of_another_training_is_refused() -> None:
    problem = Regression()
    training = problem.training()
    training.run(problem.data, stop_after=1)
    other = Regression().training(TrainingConfig(epochs=7, batch_size=4, lr=0.05))
    with pytest.raises(ConfigurationError, match="trained with epochs 6, now epochs is 7"):
        other.load_state_dict(training.state_dict())
    with pytest.raises(ConfigurationError, match="seed"):
        Regression().training(seed=8).load_state_dict(training.state_dict())


def test_misfitting_weights_are_named() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(ConfigurationError, match=r"bias is missing; colour is unknown; weight is \[3, 4\] instead of"):
        load_weights(module, {"weight": torch.zeros(3, 4), "colour": torch.zeros(1)})


# ---------------------------------------------------------------- stopping


def test_early_stopping_keeps_the_weights_of_the_lowest_held_out_loss() -> None:
    problem = Regression()
    seen: dict[int, tuple[float, torch.Tensor]] = {}

    def remember(training: Training, record: EpochRecord) -> None:
        assert record.held_out_loss is not None
        seen[record.epoch] = (record.held_out_loss, problem.weights())

    training = problem.training(PATIENT)
    history = training.run(problem.data, of_another_line(problem), remember)
    best = min(seen, key=lambda epoch: seen[epoch][0])
    assert best > 2 and len(history) == best + 3 < 40
    assert training.weights_epoch == best
    assert torch.equal(problem.weights(), seen[best][1])


def test_without_patience_held_out_images_select_nothing() -> None:
    problem = Regression()
    training = problem.training()
    training.run(problem.data, [problem.data[0], problem.data[1] + 5])
    assert torch.equal(problem.weights(), trained())
    assert training.weights_epoch == 6


def test_early_stopping_needs_held_out_images() -> None:
    problem = Regression()
    with pytest.raises(ConfigurationError, match="found none: hold some out"):
        problem.training(TrainingConfig(patience=2)).run(problem.data)


def test_a_callback_leaves_no_trace() -> None:
    problem = Regression()

    def disturb(training: Training, record: EpochRecord) -> None:
        assert not training.module.training
        training.module.train()
        torch.manual_seed(record.epoch)
        training.mean_loss(problem.data)

    problem.training().run(problem.data, after_epoch=disturb)
    assert torch.equal(problem.weights(), trained())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_spoilt(value: float) -> None:
    problem = Regression()
    states: list[int] = []
    calls = 0

    def loss(batch: list[torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        factor = value if calls == 10 else 1.0  # an epoch is three batches, and the loss after them
        return problem.loss(batch) * factor

    training = Training(problem.module, loss, CONFIG, 3, "plate: line")
    with pytest.raises(DataError, match=r"plate: line: training diverged in epoch 3 of 6 .*smaller --lr than 0.05"):
        training.run(problem.data, after_epoch=lambda t, r: states.append(r.epoch))
    assert states == [1, 2]
    assert problem.weights().isfinite().all()


@pytest.mark.parametrize("lr", [1e3, 1e10, 1e20])
@pytest.mark.parametrize("epochs", [1, 3])
def test_divergence_in_the_last_step_of_an_epoch_is_noticed(
    lr: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch per epoch: every loss that a step begins with is good, only what the last step leaves is not."""
    problem = Regression(4)
    config = TrainingConfig(epochs, 4, 0.05)
    monkeypatch.setattr(
        "patchcore.methods.training.schedule_factor",
        lambda schedule, step, num_steps: lr / config.lr if step == epochs - 1 else 0.1,
    )
    seen: list[int] = []
    training = problem.training(config)
    with pytest.raises(
        DataError,
        match=rf"^plate: line: training diverged in epoch {epochs} of {epochs} \(a loss of .* that began at .*\), "
        r"expected a falling loss: use a smaller --lr than 0\.05, or a smaller --grad_clip, in a new run$",
    ):
        training.run(problem.data, after_epoch=lambda _, record: seen.append(record.epoch))
    assert seen == [record.epoch for record in training.history] == list(range(1, epochs))


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_held_out_images_without_a_loss_are_named(value: float, patience: int | None) -> None:
    """Patience would wait for the end of what no epoch can beat."""
    problem = Regression()
    x, y = problem.data
    training = problem.training(TrainingConfig(6, 4, 0.05, patience=patience))
    with pytest.raises(DataError, match=r"^plate: line: .* in epoch 1 of 6 \(a loss of (nan|inf) on held-out images\)"):
        training.run(problem.data, [x, torch.full_like(y, value)])


def test_a_rising_loss_is_called_divergence() -> None:
    problem = Regression()
    config = TrainingConfig(50, 4, 30.0, 0.0, "constant", None)
    with pytest.raises(DataError, match=r"diverged in epoch \d+ of 50 \(a loss of .* that began at .*--grad_clip 0.1"):
        problem.training(config).run(problem.data)


def test_one_image_is_enough() -> None:
    problem = Regression(count=1)
    assert len(problem.training().run(problem.data)) == 6
