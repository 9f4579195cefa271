"""One gradient loop, for every method that trains a network on what it keeps of the training images.

Nothing in it depends on where a run was interrupted: the order of the images, the random numbers of an epoch and the
learning rate of a step follow from the seed and the number of the epoch alone, so that a resumed run ends in the same
weights as one without interruption. Nor does it depend on how many processes train together: each holds some of the
rows and computes with those that a batch has of them, so that all batches are those of one process.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from patchcore.config_json import config_to_dict
from patchcore.configs import TrainingConfig, require_choice
from patchcore.errors import ConfigurationError, DataError
from patchcore.process_group import ALONE, Processes
from patchcore.runtime import derive_seed, progress

WARMUP_SHARE = 0.3  # of the steps of one cycle; with the divisors below those of torch's OneCycleLR
START_DIVISOR = 25.0  # the first learning rate of one cycle is lr / 25 ...
END_DIVISOR = 1e4  # ... and the last one the first / 10^4
WITHOUT_HELD_OUT = "early stopping watches held-out images, found none: hold some out, such as --train_val_split 0.8"
CHECKED_IMAGES = 1  # of each process, whose loss shows after each epoch that its last step has not spoilt the weights
FUSED_DEVICES = ("cpu", "cuda")  # where the optimiser takes its step in one pass over the weights
SEEDING = threading.Lock()  # the generators that networks draw their weights from belong to the whole process
DIVERGED_BY = 10.0  # an epoch whose mean loss lies so many times max(1, |first loss|) above the first has diverged

Data = Sequence[torch.Tensor]
"""Tensors [N, ...], one row per image, on the CPU: of several processes those that this one has."""


class Batch(list[torch.Tensor]):
    """What this process has of a batch: tensors [b, ...], on the device.

    Args:
        tensors: The rows; one of zeros where it has none, as each process has to run the network.
        places: Where the rows stand in the whole batch, int64 [b].
        size: Rows of the whole batch.
        share: Part of the whole batch that the rows are, 0 to 1.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], places: torch.Tensor, size: int, share: float = 1.0) -> None:
        super().__init__(tensors)
        self.places = places
        self.size = size
        self.share = share

    def randn_like(self, rows: torch.Tensor) -> torch.Tensor:
        """Draw standard normal numbers for rows [b, ...]: those that a process with the whole batch draws for them."""
        if len(rows) == self.size:
            return torch.randn_like(rows)
        whole = rows[torch.zeros(self.size, dtype=torch.int64, device=rows.device)]  # the memory layout of a batch
        return torch.randn_like(whole)[self.places.to(rows.device)]


BatchLoss = Callable[[Batch], torch.Tensor]
"""Rows of the data, on the device, to a scalar: the mean loss of these images."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch left in the history.

    Attributes:
        epoch: Number, from 1.
        loss: Mean over the training images, each with the weights that its batch met.
        held_out_loss: Mean over the held-out images after the epoch; None without them.
        lr: Learning rate of its last step.
        grad_norm: Mean Euclidean norm of the gradients, before clipping.
        seconds: Time for training and held-out loss.
    """

    epoch: int
    loss: float
    held_out_loss: float | None
    lr: float
    grad_norm: float
    seconds: float


AfterEpoch = Callable[["Training", EpochRecord], None]


