"""Folders as users have them: listing, pairing with masks, drawing subsets, batches, and what is refused."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_PX, write_category, write_mask, write_texture
from PIL import Image

from patchcore.configs import RESIZE_MODES, DatasetConfig, PreprocessingConfig
from patchcore.datasets import inspection
from patchcore.datasets.images import IGNORED
from patchcore.datasets.inspection import (
    DatasetSplit,
    InspectionDataset,
    found_categories,
    list_images,
    list_test,
    list_train,
    resolve_categories,
)
from patchcore.datasets.loader import ImageLoader
from patchcore.datasets.mpdd import MPDDDataset
from patchcore.datasets.mvtec import MVTecDataset
from patchcore.datasets.registry import DATASETS, dataset_class
from patchcore.errors import ConfigurationError, DataError

WHOLE = PreprocessingConfig(IMAGE_PX, IMAGE_PX)


@pytest.fixture
def plate(small_dataset: Path) -> Path:
    """The folder of class `plate`: 6 training images, 3 good test images, 3 with a masked defect `spot`."""
    return small_dataset / "plate"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """The toolkit's warnings, also after a command in this process has detached its logger from the root."""
    monkeypatch.setattr(logging.getLogger("patchcore"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="patchcore"):
        yield caplog


def open_class(folder: Path, split: DatasetSplit = DatasetSplit.TEST, **options: object) -> InspectionDataset:
    return InspectionDataset(folder.parent, folder.name, split, WHOLE, **options)  # type: ignore[arg-type]


def names(dataset: InspectionDataset) -> list[str]:
    return [f"{r.defect_type}/{r.path.name}" for r in dataset.records]


def assert_one_line(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# Listing


def test_list_images(tmp_path: Path) -> None:
    wanted = ["a b.PNG", "c.JPeG", "d.tif", "ä.webp"]
    for name in [*wanted, ".hidden.png", "._a b.PNG", "notes.txt", "Thumbs.db", "clip.gif", "png"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == wanted
    assert list_images(tmp_path / "missing") == []


def test_order_is_by_name_not_by_the_file_system(tmp_path: Path) -> None:
    for name in ("b.png", "c.png", "a.png", "10.png", "2.png"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["10.png", "2.png", "a.png", "b.png", "c.png"]


@pytest.mark.parametrize("other", ["000.jpg", "000.PNG"])
def test_two_images_of_one_name(plate: Path, other: str) -> None:
    shutil.copy(plate / "test" / "spot" / "000.png", plate / "test" / "spot" / other)
    if len(list((plate / "test" / "spot").iterdir())) == 3:
        pytest.skip("this file system ignores case")
    with pytest.raises(DataError) as caught:
        list_test(plate.parent, "plate")
    assert_one_line(caught.value, "000.png", other, "rename")


def test_links_to_images_and_folders(plate: Path, tmp_path: Path) -> None:
    image = plate / "train" / "good" / "000.png"
    moved = tmp_path / "store" / "content-of-000"
    moved.parent.mkdir()
    image.rename(moved)
    image.symlink_to(moved)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "plate").symlink_to(plate)
    train = open_class(linked / "plate", DatasetSplit.TRAIN)
    train.check_files()
    assert len(train) == 6
    assert train[0]["image"].shape == (3, IMAGE_PX, IMAGE_PX)


def test_a_broken_link_is_named_not_passed_over(plate: Path) -> None:
    image = plate / "train" / "good" / "002.png"
    image.unlink()
    image.symlink_to(plate / "fetched-later.png")
    with pytest.raises(DataError) as caught:
        open_class(plate, DatasetSplit.TRAIN).check_files()
    assert_one_line(caught.value, image, "No such file")


def test_hidden_folders_are_no_classes_and_no_defects(plate: Path) -> None:
    write_category(plate.parent, ".cache")
    write_texture(plate / "test" / ".ipynb_checkpoints" / "000-checkpoint.png", 0)
    (plate / "ground_truth" / ".ipynb_checkpoints").mkdir()
    assert found_categories(plate.parent) == ["plate", "rod"]
    assert {r.defect_type for r in list_test(plate.parent, "plate")} == {"good", "spot"}


def test_other_training_folders_are_left_out(plate: Path) -> None:
    write_texture(plate / "train" / "scratched" / "000.png", 0)
    assert len(list_train(plate.parent, "plate")) == 6


# Masks


def test_masks_are_paired_by_name(plate: Path) -> None:
    truth = plate / "ground_truth" / "spot"
    (truth / "001_mask.png").rename(truth / "001.png")
    with Image.open(truth / "002_mask.png") as mask:
        mask.save(truth / "002_mask.BMP")
    (truth / "002_mask.png").unlink()
    records = [r for r in list_test(plate.parent, "plate") if r.is_anomalous]
    found = [(r.path.name, r.mask_path.name) for r in records if r.mask_path]
    assert found == [("000.png", "000_mask.png"), ("001.png", "001.png"), ("002.png", "002_mask.BMP")]


def test_order_of_masks_does_not_matter(plate: Path) -> None:
    # "10" < "9" < "9_" sorts images and masks differently; pairs made by position would be wrong.
    for name, seed in (("9", 1), ("9_b", 2), ("10", 3)):
        write_texture(plate / "test" / "dent" / f"{name}.png", seed)
        write_mask(plate / "ground_truth" / "dent" / f"{name}_mask.png")
    for record in list_test(plate.parent, "plate"):
        if record.is_anomalous:
            assert record.mask_path is not None
            assert record.mask_path.stem == f"{record.path.stem}_mask"


def test_image_without_mask(plate: Path) -> None:
    (plate / "ground_truth" / "spot" / "001_mask.png").unlink()
    with pytest.raises(DataError) as caught:
        open_class(plate)
    assert_one_line(caught.value, plate / "test" / "spot" / "001.png", "no mask found", "001_mask.png")


def test_defect_type_without_masks(plate: Path) -> None:
    write_texture(plate / "test" / "dent" / "000.png", 0)
    with pytest.raises(DataError, match="no mask found"):
        open_class(plate)


def test_mask_without_image(plate: Path) -> None:
    (plate / "test" / "spot" / "001.png").unlink()
    with pytest.raises(DataError) as caught:
        open_class(plate)
    assert_one_line(caught.value, "001_mask.png: a mask without an image", "test/spot/001.png")


def test_masks_of_a_missing_folder(plate: Path) -> None:
    (plate / "test" / "spot").rename(plate / "test" / "spots")
    write_mask(plate / "ground_truth" / "spots" / "000_mask.png")
    for i in (1, 2):
        write_mask(plate / "ground_truth" / "spots" / f"{i:03d}_mask.png")
    with pytest.raises(DataError) as caught:
        open_class(plate)
    assert_one_line(caught.value, plate / "ground_truth" / "spot" / "000_mask.png", "without an image")


def test_two_masks_of_one_image(plate: Path) -> None:
    write_mask(plate / "ground_truth" / "spot" / "001.png")
    with pytest.raises(DataError) as caught:
        open_class(plate)
    assert_one_line(caught.value, "001_mask.png", "001.png", "remove one")


def test_mask_of_another_size(plate: Path) -> None:
    path = plate / "ground_truth" / "spot" / "001_mask.png"
    Image.new("L", (IMAGE_PX, IMAGE_PX // 2)).save(path)
    dataset = open_class(plate)
    index = names(dataset).index("spot/001.png")
    for attempt in (dataset.check_files, lambda: dataset[index], lambda: dataset.full_mask(index)):
        with pytest.raises(DataError) as caught:
            attempt()
        assert_one_line(caught.value, path, "64 x 32 px", "64 x 64 px")


def test_class_without_ground_truth(plate: Path) -> None:
    shutil.rmtree(plate / "ground_truth")
    dataset = open_class(plate)
    dataset.check_files()
    assert [r.is_anomalous for r in dataset.records] == [False] * 3 + [True] * 3
    assert not dataset.has_masks
    assert set(dataset[4]) == {"image", "index"}


def test_only_good_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test" / "spot")
    shutil.rmtree(plate / "ground_truth" / "spot")
    dataset = open_class(plate)
    assert dataset.has_masks
    assert [int(dataset[i]["mask"].sum()) for i in range(3)] == [0, 0, 0]


def test_only_anomalous_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test" / "good")
    dataset = open_class(plate)
    assert names(dataset) == ["spot/000.png", "spot/001.png", "spot/002.png"]
    assert all(int(dataset[i]["mask"].sum()) == 16 * 16 for i in range(3))
    assert resolve_categories(DatasetConfig("folder", str(plate.parent), ("plate",)), ()) == ["plate"]


def test_masks_of_good_images_are_allowed(plate: Path) -> None:
    for i in range(3):
        path = plate / "ground_truth" / "good" / f"{i:03d}_mask.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (IMAGE_PX, IMAGE_PX)).save(path)
    dataset = open_class(plate)
    dataset.check_files()
    assert [r.mask_path for r in dataset.records[:3]] == [None] * 3
    assert int(dataset[0]["mask"].sum()) == 0


# Items


def test_item(plate: Path) -> None:
    dataset = open_class(plate)
    item = dataset[3]
    assert item["index"] == 3
    assert item["image"].dtype == item["mask"].dtype == torch.uint8
    with Image.open(plate / "test" / "spot" / "000.png") as image:
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), np.asarray(image))
    expected = np.zeros((IMAGE_PX, IMAGE_PX), dtype=np.uint8)
    expected[20:36, 24:40] = 1
    np.testing.assert_array_equal(item["mask"].numpy(), expected)
    np.testing.assert_array_equal(dataset.full_mask(3), expected)
    assert dataset.full_mask(0).sum() == 0


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_masks_stay_binary_and_padding_is_ignored(plate: Path, mode: str) -> None:
    for folder, mask in ((plate / "test" / "spot", False), (plate / "ground_truth" / "spot", True)):
        for path in folder.iterdir():
            pixels = np.zeros((50, 90), dtype=np.uint8)
            pixels[20:30, 30:60] = 255
            Image.fromarray(pixels if mask else np.dstack([pixels] * 3)).save(path)
    dataset = InspectionDataset(plate.parent, "plate", DatasetSplit.TEST, PreprocessingConfig(64, 56, mode))
    dataset.check_files()
    values = {int(v) for v in dataset[3]["mask"].unique()}
    assert values == ({0, 1, IGNORED} if mode == "letterbox" else {0, 1})


def test_turned_photograph_with_an_upright_mask(plate: Path) -> None:
    # A phone stores the sensor's rows and a tag; annotation tools save the mask as the picture is seen.
    seen = np.zeros((40, 64, 3), dtype=np.uint8)
    seen[5:15, 40:60] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (plate / "test" / "spot" / "000.png").unlink()
    Image.fromarray(np.rot90(seen).copy()).save(plate / "test" / "spot" / "000.jpg", exif=exif, quality=100)
    Image.fromarray(seen[..., 0]).save(plate / "ground_truth" / "spot" / "000_mask.png")
    dataset = InspectionDataset(
        plate.parent, "plate", DatasetSplit.TEST, PreprocessingConfig(64, 64, "letterbox")
    )  # as wide as the image, so that nothing is scaled
    dataset.check_files()
    item = dataset[3]
    inside = item["mask"] != IGNORED
    assert torch.equal((item["image"][0] > 127) & inside, item["mask"] == 1)


def test_train_images_have_no_mask(plate: Path) -> None:
    assert set(open_class(plate, DatasetSplit.TRAIN)[0]) == {"image", "index"}


@pytest.mark.parametrize(("width", "mode", "warned"), [(128, "shorter", True), (128, "letterbox", False)])
def test_warning_of_long_images(
    plate: Path, warnings: pytest.LogCaptureFixture, width: int, mode: str, warned: bool
) -> None:
    Image.new("RGB", (width, 64), "gray").save(plate / "train" / "good" / "003.png")
    dataset = InspectionDataset(plate.parent, "plate", DatasetSplit.TRAIN, PreprocessingConfig(64, 56, mode))
    dataset.check_files()
    if not warned:
        assert not warnings.messages
        return
    # 56 x 56 of 64 x 128 px are kept, of a square image 56 x 56 of 64 x 64.
    assert len(warnings.messages) == 1
    for part in ("plate", "003.png", "62 %", "23 %", "--resize_mode letterbox"):
        assert part in warnings.messages[0]


def test_no_warning_of_square_and_nearly_square_images(plate: Path, warnings: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (643, 640), "gray").save(plate / "train" / "good" / "003.png")
    InspectionDataset(plate.parent, "plate", preprocessing=PreprocessingConfig(64, 56)).check_files()
    assert not warnings.messages


def test_warning_of_12_bits_in_a_16_bit_file(plate: Path, warnings: pytest.LogCaptureFixture) -> None:
    raw = np.random.default_rng(0).integers(0, 4096, (IMAGE_PX, IMAGE_PX), dtype=np.uint16)
    raw[0, 0] = 4095
    Image.fromarray(raw).save(plate / "train" / "good" / "000.png")
    open_class(plate, DatasetSplit.TRAIN).check_files()
    assert len(warnings.messages) == 1
    assert "000.png reads as 16 of 255" in warnings.messages[0]


# Damaged files


@pytest.mark.parametrize("content", [b"", b"not an image"])
@pytest.mark.parametrize("relative", ["train/good/002.png", "test/spot/001.png", "ground_truth/spot/001_mask.png"])
def test_damaged_file_is_found_by_its_header(plate: Path, content: bytes, relative: str) -> None:
    (plate / relative).write_bytes(content)
    split = DatasetSplit.TRAIN if relative.startswith("train") else DatasetSplit.TEST
    with pytest.raises(DataError) as caught:
        open_class(plate, split).check_files()
    assert_one_line(caught.value, plate / relative, "not a readable")


# Subsets


def test_train_val_split_is_disjoint_and_complete(plate: Path) -> None:
    everything = [r.path for r in list_train(plate.parent, "plate")]
    seen = set()
    for seed in range(20):
        parts = [
            [r.path for r in open_class(plate, split, train_val_split=0.5, seed=seed).records]
            for split in (DatasetSplit.TRAIN, DatasetSplit.VAL)
        ]
        assert [len(part) for part in parts] == [3, 3]
        assert sorted(parts[0] + parts[1]) == everything
        assert all(part == sorted(part) for part in parts)
        seen.add(tuple(parts[0]))
    assert len(seen) > 5, "the seed decides which images are held out"


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.9, 9), (0.7, 7), (0.29, 2), (0.3, 3), (0.01, 1)])
def test_train_val_split_counts(tmp_path: Path, share: float, count: int) -> None:
    folder = write_category(tmp_path, "rod", num_train=10, num_test=1)
    assert len(open_class(folder, DatasetSplit.TRAIN, train_val_split=share)) == count
    assert len(open_class(folder, DatasetSplit.VAL, train_val_split=share)) == 10 - count


