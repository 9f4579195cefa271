"""A real Ray cluster of two nodes on this machine: the same tables, also where a node is lost on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, small_run, write_category
from in_process import invoke
from test_sharded_bank import ClusterInThisProcess

import patchcore
import patchcore.pipeline
from patchcore.cli import run_patchcore
from patchcore.storage.model_folder import read_model_tensors

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="the package ray is not installed: pip install '.[distributed]'")

SEEDS = (0, 1)
CATEGORIES = ("plate", "rod")
TABLES = ("results.csv", "results_by_defect.csv", "false_alarms.csv")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster") / "data"
    for category in CATEGORIES:
        write_category(root, category, num_train=40, num_test=10)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one core each; the first is the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(REPOSITORY / "src"))  # which the workers of the nodes inherit
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        try:
            nodes.wait_for_nodes(60)
            yield nodes
        finally:
            nodes.shutdown()


def arguments(data: Path, out: Path, *launch: object) -> list[str]:
    seeds = [part for seed in SEEDS for part in ("--seed", seed)]
    typed = [out, "--device", "cpu", "--threads", 1, *seeds, "--save_segmentation_images", *launch]
    return [str(part) for part in (*typed, *small_run(data, *CATEGORIES))]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "bin" / "run_patchcore.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_task_that_no_node_has_room_for_is_refused_at_once(data: Path, tmp_path: Path, cluster: Any) -> None:
    launch = ("--launcher", "ray", "--ray_address", cluster.address, "--device", "auto")
    for option, expected in (
        (("--cpus_per_task", 2), "--cpus_per_task 2, but no node of the cluster has more than 1 CPU"),
        (("--gpus_per_task", 1), "--gpus_per_task 1, but no node of the cluster has more than 0 GPU"),
    ):
        done = invoke(run_patchcore, *arguments(data, tmp_path / "out", *launch, *option))
        assert done.code == 2 and len(done.error_lines) == 1 and expected in done.err
        assert not (tmp_path / "out").exists()


def test_nodes_that_have_other_versions_or_do_not_see_the_data_are_named(
    data: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = ("--launcher", "ray", "--ray_address", cluster.address)
    real = patchcore.__version__
    with monkeypatch.context() as patch:
        patch.setattr(patchcore, "__version__", "0.0")  # of this process alone
        done = invoke(run_patchcore, *arguments(data, tmp_path / "out", *launch))
    assert done.code == 2 and len(done.error_lines) == 1
    assert re.match(rf"error: node .* has patchcore {re.escape(real)}, here it is 0\.0: ", done.err)
    if Path("/proc/self/fd").is_dir():
        handle = os.open(data, os.O_RDONLY)
        done = invoke(run_patchcore, *arguments(Path(f"/proc/self/fd/{handle}"), tmp_path / "out", *launch))
        os.close(handle)
        assert done.code == 2 and len(done.error_lines) == 1
        assert re.match(rf"error: node .* does not see '/proc/self/fd/{handle}.*': use a path that all", done.err)
    assert not (tmp_path / "out").exists()


def test_a_bank_in_shares_is_the_same_wherever_the_shares_are_read(
    data: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = ("--launcher", "ray", "--ray_address", cluster.address, "--shards", 3, "--save_patchcore_model")
    done = invoke(run_patchcore, *arguments(data, tmp_path / "ray", *launch))
    assert done.code == 0, done.err
    with monkeypatch.context() as patch:
        patch.setattr(patchcore.pipeline, "open_executor", lambda *_: nullcontext(ClusterInThisProcess()))
        assert invoke(run_patchcore, *arguments(data, tmp_path / "here", *launch)).code == 0
    for seed in SEEDS:
        ray, here = (tmp_path / name / "project" / f"group_S{seed}" for name in ("ray", "here"))
        for table in TABLES:
            assert (ray / table).read_bytes() == (here / table).read_bytes()
        for category in CATEGORIES:
            banks = [read_model_tensors(f / "models" / f"mpdd_{category}")["memory_bank"] for f in (ray, here)]
            assert banks[0].equal(banks[1])
            assert len(list((ray / "logs").glob(f"{category}_{seed}_share*.log"))) == 3


def test_tables_are_complete_and_equal_although_a_node_is_killed(data: Path, tmp_path: Path, cluster: Any) -> None:
    assert invoke(run_patchcore, *arguments(data, tmp_path / "alone")).code == 0
    launch = ("--launcher", "ray", "--ray_address", cluster.address)
    process = start(arguments(data, tmp_path / "ray", *launch))
    try:
        # A log is there from when its task begins: with two of them both nodes are at work.
        wait_for(lambda: process.poll() is not None or len(logs(tmp_path)) >= 2)
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "was lost: what ran there is done anew elsewhere" in err
    begun = [log.read_text().count(" begins") for log in logs(tmp_path)]
    assert len(begun) == len(SEEDS) * len(CATEGORIES) and max(begun) == 2
    for seed in SEEDS:
        alone, ray = (tmp_path / name / "project" / f"group_S{seed}" for name in ("alone", "ray"))
        for table in TABLES:
            assert (alone / table).read_bytes() == (ray / table).read_bytes()
        assert not list(ray.rglob(".*"))
    seeds = [tmp_path / name / "project" / "group_seeds.csv" for name in ("alone", "ray")]
    assert seeds[0].read_bytes() == seeds[1].read_bytes()
    again = invoke(run_patchcore, *arguments(data, tmp_path / "ray", *launch, "--skip_existing"))
    assert again.code == 0 and again.err.count("finished before, skipped") == len(SEEDS) * len(CATEGORIES)


def logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("ray/project/group_S*/logs/*.log"))
