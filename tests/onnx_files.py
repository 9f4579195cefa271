"""What the tests of exported models share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
SCRIPT = "score_onnx.py"


def readme_script() -> str:
    """Return the program of the README that scores images with an exported model."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    (script,) = [block for block in blocks if block.startswith(f"# {SCRIPT}\n")]
    return script


def run_onnx(path: Path, images: Sequence[np.ndarray] | np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Return the outputs of a file for images uint8 [N, 3, H, W], or for batches [1, 3, H, W] of any size, by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batches = images
    if isinstance(images, np.ndarray):
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    results = [session.run(None, {"images": batch}) for batch in batches]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*results, strict=True), strict=True)}
