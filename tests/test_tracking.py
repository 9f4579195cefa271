"""Experiment tracking: what is recorded, and that no tracker can take results with it."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand, small_run
from in_process import read_rows

from patchcore.configs import TrackingConfig
from patchcore.errors import ConfigurationError
from patchcore.tracking import Tracker, open_tracker, require_trackers

WANDB_FILE_HEADER_BYTES = 7
CONFIG = {"method": "patchcore", "dataset": {"path": os.fsdecode(b"/parts \xff"), "limit_train": None}, "seed": 3}


@dataclass(frozen=True)
class Numbers:
    """The part of a class's result that trackers read."""

    row_name: str
    metrics: dict[str, float | None]
    timings: dict[str, float | None] = field(default_factory=dict)


@dataclass
class StandIn:
    """A recorder that keeps what it is given, and fails from a chosen call on."""

    name: str = "stand-in"
    remedy: str = "nothing to do"
    fails_from: int | None = None
    calls: list[Any] = field(default_factory=list)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._note((step, dict(values)))

    def close(self, failed: bool) -> None:
        self._note(("closed", failed))

    def _note(self, call: Any) -> None:
        if self.fails_from is not None and len(self.calls) >= self.fails_from:
            raise ConnectionResetError("lost\nthe network")
        self.calls.append(call)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the toolkit's log says, level first; whether a console handler is there changes nothing."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname.lower()}: {record.getMessage()}")

    logger, handler = logging.getLogger("patchcore"), Keep(logging.INFO)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_names_steps_and_blank_cells() -> None:
    recorder = StandIn()
    tracker = Tracker([recorder])
    tracker.log_class(0, Numbers("mpdd_plate", {"instance_auroc": 0.75, "full_pro": None}, {"train_images": 5}))
    tracker.log_class(2, Numbers("mpdd_rod", {"instance_auroc": 1.0, "full_pro": float("nan")}))
    tracker.log_mean({"instance_auroc": 0.875, "full_pro": None})
    tracker.log_mean({"instance_auroc": None})  # no class was finished
    tracker.close()
    assert recorder.calls == [
        (0, {"mpdd_plate/instance_auroc": 0.75, "mpdd_plate/train_images": 5.0}),
        (2, {"mpdd_rod/instance_auroc": 1.0}),
        (3, {"Mean/instance_auroc": 0.875}),
        ("closed", False),
    ]


@pytest.mark.parametrize("fails_from", [0, 1, 2])
def test_a_recorder_that_fails_costs_one_warning(fails_from: int, messages: list[str]) -> None:
    broken, sound = StandIn("broken one", "look there", fails_from), StandIn()
    tracker = Tracker([broken, sound])
    tracker.log_class(0, Numbers("a", {"f1": 1.0}))
    tracker.log_mean({"f1": 1.0})
    tracker.close()
    assert len(broken.calls) == fails_from and len(sound.calls) == 3
    assert messages == ["warning: broken one records no longer (ConnectionResetError: lost the network): look there"]


def test_without_trackers_nothing_is_imported_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    require_trackers(TrackingConfig(), "project")
    with open_tracker(TrackingConfig(), tmp_path, "project", "group", CONFIG) as tracker:
        tracker.log_class(0, Numbers("a", {"f1": 1.0}))
        tracker.log_mean({"f1": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "config", "extra"),
    [
        ("wandb", TrackingConfig(wandb=True), r"--log_online .* pip install '\.\[wandb\]'"),
        ("torch.utils.tensorboard", TrackingConfig(tensorboard=True), r"--tensorboard .*'\.\[tensorboard\]'"),
    ],
)
def test_a_missing_package_is_found_before_any_work(
    module: str, config: TrackingConfig, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=extra):
        require_trackers(config, "project")


def test_tensorboard_gets_every_number(tmp_path: Path, messages: list[str]) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = TrackingConfig(tensorboard=True), tmp_path / "PatchCore run"
    require_trackers(config, "project")
    with open_tracker(config, folder, "project", "group", CONFIG) as tracker:
        tracker.log_class(0, Numbers("mpdd_plate", {"instance_auroc": 0.75, "full_pro": None}, {"train_images": 5}))
        tracker.log_class(1, Numbers(os.fsdecode(b"mpdd_\xff"), {"instance_auroc": 1.0}))
        tracker.log_mean({"instance_auroc": 0.875})
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "mpdd_plate/instance_auroc": [(0, 0.75)],
        "mpdd_plate/train_images": [(0, 5.0)],
        "mpdd_?/instance_auroc": [(1, 1.0)],
        "Mean/instance_auroc": [(2, 0.875)],
    }
    (text,) = events.Tensors("config/text_summary")
    assert b'"seed": 3' in text.tensor_proto.string_val[0]
    assert messages == [f"info: TensorBoard: tensorboard --logdir {tmp_path}"]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """W&B without the account and the settings of whoever runs the tests, recording offline."""
    package = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    package.teardown()  # it reads the environment once
    yield package
    package.teardown()


def track_offline(folder: Path, group: str = "group") -> None:
    config = TrackingConfig(wandb=True)
    require_trackers(config, "parts")
    folder.mkdir(exist_ok=True)
    with open_tracker(config, folder, "parts", group, CONFIG) as tracker:
        tracker.log_class(0, Numbers("mpdd_plate", {"instance_auroc": 0.8125, "full_pro": None}, {"train_images": 5}))
        tracker.log_mean({"instance_auroc": 0.4375})


