"""Runs that are killed, interrupted, out of memory or room, or not alone: what they leave is whole, and goes on."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, small_run, write_category
from in_process import Finished, invoke, read_rows
from small_images import PREPROCESSING, Batches, random_images

import patchcore.pipeline
from patchcore.batch_halving import PredictInMemory, call_in_memory
from patchcore.cli import run_patchcore
from patchcore.cli.grammar import run_with_exit_code
from patchcore.configs import TrainingSource
from patchcore.detector import AnomalyDetector, Prediction
from patchcore.errors import ConfigurationError, DataError
from patchcore.failures import is_out_of_memory
from patchcore.features.extractor import FeatureExtractor
from patchcore.resuming import new_folder
from patchcore.runtime import in_threads
from patchcore.storage import files, run_folder
from patchcore.storage.files import remove_unfinished
from patchcore.storage.folder_lock import LOCK_FILE, FolderInUseError, locked

ALL_OUTPUTS = ("--save_patchcore_model", "--save_segmentation_images", "--save_anomaly_scores")
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)
MEMORY_ERRORS = [
    MemoryError("Unable to allocate 3.00 TiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(CPU_MESSAGE),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
]


def run(out: Path, *args: object) -> Finished:
    return invoke(run_patchcore, out, "--device", "cpu", "--threads", 1, *args)


def warnings(done: Finished) -> list[str]:
    """Return the lines of warnings; a slow machine also shows bars."""
    return [line for line in done.error_lines if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survival") / "data"
    for category in ("plate", "rod"):
        write_category(root, category, num_train=4, num_test=2)
    return root


def group(out: Path, name: str = "group") -> Path:
    return out / "project" / name


# ---------------------------------------------------------------- one run per folder


HOLD = """
import sys
from pathlib import Path
from patchcore.storage.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
Holder = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Starts a process that holds the lock of a folder until the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.communicate()


