"""Generated model folders, exports and presets: each gives finite scores, or is refused in one line."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_METHOD, write_category
from fuzzing import Cases, damaged, generated, require_clear, require_one_line, run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from signed_model import sign
from test_configs import EXAMPLES
from test_legacy import PARAMS, write_original

from patchcore.cli import predict, run_baselines, run_fastflow, run_patchcore
from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.detector import AnomalyDetector
from patchcore.errors import ConfigurationError
from patchcore.features import extractor
from patchcore.prediction import open_detector
from patchcore.presets import BACKBONES_FILE, FASTFLOW_FILE, fastflow_backbone, fastflow_preset, read_presets
from patchcore.storage.legacy import PARAMS_FILE
from patchcore.storage.torch_export import read_torch_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = Cases(at_least=520)

CPU = torch.device("cpu")
METHODS = ("patchcore", "sq8", "ensemble", "fastflow", "autoencoder", "resnet_knn")
COMMON = ("--device", "cpu", "--threads", "1")
READING = ("dataset", "--resize", "32", "--imagesize", "32", "--num_workers", "0")
BACKBONE = ("efficientnet_lite0", "--weights", "random")
TENSORS = "search_index.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders, by the names of METHODS."""
    root = tmp_path_factory.mktemp("models")
    write_category(root / "data", "plate", 4, 1)
    data = (*READING, "mpdd", root / "data")
    sampler = ("--anomaly_scorer_num_nn", "1", "sampler", "-p", "0.3", "random")
    two = ("patch_core", "-b", *BACKBONE, "-b", "efficientnet_lite0", "-le", "0.blocks.1", "-le", "1.blocks.2")
    own = ("--layers", "blocks.1", "--flow_steps", "1", "--epochs", "1")
    lines: dict[str, tuple[Any, tuple[object, ...]]] = {
        "patchcore": (run_patchcore, (*SMALL_METHOD, *sampler, *data)),
        "sq8": (run_patchcore, (*SMALL_METHOD, "--index", "sq8", *sampler, *data)),
        "ensemble": (run_patchcore, (*two, *sampler, *data)),
        "fastflow": (run_fastflow, (*data, "fastflow", "--backbone", *BACKBONE, *own)),
        "autoencoder": (run_baselines, ("autoencoder", "--epochs", "1", *data)),
        "resnet_knn": (run_baselines, ("resnet_knn", "-b", *BACKBONE, "-le", "blocks.2", "-k", "1", *data)),
    }
    folders = {}
    for name, (command, steps) in lines.items():
        save = "--save_patchcore_model" if command is run_patchcore else "--save_model"
        done = run(command, root / name, *COMMON, save, *steps)
        assert done.code == 0, done.err
        (folders[name],) = (root / name / "project" / "group" / "models").iterdir()
    return folders


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Random weights are drawn once and copied, which spares most of the time."""
    draw = functools.cache(extractor.load_backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_backbone", lambda *arguments: copy.deepcopy(draw(*arguments)))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed") / "model"


def copied(models: dict[str, Path], method: str, place: Path) -> Path:
    """Return a copy of a model, which a case may change."""
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(models[method], place)


def require_sound_or_refused(path: Path) -> AnomalyDetector | None:
    """Open a model and score images with it; None if it is refused."""
    try:
        detector = open_detector(path, CPU)
    except ConfigurationError as error:
        require_one_line(str(error))
        assert path.name in str(error)
        return None
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    if detector.preprocessing.imagesize_px == 32:
        prediction = detector.predict(images)
        assert prediction.scores.shape == (2,)
        # Scores that are none are an error of each image, in one line; here of a model with values beyond float32.
    return detector


# ---------------------------------------------------------------- JSON


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, -0.5, math.nan, math.inf, -math.inf,
    1e308, 5e-324, "", "5", "nan", "patchcore", "resnet18", "\ud800", "a\nb", "../..", "/dev/zero", "x" * 3000, [],
    [[]], [None], ["blocks.1", 3], [1, 2, 3], ["blocks.1"] * 2, {}, {"a": 1}, {"": {}}, {"name": "resnet18"},
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a JSON document but the digests of the files and itself."""
    if path:
        yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inside:
        yield from places(value, (*path, name))


def with_odd_value(content: Any, where: int, value: Any, how: str) -> Any:
    """Return a document in which one place has another value, is missing, is there twice, or has an unknown name."""
    content = copy.deepcopy(content)
    found = list(places(content))
    if not found:
        return value
    *outer, name = found[where % len(found)]
    holder = content
    for step in outer:
        holder = holder[step]
    match how:
        case "value":
            holder[name] = value
        case "missing":
            del holder[name]
        case "unknown":
            if isinstance(holder, dict):
                holder[f"{name}_x"] = value
            else:
                holder.append(value)
        case "wrapped":
            holder[name] = [holder[name]]
    return content


