"""What Ray is handed and when, with a stand-in for Ray; and addresses where something else listens."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_process import invoke

from patchcore.cli import predict
from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.launching import Job, ray_cluster
from patchcore.launching.ray_cluster import RayCluster
from patchcore.launching.worker import Reply

NODE = {"NodeID": "n", "Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerHostname": "h", "NodeManagerAddress": "a"}


class StandIn:
    """Ends one task at a time, which `choose` picks from those that were handed over."""

    exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=LookupError)

    def __init__(self, choose: Callable[[list[int]], list[int]]) -> None:
        self.choose = choose
        self.nodes_there = [NODE]
        self.wanted: dict[str, Any] = {}

    def remote(self, **wanted: Any) -> Callable[..., Any]:
        self.wanted = wanted
        handed_over = SimpleNamespace(remote=lambda job: job.key)
        return lambda function: SimpleNamespace(options=lambda name: handed_over)

    def wait(self, references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        done = self.choose(references)
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: int) -> Reply:
        return Reply(f"value {reference}", [])

    def nodes(self) -> list[dict[str, Any]]:
        return self.nodes_there

    def is_initialized(self) -> bool:
        return False

    def init(self, **wanted: Any) -> None:
        """Nothing to start."""

    def shutdown(self) -> None:
        """Nothing to end."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    """Replace Ray by a stand-in that ends the tasks that a function picks."""

    def replace(choose: Callable[[list[int]], list[int]]) -> StandIn:
        ray = StandIn(choose)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(ray_cluster, "TASKS_AHEAD", 3)
        return ray

    return replace


def jobs(count: int, taken: list[int]) -> Iterator[Job]:
    for key in range(count):
        taken.append(key)
        yield Job(key, f"task {key}", Path("log"), int)


def opened(**launch: Any) -> RayCluster:
    return RayCluster(LaunchConfig("ray", **launch), RuntimeConfig("cpu"))


def test_tasks_are_handed_over_a_bounded_number_ahead_of_the_first_that_has_not_ended(
    stand_in: Callable[..., StandIn],
) -> None:
    first_ends_after = 2
    picked: list[int] = []

    def choose(references: list[int]) -> list[int]:
        picked.append(references[-1] if len(picked) < first_ends_after else references[0])
        return [picked[-1]]

    stand_in(choose)
    taken = list[int]()
    ended = opened().run(jobs(7, taken))
    assert next(ended).value == "value 2" and taken == [0, 1, 2]
    assert next(ended).value == "value 1" and taken == [0, 1, 2], "0 has not ended"
    assert next(ended).value == "value 0" and taken == [0, 1, 2]
    assert next(ended).value == "value 3" and taken == [0, 1, 2, 3, 4, 5]
    assert [end.key for end in ended] == [4, 5, 6]
    assert list(opened().run(iter(()))) == []


def test_workers_with_a_gpu_keep_the_model_that_they_hold(stand_in: Callable[..., StandIn]) -> None:
    ray = stand_in(lambda references: references[:1])
    list(opened().run(jobs(1, [])))
    assert ray.wanted == {"num_cpus": 1, "num_gpus": 0.0, "max_retries": 2, "max_calls": 0}


def test_where_no_node_is_left_every_task_is_told_to_be_lost_also_those_that_were_never_handed_over(
    stand_in: Callable[..., StandIn],
) -> None:
    ray = stand_in(lambda references: [])
    ended = opened().run(jobs(7, []))
    ray.nodes_there = []
    lost = list(ended)
    assert [end.key for end in lost] == list(range(7))
    assert all(end.value is None and end.lost.startswith("no node with room for it is left") for end in lost)


def test_nothing_is_handed_over_once_nobody_awaits_it(stand_in: Callable[..., StandIn]) -> None:
    stand_in(lambda references: references[:1])
    taken = list[int]()
    ended = opened().run(jobs(7, taken))
    next(ended)
    ended.close()
    assert taken == [0, 1, 2]


# ---------------------------------------------------------------- something listens, but it is no Ray


@pytest.fixture(params=["silent", "rude"])
def not_ray(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that says nothing, or something else, to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                connections.append(connection)
                if request.param == "rude":
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)  # ends accept
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("patience", [0.1, pytest.param(10.0, marks=pytest.mark.slow)])  # s; Ray itself asks for longer
def test_an_address_where_something_else_listens_is_one_line(
    tmp_path: Path, not_ray: str, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    monkeypatch.setattr(ray_cluster, "HEALTH_SECONDS", patience)
    (tmp_path / "a.png").write_bytes(b"")
    launch = ("--launcher", "ray", "--ray_address", not_ray)
    done = invoke(predict, "model", tmp_path / "a.png", "--out", tmp_path / "out", *launch)
    assert done.code == 2 and len(done.error_lines) == 1, done.err
    assert f"--ray_address {not_ray}: something listens there, but no Ray cluster" in done.err
    assert not (tmp_path / "out").exists()
