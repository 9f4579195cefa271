"""Where the tasks of a run execute: in this process, in several processes here, or on a Ray cluster."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from patchcore.configs.checks import require_at_least, require_choice
from patchcore.errors import ConfigurationError

LOCAL, RAY = "local", "ray"
LAUNCHERS = (LOCAL, RAY)


@dataclass(frozen=True)
class LaunchConfig:
    """Where the tasks of a run execute; it changes no result.

    Attributes:
        launcher: One of LAUNCHERS.
        workers: Processes of "local"; None or 1 is the process of the run itself.
        ray_address: HOST:PORT of a Ray cluster, or "auto" for the one that this machine is part of; None starts one
            here for as long as the run lasts.
        gpus_per_task: GPUs that Ray reserves for a task, a share of one allowed; None is 1 where the cluster has GPUs.
        cpus_per_task: Cores that Ray reserves for a task; None is --threads, or 1.
    """

    launcher: str = LOCAL
    workers: int | None = None
    ray_address: str | None = None
    gpus_per_task: float | None = None
    cpus_per_task: int | None = None

    def __post_init__(self) -> None:
        require_choice("--launcher", self.launcher, LAUNCHERS)
        if self.workers is not None:
            require_at_least("--workers", self.workers, 1)
        if self.cpus_per_task is not None:
            require_at_least("--cpus_per_task", self.cpus_per_task, 1)
        self._require_own_options()
        self._require_possible_share()
        if self.ray_address not in (None, "auto") and not _is_host_and_port(str(self.ray_address)):
            raise ConfigurationError(
                f"--ray_address {self.ray_address!r}, expected HOST:PORT as `ray start --head` prints it, or auto"
            )

    def _require_own_options(self) -> None:
        """Raise ConfigurationError for an option of the other launcher."""
        if self.launcher == RAY and self.workers is not None:
            raise ConfigurationError(
                f"--workers {self.workers} is for --launcher local, Ray has as many tasks at once as its nodes have "
                "cores: leave it out, or use --cpus_per_task"
            )
        of_ray = {
            "--ray_address": self.ray_address,
            "--gpus_per_task": self.gpus_per_task,
            "--cpus_per_task": self.cpus_per_task,
        }
        for option, value in of_ray.items():
            if self.launcher != RAY and value is not None:
                raise ConfigurationError(f"{option} {value} without --launcher ray: type both, or leave {option} out")

    def _require_possible_share(self) -> None:
        """Raise ConfigurationError for a number of GPUs that no task can have."""
        share = self.gpus_per_task
        if share is None:
            return
        if not math.isfinite(share) or share < 0 or (share > 1 and share != int(share)):
            raise ConfigurationError(f"--gpus_per_task {share:g}, expected a share of one GPU or a whole number")

    @property
    def is_in_process(self) -> bool:
        """Whether the tasks run one after the other in the process of the run."""
        return self.launcher == LOCAL and self.workers in (None, 1)

    def require_machine(self, device: str, gpus: tuple[int, ...], threads: int | None) -> None:
        """Raise ConfigurationError for a device or number of threads that Ray's tasks cannot have.

        Args:
            device: --device.
            gpus: --gpu.
            threads: --threads.
        """
        if self.launcher != RAY:
            return
        if gpus != (0,):
            raise ConfigurationError(
                f"--gpu {' '.join(map(str, gpus))} with --launcher ray, which hands out GPUs: use --gpus_per_task"
            )
        if device == "mps" or device.startswith("cuda:"):
            raise ConfigurationError(f"--device {device} with --launcher ray: use cuda, cpu or auto")
        if device == "cpu" and self.gpus_per_task:
            raise ConfigurationError(
                f"--gpus_per_task {self.gpus_per_task:g} with --device cpu would leave GPUs idle: leave one of them out"
            )
        if device == "cuda" and self.gpus_per_task == 0:
            raise ConfigurationError("--device cuda needs GPUs, --gpus_per_task is 0: give 1, or --device cpu")
        if threads is not None and self.cpus_per_task is not None and threads > self.cpus_per_task:
            raise ConfigurationError(
                f"--threads {threads} on --cpus_per_task {self.cpus_per_task} would wait for one another: give at most "
                "as many threads as cores"
            )


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    plausible = re.fullmatch(r"[A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\]", host) is not None
    return plausible and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
