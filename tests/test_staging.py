"""Embeddings on their way from a GPU to the host: complete, in order, with one batch computed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_images import BACKBONE, PREPROCESSING, Batches, random_images

from patchcore.configs import PatchCoreConfig, RuntimeConfig, TrainingSource
from patchcore.memory.buffers import Buffers
from patchcore.methods import staging
from patchcore.methods.patchcore import PatchCore
from patchcore.methods.staging import StagedWrites, writes_from
from patchcore.methods.training_features import embed_images

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class StandInDevice:
    """Does what it was asked for when somebody waits for it, or at once: the two ends of what a GPU may do.

    Attributes:
        log: What happened, in order: "give n" (batch n was asked for), "wait n" (somebody waited for it).
        locked: Sizes of the page-locked memory that was made.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.log: list[str] = []
        self.locked: list[int] = []
        self._asked: list[Callable[[], object]] = []
        self._num_done = 0

    def ask(self, work: Callable[[], object]) -> None:
        self.log.append(f"give {len(self._asked)}")
        self._asked.append(work)
        if self.at_once:
            self._do_until(len(self._asked))

    def mark(self) -> SimpleNamespace:
        place = len(self._asked)

        def synchronize() -> None:
            self.log.append(f"wait {place - 1}")
            self._do_until(place)

        return SimpleNamespace(synchronize=synchronize)

    def page_locked(self, num_values: int) -> torch.Tensor:
        self.locked.append(num_values)
        return torch.full((num_values,), torch.nan)  # what is read too early shows

    def copying(self, batch: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], None]:
        """Return what asks the device to copy a batch; until then the rooms hold what they held."""

        def fill(rooms: Sequence[torch.Tensor]) -> None:
            assert [room.shape for room in rooms] == [part.shape for part in batch]
            self.ask(lambda: [room.copy_(part) for room, part in zip(rooms, batch, strict=True)])

        return fill

    def _do_until(self, place: int) -> None:
        for work in self._asked[self._num_done : place]:
            work()
        self._num_done = max(self._num_done, place)


