"""A bank that is chosen in two rounds: what it holds, how far it covers, its calibration, its files and its errors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_run, write_category
from in_process import invoke
from test_patchcore import CPU, PREPROCESSING, Batches, build, random_images

import patchcore.pipeline
from patchcore.class_shares import Crew
from patchcore.cli import run_patchcore
from patchcore.configs import LaunchConfig, RuntimeConfig, SamplerConfig, ShardsConfig
from patchcore.detector import ImageBatches, TrainingPlan
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.launching import Ended, InThisProcess, Job
from patchcore.memory.buffers import Buffers
from patchcore.memory.points import Points
from patchcore.methods import sharded_bank
from patchcore.methods.patchcore import PatchCore

PATCHES = 8 * 8  # of an image
NUM_IMAGES = 12
RUNTIME = RuntimeConfig("cpu")


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    from test_patchcore import BACKBONE, SIDE

    return build_extractor(BACKBONE, SIDE)


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return random_images(NUM_IMAGES, seed=0)


class SharesInMemory:
    """Images of a tensor in shares, read in this process by turns; notes which share did what.

    Args:
        images: uint8 [N, 3, S, S].
        parts: Numbers of the images of each share.
        order: In which the answers come; None for that of the calls.
    """

    def __init__(
        self, images: torch.Tensor, parts: Sequence[Sequence[int]], order: Sequence[int] | None = None
    ) -> None:
        self._images = images
        self.images = [torch.tensor(part) for part in parts]
        self.runtime = RUNTIME
        self._order = order
        self.calls: list[tuple[int, Any]] = []

    def map(self, calls: Iterable[tuple[int, Callable[[ImageBatches], Any]]]) -> Iterator[tuple[int, Any]]:
        taken = list(calls)
        self.calls += taken
        for share, call in sorted(taken, key=lambda pair: self._order.index(pair[0]) if self._order else 0):
            yield share, call(Batches(self._images[self.images[share]]))


def sharded(
    extractor: FeatureExtractor,
    shares: SharesInMemory,
    percentage: float,
    coreset: int | None = None,
    name: str = "approx_greedy_coreset",
) -> PatchCore:
    """Return a model that is to learn from shares."""
    config = ShardsConfig(max(2, len(shares.images)), coreset)
    model = build(extractor, sampler=SamplerConfig(name, percentage, config))
    model.plan = TrainingPlan(shares=shares)
    return model


def parts(count: int) -> list[list[int]]:
    return [list(range(first, NUM_IMAGES, count)) for first in range(count)]


def all_rows(extractor: FeatureExtractor, images: torch.Tensor) -> torch.Tensor:
    """Return every patch embedding [N * P, D]: the bank of the sampler that keeps all."""
    return build(extractor).fit(Batches(images)).memory_bank_


def as_set(rows: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in rows.numpy()}


def distances(rows: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Return the distance of each row to the nearest one of a bank, exact for equal rows."""
    return torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