def test_limit_train_is_drawn_with_the_seed(plate: Path) -> None:
    draws = [names(open_class(plate, DatasetSplit.TRAIN, limit=2, seed=seed)) for seed in range(20)]
    assert draws == [names(open_class(plate, DatasetSplit.TRAIN, limit=2, seed=seed)) for seed in range(20)]
    assert all(len(set(d)) == 2 and d == sorted(d) for d in draws)
    assert len({tuple(d) for d in draws}) > 5
    assert len(open_class(plate, DatasetSplit.TRAIN, limit=100)) == 6


def test_limit_train_keeps_held_out_images_out(plate: Path) -> None:
    train = open_class(plate, DatasetSplit.TRAIN, train_val_split=0.5, limit=2, seed=3)
    held_out = open_class(plate, DatasetSplit.VAL, train_val_split=0.5, limit=2, seed=3)
    assert len(train) == 2
    assert len(held_out) == 3, "a limit on training images takes nothing from the calibration"
    assert not {r.path for r in train.records} & {r.path for r in held_out.records}


def test_classes_draw_independently(small_dataset: Path) -> None:
    def draws(category: str) -> list[list[str]]:
        return [names(open_class(small_dataset / category, DatasetSplit.TRAIN, limit=3, seed=s)) for s in range(9)]

    assert draws("plate") != draws("rod")


