"""PatchCore's numbers on real images against a plain formulation: unfold, one pick after the other, brute force."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunCommand
from in_process import read_rows
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from patchcore.configs import BackboneConfig, PreprocessingConfig
from patchcore.datasets.inspection import DatasetSplit
from patchcore.datasets.mpdd import MPDDDataset
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.runtime import derive_seed

pytestmark = pytest.mark.slow

LAYERS = ("blocks.2", "blocks.4")
SEED, CATEGORY, SHARE = 3, "metal_plate", 0.01


def batches(split: DatasetSplit, root: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    dataset = MPDDDataset(str(root), CATEGORY, split, PreprocessingConfig(256, 224))
    for i in range(len(dataset)):
        item = dataset[i]
        yield item["image"][None], item["mask"] if "mask" in item else torch.zeros(1)


def plain_embedding(extractor: FeatureExtractor, image: torch.Tensor, patchsize: int) -> torch.Tensor:
    """The published steps, one after the other: float32 [784, 1024] of one image."""
    layers = []
    for feature_map in extractor(image).values():
        _, channels, height, width = feature_map.shape
        patches = F.unfold(feature_map, patchsize, padding=patchsize // 2)
        patches = patches.view(1, channels * patchsize**2, height, width)
        aligned = F.interpolate(patches, size=(28, 28), mode="bilinear", align_corners=False)
        flat = aligned[0].flatten(1).T  # [784, C * p * p]
        layers.append(F.adaptive_avg_pool1d(flat, 1024))
    return F.adaptive_avg_pool1d(torch.stack(layers, dim=1).flatten(1), 1024)


def random_numbers(purpose: str) -> torch.Generator:
    """The same draws as the toolkit's: the method is compared, not the luck."""
    return torch.Generator().manual_seed(derive_seed(SEED, CATEGORY, purpose))


def plain_coreset(features: np.ndarray) -> np.ndarray:
    """Return the rows that the greedy algorithm picks, one after the other, in float64."""
    bound = 1 / np.sqrt(features.shape[1])
    drawn = torch.empty(128, features.shape[1]).uniform_(-bound, bound, generator=random_numbers("coreset"))
    points = (features - features.mean(axis=0, dtype=np.float64)) @ drawn.double().numpy().T
    starts = torch.randperm(len(points), generator=random_numbers("selection"))[:10].numpy()
    nearest = np.mean([np.linalg.norm(points - points[s], axis=1) for s in starts], axis=0)
    picks = []
    for _ in range(int(SHARE * len(points))):
        picks.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[picks[-1]], axis=1))
    return np.array(picks)


@pytest.mark.parametrize(("num_nn", "patchsize"), [(1, 3), (3, 5)])
def test_tables_equal_a_plain_formulation(
    num_nn: int, patchsize: int, real_data: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    finished = run_command(
        "run_patchcore.py", "--device", "cpu", "--seed", SEED, "--calibration", "none", tmp_path,
        "patch_core", "-b", "efficientnet_lite0", "-le", LAYERS[0], "-le", LAYERS[1], "--patchsize", patchsize,
        "--anomaly_scorer_num_nn", num_nn, "sampler", "-p", SHARE, "approx_greedy_coreset",
        "dataset", "--batch_size", 8, "-d", CATEGORY, "mpdd", real_data / "mpdd",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    row = read_rows(tmp_path / "project" / "group" / "results.csv")[0]
    written = read_rows(tmp_path / "project" / "group" / "anomaly_scores" / f"mpdd_{CATEGORY}.csv")

    extractor = build_extractor(BackboneConfig("efficientnet_lite0", LAYERS), 224)
    root = real_data / "mpdd"
    features = torch.cat(
        [plain_embedding(extractor, image, patchsize) for image, _ in batches(DatasetSplit.TRAIN, root)]
    )
    bank = features[plain_coreset(features.double().numpy())].double()
    scores, maps, masks = [], [], []
    for image, mask in batches(DatasetSplit.TEST, root):
        distances = torch.cdist(plain_embedding(extractor, image, patchsize).double(), bank)
        patch_scores = distances.topk(num_nn, dim=1, largest=False).values.mean(dim=1).view(1, 1, 28, 28)
        scores.append(float(patch_scores.max()))
        upsampled = F.interpolate(patch_scores, size=224, mode="bilinear", align_corners=False)[0, 0].numpy()
        maps.append(gaussian_filter(upsampled, sigma=4))
        masks.append(mask.numpy().reshape(224, 224) > 0)
    np.testing.assert_allclose([float(r["score"]) for r in written], scores, rtol=2e-3)
    labels = [r["label"] == "1" for r in written]
    assert float(row["instance_auroc"]) == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    pixels = np.stack(maps).ravel(), np.stack(masks).ravel()
    assert float(row["full_pixel_auroc"]) == pytest.approx(roc_auc_score(pixels[1], pixels[0]), abs=1e-4)
