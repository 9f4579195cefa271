"""What FastFlow runs leave and say where something goes wrong: divergence, interruption, bad files, small images."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_category
from in_process import read_rows
from PIL import Image
from signed_model import as_format_1
from small_fastflow import evaluate, same_weights, tensors_of, train

from patchcore.configs import TrainingConfig
from patchcore.methods.fastflow import FastFlow
from patchcore.methods.training import Training, schedule_factor
from patchcore.storage.torch_export import read_state

GROUP = Path("project") / "group"
CHECKPOINT = GROUP / "checkpoints" / "mpdd_plate.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training images, which are one batch: an epoch is one step."""
    root = tmp_path_factory.mktemp("failures")
    write_category(root, "plate")
    return root


@pytest.fixture(scope="module")
def clean(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("clean")
    terminal = train(out, data, "--save_model")
    assert terminal.code == 0, terminal.err
    return out / GROUP


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run that ended in the evaluation, with a checkpoint of epoch 3 of 4."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchcore.class_run.evaluate_class", killed)
        assert train(out, data, "--save_model", "--checkpoint_every", 3).code == 130
    return out


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors of nested containers."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(part)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("lr", [1e3, 1e10, 1e20])
def test_a_last_step_that_diverges_leaves_what_went_well(
    lr: float, clean: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jump(schedule: str, step: int, num_steps: int) -> float:
        return lr / TrainingConfig.lr if step == 2 else schedule_factor(schedule, step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr("patchcore.methods.training.schedule_factor", jump)
        terminal = train(tmp_path, data, "--save_model", "--checkpoint_every", 1)
    assert terminal.code == 1
    (line,) = [line for line in terminal.error_lines if line.startswith("error: ")]
    assert line.startswith("error: plate failed: plate: flows: training diverged in epoch 3 of 4 (a loss of ")
    assert line.endswith("use a smaller --lr than 0.001, or a smaller --grad_clip, in a new run")
    assert "Traceback" not in terminal.err
    assert not list((tmp_path / GROUP).glob("models/*"))
    history = tmp_path / GROUP / "training" / "mpdd_plate"
    assert [row["epoch"] for row in read_rows(history / "training_log.csv")] == ["1", "2"]
    assert (history / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    state = read_state(tmp_path / CHECKPOINT)
    assert len(state["history"]) == 2
    assert all(tensor.isfinite().all() for tensor in tensors_in(state))

    resumed = train(tmp_path, data, "--save_model", "--resume")  # without the jump
    assert resumed.code == 0, resumed.err
    assert same_weights(tensors_of(tmp_path / GROUP), tensors_of(clean))


@pytest.mark.parametrize("lr", [1e3, 1e6])
def test_a_training_of_one_step_that_diverges_leaves_no_model(lr: float, data: Path, tmp_path: Path) -> None:
    flags = ("--epochs", 1, "--lr", lr, "--schedule", "constant", "--save_model", "--checkpoint_every", 1)
    terminal = train(tmp_path, data, *flags)
    assert terminal.code == 1
    assert "training diverged in epoch 1 of 1 (a loss of " in terminal.err
    assert f"use a smaller --lr than {lr:g}, or a smaller --grad_clip" in terminal.err
    assert not any((tmp_path / GROUP / name).exists() for name in ("models", "checkpoints", "training"))


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize(("checkpoint_every", "trained_again"), [(2, []), (3, [4])])
def test_an_interrupted_evaluation_is_no_reason_to_train_again(
    checkpoint_every: int,
    trained_again: list[int],
    clean: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ("--save_model", "--checkpoint_every", checkpoint_every)
    with monkeypatch.context() as patch:
        patch.setattr("patchcore.class_run.evaluate_class", killed)
        assert train(tmp_path, data, *flags).code == 130
    assert (tmp_path / CHECKPOINT).exists()
    epochs: list[int] = []
    train_epoch = Training._train_epoch

    def counted(self: Training, epoch: int, *given: Any) -> Any:
        if self.description == "plate: flows":  # not those of calibration
            epochs.append(epoch)
        return train_epoch(self, epoch, *given)

    monkeypatch.setattr(Training, "_train_epoch", counted)
    resumed = train(tmp_path, data, *flags, "--resume")
    assert resumed.code == 0, resumed.err
    assert epochs == trained_again
    folder = tmp_path / GROUP
    assert same_weights(tensors_of(folder), tensors_of(clean))
    for table in ("results.csv", "results_by_defect.csv", "anomaly_scores/mpdd_plate.csv"):
        assert (folder / table).read_bytes() == (clean / table).read_bytes()
    found, expected = (read_rows(f / "training" / "mpdd_plate" / "training_log.csv") for f in (folder, clean))
    assert [{**row, "seconds": ""} for row in found] == [{**row, "seconds": ""} for row in expected]
    assert not (folder / "checkpoints").exists() and not (clean / "checkpoints").exists()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def changed(content: bytes, **parts: Any) -> bytes:
    """Return a checkpoint with other parts; a function makes the new part of the old one."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    return saved({**state, **{name: part(state[name]) for name, part in parts.items()}})


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda content: content[: len(content) // 2], "mpdd_plate.pt' is damaged ("),
    "cut off at the end": (lambda content: content[:-1], "mpdd_plate.pt' is damaged ("),
    "empty": (lambda _: b"", "mpdd_plate.pt' is damaged ("),
    "text": (lambda _: b"no checkpoint", "mpdd_plate.pt' is damaged ("),
    "a list": (lambda _: saved([1, 2]), "holds list, expected a dictionary): remove it"),
    "something else": (lambda _: saved({"epoch": 3}), "the checkpoint holds no 'best_epoch', expected the state of a"),
    "another learning rate": (
        lambda content: changed(content, config=lambda config: {**config, "lr": 0.5}),
        "the checkpoint was trained with lr 0.5, now lr is 0.001: resume with the same settings, or train anew",
    ),
    "another seed": (lambda content: changed(content, seed=lambda seed: seed + 1), "was trained with seed "),
    "other flows": (
        lambda content: changed(content, module=lambda module: {**module, "spread": torch.ones(3)}),
        "spread is [3] instead of [2]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(damage: str, interrupted: Path, data: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    checkpoint = out / CHECKPOINT
    checkpoint.write_bytes(change(checkpoint.read_bytes()))
    before = checkpoint.read_bytes()
    terminal = train(out, data, "--save_model", "--resume")
    assert terminal.code == 1
    (line,) = [line for line in terminal.error_lines if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in terminal.out + terminal.err
    assert "traceback in" not in terminal.err, "what is expected to go wrong needs no traceback"
    assert checkpoint.read_bytes() == before, "nothing is removed before the user has seen it"


def test_without_the_damaged_checkpoint_the_class_is_trained_anew(
    interrupted: Path, clean: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    (out / CHECKPOINT).unlink()
    assert train(out, data, "--save_model", "--resume").code == 0
    assert same_weights(tensors_of(out / GROUP), tensors_of(clean))


# ---------------------------------------------------------------- stored models

WEIGHT = "flows.0.steps.0.subnet.0.weight"
ORDER = "flows.1.steps.1.order"
WRONG_TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "an index twice": (ORDER, torch.zeros_like, "is not a permutation"),
    "an index too large": (ORDER, lambda t: t + 1, "is not a permutation"),
    "indices that are no integers": (ORDER, lambda t: t.float(), "is torch.float32, torch.strided instead of"),
    "NaN": (WEIGHT, lambda t: t.fill_(torch.nan), "is not finite numbers"),
    "infinite statistics": ("flows.0.mean", lambda t: t + torch.inf, "is not finite numbers"),
    "no spread": ("spread", torch.zeros_like, "is not positive numbers"),
    "no standard deviation": ("flows.0.std", torch.zeros_like, "is not positive numbers"),
    "sparse": (WEIGHT, lambda t: t.to_sparse(), "is torch.float32, torch.sparse_coo instead of torch.float32"),
    "complex": (WEIGHT, lambda t: t.to(torch.complex64), "is torch.complex64, torch.strided instead of torch.float32"),
    "integer": (WEIGHT, lambda t: t.long(), "is torch.int64, torch.strided instead of torch.float32"),
    "another shape": (WEIGHT, lambda t: t[:1], "is [1, "),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_tensor_that_makes_no_flow_is_named(case: str, clean: Path, data: Path, tmp_path: Path) -> None:
    name, change, message = WRONG_TENSORS[case]
    (export,) = (clean / "models" / "mpdd_plate").glob("*.pth")
    content = torch.load(export, weights_only=True)
    content["state_dict"][name] = change(content["state_dict"][name])
    torch.save({**content, "model": as_format_1(content["model"])}, tmp_path / "model.pth")
    terminal = evaluate(tmp_path / "out", data, tmp_path / "model.pth")
    assert terminal.code == 2
    unverified, line = terminal.error_lines
    assert "not verified" in unverified
    assert f"{name} " in line and message in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- images smaller than a tile


def test_an_image_smaller_than_a_tile_is_named_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    for category in ("plate", "rod"):
        write_category(root, category)
    small = root / "rod" / "test" / "good" / "001.png"
    with Image.open(small) as image:
        image.crop((0, 0, 64, 30)).save(small)
    embedded: list[str] = []
    compute = FastFlow._embedded

    def counted(self: FastFlow, *given: Any) -> Any:
        embedded.append(self.source.category)
        return compute(self, *given)

    monkeypatch.setattr(FastFlow, "_embedded", counted)
    flags = ("--enable_patch_inference", "--patch_size", 40, "--training_tiles", 1, "--epochs", 1, "--save_model")
    of_dataset = ("-d", "rod", "-d", "plate", "--preserve_high_res")
    terminal = train(tmp_path / "out", root, *flags, "--calibration", "none", of_dataset=of_dataset)
    assert terminal.code == 1
    (line,) = [line for line in terminal.error_lines if line.startswith("error: ")]
    assert line.startswith(f"error: rod failed: {small}: scored at 64 x 30 px, smaller than a tile of 40 px: use a ")
    assert embedded == ["plate"], "the other class is trained, this one is not begun"

    with Image.open(small) as image:
        image.save(root / "plate" / "test" / "good" / "001.png")
    model = tmp_path / "out" / GROUP / "models" / "mpdd_plate"
    terminal = evaluate(tmp_path / "evaluated", root, model)
    assert terminal.code == 1
    assert f"{root / 'plate' / 'test' / 'good' / '001.png'}: scored at 64 x 30 px" in terminal.err