@pytest.fixture(params=[False, True], ids=["late", "at once"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandInDevice:
    """Return a device that stands in for all of CUDA."""
    found = StandInDevice(request.param)
    monkeypatch.setattr(staging, "_mark_on", lambda _: found.mark())
    monkeypatch.setattr(staging, "_page_locked", found.page_locked)
    return found


def batches_of(*sizes: int) -> list[list[torch.Tensor]]:
    """Return batches of these numbers of images, each of two tensors with values that appear nowhere else."""
    numbers = iter(torch.arange(1.0, 1 + 10 * sum(sizes)).split([n for size in sizes for n in (6 * size, 4 * size)]))
    return [[next(numbers).view(size, 3, 2), next(numbers).view(size, 4)] for size in sizes]


@pytest.mark.parametrize("sizes", [(3,), (3, 3), (3, 3, 3, 1), (2, 2, 2, 2, 2, 2, 1), (1, 3, 2, 4, 1)])
def test_every_batch_arrives_whole_where_it_belongs(sizes: tuple[int, ...], device: StandInDevice) -> None:
    batches = batches_of(*sizes)
    arrays = [torch.full((sum(sizes), *part.shape[1:]), -1.0) for part in batches[0]]
    parts = zip(*(array.split(sizes) for array in arrays), strict=True)
    with writes_from(GPU) as write:
        for batch, rooms in zip(batches, parts, strict=True):
            write(list(rooms), device.copying(batch))
    for number, array in enumerate(arrays):
        assert torch.equal(array, torch.cat([batch[number] for batch in batches]))


def test_a_batch_is_waited_for_once_the_next_one_is_given(device: StandInDevice) -> None:
    with writes_from(GPU) as write:
        for batch in batches_of(2, 2, 2, 1):
            write([torch.empty_like(part) for part in batch], device.copying(batch))
    assert device.log == ["give 0", "give 1", "wait 0", "give 2", "wait 1", "give 3", "wait 2", "wait 3"]
    assert device.locked == [20, 20], "two slots of a whole batch, made once"


def test_memory_grows_with_a_larger_batch(device: StandInDevice) -> None:
    with writes_from(GPU) as write:
        for batch in batches_of(1, 3, 2, 2):
            write([torch.empty_like(part) for part in batch], device.copying(batch))
    assert device.locked == [10, 30, 20], "the first slot for one image, the second for three, the first for two"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
def test_after_an_error_nobody_waits(error: BaseException, device: StandInDevice) -> None:
    """The device may have failed, and its answer would hide the error."""

    def fail(rooms: Sequence[torch.Tensor]) -> None:
        raise error

    batches = batches_of(2, 2, 2)
    arrays = [[torch.full_like(part, -1.0) for part in batch] for batch in batches]
    with pytest.raises(type(error)), writes_from(GPU) as write:
        for number in (0, 1):
            write(arrays[number], device.copying(batches[number]))
        write(arrays[2], fail)
    assert device.log == ["give 0", "give 1", "wait 0"]
    assert all(torch.equal(array, part) for array, part in zip(arrays[0], batches[0], strict=True))
    assert all((array == -1).all() for array in (*arrays[1], *arrays[2])), "no part of what is not complete"


def test_nothing_to_write(device: StandInDevice) -> None:
    with writes_from(GPU):
        pass
    assert device.log == [] and device.locked == []


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_other_devices_write_at_once_into_the_arrays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "StagedWrites", pytest.fail)
    arrays, given = [torch.zeros(2), torch.zeros(3)], []
    with writes_from(torch.device(name)) as write:
        write(arrays, lambda rooms: given.extend(rooms))
        assert given[0] is arrays[0] and given[1] is arrays[1]


def test_marks_are_set_on_the_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs the current one may be another."""
    recorded = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "a thread that spins takes a core from those that read images"

        def record(self, stream: str) -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert isinstance(staging._mark_on(GPU), Event)
    assert recorded == ["stream of cuda:1"]


# ---------------------------------------------------------------- with a network


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_images(7, seed=3)


def model() -> PatchCore:
    found = PatchCore.prepare(PatchCoreConfig(BACKBONE), PREPROCESSING, RuntimeConfig())(TrainingSource(), CPU)
    assert isinstance(found, PatchCore)
    return found


@pytest.mark.parametrize("budget_bytes", [None, 0], ids=["memory", "files"])
def test_embeddings_are_the_same_bit_for_bit(
    budget_bytes: int | None, images: torch.Tensor, device: StandInDevice, tmp_path: Path
) -> None:
    plain, staged = model(), model()
    staged.device = GPU  # where its results are said to be; they are computed on the CPU
    (expected,) = embed_images(Batches(images), [plain], Buffers(), "plain").embeddings.values()
    assert device.locked == [], "a CPU needs no slots"
    (found,) = embed_images(Batches(images), [staged], Buffers(budget_bytes, tmp_path), "staged").embeddings.values()
    assert torch.equal(found, expected) and bool(found.any())
    assert device.locked == 2 * [3 * expected[0].numel()], "three images, twice"
    assert len(device.log) == 3, "one wait for each batch"


def test_members_of_one_backbone_share_the_slots(images: torch.Tensor, device: StandInDevice) -> None:
    wide, narrow = model(), model()
    narrow_config = PatchCoreConfig(BACKBONE, target_embed_dimension=96)
    narrow = PatchCore(narrow_config, type(wide.embedder)(wide.embedder.extractor, narrow_config), PREPROCESSING)
    expected = embed_images(Batches(images), [wide, narrow], Buffers(), "plain").embeddings
    wide.device = narrow.device = GPU
    found = embed_images(Batches(images), [wide, narrow], Buffers(), "staged").embeddings
    assert len(found) == 2
    for embedder, embeddings in found.items():
        assert torch.equal(embeddings, expected[embedder])
    assert device.locked == 2 * [3 * sum(embeddings[0].numel() for embeddings in found.values())]


def test_an_unreadable_image_ends_the_loop(images: torch.Tensor, device: StandInDevice) -> None:
    class Broken(Batches):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            yield {"image": self.images[:3]}
            raise OSError("unreadable")

    staged = model()
    staged.device = GPU
    with pytest.raises(OSError, match="unreadable"):
        embed_images(Broken(images), [staged], Buffers(), "staged")
    assert device.log == [], "the first batch was still in its slot"


def test_staged_writes_leave_nothing_behind(device: StandInDevice) -> None:
    """`finish` is asked for once; a second time there is nothing to write."""
    staged = StagedWrites(device.mark, device.page_locked)
    (batch,) = batches_of(2)
    arrays = [torch.zeros_like(part) for part in batch]
    staged.write(arrays, device.copying(batch))
    staged.finish()
    arrays[0].zero_()
    staged.finish()
    assert not arrays[0].any() and torch.equal(arrays[1], batch[1])
