"""Folders of the original repository: their scores come back, their pickles run nothing."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_PX, write_category, write_texture
from in_process import Finished, invoke, read_rows
from PIL import Image
from test_imports import MODULES, SOURCE
from torchvision.models import resnet18

from patchcore.cli import load_and_evaluate_patchcore, predict, update_model
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import load_backbone
from patchcore.prediction import open_detector
from patchcore.storage.legacy import PARAMS_FILE, read_original_header, read_original_tensors

CPU = torch.device("cpu")
CACHED = "checkpoints/resnet18-f37072fd.pth"  # where torch keeps the published weights
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

PARAMS: dict[str, Any] = {
    "backbone.name": "resnet18",
    "layers_to_extract_from": ("layer1", "layer2"),
    "input_shape": (3, IMAGE_PX, IMAGE_PX),
    "pretrain_embed_dimension": 40,
    "target_embed_dimension": 48,
    "patchsize": 3,
    "patchstride": 1,
    "anomaly_scorer_num_nn": 1,
}
READING = ("--resize", IMAGE_PX, "--imagesize", IMAGE_PX, "--num_workers", 0)


def flat_index(bank: np.ndarray) -> bytes:
    """What faiss.write_index writes of a flat L2 index, as of faiss 1.5 to 1.15; one test compares with faiss."""
    rows, dimension = bank.shape
    header = struct.pack("<4siqqqBiQ", b"IxF2", dimension, rows, 1 << 20, 1 << 20, 1, 1, bank.size)
    return header + bank.astype("<f4").tobytes()


def write_original(folder: Path, bank: np.ndarray, prefix: str = "", protocol: int = 4, **changed: Any) -> Path:
    """Write the files that the original's save_to_path writes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{prefix}patchcore_params.pkl").open("wb") as file:
        pickle.dump({**PARAMS, **changed}, file, protocol)
    (folder / f"{prefix}nnscorer_search_index.faiss").write_bytes(flat_index(bank))
    return folder