def is_among(bank: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return which rows of a bank are among others, but for the last bits, which depend on the batch of an image."""
    return distances(bank, rows) < 1e-4 * float(rows.std())


# ---------------------------------------------------------------- the two rounds


def test_of_one_share_the_bank_is_that_of_one_machine(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    # Its start is not drawn; and of one share the second round can but keep what the first has kept.
    alone = build(extractor, sampler=SamplerConfig("greedy_coreset", 0.1)).fit(Batches(train))
    model = sharded(extractor, SharesInMemory(train, [range(NUM_IMAGES)]), 0.1, name="greedy_coreset")
    model.fit(Batches(train))
    assert len(model.memory_bank_) == 76
    assert as_set(model.memory_bank_) == as_set(alone.memory_bank_)


def test_the_bank_is_what_a_selection_by_hand_gives(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    rows = all_rows(extractor, train).view(NUM_IMAGES, PATCHES, -1)
    shares = SharesInMemory(train, parts(3))
    model = sharded(extractor, shares, 0.1, coreset=40).fit(Batches(train))
    # An oracle that knows the scheme alone: local picks by each share's own call, then picks among them.
    local = [call(Batches(train[shares.images[share]])) for share, call in shares.calls]
    assert [len(part) for part, _ in local] == [40, 40, 40]
    for (share, _), (part, _) in zip(shares.calls, local, strict=True):
        assert is_among(torch.from_numpy(part), rows[shares.images[share]].flatten(0, 1)).all()
    union = torch.from_numpy(np.concatenate([part for part, _ in local]))
    handicaps = 0.25 * torch.from_numpy(np.concatenate([reaches for _, reaches in local]))
    points = model.sampler.reduce(union, model.random_numbers("coreset"))
    starts = torch.randperm(len(union), generator=model.random_numbers("selection"))[:10]
    distances = torch.cdist(points[slice(None)], points[starts]).mean(dim=1).square()
    expected = union[picks_one_by_one(points[slice(None)], distances, handicaps, 76)]
    torch.testing.assert_close(model.memory_bank_, expected, rtol=0, atol=0)


def picks_one_by_one(points: torch.Tensor, distances: torch.Tensor, handicaps: torch.Tensor, count: int) -> list[int]:
    """Return what a loop picks that updates every distance after each pick."""
    distances = distances.clone().double()
    picks: list[int] = []
    while len(picks) < count:
        picks.append(int(distances.argmax()))
        squared = (points.double() - points[picks[-1]].double()).square().sum(dim=1) + handicaps
        distances = torch.minimum(distances, squared)
        distances[picks] = -torch.inf
    return picks


def test_a_point_reaches_to_the_farthest_one_that_is_nearest_to_it() -> None:
    points = Points(torch.tensor([[0.0], [1.0], [3.0], [10.0], [11.0]]))
    reaches = sharded_bank.squared_reaches(points, torch.tensor([3, 0]))
    assert reaches.tolist() == pytest.approx([1.0, 9.0])
    assert sharded_bank.squared_reaches(points, torch.arange(5)).tolist() == [0.0] * 5


def test_the_order_of_the_answers_changes_nothing(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    orders = (None, (2, 0, 1))
    models = [sharded(extractor, SharesInMemory(train, parts(3), order), 0.2).fit(Batches(train)) for order in orders]
    torch.testing.assert_close(models[0].memory_bank_, models[1].memory_bank_, rtol=0, atol=0)
    first, second = (model.out_of_fold_calibration() for model in models)
    assert first == second


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("percentage", [0.02, 0.1, 0.4])
def test_the_bank_covers_about_as_well_as_that_of_one_machine(
    count: int, percentage: float, extractor: FeatureExtractor, train: torch.Tensor
) -> None:
    rows = all_rows(extractor, train)
    alone = build(extractor, sampler=SamplerConfig("approx_greedy_coreset", percentage)).fit(Batches(train))
    model = sharded(extractor, SharesInMemory(train, parts(count)), percentage).fit(Batches(train))
    assert len(model.memory_bank_) == len(alone.memory_bank_)
    assert is_among(model.memory_bank_, rows).all()
    assert len(as_set(model.memory_bank_)) == len(model.memory_bank_)
    reached, alone_reached = (float(distances(rows, bank).max()) for bank in (model.memory_bank_, alone.memory_bank_))
    assert reached <= 1.3 * alone_reached  # the bound is 4 for distances of projections; so much is seen


def test_each_share_keeps_as_many_patches_as_the_bank_has_or_all_that_it_has(
    extractor: FeatureExtractor, train: torch.Tensor
) -> None:
    for percentage, expected in ((0.1, 76), (0.5, 3 * PATCHES)):
        shares = SharesInMemory(train, parts(4))
        sharded(extractor, shares, percentage).fit(Batches(train))
        assert [call.num_select for _, call in shares.calls] == [expected] * 4


def test_what_is_held_grows_with_shares_and_their_coresets_alone(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed: list[int] = []
    empty = Buffers.empty

    def noted(self: Buffers, *shape: int) -> torch.Tensor:
        claimed.append(int(np.prod(shape)))
        return empty(self, *shape)

    held = []
    for num_images in (4, 40):
        images = random_images(num_images, seed=0)
        shares = SharesInMemory(images, [range(0, num_images, 2), range(1, num_images, 2)])
        model = sharded(extractor, shares, 20.5 / (num_images * PATCHES), coreset=30)  # a bank of 20 patches
        answers = [
            (np.zeros((30, 1024), np.float32), np.zeros(30, np.float32))
        ] * 2  # what shares hold themselves is not asked here
        monkeypatch.setattr(shares, "map", lambda calls, told=answers: [(n, told[n]) for n, _ in calls])
        with monkeypatch.context() as patch:
            patch.setattr(Buffers, "empty", noted)
            model.fit(Batches(images))
        held.append(list(claimed))
        claimed.clear()
    assert held[0] == held[1] == [2 * 30 * 1024, 2 * 30 * 128, 20 * 1024]


# ---------------------------------------------------------------- calibration


def test_no_image_is_scored_by_a_bank_with_patches_of_its_own_fold(
    extractor: FeatureExtractor, train: torch.Tensor
) -> None:
    rows = all_rows(extractor, train).view(NUM_IMAGES, PATCHES, -1)
    shares = SharesInMemory(train, parts(6))  # more than folds: share 5 is in the fold of share 0
    model = sharded(extractor, shares, 0.1).fit(Batches(train))
    shares.calls.clear()
    calibration = model.out_of_fold_calibration()
    assert calibration is not None
    assert (calibration.method, calibration.num_folds) == ("kfold", 5)
    assert [share for share, _ in shares.calls] == [0, 5, 1, 2, 3, 4]
    for share, call in shares.calls:
        fold = torch.cat([shares.images[other] for other in range(6) if other % 5 == share % 5])
        bank = torch.from_numpy(call.bank)
        assert not is_among(bank, rows[fold].flatten(0, 1)).any()
        assert is_among(bank, rows.flatten(0, 1)).all()
        assert len(bank) == int(0.1 * (NUM_IMAGES - len(fold)) * PATCHES)


def test_calibration_scores_are_those_of_a_model_with_the_bank_of_the_fold(
    extractor: FeatureExtractor, train: torch.Tensor
) -> None:
    shares = SharesInMemory(train, parts(3), order=(1, 2, 0))
    model = sharded(extractor, shares, 0.1).fit(Batches(train))
    shares.calls.clear()
    calibration = model.out_of_fold_calibration()
    assert calibration is not None
    assert calibration.map_maxima is not None
    for share, call in shares.calls:
        judge = build(extractor).fit_bank(torch.from_numpy(call.bank))
        prediction = judge.predict(train[shares.images[share]])
        assert prediction.maps is not None
        images = shares.images[share].tolist()
        np.testing.assert_allclose([calibration.image_scores[i] for i in images], prediction.scores, rtol=1e-5)
        np.testing.assert_allclose([calibration.map_maxima[i] for i in images], prediction.maps.max((1, 2)), rtol=1e-5)
    model.release_training_data()
    with pytest.raises(RuntimeError, match="right after fit"):
        model.out_of_fold_calibration()


# ---------------------------------------------------------------- errors


def test_too_small_a_local_coreset_names_one_that_suffices(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"--shard_coreset 25 keeps 75 patches of 3 shares, .* 76 .* at least 26"):
        sharded(extractor, SharesInMemory(train, parts(3)), 0.1, coreset=25).fit(Batches(train))
    sharded(extractor, SharesInMemory(train, parts(3)), 0.1, coreset=26).fit(Batches(train))


@pytest.mark.parametrize("sampler", ["identity", "random"])
def test_a_sampler_without_distances_is_refused(sampler: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--shards 2 .* found sampler '{sampler}': use greedy_coreset or"):
        SamplerConfig(sampler, 0.1, ShardsConfig(2))


def test_numbers_that_cannot_be() -> None:
    for build_config, expected in (
        (lambda: ShardsConfig(1), "--shards is 1, expected 2"),
        (lambda: ShardsConfig(2, 0), "--shard_coreset is 0, expected"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            build_config()


# ---------------------------------------------------------------- the command


class ClusterInThisProcess(InThisProcess):
    """Does what Ray does with the tasks, here."""

    is_in_process = False

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        for job in list(jobs):
            job.log.parent.mkdir(parents=True, exist_ok=True)
            yield from super().run([job])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    def opened(launch: LaunchConfig, runtime: RuntimeConfig) -> Any:
        return nullcontext(ClusterInThisProcess())

    monkeypatch.setattr(patchcore.pipeline, "open_executor", opened)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded") / "data"
    write_category(root, "plate", num_train=7, num_test=2)
    write_category(root, "rod", num_train=2, num_test=2)
    return root


def run(out: Path, data: Path, *options: object, categories: Sequence[str] = ("plate",)) -> Any:
    typed = [out, "--device", "cpu", "--launcher", "ray", *options, *small_run(data, *categories)]
    return invoke(run_patchcore, *typed)


def test_a_run_in_shares_and_a_class_with_fewer_images_than_shares(cluster: None, data: Path, tmp_path: Path) -> None:
    options = ("--shards", 3, "--save_patchcore_model")
    finished = run(tmp_path, data, *options, categories=("plate", "rod"))
    assert finished.code == 1
    assert "2 training image(s) for --shards 3, expected one for each share" in finished.err
    folder = tmp_path / "project" / "group"
    assert (folder / "models" / "mpdd_plate" / "model.json").exists(), finished.err
    assert {path.name for path in (folder / "logs").iterdir()} == {f"plate_0_share{n}.log" for n in range(3)}
    assert "plate" in (folder / "results.csv").read_text()
    again = run(tmp_path, data, *options, "--skip_existing", categories=("plate", "rod"))
    assert "plate: finished before" in again.err
    other = run(tmp_path, data, "--shards", 2, "--save_patchcore_model", "--skip_existing")
    assert other.code == 2
    assert "shards.count: 3 there, 2 now" in other.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--shards", 1), "--shards is 1, expected 2"),
        (("--shard_coreset", 5), "--shard_coreset 5 without --shards"),
        (("--shards", 2, "--launcher", "local"), "--shards 2 without --launcher ray"),
    ],
)
def test_a_wrong_option_is_one_line(data: Path, tmp_path: Path, options: tuple[object, ...], expected: str) -> None:
    finished = run(tmp_path, data, *options)
    assert finished.code == 2
    assert expected in finished.err
    assert len(finished.err.strip().splitlines()) == 1
    assert not (tmp_path / "project").exists()


def test_images_are_divided_at_random_and_evenly(data: Path, tmp_path: Path) -> None:
    from patchcore.class_data import open_dataset
    from patchcore.class_run import ClassTask
    from patchcore.configs import DatasetConfig, OutputConfig
    from patchcore.datasets.inspection import DatasetSplit

    config = DatasetConfig("mpdd", str(data), ("plate",), preprocessing=PREPROCESSING)
    task = ClassTask(tmp_path, config, OutputConfig(), CPU)
    train = open_dataset(config, "plate", DatasetSplit.TRAIN, 0)
    divided = [Crew(InThisProcess(), RUNTIME, 3).shares(task, train, seed, 2).images for seed in range(3)]
    for images in divided:
        assert sorted(torch.cat(list(images)).tolist()) == list(range(7))
        assert sorted(map(len, images)) == [2, 2, 3]
    assert len({tuple(images[0].tolist()) for images in divided}) > 1