def test_a_second_run_is_refused_in_one_line_that_names_the_first(data: Path, tmp_path: Path, holder: Holder) -> None:
    assert run(tmp_path, *small_run(data, "rod")).code == 0
    before = {p: p.read_bytes() for p in group(tmp_path).rglob("*") if p.is_file()}
    process = holder(group(tmp_path))
    done = run(tmp_path, "--skip_existing", *small_run(data, "rod"))
    assert done.code == 2 and len(done.error_lines) == 1 and done.out == ""
    assert f"process {process.pid} on " in done.err and str(group(tmp_path)) in done.err
    assert before == {p: p.read_bytes() for p in before}


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path, holder: Holder) -> None:
    process = holder(tmp_path)
    with pytest.raises(FolderInUseError), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_holder_has_just_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened it before would hold what a third process no longer sees."""
    lock, calls = fcntl.lockf, []

    def lock_too_late(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "lockf", lock_too_late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_told_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    done = run(tmp_path, "--calibration", "none", *small_run(data, "rod"))
    assert done.code == 0
    (line,) = warnings(done)
    assert "its file system has no locks (No locks available)" in line and str(group(tmp_path)) in line


def test_a_folder_that_another_run_has_found_first_is_left_to_it(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = run_folder.claim_folder

    def claim_and_lose(parent: Path, name: str) -> Path:
        folder = claim(parent, name)
        if folder.name == "g":
            holder(folder)
        return folder

    monkeypatch.setattr(run_folder, "claim_folder", claim_and_lose)
    with ExitStack() as locks:
        assert new_folder(tmp_path, "g", False, locks).name == "g_0"
    with ExitStack() as locks, pytest.raises(ConfigurationError, match="another run has just begun"):
        new_folder(tmp_path, "g", True, locks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g", "g_0"]


def test_what_a_killed_run_left_half_written_is_removed(data: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--save_patchcore_model", *small_run(data, "rod")).code == 0
    folder = group(tmp_path)
    (folder / "class_results" / "mpdd_rod.json").unlink()
    leftovers = [folder / ".a.part", folder / "anomaly_scores" / ".b.part"]
    for path in leftovers:
        path.write_bytes(b"half")
    for name in (".c.part", ".d.old"):
        (folder / "models" / name).mkdir()
        (folder / "models" / name / "model.json").write_text("{")
        leftovers.append(folder / "models" / name)
    mine = folder / "notes.part"
    mine.write_text("not hidden: a user's own")
    assert run(tmp_path, "--save_patchcore_model", "--skip_existing", *small_run(data, "rod")).code == 0
    assert not any(path.exists() for path in leftovers) and mine.exists()
    remove_unfinished(tmp_path / "nothing")


def test_files_keep_their_permissions_when_many_are_written_at_once(tmp_path: Path) -> None:
    """The mask of a process can only be read by setting it, which another thread would see."""
    before = os.umask(0o027)
    try:
        list(in_threads(lambda i: files.write_bytes(tmp_path / str(i), b"x"), range(300)))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_folder(tmp_path / "m", lambda folder: (folder / "old").touch())
    replace, calls = os.replace, []

    def fail_second(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "for the test")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="for the test"):
        files.write_folder(tmp_path / "m", lambda folder: (folder / "new").touch())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["m", "old"]


# ---------------------------------------------------------------- finished classes


def test_a_finished_run_loads_no_backbone_and_reads_no_image(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("--calibration", "split", *small_run(data, reading=("--train_val_split", "0.5")))
    assert run(tmp_path, *steps).code == 0
    before = {p: p.read_bytes() for p in group(tmp_path).rglob("*.csv")}

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr("patchcore.methods.patchcore.build_extractor", refuse)
    monkeypatch.setattr("patchcore.datasets.inspection.InspectionDataset.__init__", refuse)
    done = run(tmp_path, "--skip_existing", *steps)
    assert done.code == 0 and done.err.count("finished before, skipped") == 2
    assert before == {p: p.read_bytes() for p in group(tmp_path).rglob("*.csv")}
    assert not (group(tmp_path) / LOCK_FILE).exists()


def test_wrong_arguments_of_the_classes_that_are_left_are_found_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = small_run(data)
    assert run(tmp_path, *steps).code == 0
    run_folder.class_result_path(group(tmp_path), "mpdd_rod").unlink()

    def refuse(*arguments: object, **options: object) -> None:
        raise ConfigurationError("the weights are gone")

    monkeypatch.setattr("patchcore.methods.patchcore.build_extractor", refuse)
    done = run(tmp_path, "--skip_existing", *steps)
    assert done.code == 2 and done.error_lines == ["error: the weights are gone"] and done.out == ""


def test_a_class_that_is_done_anew_counts_as_unfinished_meanwhile(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("--save_segmentation_images", *small_run(data, "rod"))
    assert run(tmp_path, *steps).code == 0
    pictures = group(tmp_path) / "segmentation_images" / "mpdd_rod"
    whole = sorted(p.name for p in pictures.iterdir())
    for path in pictures.iterdir():
        path.unlink()
    pictures.rmdir()

    begun: list[Path] = []

    def interrupted(path: Path, content: bytes, write: Any = files.write_bytes) -> None:
        begun.append(path)
        if len(begun) > 1:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("patchcore.class_run.write_bytes", interrupted)
        assert run(tmp_path, "--skip_existing", *steps).code == 130
    assert not run_folder.class_result_path(group(tmp_path), "mpdd_rod").exists()
    assert len(list(pictures.iterdir())) == 1
    assert run(tmp_path, "--skip_existing", *steps).code == 0
    assert sorted(p.name for p in pictures.iterdir()) == whole


# ---------------------------------------------------------------- one class fails


STAGES = {
    "training": "patchcore.methods.patchcore.PatchCore.fit",
    "calibration": "patchcore.methods.patchcore.PatchCore.out_of_fold_calibration",
    "model": "patchcore.methods.patchcore.PatchCore.save",
    "scores": "patchcore.methods.patchcore.PatchCore.predict",
    "metrics": "patchcore.class_run.class_metrics",
    "score file": "patchcore.storage.run_folder.write_image_scores",
    "maps": "patchcore.storage.run_folder.write_anomaly_maps",
    "pictures": "patchcore.class_run.segmentation_picture",
    "record": "patchcore.storage.run_folder.save_class_result",
}
FAILURES = [
    (MemoryError("for the test"), "out of memory (MemoryError: for the test): use --memory_budget"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no room on the disk at a/b (No space left on device)"),
    (DataError("for the test"), "for the test"),
]


def test_a_class_that_fails_anywhere_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes, of which nine fail, each at another stage and for want of something else."""
    root = tmp_path / "data"
    classes = {stage.replace(" ", "_"): target for stage, target in STAGES.items()}
    for category in (*classes, "whole"):
        write_category(root, category, num_train=2, num_test=1)
    at_work: list[str] = []
    train = patchcore.pipeline.train_class

    def begin(task: Any, category: str, **options: Any) -> Any:
        at_work[:] = [category]
        return train(task, category, **options)

    def spoil(category: str, target: str, error: BaseException) -> None:
        module, _, name = target.rpartition(".")
        owner = _resolve(module)
        original = getattr(owner, name)

        def fail(*arguments: Any, **options: Any) -> Any:
            if at_work == [category]:
                raise error
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, fail)

    monkeypatch.setattr("patchcore.pipeline.train_class", begin)
    for number, (category, target) in enumerate(classes.items()):
        spoil(category, target, FAILURES[number % len(FAILURES)][0])
    done = run(tmp_path / "out", *ALL_OUTPUTS, *small_run(root, reading=("--batch_size", "1")))
    folder = group(tmp_path / "out")
    assert done.code == 1 and "Traceback" not in done.err
    reasons = [row["reason"] for row in read_rows(folder / "failures.csv")]
    order = sorted(classes)
    assert [row["Row Names"] for row in read_rows(folder / "failures.csv")] == [f"mpdd_{name}" for name in order]
    for name, why in zip(order, reasons, strict=True):
        assert FAILURES[list(classes).index(name) % len(FAILURES)][1] in why
        assert f"error: {name} failed: {why}" in done.err
    rows = {row["Row Names"]: row for row in read_rows(folder / "results.csv")}
    assert [name for name, row in rows.items() if row["full_pro"]] == ["mpdd_whole", "Mean"]
    assert [path.stem for path in (folder / "class_results").iterdir()] == ["mpdd_whole"]
    assert not list((tmp_path / "out").rglob(".*"))