class Training:
    """Adam on a network, epoch by epoch.

    Args:
        module: The network, on its device; trained in place.
        batch_loss: The loss of a batch, which runs the network.
        config: Epochs, batches, learning rates.
        seed: Gives the order of the images and every other random number.
        description: What is trained, for the progress bar and messages.
        processes: Those that train the network together, each with rows of its own; all call the same methods.

    Attributes:
        history: One record for each finished epoch.

    Source: Adam with decoupled weight decay of Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (ICLR
        2019). An L2 term in the gradient, as plain Adam has it, would weigh more the smaller the unit of the loss is;
        ours is a loss per dimension.
    """

    def __init__(
        self,
        module: nn.Module,
        batch_loss: BatchLoss,
        config: TrainingConfig,
        seed: int,
        description: str,
        processes: Processes = ALONE,
    ) -> None:
        self.module = module
        self.batch_loss = batch_loss
        self.config = config
        self.seed = seed
        self.description = description
        self.processes = processes
        self.history: list[EpochRecord] = []
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.lr, weight_decay=config.weight_decay, fused=self.device.type in FUSED_DEVICES
        )
        self._averaged_loss = processes.averaging(self._parameters, batch_loss)
        self._first_row = 0  # of this process, among those of all ...
        self._num_rows = 0  # ... which are so many
        self._first_loss: float | None = None
        self._lowest = math.inf
        self._best_epoch = 0
        self._best_weights: dict[str, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    @property
    def weights_epoch(self) -> int:
        """Epoch whose weights the network is left with: the last, or with early stopping that of the lowest loss."""
        return self._best_epoch or len(self.history)

    @property
    def _stopped_early(self) -> bool:
        patience = self.config.patience
        return patience is not None and len(self.history) - self._best_epoch >= patience

    def run(
        self,
        data: Data,
        held_out: Data | None = None,
        after_epoch: AfterEpoch | None = None,
        stop_after: int | None = None,
    ) -> list[EpochRecord]:
        """Train the epochs that are still to be done.

        Args:
            data: Tensors [N, ...] of the training images; of several processes those of the first come first.
            held_out: The same of images that are kept from the gradients, for the history and early stopping.
            after_epoch: Called after each finished epoch, to write a checkpoint or report numbers; the network is in
                evaluation mode then, and what it does leaves no trace in the training.
            stop_after: Stop after this epoch, on the schedule of all of them; None trains them all.

        Returns:
            The history, of earlier calls as well.

        Raises:
            DataError: The loss is no finite number or has diverged; the weights are not to be used then.
            ConfigurationError: Early stopping is asked for without held-out images.
        """
        if self.config.patience is not None and held_out is None:
            raise ConfigurationError(WITHOUT_HELD_OUT)
        counts = self.processes.gathered(len(data[0]))
        self._first_row, self._num_rows = sum(counts[: self.processes.rank]), sum(counts)
        first, last = len(self.history) + 1, min(self.config.epochs, stop_after or self.config.epochs)
        with progress(range(first, last + 1), f"{self.description}: epochs") as bar:
            for epoch in bar:
                if self._stopped_early:
                    break
                record = self._train_epoch(epoch, data, held_out)
                self.history.append(record)
                self._remember_best(record)
                bar.set_postfix(loss=f"{record.loss:.4f}", refresh=False)
                if after_epoch is not None:
                    after_epoch(self, record)
        self.module.eval()
        is_over = self._stopped_early or len(self.history) == self.config.epochs
        if self._best_weights is not None and is_over:  # else the remaining epochs go on from the last weights
            self.module.load_state_dict(self._best_weights)
        return self.history

    def _train_epoch(self, epoch: int, data: Data, held_out: Data | None) -> EpochRecord:
        started = time.perf_counter()
        order = torch.randperm(self._num_rows, generator=self._generator(epoch))
        batches = order.split(self.config.batch_size)
        self.module.train()
        total_loss = total_norm = 0.0
        # Random numbers inside the network, such as dropout, begin anew with each epoch: a resumed run draws the same.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "network", epoch))
            for number, rows in enumerate(batches):
                step = (epoch - 1) * len(batches) + number
                rate = schedule_factor(self.config.schedule, step, self.config.epochs * len(batches))
                loss, norm = self._step(self._batch(data, rows), self.config.lr * rate, epoch)
                total_loss += loss * len(rows)
                total_norm += norm
        self.module.eval()
        mean = total_loss / self._num_rows
        self._require_convergence(mean, epoch)
        # The losses above were measured before each step: the last step may have gone anywhere.
        self._require_convergence(self.mean_loss([tensor[:CHECKED_IMAGES] for tensor in data]), epoch)
        held_out_loss = None if held_out is None else self.mean_loss(held_out)
        if held_out_loss is not None and not math.isfinite(held_out_loss):
            raise DataError(self._diverged(epoch, f"a loss of {held_out_loss:g} on held-out images"))
        seconds = time.perf_counter() - started
        return EpochRecord(epoch, mean, held_out_loss, self.config.lr * rate, total_norm / len(batches), seconds)

    def _step(self, batch: Batch, lr: float, epoch: int) -> tuple[float, float]:
        """Take one step and return the loss before it and the length of the gradient, both of the whole batch."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        part = self._averaged_loss(batch) * batch.share
        (part * self.processes.size).backward()  # the gradient is the mean over processes, the loss the sum of parts
        loss = self.processes.sum(part.detach())
        clip = self.config.grad_clip
        norm = nn.utils.clip_grad_norm_(self._parameters, math.inf if clip is None else clip)
        values = float(loss), float(norm)
        if not all(map(math.isfinite, values)):  # before the step: the weights are still good
            raise DataError(self._diverged(epoch, f"loss {values[0]:g} and gradient {values[1]:g}"))
        if self._first_loss is None:
            self._first_loss = values[0]
        self._optimizer.step()
        return values

    def _require_convergence(self, loss: float, epoch: int) -> None:
        assert self._first_loss is not None
        highest = self._first_loss + DIVERGED_BY * max(1.0, abs(self._first_loss))
        if not loss <= highest:  # nor NaN
            raise DataError(self._diverged(epoch, f"a loss of {loss:g} that began at {self._first_loss:g}"))

    def _diverged(self, epoch: int, found: str) -> str:
        clip = "a smaller --grad_clip" if self.config.grad_clip is not None else "--grad_clip 0.1"
        return (
            f"{self.description}: training diverged in epoch {epoch} of {self.config.epochs} ({found}), expected a "
            f"falling loss: use a smaller --lr than {self.config.lr:g}, or {clip}, in a new run"
        )

    @torch.no_grad()
    def mean_loss(self, data: Data) -> float:
        """Return the mean loss over images with the present weights."""
        self.module.eval()
        total, num_images = 0.0, len(data[0])
        for first in range(0, num_images, self.config.batch_size):
            rows = torch.arange(first, min(first + self.config.batch_size, num_images))
            total += float(self.batch_loss(Batch(self._rows(data, rows), rows - first, len(rows)))) * len(rows)
        return float(self.processes.mean(torch.tensor(total, dtype=torch.float64), num_images))

    def _batch(self, data: Data, rows: torch.Tensor) -> Batch:
        """Return what this process has of a batch, given the numbers of its rows among those of all processes."""
        own = (rows >= self._first_row) & (rows < self._first_row + len(data[0]))
        (places,) = own.nonzero(as_tuple=True)
        if len(places) == 0:
            stand_in = [_zeros_like_row(tensor).to(self.device) for tensor in data]
            return Batch(stand_in, torch.zeros(1, dtype=torch.int64), len(rows), share=0.0)
        tensors = self._rows(data, rows[places] - self._first_row)
        return Batch(tensors, places, len(rows), len(places) / len(rows))

    def _rows(self, data: Data, rows: torch.Tensor) -> list[torch.Tensor]:
        # Only CUDA waits for a copy before the memory is used again; elsewhere the batch could change under way.
        return [tensor[rows].to(self.device, non_blocking=self.device.type == "cuda") for tensor in data]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))

    def _remember_best(self, record: EpochRecord) -> None:
        """Keep the weights of the lowest held-out loss, for early stopping alone."""
        if self.config.patience is None or record.held_out_loss is None or not record.held_out_loss < self._lowest:
            return
        self._lowest, self._best_epoch = record.held_out_loss, record.epoch
        self._best_weights = copy.deepcopy(self.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the remaining epochs depend on; plain values and tensors that torch.save writes."""
        return {
            "config": config_to_dict(self.config),
            "seed": self.seed,
            "module": copy.deepcopy(self.module.state_dict()),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "history": [config_to_dict(record) for record in self.history],
            "first_loss": self._first_loss,
            "lowest": self._lowest,
            "best_epoch": self._best_epoch,
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of a training of the same configuration, seed and network.

        Raises:
            ConfigurationError: It is of another training, or of none.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ConfigurationError(f"the checkpoint holds no {missing[0]!r}, expected the state of a training")
        mine = {**config_to_dict(self.config), "seed": self.seed}
        theirs = {**state["config"], "seed": state["seed"]}
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise ConfigurationError(
                    f"the checkpoint was trained with {name} {theirs.get(name)}, now {name} is {value}: resume with "
                    "the same settings, or train anew"
                )
        load_weights(self.module, state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self._first_loss = state["first_loss"]
        self._lowest, self._best_epoch = state["lowest"], state["best_epoch"]
        self._best_weights = state["best_weights"]


def _zeros_like_row(tensor: torch.Tensor) -> torch.Tensor:
    """Return a row of zeros [1, ...] in the memory layout of a tensor [N, ...], which random numbers follow; N >= 0."""
    return torch.empty_strided((1, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype).zero_()


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a network that has exactly these, or raise ConfigurationError that names the misfits."""
    expected = module.state_dict()
    misfits = [f"{name} is missing" for name in expected if name not in weights]
    misfits += [f"{name} is unknown" for name in weights if name not in expected]
    misfits += [
        f"{name} is {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    misfits += [
        f"{name} is {weights[name].dtype}, {weights[name].layout} instead of {tensor.dtype}, {tensor.layout}"
        for name, tensor in expected.items()
        if name in weights and (weights[name].layout != torch.strided or not _same_kind(weights[name], tensor))
    ]
    if misfits:
        shown = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise ConfigurationError(f"weights and configuration do not fit: {shown}: they belong to different models")
    module.load_state_dict(weights)


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.is_floating_point() == other.is_floating_point() and one.is_complex() == other.is_complex()


def require_finite(network: nn.Module, positive: Sequence[str] = ()) -> None:
    """Raise ConfigurationError if a tensor of a stored network is not finite, or one of the named not positive."""
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()) or (name in positive and not bool((tensor > 0).all())):
            expected = "positive" if name in positive else "finite"
            raise ConfigurationError(f"{name} of the stored network is not {expected}: train the model anew")


def schedule_factor(schedule: str, step: int, num_steps: int) -> float:
    """Return the learning rate of a step as a share of the highest one.

    Args:
        schedule: "constant", "cosine" (from 1 towards 0) or "one_cycle" (cosines from 1/25 to 1 over the first 30 %
            of the steps, then towards 0).
        step: Number of the step, from 0.
        num_steps: Steps of the whole training.

    Returns:
        A number in [0, 1].

    Source: cosine after Loshchilov & Hutter, "SGDR" (ICLR 2017), Eq. 5, without restarts; one cycle after Smith &
        Topin, "Super-Convergence" (2018), with the constants of torch's OneCycleLR and without its cycle of momentum.
    """
    require_choice("schedule", schedule, ("constant", "cosine", "one_cycle"))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return _cosine(1.0, 0.0, step / num_steps)
    warmup = WARMUP_SHARE * num_steps
    if step < warmup:
        return _cosine(1 / START_DIVISOR, 1.0, step / warmup)
    return _cosine(1.0, 1 / (START_DIVISOR * END_DIVISOR), (step - warmup) / (num_steps - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    """Go from `start` to `end` along half a cosine, `share` of the way."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch and numpy, whose global generator FrEIA draws permutations from, for as long as the context lasts."""
    with SEEDING, torch.random.fork_rng(devices=[]):
        before = np.random.get_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)
