"""Experiment tracking: the numbers of a run as they come, in Weights & Biases and TensorBoard.

The tables in the run folder are the record; trackers repeat them. What can be wrong with a tracker is therefore
found before any work, and what goes wrong with it later costs one warning and never a result.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from patchcore.configs import TrackingConfig
from patchcore.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

MEAN = "Mean"  # named as the row of the tables
INIT_TIMEOUT_SECONDS = 30.0  # then the run is recorded offline
FINISH_TIMEOUT_SECONDS = 60.0  # W&B sends while the run goes on; without a network it would wait without end
STEP = "class_index"
WANDB_MODES = ("online", "offline", "disabled", "run", "dryrun", "shared")  # which W&B takes


class ClassNumbers(Protocol):
    """The numbers of one class; `ClassResult` has them."""

    @property
    def row_name(self) -> str: ...

    @property
    def metrics(self) -> Mapping[str, float | None]: ...

    @property
    def timings(self) -> Mapping[str, float | None]: ...


class Recorder(Protocol):
    """One place where numbers go.

    Attributes:
        name: What messages call it.
        remedy: What to do with what was recorded when it stops before its time.
    """

    name: str
    remedy: str

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record values under their names, at a step >= 0."""

    def close(self, failed: bool) -> None:
        """Send or write what is left; `failed` says that the run ended early."""


class Tracker:
    """Gives numbers to every recorder, and goes on without one that fails.

    Args:
        recorders: Where the numbers go; none makes every call do nothing.
    """

    def __init__(self, recorders: list[Recorder]) -> None:
        self._recorders = list(recorders)
        self._next_step = 0

    def log_class(self, step: int, result: ClassNumbers) -> None:
        """Record the metrics and timings of one class as `<row name>/<column>`.

        Args:
            step: Index of the class in the run, >= 0.
            result: Its numbers; blank cells are left out.
        """
        self._next_step = max(self._next_step, step + 1)
        self._record(step, result.row_name, {**result.metrics, **result.timings})

    def log_mean(self, metrics: Mapping[str, float | None]) -> None:
        """Record the mean over the classes as `Mean/<column>`, one step after the last class."""
        self._record(self._next_step, MEAN, metrics)

    def close(self, failed: bool = False) -> None:
        """Close every recorder; `failed` says that the run ended early."""
        for recorder in list(self._recorders):
            self._attempt(recorder, lambda r: r.close(failed))
        self._recorders.clear()

    def _record(self, step: int, prefix: str, columns: Mapping[str, float | None]) -> None:
        prefix = readable(prefix)
        values = {f"{prefix}/{c}": float(v) for c, v in columns.items() if v is not None and math.isfinite(v)}
        for recorder in list(self._recorders) if values else []:
            self._attempt(recorder, lambda r: r.record(step, values))

    def _attempt(self, recorder: Recorder, call: Callable[[Recorder], None]) -> None:
        """Call a recorder; one that fails is named in one warning and left out from then on."""
        try:
            call(recorder)
        except Exception as error:  # W&B's have no common base class, and none of them is worth a trained model
            LOGGER.warning("%s records no longer (%s): %s", recorder.name, _one_line(error), recorder.remedy)
            LOGGER.debug("what %s met", recorder.name, exc_info=True)
            self._recorders.remove(recorder)


def require_trackers(config: TrackingConfig, project: str) -> None:
    """Find before any work what would keep a tracker from recording.

    With W&B online this asks its server whether the key is valid, and on a terminal W&B asks for a missing one.

    Args:
        config: The trackers asked for.
        project: W&B's project.

    Raises:
        ConfigurationError: A package is missing, or W&B knows no user, no server, or refuses the project's name.
    """
    if config.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"--tensorboard needs the package tensorboard ({_one_line(error)}): pip install '.[tensorboard]'"
            ) from error
    if config.wandb:
        _require_wandb(project)


def _require_wandb(project: str) -> None:
    try:
        import wandb
    except ImportError as error:
        raise ConfigurationError(
            f"--log_online needs the package wandb ({_one_line(error)}): pip install '.[wandb]'"
        ) from error
    typed = os.environ.get("WANDB_MODE", "online")
    if typed not in WANDB_MODES:
        raise ConfigurationError(f"--log_online: WANDB_MODE is {typed!r}, expected online, offline or disabled")
    try:
        mode = wandb.setup().settings.mode
        wandb.Settings(project=project)
        if mode not in ("offline", "dryrun", "disabled"):
            wandb.login(verify=True)
    except (wandb.Error, ValueError) as error:  # ValueError: a setting or environment variable of another type
        raise ConfigurationError(
            f"--log_online: W&B cannot record ({_one_line(error)}): mend that, call `wandb login`, or set "
            "WANDB_MODE=offline to record in the run folder"
        ) from error


