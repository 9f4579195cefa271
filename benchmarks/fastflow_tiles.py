"""Memory and time of scoring one large image in tiles, in the usual batches and in the small ones of --low_memory.

    python benchmarks/fastflow_tiles.py --side 1024 --patch_size 160 --patch_stride 80

Each way runs in a process of its own, because a process never gives its peak back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time

import numpy as np
import torch

from patchcore.configs import (
    BackboneConfig,
    FastFlowConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TileConfig,
    TrainingSource,
)
from patchcore.methods.fastflow import FastFlow
from patchcore.methods.tiles import tile_corners
from patchcore.runtime import peak_memory_megabytes, set_threads

LAYERS = ("layer1", "layer2", "layer3")
INPUT_PX = 224


def measure(low_memory: bool, side: int, patch_size: int, patch_stride: int, threads: int) -> dict[str, object]:
    """Score one image of random pixels and return the peak before it, the peak with it, the time and the map."""
    set_threads(threads)
    config = FastFlowConfig(
        BackboneConfig("resnet18", LAYERS, weights="random"),
        flow_steps=4,
        hidden_ratio=0.5,
        tiles=TileConfig(patch_size, patch_stride, low_memory=low_memory),
    )
    preprocessing = PreprocessingConfig(INPUT_PX, INPUT_PX, max_side_px=side)
    detector = FastFlow.prepare(config, preprocessing, RuntimeConfig())(TrainingSource(), torch.device("cpu"))
    detector.restore(detector._new_flows("flows").state_dict())  # new flows: the arithmetic is that of trained ones
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
    detector.predict(image[..., :patch_size, :patch_size])
    before = peak_memory_megabytes()
    started = time.perf_counter()
    maps = detector.predict(image).maps
    seconds = time.perf_counter() - started
    peak = max(before, peak_memory_megabytes())  # the system counts pages in steps, and may report a little less
    return {"before": before, "peak": peak, "s": seconds, "maps": maps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="side of the image, px")
    parser.add_argument("--patch_size", type=int, default=160)
    parser.add_argument("--patch_stride", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    num_tiles = len(tile_corners(options.side, options.side, TileConfig(options.patch_size, options.patch_stride)))
    print(f"resnet18, {options.side} x {options.side} px, {num_tiles} tiles, {options.threads} threads")
    found = {}
    for low_memory in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = (low_memory, options.side, options.patch_size, options.patch_stride, options.threads)
            found[low_memory] = result = pool.apply(measure, arguments)
        name = "--low_memory" if low_memory else "usual"
        print(
            f"{name:12}  peak {result['peak']:6.0f} MB, of it {result['peak'] - result['before']:6.0f} MB for the "
            f"image; {result['s']:5.1f} s"
        )
    difference = np.abs(found[True]["maps"] - found[False]["maps"]).max()
    print(f"largest difference of the maps: {difference:.1e}, maps up to {np.abs(found[False]['maps']).max():.3g}")


if __name__ == "__main__":
    main()
