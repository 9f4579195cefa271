"""`--index` as a user types it: train, store, evaluate, and with another one than the model was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_category
from in_process import Finished, invoke, read_rows

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore
from patchcore.memory import faiss_search

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("indexes")
    write_category(root, "plate")
    return root


@pytest.fixture(autouse=True)
def warnings_once_per_test() -> None:
    faiss_search.warn_once.cache_clear()


def run(out: Path, data: Path, *options: object, backbones: tuple[str, ...] = ("resnet18",)) -> Finished:
    named = [part for name in backbones for part in ("-b", name)]
    layers = [
        part for i in range(len(backbones)) for part in ("-le", f"{i}.layer2" if len(backbones) > 1 else "layer2")
    ]
    return invoke(
        run_patchcore, out, "--device", "cpu", "--threads", 1, "--save_patchcore_model",
        "patch_core", *named, *layers, "--weights", "random", "--anomaly_scorer_num_nn", 1,
        "--target_embed_dimension", 64, *options,
        "sampler", "identity",
        "dataset", "--resize", 64, "--imagesize", 64, "--num_workers", 0, "-d", "plate", "mpdd", data,
    )  # fmt: skip


def evaluate(out: Path, trained: Path, data: Path, *options: object) -> Finished:
    return invoke(
        load_and_evaluate_patchcore, out, "--device", "cpu", "--threads", 1,
        "patch_core_loader", "-p", trained / "project" / "group" / "models" / "mpdd_plate", *options,
        "dataset", "--num_workers", 0, "-d", "plate", "mpdd", data,
    )  # fmt: skip


def scores(folder: Path) -> list[float]:
    return [float(row["score"]) for row in read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")]


@pytest.fixture(scope="module")
def flat(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flat")
    finished = run(out, data)
    assert finished.code == 0, finished.err
    return out


@pytest.mark.parametrize(("index", "file"), [("sq8", "search_index.safetensors"), ("ivf", "search_index.faiss")])
def test_a_stored_index_gives_the_tables_of_its_run(
    index: str, file: str, data: Path, flat: Path, tmp_path: Path
) -> None:
    if index == "ivf":
        pytest.importorskip("faiss")
    done = run(tmp_path / "run", data, "--index", index)
    assert done.code == 0, done.err
    folder = tmp_path / "run" / "project" / "group"
    assert json.loads((folder / "config.json").read_text())["config"]["method_config"]["index"] == index
    np.testing.assert_allclose(scores(folder), scores(flat / "project" / "group"), rtol=0.02)
    assert {p.name for p in (folder / "models" / "mpdd_plate").iterdir()} == {"model.json", file}
    if index == "sq8":
        assert (folder / "models" / "mpdd_plate" / file).stat().st_size < 6 * 64 * (64 + 4) + 2000
    evaluated = evaluate(tmp_path / "again", tmp_path / "run", data)
    assert evaluated.code == 0, evaluated.err
    assert (tmp_path / "again" / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    refused = evaluate(tmp_path / "refused", tmp_path / "run", data, "--index", "flat")
    if index == "ivf":
        assert refused.code == 0, refused.err
        np.testing.assert_allclose(scores(tmp_path / "refused"), scores(flat / "project" / "group"), rtol=1e-5)
    else:
        assert refused.code == 2
        assert len(refused.error_lines) == 1
        assert "keeps its memory bank as sq8, --index flat needs float32 values: leave --index out" in refused.err
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(("index", "tolerance", "warns"), [("projected", 1e-5, False), ("fp16", 5e-3, True)])
def test_a_float32_bank_is_searched_by_the_index_typed(
    index: str, tolerance: float, warns: bool, data: Path, flat: Path, tmp_path: Path
) -> None:
    finished = evaluate(tmp_path / "out", flat, data, "--index", index)
    assert finished.code == 0, finished.err
    assert ("thresholds were measured with its own index" in finished.err) == warns
    expected = scores(flat / "project" / "group")
    np.testing.assert_allclose(scores(tmp_path / "out"), expected, rtol=tolerance)
    assert (scores(tmp_path / "out") == expected) != warns


def test_every_member_of_an_ensemble_takes_the_index(data: Path, tmp_path: Path) -> None:
    members = ("resnet18", "resnet18.seed-1")
    done = run(tmp_path / "run", data, "--index", "fp16", backbones=members)
    assert done.code == 0, done.err
    model = tmp_path / "run" / "project" / "group" / "models" / "mpdd_plate"
    config = json.loads((model / "model.json").read_text())["config"]
    assert [member["index"] for member in config["members"]] == ["fp16", "fp16"]
    refused = evaluate(tmp_path / "refused", tmp_path / "run", data, "--index", "projected")
    assert refused.code == 2
    assert "member Ensemble-1-2: the model keeps its memory bank as fp16, --index projected" in refused.err


def test_a_bank_that_is_too_small_is_refused_before_its_features(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    done = run(tmp_path, data, "--index", "ivfpq")
    assert done.code == 1
    assert "the memory bank has 384 patches, --index ivfpq needs 19968 to learn its centroids" in done.err
    assert "features" not in done.err.replace("--index", "")


def test_a_dimension_that_cannot_be_divided_is_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    done = run(tmp_path / "out", data, "--index", "ivfpq", "--target_embed_dimension", 100)
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert "64 parts, but it has 100 values: choose --target_embed_dimension 64 or --index sq8" in done.err
    assert not (tmp_path / "out").exists()
