"""Small trainings that several processes do together, each in what `take_part` starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchcore.configs import TrainingConfig
from patchcore.errors import DataError
from patchcore.methods.training import Batch, Training
from patchcore.process_group import ALONE, Processes, open_group
from patchcore.torchrun import Place

EPOCHS = 4
PAUSE = 2  # epochs before a training is written down, to be resumed by another number of processes


@dataclass(frozen=True)
class Problem:
    """A network with noise that is drawn for each image, on a few images.

    Attributes:
        count: Images.
        batch_size: Images of a batch, of all processes.
        held_out: Images that are kept from the gradients.
        options: Of the training.
        spoilt: Number of the image that has no loss, if any.
        left_out: First images, which nobody trains on, as those of a fold.
    """

    count: int
    batch_size: int
    held_out: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    spoilt: int | None = None
    left_out: int = 0

    def training(self, processes: Processes) -> Training:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 4 * 4, 1))

        def loss(batch: Batch) -> torch.Tensor:
            x, y = batch
            noise = 0.5 * batch.randn_like(x) if module.training else 0
            return (module(x + noise) - y).square().mean()

        config = TrainingConfig(EPOCHS, self.batch_size, 0.05, **self.options)
        return Training(module, loss, config, 3, "plate: line", processes)

    def run(self, processes: Processes, stop_after: int | None = None, state: Any = None) -> dict[str, Any]:
        """Train, and return the history, the weights and the state after the training."""
        training = self.training(processes)
        if state is not None:
            training.load_state_dict(state)
        own, held_out = processes.share(self.count), processes.share(self.held_out)
        data, kept = self._images(0, self.count), self._images(1, self.held_out)
        if self.spoilt is not None:
            data[1][self.spoilt] = math.nan
        own = range(max(own.start, self.left_out), max(own.stop, self.left_out))
        history = training.run(_rows(data, own), _rows(kept, held_out), stop_after=stop_after)
        losses = [(r.loss, r.held_out_loss, r.grad_norm, r.lr) for r in history]
        weights = {name: tensor.clone() for name, tensor in training.module.state_dict().items()}
        return {"losses": losses, "weights": weights, "epoch": training.weights_epoch, "state": training.state_dict()}

    def _images(self, seed: int, count: int) -> list[torch.Tensor]:
        x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        y = x.mean(dim=(2, 3)) @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25
        return [x.to(memory_format=torch.channels_last), y]  # as feature maps are kept: noise follows the layout


def _rows(data: list[torch.Tensor], numbers: range) -> list[torch.Tensor]:
    return [tensor[numbers.start : numbers.stop] for tensor in data]


PROBLEMS = {
    "uneven last batch": Problem(10, 4),
    "clipped": Problem(9, 5, options={"grad_clip": 1e-3, "schedule": "constant", "weight_decay": 0.1}),
    "early stopping": Problem(7, 4, options={"patience": 1}),
    "one image per batch": Problem(3, 1),
    "fewer images than processes": Problem(1, 4, held_out=1),
    "a first process without images": Problem(5, 2, left_out=3),
}
SPOILT = Problem(10, 4, spoilt=9)  # which the second of two processes has


def take_part(rank: int, port: int, folder: Path) -> None:
    """Do all trainings as one of two processes, and write down what came of them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with open_group(Place(rank, 2, rank, 2), torch.device("cpu")) as processes:
        for name, problem in PROBLEMS.items():
            results[name] = problem.run(processes)
        first = PROBLEMS["uneven last batch"]
        results["paused"] = first.run(processes, stop_after=PAUSE)
        results["resumed"] = first.run(processes, state=first.run(ALONE, stop_after=PAUSE)["state"])
        results["spoilt"] = _error_of(lambda: SPOILT.run(processes))

        def read() -> None:
            with processes.together():
                if rank == 1:
                    raise DataError("7.png cannot be read")

        results["unreadable"] = _error_of(read)
        results["told"] = processes.from_first(f"by {rank}"), processes.gathered(rank)
        processes.from_first("until the end") if rank == 0 else results.update(end=_until_the_end(processes))
    torch.save(results, folder / f"{rank}.pt")


def _until_the_end(processes: Processes) -> list[str | None]:
    """Take what the first process says, and what it says as it leaves."""
    nothing: str | None = None
    return [processes.from_first(nothing), processes.from_first(nothing)]


def _error_of(call: Any) -> str:
    try:
        call()
    except DataError as error:
        return str(error)
    return "no error"
