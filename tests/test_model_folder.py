"""Model folders: what is written comes back, damage is refused before any work, nothing is unpickled."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_PX, write_category
from in_process import Finished, invoke
from safetensors.torch import load_file, save_file
from signed_model import as_format_1, sign

from patchcore.cli import load_and_evaluate_patchcore
from patchcore.configs import (
    BackboneConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
from patchcore.datasets.inspection import DatasetSplit, InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import AnomalyDetector
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import load_backbone
from patchcore.memory.faiss_search import FaissNN
from patchcore.memory.torch_search import TorchNN
from patchcore.methods.patchcore import PatchCore
from patchcore.prediction import open_detector
from patchcore.scoring.calibration import Calibration
from patchcore.storage import model_folder
from patchcore.storage.model_folder import FORMAT_VERSION, ModelHeader, read_model_tensors, write_model_folder

CPU = torch.device("cpu")
PREPROCESSING = PreprocessingConfig(IMAGE_PX, IMAGE_PX)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "data"
    write_category(root, "plate")
    return root


@pytest.fixture(scope="module")
def images(data: Path) -> torch.Tensor:
    """The test images, uint8 [6, 3, S, S]."""
    test = InspectionDataset(data, "plate", DatasetSplit.TEST, PREPROCESSING)
    return torch.stack([test[i]["image"] for i in range(len(test))])


@pytest.fixture(scope="module")
def trained(data: Path) -> PatchCore:
    backbone = BackboneConfig("resnet18", ("layer1", "layer2"), weights="random")
    config = PatchCoreConfig(backbone, SamplerConfig("random", 0.3), num_nn=2)
    runtime = RuntimeConfig(faiss_num_workers=1)  # with faiss where it is installed
    model = PatchCore.prepare(config, PREPROCESSING, runtime)(TrainingSource("mpdd", "plate", 4), CPU)
    model.fit(ImageLoader(InspectionDataset(data, "plate", preprocessing=PREPROCESSING), 2))
    model.calibration_ = model.out_of_fold_calibration()
    return model


@pytest.fixture(scope="module")
def original(trained: PatchCore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "mpdd_plate"
    trained.save(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return shutil.copytree(original, tmp_path / "copy")


def assert_same(detector: AnomalyDetector, trained: PatchCore, images: torch.Tensor, tolerance: float = 0) -> None:
    found, expected = detector.predict(images), trained.predict(images)
    assert found.maps is not None and expected.maps is not None
    np.testing.assert_allclose(found.scores, expected.scores, rtol=tolerance)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=tolerance)


def test_everything_comes_back(original: Path, trained: PatchCore, images: torch.Tensor) -> None:
    loaded = open_detector(original, CPU, RuntimeConfig(faiss_num_workers=1))
    assert isinstance(loaded, PatchCore)
    assert (loaded.config, loaded.source, loaded.preprocessing) == (
        trained.config,
        trained.source,
        trained.preprocessing,
    )
    assert isinstance(loaded.calibration_, Calibration) and loaded.calibration_ == trained.calibration_
    assert_same(loaded, trained, images)
    assert sorted(p.name for p in original.iterdir()) == ["model.json", "search_index.safetensors"]


def test_saving_what_was_loaded_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    open_detector(original, CPU).save(tmp_path / "again")
    for path in original.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_saving_replaces_an_older_model(folder: Path, trained: PatchCore) -> None:
    (folder / "leftover").touch()
    trained.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "search_index.safetensors"]


def test_nothing_is_unpickled(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    open_detector(original, CPU)


def test_a_model_trained_with_faiss_is_scored_without(
    original: Path, trained: PatchCore, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    assert trained._scorer is not None and isinstance(trained._scorer.nearest_neighbours, FaissNN)
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails from here on
    for runtime in (None, RuntimeConfig(faiss_num_workers=1)):
        loaded = open_detector(original, CPU, runtime)
        assert isinstance(loaded, PatchCore) and loaded._scorer is not None
        assert isinstance(loaded._scorer.nearest_neighbours, TorchNN)
        assert_same(loaded, trained, images, tolerance=1e-4)


def test_a_model_without_calibration(trained: PatchCore, tmp_path: Path) -> None:
    calibration, trained.calibration_ = trained.calibration_, None
    try:
        trained.save(tmp_path / "model")
    finally:
        trained.calibration_ = calibration
    assert open_detector(tmp_path / "model", CPU).calibration_ is None


# ---------------------------------------------------------------- damage


def test_signing_alone_changes_nothing(folder: Path, trained: PatchCore, images: torch.Tensor) -> None:
    sign(folder)
    assert_same(open_detector(folder, CPU, RuntimeConfig(faiss_num_workers=1)), trained, images)


def edit(*path: str | int, value: object) -> Callable[[Path], None]:
    """Return what sets one value of model.json, or removes it where `value` is Ellipsis."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        place = content
        for part in path[:-1]:
            place = place[part]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "search_index.safetensors"
        content = change({name: t.clone() for name, t in load_file(path).items()})
        save_file(content, path)

    return apply


