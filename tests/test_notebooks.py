"""The notebooks: stored without outputs, and run as they stand on what a demo leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, SMALL_METHOD, SMALL_SAMPLER
from shell_scripts import render_demo_set
from synthetic_runs import write_run

from patchcore.storage.run_folder import load_class_result, write_tables

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MAX_CODE_LINES = 25
CELL_SECONDS = 600
SHOWN = {
    "compare_methods": ["PatchCore", "three\\_neighbours", "## image AUROC", "## Speed and memory"],
    "explore_dataset": ["metal_plate", "## "],
    "visualize_results": ["mpdd_metal_plate", "instance_auroc", "num_images", "latency_p50_ms", "Mean"],
}


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_there_are_three_notebooks() -> None:
    assert [p.stem for p in NOTEBOOKS] == ["compare_methods", "explore_dataset", "visualize_results"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_what_a_machine_left(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert not re.search(r"/(home|Users|tmp|work|mnt|root)/|[A-Z]:\\\\", text), "the path of a machine"
    assert set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_call_the_toolkit_and_have_no_logic_of_their_own(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    assert len(code.splitlines()) <= MAX_CODE_LINES
    assert "from patchcore." in code
    assert not re.search(r"^\s*(def|class|if|while|try|import) ", code, re.MULTILINE)


def test_results_of_a_method_without_maps_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, "knn", method="resnet_knn", maps=False)
    result = load_class_result(run, "mpdd_plate")
    assert result is not None
    write_tables(run, {"mpdd_plate": result})
    code = "\n".join("".join(cell["source"]) for cell in cells(NOTEBOOKS[-1], "code"))
    assert code.count('RUN = Path("../demo/results/demo/PatchCore")') == 1
    shown: list[object] = []
    display = types.SimpleNamespace(Image=lambda filename: filename, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    exec(code.replace("../demo/results/demo/PatchCore", str(run)), {})
    assert shown == [] and "mpdd_plate" in capsys.readouterr().out


@pytest.fixture(scope="module")
def demo_clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside which `make demo` has been: small images, two methods of which each knows the maps."""
    root = tmp_path_factory.mktemp("clone")
    (root / "notebooks").mkdir()
    render_demo_set(root / "demo" / "data")
    for group, k in (("PatchCore", "1"), ("three_neighbours", "3")):
        command = [
            *(sys.executable, REPOSITORY / "bin" / "run_patchcore.py", "--device", "cpu", "--save_segmentation_images"),
            *("--save_anomaly_scores", "--log_project", "demo", "--log_group", group, root / "demo" / "results"),
            *(*SMALL_METHOD, "--anomaly_scorer_num_nn", k, *SMALL_SAMPLER),
            *("dataset", "--resize", "64", "--imagesize", "64", "--num_workers", "0", "mpdd", root / "demo" / "data"),
        ]
        subprocess.run([str(part) for part in command], check=True, env=environment())
    return root


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_as_they_stand(path: Path, demo_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(demo_clone / "notebooks")}}
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    texts = "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)
    assert not [o for o in outputs if o.output_type == "error"]
    assert len(pictures) >= 4, "every notebook shows pictures"
    assert [shown for shown in SHOWN[path.stem] if shown not in texts] == []