CHANGES = st.tuples(
    st.integers(0, 10**6), st.sampled_from(ODD), st.sampled_from(["value"] * 5 + ["missing", "unknown", "wrapped"])
)


@given(st.sampled_from(METHODS), CHANGES)
@generated(150)
def test_values_of_model_json(models: dict[str, Path], place: Path, method: str, change: tuple[int, Any, str]) -> None:
    """Of files whose digests fit, as another program may write them."""
    folder = copied(models, method, place)
    path = folder / "model.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    manifest = content.pop("manifest")
    path.write_text(json.dumps({**with_odd_value(content, *change), "manifest": manifest}), encoding="utf-8")
    sign(folder)
    with CASES():
        require_sound_or_refused(folder)


@given(st.sampled_from(METHODS), st.integers(0, 2**32))
@generated(60)
def test_damaged_model_json(models: dict[str, Path], place: Path, method: str, seed: int) -> None:
    folder = copied(models, method, place)
    path = folder / "model.json"
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, seed))
    with CASES():
        detector = require_sound_or_refused(folder)
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        assert (detector is not None) == same


@given(st.sampled_from(range(len(EXAMPLES))), CHANGES)
@generated(150)
def test_values_of_configurations(number: int, change: tuple[int, Any, str]) -> None:
    example = EXAMPLES[number]
    content = with_odd_value(json.loads(json.dumps(config_to_dict(example))), *change)
    with CASES():
        try:
            config_from_dict(type(example), content, "file.json")
        except ConfigurationError as error:
            require_one_line(str(error))


@given(st.booleans(), CHANGES)
@generated(80)
def test_presets(place: Path, of_backbones: bool, change: tuple[int, Any, str]) -> None:
    source = BACKBONES_FILE if of_backbones else FASTFLOW_FILE
    content = with_odd_value(json.loads(source.read_text(encoding="utf-8")), *change)
    path = place.with_name("presets.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    with CASES():
        try:
            if of_backbones:
                for name in json.loads(source.read_text(encoding="utf-8")):
                    fastflow_backbone(name, path)
            else:
                read_presets(path)
                fastflow_preset("wideresnet50", "metal_plate", path)
        except ConfigurationError as error:
            require_one_line(str(error))
            assert "presets.json" in str(error) or "no presets" in str(error) or "neither a preset" in str(error)


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"null", b"[]", b"[" * 200_000, b"1" * 5000, b'{"a": NaN}'])
def test_files_of_presets_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "presets.json").write_bytes(content)
    with CASES(), pytest.raises(ConfigurationError, match=r"^[^\n]*presets\.json[^\n]*$"):
        read_presets(tmp_path / "presets.json")


# ---------------------------------------------------------------- tensors


def narrower(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., : max(0, tensor.shape[-1] - 1)] if tensor.ndim else tensor


TENSOR_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda t: t.flatten(),
    "scalar": lambda t: t.flatten()[:1].sum(),
    "empty": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "no columns": lambda t: t[..., :0] if t.ndim else t.new_zeros(0),
    "narrower": narrower,
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
    "transposed": lambda t: t.movedim(0, -1) if t.ndim > 1 else t[None],
    "deeper": lambda t: t[None],
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bytes": lambda t: t.to(torch.uint8),
    "signed bytes": lambda t: t.to(torch.int8),
    "long": lambda t: t.long(),
    "truth": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: torch.full_like(t.float(), math.nan),
    "infinite": lambda t: torch.full_like(t.float(), math.inf),
    "huge": lambda t: torch.full_like(t.float(), 3e38),
    "zero": torch.zeros_like,
    "negative": lambda t: -t.float() - 1,
}


@given(
    st.sampled_from(METHODS), st.integers(0, 10**6),
    st.sampled_from([*TENSOR_CHANGES, *TENSOR_CHANGES, "missing", "renamed", "added", "exchanged"]),
)  # fmt: skip
@generated(120)
def test_tensors(models: dict[str, Path], place: Path, method: str, number: int, change: str) -> None:
    """Of files whose digests fit."""
    folder = copied(models, method, place)
    paths = sorted(folder.glob(f"*{TENSORS}"))
    path = paths[number % len(paths)]
    tensors = load_file(path)
    name = sorted(tensors)[number % len(tensors)]
    if change == "missing":
        del tensors[name]
    elif change == "renamed":
        tensors[f"{name}_x"] = tensors.pop(name)
    elif change == "added":
        tensors["more"] = torch.zeros(3)
    elif change == "exchanged":
        other = sorted(tensors)[(number + 1) % len(tensors)]
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    else:
        tensors[name] = TENSOR_CHANGES[change](tensors[name]).contiguous()
    save_file(tensors, path)
    sign(folder)
    with CASES():
        require_sound_or_refused(folder)