@contextmanager
def open_tracker(
    config: TrackingConfig, folder: Path, project: str, group: str, run_config: Mapping[str, Any]
) -> Iterator[Tracker]:
    """Open the trackers of one run folder, and close them when the context ends.

    Args:
        config: The trackers asked for; `require_trackers` has accepted them.
        folder: The run folder, whose name is that of the W&B run; everything the trackers write goes below it.
        project: W&B's project.
        group: W&B's group, which holds the runs of several seeds together.
        run_config: What was asked for, as JSON values.

    Yields:
        The tracker. A tracker that cannot be opened is left out with a warning.
    """
    openers: list[tuple[str, Callable[[], Recorder]]] = []
    if config.wandb:
        openers.append(("Weights & Biases", lambda: WandbRecorder(folder, project, group, run_config)))
    if config.tensorboard:
        openers.append(("TensorBoard", lambda: TensorBoardRecorder(folder, run_config)))
    recorders = []
    for name, opener in openers:
        try:
            recorders.append(opener())
        except Exception as error:  # as in Tracker: a run that can be trained is trained
            LOGGER.warning("%s records nothing (%s): the run goes on without it", name, _one_line(error))
            LOGGER.debug("what %s met", name, exc_info=True)
    tracker = Tracker(recorders)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.close(failed)


class WandbRecorder:
    """One W&B run per run folder; a resumed run folder continues its W&B run.

    Args:
        folder: The run folder; W&B's files go to its subfolder `wandb`.
        project: W&B's project.
        group: W&B's group.
        run_config: What was asked for, as JSON values.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str, group: str, run_config: Mapping[str, Any]) -> None:
        import wandb

        earlier = _earlier_wandb_id(folder)
        wanted = {
            "project": project,
            "group": readable(group),
            "name": readable(folder.name),
            "config": json.loads(readable(json.dumps(run_config, ensure_ascii=False))),
            "dir": str(folder),
            "id": earlier,
            "resume": "allow" if earlier else None,
            "reinit": "create_new",  # not the run that a notebook around this one may have open
            "settings": wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        }
        try:
            self._run = wandb.init(**wanted)
        except wandb.Error as error:  # the network was there when the run began, or the project takes no new runs
            LOGGER.warning("W&B accepts no run now (%s): recorded offline instead", _one_line(error))
            self._run = wandb.init(**wanted, mode="offline")
        # A step of our own: W&B drops what is logged below its own step, as a resumed run does.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        sync = f"wandb sync {shlex.quote(str(self._run.settings.sync_dir))}"
        self.remedy = f"what it has so far is sent by: {sync}"
        if self._run.settings.mode == "disabled":
            LOGGER.info("Weights & Biases records nothing: WANDB_MODE is disabled")
        elif self._run.offline:
            LOGGER.info("Weights & Biases records offline, sent by: %s", sync)
        else:
            LOGGER.info("Weights & Biases: %s", self._run.url)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _earlier_wandb_id(folder: Path) -> str | None:
    """Return the id of the newest W&B run that a run folder has already, from the name that W&B gives its record."""
    records = (folder / "wandb").glob("*run-*/run-*.wandb")  # <time>-<id>/run-<id>.wandb, with "offline-" or not
    newest = max(records, key=lambda path: path.parent.name.partition("run-")[2], default=None)
    return newest.stem.removeprefix("run-") if newest else None


class TensorBoardRecorder:
    """Scalars in event files, flushed after each class.

    Args:
        folder: The run folder; the event files go to its subfolder `tensorboard`.
        run_config: What was asked for, shown as text.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, run_config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.remedy = f"the event files in {folder / 'tensorboard'} hold what came before"
        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
        lines = readable(json.dumps(run_config, ensure_ascii=False, indent=2, sort_keys=True)).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines))  # Markdown for code
        self._writer.flush()
        LOGGER.info("TensorBoard: tensorboard --logdir %s", shlex.quote(str(folder.parent)))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def readable(text: str) -> str:
    """Return a text without the bytes of file names that are no UTF-8, which neither tracker can store."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