def _resolve(dotted: str) -> Any:
    """Import the longest module of a dotted name, and return what the rest names in it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


# ---------------------------------------------------------------- memory


class Frugal(AnomalyDetector):
    """Mean brightness, with memory for so many images at a time."""

    method = "frugal"
    config_class = dict

    def __init__(self, capacity: int, error: BaseException) -> None:
        super().__init__(PREPROCESSING, TrainingSource("mpdd", "plate"))
        self.capacity, self.error = capacity, error
        self.sizes: list[int] = []
        self.fits = 0

    def _require_room(self, images: torch.Tensor) -> None:
        self.sizes.append(len(images))
        if len(images) > self.capacity:
            raise self.error

    def fit(self, loader: Any) -> Frugal:
        self.fits += 1
        self.seen = 0
        for batch in loader:
            self._require_room(batch["image"])
            self.seen += len(batch["image"])
        if self.capacity < 0:
            raise self.error
        return self

    def predict(self, images: torch.Tensor) -> Prediction:
        self._require_room(images)
        values = images.float().mean(dim=(1, 2, 3)).numpy()
        return Prediction(values, np.repeat(values, 4).reshape(-1, 2, 2))

    def out_of_fold_calibration(self) -> None:
        return None

    def configuration(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Any) -> None:
        pass

    @classmethod
    def prepare(cls, config: Any, preprocessing: Any, runtime: Any) -> Any:
        raise NotImplementedError


class SizedBatches(Batches):
    """Images in batches of a size."""

    def __init__(self, images: torch.Tensor, size: int) -> None:
        super().__init__(images)
        self.size = size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for images in self.images.split(self.size):
            yield {"image": images}


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda e: type(e).__name__ + str(len(str(e))))
def test_out_of_memory_halves_the_batch_and_changes_no_score(error: BaseException) -> None:
    images = random_images(11, seed=0)
    detector = Frugal(2, error)
    predict = PredictInMemory(detector)
    predictions = [p for batch in images.split(9) for p in predict(batch)]
    assert detector.sizes == [9, 4, 2, 2, 2, 2, 1, 2]  # and from then on parts of the size that fitted
    whole = Frugal(99, error).predict(images)
    assert np.array_equal(np.concatenate([p.scores for p in predictions]), whole.scores)
    assert whole.maps is not None
    assert np.array_equal(np.concatenate([p.maps for p in predictions if p.maps is not None]), whole.maps)
    call_in_memory(detector.fit, lambda size: SizedBatches(images, size), 8, "bracket")
    assert (detector.fits, detector.seen) == (3, 11)


def test_memory_that_does_not_suffice_for_one_image_is_told_as_it_is() -> None:
    detector = Frugal(0, MEMORY_ERRORS[1])
    with pytest.raises(torch.OutOfMemoryError):
        PredictInMemory(detector)(random_images(4, seed=0))
    with pytest.raises(torch.OutOfMemoryError):
        call_in_memory(detector.fit, lambda size: SizedBatches(random_images(4, seed=0), size), 4, "bracket")
    assert detector.sizes == [4, 2, 1, 4, 2, 1]


def test_memory_that_ends_after_the_last_batch_is_not_that_of_batches() -> None:
    detector = Frugal(-1, MEMORY_ERRORS[0])
    detector._require_room = lambda images: None  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        call_in_memory(detector.fit, lambda size: SizedBatches(random_images(4, seed=0), size), 4, "bracket")
    assert detector.fits == 1


def test_other_errors_are_not_tried_again() -> None:
    detector = Frugal(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        PredictInMemory(detector)(random_images(4, seed=0))
    assert detector.sizes == [4] and not is_out_of_memory(detector.error)


def test_a_run_with_too_little_memory_says_so_and_gives_the_same_scores(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = FeatureExtractor.__call__

    def limited(self: FeatureExtractor, images: torch.Tensor) -> Any:
        if len(images) > 1:
            raise MEMORY_ERRORS[2]
        return extract(self, images)

    steps = ("--calibration", "none", *small_run(data, "rod", reading=("--batch_size", "4")))
    assert run(tmp_path, *steps).code == 0
    monkeypatch.setattr(FeatureExtractor, "__call__", limited)
    done = run(tmp_path, *steps)
    assert done.code == 0
    told = [f"warning: rod: out of memory, goes on with {n} image(s) per batch" for n in (2, 1)]
    assert warnings(done) == told * 2  # training, then scoring
    names = [group(tmp_path, name) / "anomaly_scores" / "mpdd_rod.csv" for name in ("group", "group_0")]
    ours, theirs = ([float(row["score"]) for row in read_rows(path)] for path in names)
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------- signals


def test_sigterm_has_its_own_line_and_exit_code(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run_with_exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert left.value.code == 143 and capfd.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_keeps_the_tables(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = patchcore.pipeline.train_class

    def end_in_rod(task: Any, category: str, **options: Any) -> Any:
        if category == "rod":
            os.kill(os.getpid(), signal.SIGTERM)
        return train(task, category, **options)

    with monkeypatch.context() as patch:
        patch.setattr("patchcore.pipeline.train_class", end_in_rod)
        done = run(tmp_path, *small_run(data))
    assert done.code == 143 and done.error_lines == ["error: terminated"]
    assert [row["Row Names"] for row in read_rows(group(tmp_path) / "results.csv")] == ["mpdd_plate", "Mean"]
    assert not (group(tmp_path) / LOCK_FILE).exists()


# ---------------------------------------------------------------- whole commands


WITHOUT_TIMES = ("results.csv", "results_by_defect.csv", "false_alarms.csv")


def is_of_content(path: str) -> bool:
    """Return whether a file below a results path is the same in every run: neither log nor times."""
    name = path.rpartition("/")[2]
    return any(f"/{part}/" in path for part in ("models", "anomaly_scores", "segmentation_images")) or (
        name in WITHOUT_TIMES
    )


@pytest.mark.slow
def test_killed_or_without_room_at_any_write_a_run_resumes_to_the_same_files(data: Path, tmp_path: Path) -> None:
    """Fifteen runs killed in front of a change of the disk, and three that find it full from one on."""
    command = ["--device", "cpu", "--threads", "1", *ALL_OUTPUTS, *small_run(data)]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "killed_runs.py"), "7", "15", "3", str(tmp_path), *command],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (_, code, _, _, whole), *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert code == 0 and len(others) == 18
    expected = {path: digest for path, digest in whole.items() if is_of_content(path)}
    assert len(expected) > 15
    for name, first, second, before, after in others:
        log = (tmp_path / f"{name}.first").read_text() + (tmp_path / f"{name}.second").read_text()
        assert first == (-signal.SIGKILL if name.startswith("kill") else 1), f"{name}: {log}"
        assert second == 0 and "Traceback" not in log, f"{name}: {log}"
        # What had its name when the run ended is whole; tables then held the rows that were finished.
        partial = {p: d for p, d in before.items() if is_of_content(p) and "/." not in p}
        partial = {p: d for p, d in partial.items() if not p.endswith(WITHOUT_TIMES)}
        assert partial.items() <= expected.items(), name
        for record in (path for path in before if "/class_results/m" in path):
            row_name = Path(record).stem
            assert sum(row_name in path for path in partial) == sum(row_name in path for path in expected), name
        assert {p: d for p, d in after.items() if is_of_content(p)} == expected, name
        assert not [path for path in after if path.rpartition("/")[2].startswith(".")], name


# Stands for a user who presses Ctrl-C, or a scheduler, when a phase of the work has begun.
SIGNAL_IN_PHASE = """
import os, runpy, signal, sys
from patchcore import runtime