@given(st.sampled_from(METHODS), st.integers(0, 2**32), st.booleans())
@generated(50)
def test_damaged_tensor_files(models: dict[str, Path], place: Path, method: str, seed: int, is_signed: bool) -> None:
    folder = copied(models, method, place)
    path = min(folder.glob(f"*{TENSORS}"))
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, seed))
    if is_signed:
        sign(folder)
    with CASES():
        detector = require_sound_or_refused(folder)
        assert is_signed or (detector is None) == (path.read_bytes() != whole)


@pytest.mark.parametrize("method", ["patchcore", "sq8"])
@pytest.mark.parametrize("other", METHODS)
def test_the_index_of_another_model(models: dict[str, Path], place: Path, method: str, other: str) -> None:
    """Another dimension, another kind, another method; that of a member of an ensemble has a name of its own."""
    if method == other:
        return
    folder = copied(models, method, place)
    shutil.copy(min(models[other].glob(f"*{TENSORS}")), folder / TENSORS)
    with CASES():
        assert require_sound_or_refused(folder) is None
    sign(folder)
    with CASES():
        # Whether a bank is searched as it was trained is said by --index, too: other codes of the same bank are one.
        assert require_sound_or_refused(folder) is None or {method, other} == {"patchcore", "sq8"}


@given(st.integers(0, 2**32))
@generated(60)
def test_damaged_exports(models: dict[str, Path], place: Path, seed: int) -> None:
    (whole,) = models["fastflow"].glob("*.pth")
    path = place.with_name("export.pth")
    path.write_bytes(damaged(whole.read_bytes(), seed))
    with CASES():
        try:
            read_torch_file(path)
        except ConfigurationError as error:
            require_one_line(str(error))
            assert "export.pth" in str(error)


# ---------------------------------------------------------------- folders of the original


ORIGINAL = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from([o for o in ODD if o != "\ud800"]) for name in PARAMS}
)


@given(ORIGINAL, st.integers(0, 2**32), st.sampled_from(["settings", "pickle", "index", "both"]))
@generated(80)
def test_folders_of_the_original(place: Path, changed: dict[str, Any], seed: int, what: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
    bank = np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32)
    folder = write_original(place, bank, **(changed if what in ("settings", "both") else {}))
    if what in ("pickle", "both"):
        path = folder / PARAMS_FILE
        path.write_bytes(damaged(path.read_bytes(), seed))
    if what == "index":
        path = folder / "nnscorer_search_index.faiss"
        path.write_bytes(damaged(path.read_bytes(), seed))
    with CASES():
        try:
            open_detector(folder, CPU, resize_px=64)
        except ConfigurationError as error:
            require_one_line(str(error))


# ---------------------------------------------------------------- the command


def files_of_a_folder(folder: Path, kind: str) -> None:
    """Replace what is in a model folder by what can be in any folder."""
    path = folder / ("model.json" if kind.startswith("json") else TENSORS)
    content = path.read_bytes()
    path.unlink()
    match kind.split()[-1]:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "dangling":
            path.symlink_to(folder / "gone")
        case "circle":
            path.symlink_to(path)
        case "pickle":
            path.write_bytes(pickle.dumps({"memory_bank": [1.0]}))
        case "half":
            path.write_bytes(content[: len(content) // 2])
        case "doubled":
            path.write_bytes(content * 2)


@pytest.mark.parametrize("part", ["json", "tensors"])
@pytest.mark.parametrize("kind", ["folder", "empty", "dangling", "circle", "pickle", "half", "doubled", "missing"])
def test_predict_with_what_is_no_model(models: dict[str, Path], place: Path, part: str, kind: str) -> None:
    folder = copied(models, "patchcore", place)
    files_of_a_folder(folder, f"{part} {kind}")
    image = models["patchcore"].parents[4] / "data" / "plate" / "test" / "good" / "000.png"
    with CASES():
        done = run(predict, folder, image, "--json", *COMMON)
        require_clear(done, (2,))
        assert str(folder) in done.err and done.out == ""


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)
