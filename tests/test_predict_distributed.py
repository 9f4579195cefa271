"""Images that are handed out to workers: what is left is what one process leaves, whatever ends first or is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunCommand
from in_process import Finished, invoke, read_rows
from PIL import Image
from test_predict import example

from patchcore.cli import predict
from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.inference import distributed
from patchcore.inference.distributed import in_order, task_size
from patchcore.inference.inputs import input_places
from patchcore.launching import Ended, InThisProcess, Job

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = ("--batch_size", 2)  # a task each


class LastFirst:
    """Does the last task first, as a cluster may, each from its pickled form and in another working directory."""

    is_in_process = False

    def __init__(self, elsewhere: Path, lost: Sequence[int] = ()) -> None:
        self.elsewhere = elsewhere
        self.lost = lost
        self.places: list[Path] = []

    def settle(self, runtime: RuntimeConfig) -> tuple[RuntimeConfig, torch.device]:
        return InThisProcess().settle(runtime)

    def require_visible(self, paths: Sequence[Path]) -> None:
        assert all(path.exists() for path in paths)
        self.places = list(paths)

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        for job in reversed(list(jobs)):
            before = os.getcwd()
            os.chdir(self.elsewhere)
            value = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(job.call))()))
            os.chdir(before)
            if job.key in self.lost:  # at its very end, when all is written
                yield Ended(job.key, None, lost="its worker was lost")
            else:
                yield Ended(job.key, value, [(30, "mind this")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    example("autoencoder").save(folder)
    return folder


@pytest.fixture(autouse=True)
def no_model_of_another_test() -> Iterator[None]:
    distributed._model.cache_clear()
    yield
    distributed._model.cache_clear()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders with images of the same names, of which the first cannot be read; the name of one is a numbered one."""
    root = tmp_path / "in"
    rng = np.random.default_rng(0)
    for name in ("a/x.png", "a/y.png", "b/X.png", "b/x_1.png", "b/z.png", "c/x.png", "c/y.png", "c/z.png", "d/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)).save(root / name)
    (root / "a" / "x.png").write_bytes(b"no image")
    (root / "b" / "y.png").write_bytes(b"")
    return root


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LastFirst:
    """What --launcher ray opens, instead of Ray."""
    (tmp_path / "elsewhere").mkdir()
    executor = LastFirst(tmp_path / "elsewhere")

    @contextlib.contextmanager
    def opened(launch: LaunchConfig, runtime: RuntimeConfig) -> Iterator[LastFirst]:
        assert launch.launcher == "ray"
        yield executor

    monkeypatch.setattr(distributed, "open_executor", opened)
    return executor


def run(*args: object) -> Finished:
    return invoke(predict, *args, "--device", "cpu", "--threads", 1, *BATCH)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def typed(images: Path) -> list[Path]:
    return [images / name for name in "abcd"]


# ---------------------------------------------------------------- parts, by hand


def test_a_task_has_whole_batches() -> None:
    assert task_size(1, 8) == 8 and task_size(20, 8) == 8
    assert task_size(63 * 8 + 1, 8) == 2 * 8  # 64 batches, 32 tasks
    assert task_size(1_000_000, 8) == 16 * 8 and task_size(1_000_000, 1) == 16


def test_tasks_are_yielded_in_order_each_as_soon_as_it_can_be() -> None:
    taken: list[int] = []

    def ends() -> Iterator[Ended]:
        for key in (2, 0, 3, 1, 4):
            taken.append(key)
            yield Ended(key, f"value {key}")

    ordered = in_order(ends())
    assert next(ordered).key == 0 and taken == [2, 0]
    assert [end.value for end in ordered] == [f"value {key}" for key in (1, 2, 3, 4)]


def test_what_has_to_be_there_of_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a [1]").mkdir()
    monkeypatch.chdir(tmp_path)
    found = input_places(["a [1]", "a [1]/**/*.png", "*.png", str(tmp_path / "a*" / "b" / "?.png")])
    assert found == [Path("a [1]"), Path("a [1]"), Path(), tmp_path]


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("maps", ["png16", "npy"])
def test_workers_leave_what_one_process_leaves(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, maps: str
) -> None:
    outs, arguments = (tmp_path / "alone", tmp_path / "workers"), (model, *typed(images), "--heat_maps", maps, "--json")
    alone = run(*arguments, "--out", outs[0])
    together = run(*arguments, "--out", outs[1], "--launcher", "ray")
    assert alone.code == together.code == 1
    assert alone.out == together.out and len(alone.out.splitlines()) == 10
    assert files(outs[0]) == files(outs[1]) and len(files(outs[1])) == 3 * 8 + 1
    assert sorted(p.name for p in outs[1].iterdir()) == sorted(p.name for p in outs[0].iterdir())
    overlays = [json.loads(line)["overlay"] for line in together.out.splitlines()]
    assert overlays[2] == "overlays/X.png", "an image that cannot be read takes no name"
    assert together.err.count("mind this") == 1, "of the messages of workers, each once"
    lines = [line for line in together.error_lines if "mind this" not in line]
    assert [line.replace("workers/", "alone/") for line in lines] == alone.error_lines


def test_images_of_a_lost_task_are_failures_and_take_no_names(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst
) -> None:
    cluster.lost = [1]
    lost = run(model, *typed(images), "--out", tmp_path / "lost", "--launcher", "ray")
    rows = read_rows(tmp_path / "lost" / "predictions.csv")
    assert lost.code == 1 and len(rows) == 10 and lost.err.count("not scored: its worker was lost") == 2
    assert [number for number, row in enumerate(rows) if row["error"] == "not scored: its worker was lost"] == [2, 3]
    for row in rows[2:4]:
        Path(row["path"]).write_bytes(b"no image")
    assert run(model, *typed(images), "--out", tmp_path / "alone").code == 1
    left, expected = files(tmp_path / "lost"), files(tmp_path / "alone")
    tables = left.pop("predictions.csv"), expected.pop("predictions.csv")
    assert left == expected, "no picture of a lost task is left, and its names went to others"
    for row, other in zip(rows, read_rows(tmp_path / "alone" / "predictions.csv"), strict=True):
        assert {**row, "error": bool(row["error"])} == {**other, "error": bool(other["error"])}
    assert tables[0] != tables[1]


def test_relative_paths_mean_the_same_in_workers(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (64, 60), 255).save(tmp_path / "roi.png")  # of another size: the message names both files
    monkeypatch.chdir(tmp_path)
    arguments = ("in/**/*.png", "--roi", "roi.png", "--out")
    assert run(model, *arguments, "alone").code == run(model, *arguments, "workers", "--launcher", "ray").code == 1
    assert files(tmp_path / "alone") == files(tmp_path / "workers")
    assert "in/c/z.png" in read_rows(tmp_path / "workers" / "predictions.csv")[0]["path"].replace("a/x", "c/z")
    assert not list(cluster.elsewhere.iterdir())


def test_every_node_has_to_see_images_model_region_and_outputs(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "roi.png")
    arguments = (model, f"{images}/*/*.png", "--launcher", "ray", "--roi", tmp_path / "roi.png", "--out")
    assert run(*arguments, tmp_path / "deep" / "out").code == 1
    assert cluster.places[:3] == [images, model, tmp_path / "roi.png"] and len(cluster.places) == 4
    assert cluster.places[3].parent == tmp_path, "a folder that is there for as long as it is looked for"

    def refuse(paths: Sequence[Path]) -> None:
        raise ConfigurationError(f"node b does not see {str(paths[0])!r}: use a path that all nodes share")

    monkeypatch.setattr(cluster, "require_visible", refuse)
    refused = run(*arguments, tmp_path / "refused")
    assert refused.code == 2 and refused.error_lines == [
        f"error: node b does not see {str(images)!r}: use a path that all nodes share"
    ]
    assert not (tmp_path / "refused").exists()


def test_the_model_is_opened_once_in_a_worker_and_what_is_wrong_with_it_is_one_line(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    honest = distributed.open_model
    monkeypatch.setattr(distributed, "open_model", lambda job: opened.append(job.model) or honest(job))
    assert run(model, images / "c", "--json", "--launcher", "ray").code == 0 and opened == [model]
    for wrong, expected in (((tmp_path / "no model",), "not found"), ((model, "--roi", "none.png"), "none.png")):
        refused = run(*wrong, images, "--out", tmp_path / "out", "--launcher", "ray")
        assert refused.code == 2 and expected in refused.err and len(refused.error_lines) == 1
        assert not (tmp_path / "out").exists()
    cluster.lost = ["model"]  # type: ignore[list-item]
    refused = run(model, images, "--out", tmp_path / "out", "--launcher", "ray")
    assert refused.code == 2 and "cannot be opened: its worker was lost" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_call_that_is_ended_leaves_no_table_and_nothing_unfinished(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(model, images, "--out", out, "--launcher", "ray").code == 1

    def interrupted(jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        for job in jobs:
            job.log.parent.mkdir(exist_ok=True)
            job.log.touch()
            yield Ended(job.key, job.call())
            if job.key == 0:
                (out / "overlays" / ".0.part").touch()
                raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "run", interrupted)
    assert run(model, images, "--out", out, "--launcher", "ray").code == 130
    assert {p.name for p in out.iterdir()} == {"overlays", "masks", "heat_maps"}
    assert not list(out.rglob(".*"))


def test_the_log_of_a_lost_worker_is_kept(
    model: Path, images: Path, tmp_path: Path, cluster: LastFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        for job in jobs:
            job.log.parent.mkdir(exist_ok=True)
            job.log.write_text("something")
            yield Ended(job.key, None, lost=f"see {job.log}") if job.key == 1 else Ended(job.key, job.call())

    monkeypatch.setattr(cluster, "run", lossy)
    done = run(model, images, "--out", tmp_path / "out", "--launcher", "ray")
    assert done.code == 1 and [p.name for p in (tmp_path / "out" / "logs").iterdir()] == ["images_3.log"]
    assert str(tmp_path / "out" / "logs" / "images_3.log") in done.err


def test_wrong_options_are_one_line(model: Path, images: Path, tmp_path: Path) -> None:
    for options, expected in (
        (("--launcher", "ray", "--watch"), "--watch with --launcher ray"),
        (("--ray_address", "auto"), "--ray_address auto without --launcher ray"),
        (("--cpus_per_task", 2), "--cpus_per_task 2 without --launcher ray"),
        (("--launcher", "ray", "--ray_address", "host"), "expected HOST:PORT"),
        (("--launcher", "ray", "--gpu", 1), "use --gpus_per_task"),
        (("--launcher", "ray", "--threads", 2, "--cpus_per_task", 1), "--threads 2 on --cpus_per_task 1"),
        (("--workers", 2), "No such option"),
    ):
        done = invoke(predict, model, images, "--out", tmp_path / "out", "--device", "cpu", *options)
        assert done.code == 2 and len(done.error_lines) == 1 and expected in done.err, done.err
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- Ray itself


@pytest.mark.slow
def test_ray_leaves_what_one_machine_leaves(run_command: RunCommand, model: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed: pip install '.[distributed]'")
    rng = np.random.default_rng(1)
    for number in range(10):
        Image.fromarray(rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)).save(images / "d" / f"{number}.png")
    arguments = (model, "in/a", "in/b", "in/c", "in/d", "--json", "--device", "cpu", "--threads", 1, *BATCH, "--out")
    alone = run_command("predict.py", *arguments, "alone", cwd=tmp_path)
    ray = run_command("predict.py", *arguments, "ray", "--launcher", "ray", cwd=tmp_path)
    assert alone.returncode == ray.returncode == 1, ray.stderr
    assert ray.stdout == alone.stdout and len(ray.stdout.splitlines()) == 20
    assert files(tmp_path / "ray") == files(tmp_path / "alone") and len(files(tmp_path / "ray")) == 3 * 18 + 1
    assert {p.name for p in (tmp_path / "ray").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}
    lines = [re.split(r"[\r\n]+", done.stderr) for done in (alone, ray)]  # among those of a bar
    said = [[line for line in of_one if line.startswith("warning: ")] for of_one in lines]
    assert said[0] == said[1] and len(said[1]) == 2
    assert "18 images scored, " in lines[1][-2] and lines[1][-2].endswith(
        ", 2 not scored (column error): ray/predictions.csv"
    )