def offline_records(folder: Path) -> list[bytes]:
    """Return the content of W&B's offline runs; names and numbers stand in it as text.

    W&B's service, a process of its own, may still be writing when a run has ended.
    """
    deadline = time.monotonic() + 60
    before: list[bytes] = []
    while time.monotonic() < deadline:
        contents = [path.read_bytes() for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        if contents == before and all(len(content) > WANDB_FILE_HEADER_BYTES for content in contents):
            break
        before = contents
        time.sleep(0.3)
    return contents


def test_wandb_offline_keeps_the_numbers_in_the_run_folder(
    wandb: Any, tmp_path: Path, messages: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "metal parts_S3"
    track_offline(folder, "metal parts")
    (content,) = offline_records(folder)
    for name, value in [
        ("mpdd_plate/instance_auroc", "0.8125"),
        ("mpdd_plate/train_images", "5"),
        ("Mean/instance_auroc", "0.4375"),
        ("seed", "3"),
        ("method", '"patchcore"'),
    ]:
        assert re.search(re.escape(name).encode() + rb"\x82\x01." + re.escape(value).encode(), content), name
    for text in (b"parts", b"metal parts", b"metal parts_S3"):  # project, group, name
        assert bytes([len(text)]) + text in content
    assert b"full_pro" not in content
    (sync,) = messages
    assert re.fullmatch(rf"info: .*offline.*: wandb sync '{folder}/wandb/offline-run-\S+'", sync)
    printed = capfd.readouterr()
    assert "wandb:" not in printed.out + printed.err  # with which W&B begins its lines
    assert wandb.run is None


def test_a_resumed_run_folder_continues_its_wandb_run_and_another_folder_does_not(wandb: Any, tmp_path: Path) -> None:
    for name in ("a", "a", "b"):
        track_offline(tmp_path / name)
    files = {name: list((tmp_path / name).glob("wandb/offline-run-*/*.wandb")) for name in "ab"}
    ids = {name: {path.name for path in paths} for name, paths in files.items()}
    assert len(files["a"]) == 2 and len(ids["a"]) == len(ids["b"]) == 1
    assert ids["a"] != ids["b"]


def test_a_run_that_ends_early_is_closed_and_its_error_stays(wandb: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    with (
        pytest.raises(KeyboardInterrupt),
        open_tracker(TrackingConfig(True, True), tmp_path, "parts", "group", CONFIG) as tracker,
    ):
        tracker.log_class(0, Numbers("a", {"f1": 0.8125}))
        raise KeyboardInterrupt
    (content,) = offline_records(tmp_path)
    assert b"0.8125" in content
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_network_lost_after_the_start_leaves_an_offline_run(
    wandb: Any, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = wandb.init

    def init_without_network(**arguments: Any) -> Any:
        if arguments.get("mode") != "offline":
            raise wandb.errors.CommError("no route to host")
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", init_without_network)
    track_offline(tmp_path / "run")
    assert len(offline_records(tmp_path / "run")) == 1
    assert [m.partition(":")[0] for m in messages] == ["warning", "info"]
    assert "no route to host" in messages[0] and "offline" in messages[0]


def test_a_tracker_that_cannot_be_opened_leaves_the_others(
    wandb: Any, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")

    def broken(**arguments: Any) -> Any:
        raise RuntimeError("service lost")

    monkeypatch.setattr(wandb, "init", broken)
    with open_tracker(TrackingConfig(True, True), tmp_path, "parts", "group", CONFIG) as tracker:
        tracker.log_mean({"f1": 1.0})
    assert messages[0].startswith("warning: Weights & Biases records nothing (RuntimeError: service lost)")
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("environment", "project", "message"),
    [
        ({}, "parts", "API key.*wandb login.*WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "parts", "40"),
        ({"WANDB_MODE": "ofline"}, "parts", "WANDB_MODE is 'ofline', expected online, offline or disabled"),
        ({"WANDB_MODE": ""}, "parts", "WANDB_MODE is ''"),
        ({"WANDB_MODE": "offline"}, "parts#1", "project name 'parts#1'"),
    ],
)
def test_what_wandb_refuses_is_found_before_any_work(
    wandb: Any, environment: dict[str, str], project: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    with pytest.raises(ConfigurationError, match=message) as caught:
        require_trackers(TrackingConfig(wandb=True), project)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_found_before_any_work(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    wandb.teardown()
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:9.*WANDB_MODE=offline"):
        require_trackers(TrackingConfig(wandb=True), "parts")


def test_wandb_disabled_by_its_variable_writes_nothing(
    wandb: Any, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    track_offline(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert messages == ["info: Weights & Biases records nothing: WANDB_MODE is disabled"]


@pytest.mark.slow
def test_a_run_from_the_shell_is_followed_by_both(
    wandb: Any, small_dataset: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished = run_command(
        "run_patchcore.py", "--device", "cpu", "--threads", 1, "--log_online", "--tensorboard",
        "--log_project", "parts",
        tmp_path / "out", *small_run(small_dataset),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "out" / "parts" / "group"
    (content,) = offline_records(folder)
    assert b"mpdd_rod/instance_auroc" in content and b"Mean/full_pro" in content
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for step, row in enumerate(read_rows(folder / "results.csv")):
        (event,) = events.Scalars(f"{row['Row Names']}/full_pro")
        assert (event.step, event.value) == (step, pytest.approx(float(row["full_pro"]), abs=1e-5))
    assert "wandb sync" in finished.stderr and "tensorboard --logdir" in finished.stderr
