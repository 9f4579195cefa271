"""Tasks on a Ray cluster; the only module that knows Ray.

Ray decides where and when a task runs and gives it to another node where its own is lost. What is ours: checks before
any work, and what the user gets to see.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patchcore
from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.launching.contract import RETRIES, Ended, Job
from patchcore.launching.worker import Reply, run_logged
from patchcore.runtime import available_cpus, resolve_precision, set_threads

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 30.0  # of a process that imports Ray and asks the address for its health
NODE_SECONDS = 120.0  # for every node to answer, which starts a Python process there
WATCH_SECONDS = 2.0  # between looks at the nodes while tasks run
TASKS_AHEAD = 500  # of the first that has not ended: bounds what Ray holds, and results whose turn has not come
LIBRARIES = ("faiss-cpu", "numpy", "pillow", "timm", "torchvision")  # what else reads, computes and searches
HOME = "start one with `ray start --head`, or leave --ray_address out to have one on this machine"


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself.

    Attributes:
        versions: Of what has to be the same everywhere.
        missing: The paths that it does not have.
    """

    versions: dict[str, str]
    missing: list[str]


class RayCluster:
    """Tasks on a cluster: one that is there, or one that is started on this machine and ended by `close`.

    Args:
        launch: Address, and what a task takes.
        runtime: Device and threads that were asked for.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster at the address, or no node has room for a task.
    """

    is_in_process = False

    def __init__(self, launch: LaunchConfig, runtime: RuntimeConfig) -> None:
        _require_ray()
        _connect(launch.ray_address)
        try:
            nodes = _alive_nodes()
            self._num_cpus = launch.cpus_per_task or runtime.threads or 1
            has_gpus = any(node["Resources"].get("GPU", 0) > 0 for node in nodes)
            wants_gpus = runtime.device != "cpu" and (has_gpus or runtime.device == "cuda")
            self._num_gpus = float(wants_gpus) if launch.gpus_per_task is None else launch.gpus_per_task
            require_room([node["Resources"] for node in nodes], self._num_cpus, self._num_gpus)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what still runs, and the cluster if it was started here."""
        import ray

        with _own_signal_handler():
            ray.shutdown()

    def settle(self, runtime: RuntimeConfig) -> tuple[RuntimeConfig, torch.device]:
        """Decide how a task computes: on the cores and GPUs that Ray reserves for it."""
        import torch

        threads = runtime.threads or self._num_cpus
        set_threads(threads)
        device = torch.device("cuda", 0) if self._num_gpus else torch.device("cpu")
        precision = runtime.precision
        if precision == "auto" or device.type == "cpu":  # whether a GPU can is found where there is one
            precision = resolve_precision(precision, device)
        settled = replace(runtime, device=device.type, gpus=(0,), threads=threads, precision=precision)
        return settled, device

    def require_visible(self, paths: Sequence[Path]) -> None:
        """Raise ConfigurationError unless every node sees the paths and has the versions of this process."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = ray.remote(num_cpus=0, max_retries=0)(report_node)
        asked = {}
        for node in _alive_nodes():
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[probe.options(scheduling_strategy=place).remote([os.path.abspath(p) for p in paths])] = node
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        if silent:
            raise ConfigurationError(
                f"{_node_name(asked[silent[0]])} has not answered in {NODE_SECONDS:.0f} s: take it out of the cluster"
            )
        expected = report_node([]).versions
        for answer in answered:
            name = _node_name(asked[answer])
            try:
                report = ray.get(answer)
            except ray.exceptions.RayError as error:
                raise ConfigurationError(
                    f"{name} cannot run patchcore ({_last_line(error)}): install the same version on every node"
                ) from error
            require_alike(name, report, expected)

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        import ray

        # max_calls: left to itself Ray ends a worker after each task with a GPU, and with it the model that it holds.
        wanted = {"num_cpus": self._num_cpus, "num_gpus": self._num_gpus, "max_retries": RETRIES, "max_calls": 0}
        remote = ray.remote(**wanted)(run_logged)
        waiting, taken = enumerate(jobs), 0
        running: dict[Any, tuple[int, Job]] = {}  # in the order of the jobs
        known = {node["NodeID"]: node for node in _alive_nodes()}
        # Tasks that nobody awaits any more are left to `close`: `ray.cancel` of one that is just ending brought down
        # the whole process (Ray 2.60).
        while True:
            first = next(iter(running.values()))[0] if running else taken
            for number, job in itertools.islice(waiting, first + TASKS_AHEAD - taken):
                running[remote.options(name=job.name).remote(job)] = number, job
                taken = number + 1
            if not running:
                break
            done, _ = ray.wait(list(running), num_returns=1, timeout=WATCH_SECONDS)
            for reference in done:
                yield self._ended(running.pop(reference)[1], reference)
            known = self._without_lost(known)
            if not done and not self._has_room(known):
                for _, job in itertools.chain(running.values(), waiting):
                    yield Ended(job.key, None, lost="no node with room for it is left: call again with more nodes")
                break

    def _ended(self, job: Job, reference: Any) -> Ended:
        import ray

        try:
            reply: Reply = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from error  # what the call raised, as if it had been called here
        except ray.exceptions.RayError as error:
            why = f"its worker was lost {RETRIES + 1} times ({_first_line(error)}; see {job.log})"
            return Ended(job.key, None, lost=why)
        return Ended(job.key, reply.value, reply.messages)

    def _without_lost(self, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the nodes that are there now, and tell the user of those that have gone."""
        alive = {node["NodeID"]: node for node in _alive_nodes()}
        for number in known.keys() - alive.keys():
            LOGGER.warning("%s was lost: what ran there is done anew elsewhere", _node_name(known[number]))
        return alive

    def _has_room(self, nodes: Mapping[str, dict[str, Any]]) -> bool:
        needed = {"CPU": self._num_cpus, "GPU": self._num_gpus}
        return any(_fits(node["Resources"], needed) for node in nodes.values())


def _require_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine unasked
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"--launcher ray needs the package ray ({error}): pip install '.[distributed]'"
        ) from error


def _connect(address: str | None) -> None:
    import ray

    if ray.is_initialized():
        raise ConfigurationError("this process has a Ray cluster open already: call ray.shutdown() first")
    wanted: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        wanted |= {"num_cpus": available_cpus(), "include_dashboard": False}
    elif address != "auto":
        _require_cluster(address)
    with _own_signal_handler():
        try:
            ray.init(**wanted)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = "Ray could not be started here" if address is None else f"--ray_address {address}"
            raise ConfigurationError(f"{where}: {_first_line(error)}: {HOME}") from error


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM that was there: Ray puts its own in its place, which knows no exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _require_cluster(address: str) -> None:
    """Raise ConfigurationError unless a Ray cluster answers there: Ray itself would try again for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigurationError(f"--ray_address {address} cannot be reached ({error}): {HOME}") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=HEALTH_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise ConfigurationError(
            f"--ray_address {address}: something listens there, but no Ray cluster of version {_ray_version()} "
            f"answers: {HOME}"
        )


def _ray_version() -> str:
    import ray

    return str(ray.__version__)


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _node_name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _fits(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in needed.items())


def require_room(nodes: Sequence[Mapping[str, float]], num_cpus: int, num_gpus: float) -> None:
    """Raise ConfigurationError unless one node has the cores and GPUs of a task: Ray would wait for it without end.

    Args:
        nodes: Resources of each node.
        num_cpus: Cores of a task.
        num_gpus: GPUs of a task.
    """
    for option, name, needed in (("--gpus_per_task", "GPU", num_gpus), ("--cpus_per_task", "CPU", num_cpus)):
        most = max((node.get(name, 0) for node in nodes), default=0)
        if needed > most:
            raise ConfigurationError(
                f"{option} {needed:g}, but no node of the cluster has more than {most:g} {name}(s): give at most that"
            )
    if not any(_fits(node, {"CPU": num_cpus, "GPU": num_gpus}) for node in nodes):
        raise ConfigurationError(
            f"no node of the cluster has {num_cpus} CPU(s) and {num_gpus:g} GPU(s) together: use a smaller "
            "--cpus_per_task or --gpus_per_task"
        )


def report_node(paths: Sequence[str]) -> NodeReport:
    """Say what this machine has of what a run needs."""
    import torch

    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "patchcore": patchcore.__version__,
        "torch": torch.__version__,
    }
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return NodeReport(versions, [path for path in paths if not os.path.exists(path)])


def require_alike(name: str, report: NodeReport, expected: Mapping[str, str]) -> None:
    """Raise ConfigurationError unless a node sees everything and has the expected versions.

    Args:
        name: What messages call the node.
        report: What it says of itself.
        expected: The versions here.
    """
    for package, version in expected.items():
        found = report.versions.get(package)
        if found != version:
            other = f"{package} {found}" if found else f"no {package}"
            raise ConfigurationError(f"{name} has {other}, here it is {version}: install the same on every node")
    if report.missing:
        raise ConfigurationError(
            f"{name} does not see {report.missing[0]!r}: use a path that all nodes share, such as a network folder"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
