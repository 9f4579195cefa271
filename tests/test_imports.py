"""Who may import whom, read from the syntax tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src" / "patchcore"
MODULES = sorted(SOURCE.rglob("*.py"))

FREE_FOR_ALL = {
    "configs",
    "config_json",
    "detector",
    "digests",
    "runtime",
    "errors",
    "failures",
    "process_group",
    "torchrun",
}
# Package: the packages it may import besides itself and FREE_FOR_ALL.
ALLOWED = {
    "cli": {"presets"},
    "datasets": set(),
    "features": set(),
    "memory": set(),
    "scoring": set(),
    "evaluation": set(),
    "storage": {"scoring"},
    "detector": {"scoring", "storage"},
    "methods": {"features", "memory", "scoring"},
    "class_data": {"datasets", "evaluation"},
    "class_shares": {"batch_halving", "class_run", "datasets", "launching"},
    "class_scoring": {"batch_halving", "datasets"},
    "class_run": {
        "batch_halving",
        "class_data",
        "class_scoring",
        "class_shares",
        "datasets",
        "evaluation",
        "resuming",
        "scoring",
        "storage",
    },
    "calibration_data": {"class_data", "datasets", "scoring"},
    "batch_halving": set(),
    "resuming": {"storage"},
    "prediction": {"datasets", "methods", "storage"},
    "inference": {"batch_halving", "datasets", "evaluation", "launching", "prediction", "scoring", "storage"},
    "model_export": {"datasets", "inference", "prediction", "storage"},
    "model_update": {"inference", "memory", "methods", "prediction", "scoring", "storage"},
    "stored_models": {"prediction", "storage"},
    "launching": set(),
    "class_jobs": {"class_run", "methods", "storage"},
    "run_record": {"class_jobs", "class_run", "evaluation", "resuming", "storage", "tracking"},
    "pipeline": {
        "calibration_data",
        "class_data",
        "class_jobs",
        "class_run",
        "class_shares",
        "launching",
        "resuming",
        "run_record",
        "stored_models",
        "methods",
        "datasets",
        "evaluation",
        "storage",
        "tracking",
    },
    "comparison": {"storage", "evaluation", "presets", "report_html"},
    "report_html": {"datasets", "evaluation"},
    "sweep": {"comparison", "datasets", "evaluation", "pipeline", "presets", "resuming", "storage"},
    "presets": set(),
    "tracking": set(),
    "exploration": {"datasets", "evaluation", "storage"},
    "run_views": {"evaluation", "storage"},
    "web": {"datasets", "evaluation", "inference", "prediction"},
    "configs": set(),
    "config_json": set(),
    "digests": set(),
    "runtime": set(),
    "errors": set(),
    "failures": set(),
    "process_group": set(),
    "torchrun": set(),
}
CLI_CALLBACKS_MAY_IMPORT = {
    "pipeline",
    "stored_models",
    "datasets",
    "features",
    "comparison",
    "exploration",
    "inference",
    "model_export",
    "model_update",
    "sweep",
    "web",
}
ONE_HOME = {
    "FrEIA": "methods/normalizing_flow.py",
    "click": "cli/",
    "jinja2": "report_html/page.py",
    "faiss": "memory/faiss_search.py",
    "fastapi": "web.py",
    "gradio": "web.py",
    "matplotlib": "evaluation/plots/",
    "onnx": "storage/export",
    "onnxruntime": "storage/export_int8.py",
    "ray": "launching/ray_cluster.py",
    "starlette": "web.py",
    "timm": "features/backbones.py",
    "torchvision": "features/backbones.py",
    "uvicorn": "web.py",
    "wandb": "tracking.py",
    "yaml": "sweep/definition.py",
}
OPTIONAL = {"faiss-cpu", "gradio", "onnx", "onnxruntime", "ray", "wandb"}  # extras
BROUGHT_BY_GRADIO = {"fastapi", "starlette", "uvicorn"}  # which is built on them
DISTRIBUTION = {
    "PIL": "pillow",
    "jinja2": "Jinja2",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "faiss": "faiss-cpu",
    "yaml": "PyYAML",
}


def imports(path: Path, inside_functions: bool) -> Iterator[str]:
    """Yield the dotted names that a module imports, at module level or inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inner = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if (id(node) in inner) != inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "patchcore":
                yield from (f"patchcore.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def part_of(path: Path) -> str:
    """Return the package or top-level module below src/patchcore that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_between_parts(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not [n for n in imports(path, False) if n.startswith("patchcore")]
        return
    allowed = ALLOWED[part] | FREE_FOR_ALL | {part}
    inner_allowed = allowed | (CLI_CALLBACKS_MAY_IMPORT if part == "cli" else set())
    for inside, names in ((False, allowed), (True, inner_allowed)):
        for name in imports(path, inside):
            if name.startswith("patchcore."):
                target = name.split(".")[1]
                assert target in names, f"{path.relative_to(SOURCE)} imports {name}"


@pytest.mark.parametrize("package", ONE_HOME)
def test_one_module_imports_each_heavy_package(package: str) -> None:
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in MODULES
        for inside in (False, True)
        for name in imports(path, inside)
        if name.split(".")[0] == package
    }
    users |= {
        path.relative_to(SOURCE).as_posix()
        for path in MODULES
        if re.search(rf'import_module\("{package}', path.read_text(encoding="utf-8"))
    }
    assert users, f"nothing imports {package}"
    assert all(user.startswith(ONE_HOME[package]) for user in users)


def test_scripts_are_thin_and_import_the_command_line_alone() -> None:
    for path in (REPOSITORY / "bin").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 30
        assert {n for inside in (False, True) for n in imports(path, inside)} == {"patchcore.cli"}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    required = setup.split("install_requires=[")[1].split("]")[0]
    declared = set(re.findall(r'"([a-zA-Z0-9-]+)[><=]', required))
    used = {
        DISTRIBUTION.get(name.split(".")[0], name.split(".")[0])
        for path in MODULES
        for inside in (False, True)
        for name in imports(path, inside)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "patchcore"}
    }
    assert used - OPTIONAL - BROUGHT_BY_GRADIO == declared


def test_torch_and_torchvision_bounds_belong_together() -> None:
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8").split("install_requires=[")[1]
    torch_minor = re.search(r'"torch>=2\.(\d+)"', setup)
    vision_minor = re.search(r'"torchvision>=0\.(\d+)"', setup)
    assert torch_minor and vision_minor
    assert int(vision_minor[1]) == int(torch_minor[1]) + 15  # torch 2.N was released with torchvision 0.(N+15)


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, patchcore, patchcore.cli; "
        "heavy = {'torch', 'torchvision', 'timm', 'faiss', 'matplotlib', 'skimage', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; print(patchcore.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY / "src")


def test_public_names_can_be_imported() -> None:
    import patchcore

    for name in patchcore.__all__:
        assert getattr(patchcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Patchcore'"):
        _ = patchcore.Patchcore  # type: ignore[attr-defined]