def test_limit_test_is_the_same_for_every_seed(tmp_path: Path) -> None:
    folder = write_category(tmp_path, "rod", num_train=1, num_test=8)
    draws = [names(open_class(folder, limit=3, seed=seed)) for seed in range(5)]
    assert all(d == draws[0] for d in draws)
    assert [name.split("/")[0] for name in draws[0]] == ["good"] * 3 + ["spot"] * 3
    assert names(open_class(folder, limit=8)) == names(open_class(folder))


def test_adding_a_defect_type_changes_no_other_draw(tmp_path: Path) -> None:
    folder = write_category(tmp_path, "rod", num_train=1, num_test=8)
    before = names(open_class(folder, limit=3))
    write_texture(folder / "test" / "dent" / "000.png", 0)
    write_mask(folder / "ground_truth" / "dent" / "000_mask.png")
    assert [n for n in names(open_class(folder, limit=3)) if not n.startswith("dent")] == before


# Which classes


def resolve(root: Path, *categories: str, published: tuple[str, ...] = ()) -> list[str]:
    return resolve_categories(DatasetConfig("folder", str(root), categories), published)


def refused(root: Path, *categories: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve(root, *categories)
    assert_one_line(caught.value)
    return str(caught.value)


def test_order_of_classes(small_dataset: Path) -> None:
    write_category(small_dataset, "axle")
    assert resolve(small_dataset) == ["axle", "plate", "rod"]
    assert resolve(small_dataset, published=("rod", "gone", "plate")) == ["rod", "plate", "axle"]
    assert resolve(small_dataset, "rod", "axle") == ["rod", "axle"], "as typed"


def test_files_beside_the_classes_do_no_harm(small_dataset: Path) -> None:
    (small_dataset / "license.txt").touch()
    (small_dataset / "figures").mkdir()
    assert resolve(small_dataset) == ["plate", "rod"]


def test_missing_data_path(tmp_path: Path) -> None:
    message = refused(tmp_path / "gone")
    assert str(tmp_path / "gone") in message
    assert "does not exist" in message


def test_data_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mpdd.zip").touch()
    assert "is a file" in refused(tmp_path / "mpdd.zip")


def test_data_path_is_empty(tmp_path: Path) -> None:
    assert "no class found" in refused(tmp_path)


def test_data_path_is_a_class(plate: Path) -> None:
    message = refused(plate)
    assert "is a class itself" in message
    assert "-d" in message


def test_data_path_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(root: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(inspection, "found_categories", locked)
    with pytest.raises(ConfigurationError, match="Permission denied") as caught:
        resolve_categories(DatasetConfig("folder", str(tmp_path)), ())
    assert_one_line(caught.value, tmp_path)


def test_missing_class_names_those_found(small_dataset: Path) -> None:
    assert "found plate, rod" in refused(small_dataset, "bottle")
    message = refused(small_dataset, "plate", "plat")
    assert "class 'plat' not found" in message
    assert "found plate, rod" in message
    assert "did you mean plate?" in message


@pytest.mark.parametrize("category", ["", ".", "..", "plate/", "../data set/plate"])
def test_a_class_is_a_name_not_a_path(small_dataset: Path, category: str) -> None:
    assert "found plate, rod" in refused(small_dataset, category)


def test_no_training_images(plate: Path) -> None:
    for path in (plate / "train" / "good").iterdir():
        path.unlink()
    for name in ("notes.txt", ".hidden.png"):
        (plate / "train" / "good" / name).touch()
    (plate / "train" / "good" / "folder.png").mkdir()
    message = refused(plate.parent, "plate")
    assert f"no training images in {str(plate / 'train' / 'good')!r}" in message
    assert ".png" in message


@pytest.mark.parametrize("removed", ["train", "train/good"])
def test_missing_training_folder(plate: Path, removed: str) -> None:
    shutil.rmtree(plate / removed)
    assert "no training images" in refused(plate.parent, "plate")


def test_no_test_images(plate: Path) -> None:
    shutil.rmtree(plate / "test")
    assert f"no test images in {str(plate / 'test')!r}" in refused(plate.parent, "plate")
    (plate / "test" / "good").mkdir(parents=True)
    assert "no test images" in refused(plate.parent)


@pytest.mark.parametrize("split", ["train", "test"])
def test_good_in_other_letters_would_be_a_defect_type(plate: Path, split: str) -> None:
    (plate / split / "good").rename(plate / split / "Good")
    message = refused(plate.parent, "plate")
    assert "Good" in message
    assert "expected the name 'good'" in message


def test_registry() -> None:
    assert len(set(MVTecDataset.categories)) == 15
    assert len(set(MPDDDataset.categories)) == 6
    assert {"mvtec", "mpdd", "folder"} <= set(DATASETS)
    for name, dataset in DATASETS.items():
        assert dataset_class(name) is dataset
    with pytest.raises(ConfigurationError, match="did you mean mvtec"):
        dataset_class("mvtech")


# Batches


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_come_whole_and_in_order(plate: Path, num_workers: int, batch_size: int) -> None:
    dataset = open_class(plate)
    loader = ImageLoader(dataset, batch_size, num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-6 // batch_size)
    assert loader.num_images == 6
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(6))
    assert all(b["image"].dtype == b["mask"].dtype == torch.uint8 for b in batches)
    for key in ("image", "mask"):
        expected = torch.stack([dataset[i][key] for i in range(6)])
        assert torch.equal(torch.cat([b[key] for b in batches]), expected)


def test_a_loader_can_be_read_twice(plate: Path) -> None:
    loader = ImageLoader(open_class(plate, DatasetSplit.TRAIN), 4)
    first, second = ([b["image"] for b in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_one_line_also_from_a_worker(plate: Path, num_workers: int) -> None:
    path = plate / "test" / "spot" / "001.png"
    path.write_bytes(path.read_bytes()[:200])  # a whole header, so that only decoding finds it
    dataset = open_class(plate)
    dataset.check_files()
    with pytest.raises(DataError) as caught:
        list(ImageLoader(dataset, 2, num_workers))
    assert_one_line(caught.value, f"{path}: not a readable image")


def test_reading_is_left_early_without_a_thread(plate: Path) -> None:
    threads = threading.active_count()
    batches = iter(ImageLoader(open_class(plate), 1, 2))
    next(batches)
    assert threading.active_count() > threads, "others are read ahead"
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_page_locked_batches(plate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[torch.Tensor] = []

    def pin(values: torch.Tensor) -> torch.Tensor:  # a machine without a GPU cannot lock pages
        locked.append(values.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = list(ImageLoader(open_class(plate), 4, 2, pin_memory=True))
    assert len(locked) == len(batches) == 2
    assert all(batch["image"] is values for batch, values in zip(batches, locked, strict=True))


def test_an_empty_part_has_no_batches(plate: Path) -> None:
    held_out = open_class(plate, DatasetSplit.VAL)
    held_out.check_files()
    assert list(ImageLoader(held_out, 2, 2)) == []


@pytest.mark.slow
def test_real_classes_are_complete(real_data: Path) -> None:
    counts = {"bottle": (209, 20, 63), "metal_plate": (54, 26, 71)}
    for category, expected in counts.items():
        (root,) = (p.parent for p in real_data.glob(f"*/{category}"))
        train, test = (
            InspectionDataset(root, category, split, PreprocessingConfig())
            for split in (DatasetSplit.TRAIN, DatasetSplit.TEST)
        )
        test.check_files()
        anomalous = [i for i, r in enumerate(test.records) if r.is_anomalous]
        assert (len(train), len(test) - len(anomalous), len(anomalous)) == expected
        assert test.has_masks
        assert all(test.full_mask(i).any() for i in anomalous)


def test_stored_models_are_evaluated_without_training_images(tmp_path: Path) -> None:
    shutil.rmtree(write_category(tmp_path, "plate") / "train")
    config = DatasetConfig("folder", str(tmp_path))
    assert resolve_categories(config, (), needs_training=False) == ["plate"]
    with pytest.raises(ConfigurationError, match="no training images"):
        resolve_categories(config, ())