phase, name, marker, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
progress = runtime.progress

def told(iterable, description, total=None, hidden=False):
    bar = progress(iterable, description, total, hidden)
    if phase not in description:
        return bar
    def steps():
        for step in bar:
            if not os.path.exists(marker):
                open(marker, "w").close()
                if name == "SIGINT":
                    os.killpg(0, signal.SIGINT)  # what a terminal does
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield step
    return steps()

runtime.progress = told
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "ending", "code"),
    [
        ("features", "SIGINT", 130),
        ("features", "SIGTERM", 143),
        ("calibration", "SIGINT", 130),
        ("scoring", "SIGINT", 130),
        ("pictures", "SIGINT", 130),
    ],
)
def test_an_interrupted_command_ends_in_one_line_and_leaves_no_process(
    phase: str, ending: str, code: int, data: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    command = [str(REPOSITORY / "bin" / "run_patchcore.py"), str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
    steps = small_run(data, "rod", reading=("--batch_size", "1"))
    steps[steps.index("--num_workers") + 1] = "2"
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNAL_IN_PHASE, phase, ending, str(marker), *command, *ALL_OUTPUTS, *steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        start_new_session=True,
    )
    _, err = process.communicate(timeout=300)
    assert marker.exists() and process.returncode == code, err
    # The line that a terminal's ^C stands in is ended first.
    assert err.lstrip("\n") == ("error: interrupted\n" if ending == "SIGINT" else "error: terminated\n")
    with pytest.raises(ProcessLookupError):  # nobody is left in its group
        os.killpg(process.pid, 0)
    assert not (group(tmp_path / "out") / LOCK_FILE).exists()
    assert not list((tmp_path / "out").rglob("*.part"))