def pickled_bank() -> bytes:
    buffer = io.BytesIO()
    torch.save({"memory_bank": torch.zeros(3, 1024)}, buffer)
    return buffer.getvalue()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model.json": (lambda f: (f / "model.json").unlink(), "model.json is missing"),
    "no tensors": (lambda f: (f / "search_index.safetensors").unlink(), "search_index.safetensors is missing"),
    "empty model.json": (write("model.json", b""), "damaged"),
    "half of model.json": (cut("model.json", 0.5), "damaged"),
    "no text": (write("model.json", b"\xff\xfe\x00"), "damaged"),
    "list": (write("model.json", b"[]"), "expected an object"),
    "deep nesting": (write("model.json", b"[" * 200_000), "damaged"),
    "newer format": (edit("format_version", value=99), "update it"),
    "version as text": (edit("format_version", value="1"), "format_version"),
    "unknown method": (edit("method", value="patchcor"), "of method 'patchcor'"),
    "method as number": (edit("method", value=3), "expected str"),
    "unknown name": (edit("config", "patchsise", value=3), "did you mean patchsize"),
    "missing name": (edit("config", "backbone", "name", value=...), "'name' is missing"),
    "missing source": (edit("source", value=...), "'source' is missing"),
    "text for a number": (edit("config", "num_nn", value="5"), "expected int"),
    "true for a number": (edit("config", "num_nn", value=True), "expected int"),
    "number for a list": (edit("config", "backbone", "layers", value=2), "expected a list"),
    "no object": (edit("config", value=[]), "config"),
    "null": (edit("preprocessing", value=None), "expected an object"),
    "impossible crop": (edit("preprocessing", "imagesize_px", value=500), "model.json"),
    "even patchsize": (edit("config", "patchsize", value=4), "odd"),
    "text for a threshold": (edit("calibration", "image", "threshold", value="high"), "expected float"),
    "unknown backbone": (edit("config", "backbone", "name", value="resnet19"), "did you mean resnet18"),
    "unknown layer": (edit("config", "backbone", "layers", value=["layer9"]), "no layer 'layer9'"),
    "unknown sampler": (edit("config", "sampler", "name", value="randon"), "random"),
    "another dimension": (edit("config", "target_embed_dimension", value=99), "belong to different models"),
    "more neighbours": (edit("config", "num_nn", value=10_000), "10000"),
    "empty tensors": (write("search_index.safetensors", b""), "damaged"),
    "half of the tensors": (cut("search_index.safetensors", 0.5), "damaged"),
    "all but a byte": (cut("search_index.safetensors", 0.999999), "damaged"),
    "pickle": (write("search_index.safetensors", pickled_bank()), "damaged"),
    "huge header": (write("search_index.safetensors", struct.pack("<Q", 2**62) + b"{}"), "damaged"),
    "no bank": (tensors(lambda t: {"bank": t["memory_bank"]}), "'memory_bank'"),
    "flat bank": (tensors(lambda t: {"memory_bank": t["memory_bank"].flatten()}), "rank 1"),
    "double bank": (tensors(lambda t: {"memory_bank": t["memory_bank"].double()}), "float64"),
    "narrow bank": (tensors(lambda t: {"memory_bank": t["memory_bank"][:, :9].clone()}), "9 columns"),
    "empty bank": (tensors(lambda t: {"memory_bank": t["memory_bank"][:0]}), "shape [0, "),
    "nan": (tensors(lambda t: {"memory_bank": t["memory_bank"] * np.nan}), "NaN"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_is_one_line_before_any_work(case: str, folder: Path, data: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    damage(folder)
    sign(folder)
    done = evaluate(tmp_path / "save", [folder], data)
    assert done.code == 2 and len(done.error_lines) == 1, done.err
    assert words in done.err and str(folder) in done.err
    assert not (tmp_path / "save").exists()
    with pytest.raises(ConfigurationError, match=r"[^\n]+"):
        open_detector(folder, CPU)


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_not_written_is_refused_by_name(case: str, folder: Path, original: Path) -> None:
    """Without a manifest that fits, every change is found as such, harmless looking ones too."""
    DAMAGE[case][0](folder)
    changed = [p.name for p in sorted(original.iterdir()) if read_or_none(folder / p.name) != p.read_bytes()]
    with pytest.raises(ConfigurationError) as refused:
        read_model_tensors(folder)
    assert changed and all(name in str(refused.value) for name in changed) and "\n" not in str(refused.value)


def read_or_none(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def test_every_bit_counts(folder: Path) -> None:
    """One changed bit anywhere in the tensors, or one changed digit of a threshold."""
    path = folder / "search_index.safetensors"
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ConfigurationError, match=r"search_index.safetensors is not the file that was written"):
            read_model_tensors(folder)
    path.write_bytes(whole)
    text = (folder / "model.json").read_text(encoding="utf-8")
    threshold = json.loads(text)["calibration"]["image"]["threshold"]
    assert repr(threshold) in text
    (folder / "model.json").write_text(text.replace(repr(threshold), repr(threshold + 1e-9)), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"model.json was edited or damaged"):
        open_detector(folder, CPU)


def test_the_layout_of_model_json_does_not_matter(folder: Path) -> None:
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    turned = dict(reversed(content.items()))
    (folder / "model.json").write_text(json.dumps(turned, indent=7), encoding="utf-8")
    open_detector(folder, CPU)


def test_files_of_another_model_are_refused(folder: Path, trained: PatchCore, tmp_path: Path) -> None:
    bank = trained.memory_bank_
    other = tmp_path / "other"
    try:
        trained.fit_bank(bank + 1)
        trained.save(other)
    finally:
        trained.fit_bank(bank)
    for name in ("search_index.safetensors", "model.json"):
        mixed = shutil.copytree(folder, tmp_path / f"mixed {name}")
        shutil.copy(other / name, mixed / name)
        with pytest.raises(ConfigurationError, match=r"search_index.safetensors is not the file that was written"):
            read_model_tensors(mixed)


def test_a_folder_that_is_replaced_while_it_is_read(
    folder: Path, trained: PatchCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the tensors are read, and between their digests and their values: never two halves of two models."""
    copy = shutil.copytree(folder, tmp_path / "again")
    other = tmp_path / "other"
    older = trained.calibration_
    try:
        trained.calibration_ = None
        trained.save(other)
    finally:
        trained.calibration_ = older
    header = model_folder.read_model_header(folder)
    read = model_folder._read_tensor_file

    def replaced_before(path: Path) -> dict[str, torch.Tensor]:
        shutil.rmtree(folder)
        other.rename(folder)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "_read_tensor_file", replaced_before)
        with pytest.raises(ConfigurationError, match=r"was replaced while it was read: call again"):
            read_model_tensors(folder, header)
    read_model_tensors(folder)
    with pytest.raises(ConfigurationError, match=r"was replaced while it was read: call again"):
        read_model_tensors(folder, header)
    assert read_model_tensors(copy, header).keys() == {"memory_bank"}


def test_members_that_model_json_does_not_list(folder: Path, original: Path) -> None:
    shutil.copy(original / "search_index.safetensors", folder / "Ensemble-1-2_search_index.safetensors")
    with pytest.raises(ConfigurationError, match=r"Ensemble-1-2_search_index.safetensors is not listed in model.json"):
        open_detector(folder, CPU)
    (folder / "Ensemble-1-2_search_index.safetensors").unlink()
    for name in ("notes.txt", "._search_index.safetensors"):  # what users and file systems leave
        (folder / name).touch()
    open_detector(folder, CPU)


def test_what_the_manifest_says(original: Path, trained: PatchCore) -> None:
    content = json.loads((original / "model.json").read_text(encoding="utf-8"))
    file = (original / "search_index.safetensors").read_bytes()
    entry = {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    assert content["manifest"]["files"] == {"search_index.safetensors": entry}
    assert content["format_version"] == 2 and content["source"]["category"] == "plate"
    assert content["libraries"]["torch"] == importlib.metadata.version("torch")
    assert content["libraries"].keys() >= {"patchcore", "python", "torch", "torchvision", "timm"}
    (weights,) = content["backbones"]
    assert weights["name"] == "resnet18" and len(weights["sha256"]) == 64
    again = load_backbone("resnet18", "random", 0).weights
    other = load_backbone("resnet18", "random", 1).weights
    assert again and other and weights["sha256"] == again.sha256 != other.sha256
    text = (original / "model.json").read_text(encoding="utf-8")
    assert str(original.parent) not in text


def test_older_models_are_read_and_said_to_be_unverified(
    folder: Path, trained: PatchCore, images: torch.Tensor, data: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    (folder / "model.json").write_text(json.dumps(as_format_1(content)), encoding="utf-8")
    done = evaluate(tmp_path / "save", [folder], data)
    assert done.code == 0
    assert [line for line in done.error_lines if "not verified" in line and str(folder) in line], done.err
    assert_same(open_detector(folder, CPU, RuntimeConfig(faiss_num_workers=1)), trained, images)


def test_a_folder_is_the_same_wherever_it_lies(
    original: Path, trained: PatchCore, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(original, tmp_path / "a b" / "ünï")
    monkeypatch.chdir(moved.parent)
    assert_same(open_detector(Path("ünï"), CPU, RuntimeConfig(faiss_num_workers=1)), trained, images)
    monkeypatch.chdir(moved)
    assert_same(open_detector(Path("."), CPU, RuntimeConfig(faiss_num_workers=1)), trained, images)


def test_a_faiss_index_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Its bytes come back under the name that was given, of the model and of a member."""
    index = torch.arange(256, dtype=torch.uint8)
    tensors = {"faiss_index": index, "Ensemble-1-2/faiss_index": index.flip(0), "Ensemble-1-2/norms": torch.ones(3)}
    header = ModelHeader(FORMAT_VERSION, "patchcore", {}, PREPROCESSING, TrainingSource())
    write_model_folder(tmp_path / "m", header, tensors)
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert files == [
        "Ensemble-1-2_search_index.faiss", "Ensemble-1-2_search_index.safetensors", "model.json", "search_index.faiss"
    ]  # fmt: skip
    assert (tmp_path / "m" / "search_index.faiss").read_bytes() == bytes(range(256))
    found = read_model_tensors(tmp_path / "m")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    (tmp_path / "m" / "search_index.faiss").write_bytes(bytes(256))
    with pytest.raises(ConfigurationError, match=r"search_index.faiss is not the file that was written"):
        read_model_tensors(tmp_path / "m")


# ---------------------------------------------------------------- weights of the backbone


@pytest.fixture
def with_file(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose backbone has its weights from a file, and that file."""
    weights = tmp_path / "weights" / "backbone.safetensors"
    weights.parent.mkdir()
    save_file(load_backbone("efficientnet_lite0", "random", 5).module.state_dict(), weights)
    backbone = BackboneConfig("efficientnet_lite0", ("blocks.1",), weights=str(weights))
    config = PatchCoreConfig(backbone, SamplerConfig("random", 0.1), num_nn=1, target_embed_dimension=64)
    model = PatchCore.prepare(config, PREPROCESSING, RuntimeConfig())(TrainingSource("mpdd", "plate", 4), CPU)
    model.fit(ImageLoader(InspectionDataset(data, "plate", preprocessing=PREPROCESSING), 2))
    model.save(tmp_path / "model")
    return tmp_path / "model", weights


def test_other_weights_under_the_same_path_are_refused(with_file: tuple[Path, Path]) -> None:
    model, weights = with_file
    open_detector(model, CPU)
    state = load_file(weights)
    changed = {**state, "conv_stem.weight": state["conv_stem.weight"] * 1.001}
    save_file(changed, weights)
    with pytest.raises(
        ConfigurationError, match=r"backbone 'efficientnet_lite0' has weights of sha256 [0-9a-f]{16}, it"
    ):
        open_detector(model, CPU)
    # Without the head, and in another order, it is the same network.
    save_file({k: v for k, v in reversed(state.items()) if not k.startswith("classifier")}, weights)
    open_detector(model, CPU)


def test_weights_that_were_moved_are_named_anew(
    with_file: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = with_file
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = weights.rename(elsewhere / weights.name)
    with pytest.raises(
        ConfigurationError, match=r"not at '.*backbone.safetensors' any more: set the .*PATCHCORE_WEIGHTS"
    ):
        open_detector(model, CPU)
    monkeypatch.setenv("PATCHCORE_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"nor in PATCHCORE_WEIGHTS='.*nowhere'"):
        open_detector(model, CPU)
    for value in (elsewhere, moved, f"{tmp_path / 'nowhere'}:{elsewhere}"):
        monkeypatch.setenv("PATCHCORE_WEIGHTS", str(value))
        open_detector(model, CPU)
    renamed = moved.rename(elsewhere / "other name.safetensors")
    monkeypatch.setenv("PATCHCORE_WEIGHTS", str(renamed))
    open_detector(model, CPU)
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in load_file(renamed).items()}, renamed)
    with pytest.raises(ConfigurationError, match=r"has weights of sha256"):
        open_detector(model, CPU)


def test_what_was_resampled_plays_no_part_in_the_hash(tmp_path: Path) -> None:
    """Its last digits depend on the machine; everything else is the same for each size of the images."""
    name, file = "timm:vit_tiny_patch16_224", tmp_path / "vit.safetensors"
    save_file(load_backbone(name, "random").module.state_dict(), file)
    weights = [load_backbone(name, str(file), 0, size).weights for size in (96, 128, 224)]
    assert weights[0] == weights[1] != weights[2]  # position embeddings of their own size count


def test_an_export_vouches_for_itself(trained: PatchCore, original: Path, tmp_path: Path) -> None:
    export = tmp_path / "model.pth"
    export.write_bytes(trained.torch_export())
    open_detector(export, CPU)
    content = torch.load(export, weights_only=True)
    content["model"]["calibration"]["image"]["threshold"] += 1e-9
    torch.save(content, export)
    with pytest.raises(ConfigurationError, match=r"model.pth' was edited or damaged after it was written"):
        open_detector(export, CPU)
    content = torch.load(io.BytesIO(trained.torch_export()), weights_only=True)
    content["state_dict"]["memory_bank"][3, 5] += 1
    torch.save(content, export)
    with pytest.raises(ConfigurationError, match=r"model.pth' was edited or damaged after it was written"):
        open_detector(export, CPU)


def evaluate(out: Path, models: list[Path], data: Path, *categories: str) -> Finished:
    paths = [part for model in models for part in ("-p", model)]
    chosen = [part for category in categories for part in ("-d", category)]
    return invoke(
        load_and_evaluate_patchcore, out, "--threads", 1, "patch_core_loader", *paths, "dataset", "mpdd", data, *chosen,
        "--num_workers", 0,
    )  # fmt: skip


def test_a_path_that_is_no_model(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "nowhere", "not found"),
        (tmp_path / "file", "expected a model folder or what torch.save wrote"),
        (tmp_path, "no model folder"),
    ):
        done = evaluate(tmp_path / "save", [path], data)
        assert done.code == 2 and len(done.error_lines) == 1 and words in done.err


def test_models_without_a_class_are_matched_by_order(folder: Path, data: Path, tmp_path: Path) -> None:
    edit("source", "category", value="")(folder)
    sign(folder)
    done = evaluate(tmp_path / "save", [folder], data)
    assert done.code == 2 and "stores no class" in done.err
    assert evaluate(tmp_path / "save", [folder], data, "plate").code == 0


def test_two_models_of_one_class_or_of_two_sizes(folder: Path, original: Path, data: Path, tmp_path: Path) -> None:
    done = evaluate(tmp_path / "save", [folder, original], data)
    assert done.code == 2 and "both of 'plate'" in done.err
    edit("source", "category", value="rod")(folder)
    edit("preprocessing", "resize_px", value=80)(folder)
    sign(folder)
    done = evaluate(tmp_path / "save", [folder, original], data)
    assert done.code == 2 and "different resize or crop" in done.err
    edit("preprocessing", "resize_px", value=IMAGE_PX)(folder)
    sign(folder)
    done = evaluate(tmp_path / "save", [folder, original], data)
    assert done.code == 2 and "class 'rod' not found" in done.err and "found plate" in done.err