def original_scores(bank: np.ndarray, files: list[Path], patchsize: int) -> np.ndarray:
    """The image scores of the original: unfold, resize, pool twice, smallest squared distance, maximum; one by one."""
    network = resnet18()
    network.load_state_dict(torch.load(Path(os.environ["TORCH_HOME"], "hub", CACHED), weights_only=True))
    network.eval()
    scores = []
    for file in files:
        pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            x = network.maxpool(network.relu(network.bn1(network.conv1(((pixels - MEAN) / STD)[None]))))
            maps = [network.layer1(x)]
            maps.append(network.layer2(maps[0]))
        grid = maps[0].shape[-2:]
        pooled = []
        for m in maps:
            taps = F.unfold(m, patchsize, padding=patchsize // 2).view(1, -1, *m.shape[-2:])
            taps = F.interpolate(taps, size=grid, mode="bilinear", align_corners=False)
            pooled.append(F.adaptive_avg_pool1d(taps.flatten(2)[0].T, 40))  # [P, 40]
        embeddings = F.adaptive_avg_pool1d(torch.stack(pooled, dim=1).flatten(1), 48).double().numpy()  # [P, 48]
        squared = ((embeddings[:, None] - bank[None]) ** 2).sum(axis=2)  # [P, M]
        scores.append(squared.min(axis=1).max())
    return np.array(scores)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "data"
    write_category(root, "plate", num_train=1, num_test=2)
    write_category(root, "rod", num_train=1, num_test=2)
    return root


@pytest.fixture(autouse=True, scope="module")
def cached_weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights where torch looks for the published ones, which the original's folders mean."""
    home = tmp_path_factory.mktemp("torch home")
    file = home / "hub" / CACHED
    file.parent.mkdir(parents=True)
    torch.save(load_backbone("resnet18", "random", 3).module.state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield


@pytest.fixture(scope="module")
def bank() -> np.ndarray:
    return np.random.default_rng(0).normal(0.5, 0.4, (30, 48)).astype(np.float32)


def evaluate(out: Path, models: list[Path], data: Path, *dataset: object) -> Finished:
    """Type the command as the original's sample_evaluation.sh does."""
    flags = [part for model in models for part in ("-p", model)]
    return invoke(
        load_and_evaluate_patchcore, "--gpu", 0, "--seed", 0, "--threads", 1, out,
        "patch_core_loader", *flags, "--faiss_on_gpu", "dataset", *dataset, "mpdd", data,
    )  # fmt: skip


def test_scores_are_the_square_roots_of_the_originals(bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "models" / "mvtec_x", bank)
    done = evaluate(tmp_path / "out", [folder], data, *READING, "-d", "plate")
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "out" / "anomaly_scores" / "mpdd_plate.csv")
    expected = original_scores(bank, [data / row["path"] for row in rows], 3)
    np.testing.assert_allclose([float(row["score"]) for row in rows], np.sqrt(expected), rtol=1e-4)
    assert {row["decision"] for row in rows} == {""} == {row["normalized_score"] for row in rows}
    assert "without thresholds" in done.err


def test_models_are_matched_to_classes_by_order(bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folders = [write_original(tmp_path / "one", bank), write_original(tmp_path / "two", bank + 1, "", 2, patchsize=5)]
    done = evaluate(tmp_path / "out", folders, data, *READING, "-d", "rod", "-d", "plate")
    assert done.code == 0, done.err
    for category, own, patchsize in (("rod", bank, 3), ("plate", bank + 1, 5)):
        rows = read_rows(tmp_path / "out" / "anomaly_scores" / f"mpdd_{category}.csv")
        scores = [float(row["score"]) for row in rows]
        files = [data / row["path"] for row in rows]
        np.testing.assert_allclose(scores, np.sqrt(original_scores(own, files, patchsize)), rtol=1e-4)
    unnamed = evaluate(tmp_path / "unnamed", folders, data, *READING)
    assert unnamed.code == 2 and "stores no class: name it with a -d" in unnamed.err


def test_ensembles_are_scaled_over_the_test_set(bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    """As the original does; members of one backbone, which its seeds told apart, are members here too."""
    banks = (bank, 2 * bank)
    for i, own in enumerate(banks, start=1):
        write_original(tmp_path / "m", own, f"Ensemble-{i}-2_")
    done = evaluate(tmp_path / "out", [tmp_path / "m"], data, *READING, "-d", "plate")
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "out" / "anomaly_scores" / "mpdd_plate.csv")
    files = [data / row["path"] for row in rows]
    roots = [np.sqrt(original_scores(own, files, 3)) for own in banks]
    expected = np.mean([(r - r.min()) / (r.max() - r.min()) for r in roots], axis=0)
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, atol=1e-3)


def test_predict_takes_them_too(bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder, images = write_original(tmp_path / "m", bank), data / "plate" / "test"
    done = invoke(
        predict, folder, images, "--out", tmp_path / "out", "--resize", IMAGE_PX, "--threads", 1, "--heat_maps", "none"
    )
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    expected = np.sqrt(original_scores(bank, [Path(row["path"]) for row in rows], 3))
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, rtol=1e-4)
    assert len(rows) == 4 and {row["decision"] for row in rows} == {""}
    untyped = invoke(predict, folder, images, "--out", tmp_path / "untyped")
    assert untyped.code == 2 and "is not stored: type --resize" in untyped.err


def test_the_index_is_what_faiss_writes(bank: np.ndarray, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    write_original(tmp_path / "m", bank)
    assert faiss.serialize_index(index).tobytes() == flat_index(bank)
    faiss.write_index(index, str(tmp_path / "m" / "nnscorer_search_index.faiss"))
    np.testing.assert_array_equal(read_original_tensors(tmp_path / "m")["memory_bank"].numpy(), bank)


def test_what_is_typed_of_the_images_is_taken_and_has_to_fit(bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "m", bank)
    assert read_original_header(folder, {"resize_px": 80, "resize_mode": "square"}).preprocessing.resize_px == 80
    published = write_original(tmp_path / "224", bank, input_shape=(3, 224, 224))
    assert read_original_header(published).preprocessing.resize_px == 256
    for dataset, words in (
        ((), "images have 64 px, but from which resize they were cut is not stored: type --resize"),
        (("--resize", 80, "--imagesize", 72), "--imagesize 72 was typed"),
        (("--resize", 48), "--resize 64 or more"),
    ):
        done = evaluate(tmp_path / "out", [folder], data, *dataset, "-d", "plate")
        assert done.code == 2 and words in done.err, done.err
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- damage and malice


def reduced(function: Callable[..., Any], *arguments: Any) -> Any:
    class Call:
        def __reduce__(self) -> Any:
            return function, arguments

    return Call()


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that would run something, or take far more memory than they have bytes."""
    command = f"touch {mark}"
    text = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731  # SHORT_BINUNICODE
    pickles = {
        "system": pickle.dumps(reduced(os.system, command)),
        "system, protocol 0": pickle.dumps(reduced(os.system, command), 0),
        "eval": pickle.dumps(reduced(eval, f"open({str(mark)!r}, 'w')")),
        "inside": pickle.dumps({**PARAMS, "patchsize": reduced(os.system, command)}),
        "nested": pickle.dumps([({"x": (reduced(os.system, command),)},)]),
        "reduce of reduce": pickle.dumps(reduced(getattr, reduced(__import__, "os"), "system")),
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "GLOBAL": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "NEWOBJ": b"\x80\x02cbuiltins\nset\n)\x81.",
        "BUILD": b"\x80\x02}}b.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pname\n.",
        "numpy": pickle.dumps(np.float64(3)),
        "a set": pickle.dumps({1, 2}),
        "bytes": pickle.dumps(b"abc"),
        "memo far away": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        "memo far away, protocol 0": b"(dp99999999999999\n.",
        "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
        "huge": pickle.dumps({**PARAMS, "more": "x" * 100_000}),
        "nested deeply": b"\x80\x02" + b")" + b"\x85" * 8000 + b".",
        "nested key": b"\x80\x02})" + b"\x85" * 8000 + b"Ns.",
        "holds itself": b"\x80\x02]q\x00h\x00a.",
        "laughter": b"\x80\x02]q\x00" + b"".join(b"](" + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(60)) + b".",
        "empty": b"",
        "no end": pickle.dumps(PARAMS)[:-1],
        "text": b"not a pickle",
        "a list": pickle.dumps([1, 2]),
        "unhashable": b"\x80\x02}]Ns.",
        "nothing on the stack": b"\x80\x02.",
    }
    return {name: content[:100_100] for name, content in pickles.items()}


@pytest.mark.parametrize("case", hostile(Path("mark")))
def test_a_hostile_pickle_runs_nothing(case: str, bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder, mark = write_original(tmp_path / "m", bank), tmp_path / "ran"
    content = hostile(mark)[case]
    assert case != "system" or os.fsencode(mark) in content
    (folder / PARAMS_FILE).write_bytes(content)
    done = evaluate(tmp_path / "out", [folder], data, *READING, "-d", "plate")
    assert done.code == 2 and len(done.error_lines) == 1 and PARAMS_FILE in done.err, done.err
    assert not mark.exists() and not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError):
        open_detector(folder, CPU)


def test_hostile_pickles_would_run_something_elsewhere(tmp_path: Path) -> None:
    """The tests above can fail: the standard unpickler runs what they hold."""
    for case in ("system", "STACK_GLOBAL", "GLOBAL", "INST", "OBJ"):
        mark = tmp_path / "ran"
        pickle.loads(hostile(mark)[case])
        assert mark.exists(), case
        mark.unlink()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"patchstride": 2}, "patchstride is 2, expected 1"),
        ({"patchsize": 4}, "expected an odd number"),
        ({"patchsize": True}, "patchsize is True"),
        ({"patchsize": 10**600}, "expected a whole number"),
        ({"input_shape": (3, 64, 32)}, "input_shape is (3, 64, 32)"),
        ({"input_shape": 64}, "input_shape is 64"),
        ({"layers_to_extract_from": "layer1"}, "expected names of layers"),
        ({"layers_to_extract_from": ()}, "has no layer"),
        ({"layers_to_extract_from": ("layer9",)}, "no layer 'layer9'"),
        ({"backbone.name": "bninception"}, "in no maintained package"),
        ({"backbone.name": "resnet19"}, "did you mean resnet18"),
        ({"anomaly_scorer_num_nn": 31}, "has 30 patch(es)"),
        ({"target_embed_dimension": 64}, "belong to different models"),
        ({"further": 1}, "'further'"),
    ],
)
def test_settings_that_cannot_be_used(
    changed: dict[str, Any], words: str, bank: np.ndarray, data: Path, tmp_path: Path
) -> None:
    folder = write_original(tmp_path / "m", bank, **changed)
    done = evaluate(tmp_path / "out", [folder], data, *READING, "-d", "plate")
    assert done.code == 2 and words in done.err and str(folder) in done.err, done.err
    assert not (tmp_path / "out").exists()


def damaged_indices(bank: np.ndarray) -> dict[str, tuple[bytes, str]]:
    whole = flat_index(bank)
    header = struct.Struct("<4siqqqBiQ")
    return {
        "empty": (b"", "begins with b''"),
        "cut in the header": (whole[:20], "begins with b'IxF2'"),
        "cut": (whole[:-1], "it was cut off"),
        "longer": (whole + b"\0", "it was cut off"),
        "another index": (b"IwPQ" + whole[4:], "begins with b'IwPQ'"),
        "inner products": (header.pack(b"IxF2", 48, 30, 0, 0, 1, 0, 1440) + whole[header.size :], "metric 0"),
        "negative": (header.pack(b"IxF2", -48, -30, 0, 0, 1, 1, 1440) + whole[header.size :], "damaged"),
        "gigantic": (header.pack(b"IxF2", 2**30, 2**40, 0, 0, 1, 1, 2**62), "damaged"),
        "gigantic and consistent": (header.pack(b"IxF2", 2**20, 2**40, 0, 0, 1, 1, 2**60), "it was cut off"),
    }


@pytest.mark.parametrize("case", damaged_indices(np.zeros((30, 48))))
def test_a_damaged_index(case: str, bank: np.ndarray, tmp_path: Path) -> None:
    content, words = damaged_indices(bank)[case]
    folder = write_original(tmp_path / "m", bank)
    (folder / "nnscorer_search_index.faiss").write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        read_original_tensors(folder)
    assert words in str(refused.value) and "nnscorer_search_index.faiss" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"IwPQ", flat_index(np.full((30, 48), np.nan))], ids=["another index", "NaN"])
def test_a_damaged_index_is_found_before_any_work(content: bytes, bank: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "m", bank)
    (folder / "nnscorer_search_index.faiss").write_bytes(content)
    done = evaluate(tmp_path / "out", [folder], data, *READING, "-d", "plate")
    assert done.code == 2 and str(folder) in done.error_lines[-1] and not (tmp_path / "out").exists()


def test_missing_and_mixed_files(bank: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for i in (1, 2, 3):
        write_original(folder, bank, f"Ensemble-{i}-3_", patchsize=2 * i + 1)
    assert read_original_header(folder, {"resize_px": 64}).method == "ensemble"
    (folder / "Ensemble-2-3_nnscorer_search_index.faiss").unlink()
    with pytest.raises(ConfigurationError, match=r"Ensemble-2-3_nnscorer_search_index.faiss' cannot be read"):
        read_original_tensors(folder)
    shutil.copy(folder / "Ensemble-1-3_patchcore_params.pkl", folder / "patchcore_params.pkl")
    with pytest.raises(ConfigurationError, match=r"expected patchcore_params.pkl or all of Ensemble-1-3_ to"):
        read_original_header(folder)
    (folder / "patchcore_params.pkl").unlink()
    (folder / "Ensemble-2-3_patchcore_params.pkl").unlink()
    with pytest.raises(ConfigurationError, match="copy the whole folder again"):
        read_original_header(folder)


# ---------------------------------------------------------------- nothing else unpickles

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "pandas"}
HARMLESS = {"pickle.UnpicklingError"}
MAY_UNPICKLE = {
    "storage/legacy.py": {"pickle.Unpickler"},
    "sweep/definition.py": {"yaml.SafeLoader", "yaml.YAMLError", "yaml.constructor", "yaml.load"},  # with a SafeLoader
}


def unpickling(source: str, allowed: set[str]) -> list[str]:
    """Return the places where a module could unpickle objects, or evaluate text."""
    tree, found = ast.parse(source), []
    modules = {
        alias.asname or alias.name: alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(f"from {node.module}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{modules.get(node.value.id)}.{node.attr}"
            if modules.get(node.value.id) in UNPICKLERS and name not in HARMLESS | allowed:
                found.append(name)
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load" and keywords.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True":
                found.append(ast.unparse(node))
            if called in ("eval", "exec", "compile", "__import__"):
                found.append(called)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_nothing_in_the_toolkit_unpickles_objects(path: Path) -> None:
    allowed = MAY_UNPICKLE.get(path.relative_to(SOURCE).as_posix(), set())
    assert unpickling(path.read_text(encoding="utf-8"), allowed) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.load(f)",
        "import pickle as p; p.loads(b)",
        "from pickle import load",
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import numpy as np; np.load(f, allow_pickle=flag)",
        "import joblib; joblib.load(f)",
        "import yaml; yaml.load(f)",
        "eval('1')",
    ],
)
def test_what_would_unpickle_is_found(line: str) -> None:
    assert unpickling(line, set())


def test_they_are_not_updated(bank: np.ndarray, tmp_path: Path) -> None:
    model = write_original(tmp_path / "model", bank)
    write_texture(tmp_path / "new" / "0.png", 1)
    finished = invoke(update_model, model, tmp_path / "new")
    assert finished.code == 2
    assert "original repository" in finished.error_lines[-1]
