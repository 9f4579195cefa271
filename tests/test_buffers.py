"""Large arrays: how many are in memory, what the files leave, and what a full disk says."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from patchcore.errors import DataError
from patchcore.memory import buffers as buffers_module
from patchcore.memory.buffers import Buffers

USAGE = namedtuple("USAGE", "total used free")


def is_on_disk(array: torch.Tensor) -> bool:
    """Return whether the pages of an array belong to a file, as the system's list of mappings says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if start <= array.data_ptr() < end:
            return line.split()[4] != "0"  # the inode
    raise AssertionError("not mapped")


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")


@needs_proc
def test_arrays_are_in_memory_up_to_the_budget_and_in_files_beyond(tmp_path: Path) -> None:
    buffers = Buffers(4 * 3000, tmp_path)
    arrays = [buffers.empty(*shape) for shape in ((20, 50), (2, 500, 3), (500, 2), (999,), (1,))]
    # 1,000 fit, 3,000 more do not, 1,000 more do, then 999 and 1 fill it to the last number.
    assert [is_on_disk(a) for a in arrays] == [False, True, False, False, False]
    assert buffers.held_bytes == 4 * 3000
    assert [tuple(a.shape) for a in arrays] == [(20, 50), (2, 500, 3), (500, 2), (999,), (1,)]
    assert all(a.dtype == torch.float32 and a.data_ptr() % 4096 == 0 and not a.any() for a in arrays)


@needs_proc
def test_without_a_budget_everything_is_in_memory(tmp_path: Path) -> None:
    assert not is_on_disk(Buffers(None, tmp_path).empty(1000, 1000))


def test_memory_is_given_back_with_the_last_view(tmp_path: Path) -> None:
    buffers = Buffers(4000, tmp_path)
    view = buffers.empty(10, 100)[3:5].flatten()
    view.fill_(7)
    assert buffers.held_bytes == 4000
    assert float(view.sum()) == 7 * 200
    del view
    assert buffers.held_bytes == 0


def test_an_array_of_nothing_takes_nothing(tmp_path: Path) -> None:
    buffers = Buffers(0, tmp_path)
    assert buffers.empty(0, 5).shape == (0, 5)
    assert buffers.held_bytes == 0


def test_files_have_no_name_and_hold_what_is_written(tmp_path: Path) -> None:
    array = Buffers(0, tmp_path).empty(300, 70)
    values = torch.rand(300, 70, generator=torch.Generator().manual_seed(0))
    array.copy_(values)
    assert torch.equal(array, values)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from patchcore.memory.buffers import Buffers
array = Buffers(0, Path(sys.argv[1])).empty(1000, 1000).fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers_module.shutil, "disk_usage", lambda folder: USAGE(10**9, 10**9 - 4 * 10**6, 4 * 10**6))
    monkeypatch.setattr(buffers_module.tempfile, "TemporaryFile", lambda **_: pytest.fail("opened a file"))
    with pytest.raises(DataError) as caught:
        Buffers(0, tmp_path).empty(3000, 1000)
    expected = (
        "features above --memory_budget need a file of 12 MB, found 4 MB free for it in "
        f"{str(tmp_path)!r}: free some space there, write the results to a larger disk, or raise the budget"
    )
    assert str(caught.value) == expected


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system claims no space in advance")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_space_that_goes_in_between_or_beyond_a_quota_gives_the_same_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, start: int, length: int) -> None:
        assert (start, length) == (0, 4 * 3000)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DataError, match="need a file of"):
        Buffers(0, tmp_path).empty(3000)


def test_space_is_claimed_and_not_only_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with holes would end the process where the disk fills up later."""
    found = []

    def mapped(descriptor: int, length: int) -> mmap.mmap:
        found.append((os.fstat(descriptor).st_blocks * 512, length))
        return original(descriptor, length)

    original = mmap.mmap
    monkeypatch.setattr(buffers_module.mmap, "mmap", mapped)
    Buffers(0, tmp_path).empty(1000, 1000)
    ((claimed, length),) = found
    assert claimed >= length == 4 * 10**6


def test_too_little_memory_is_one_line_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"need \d+ MB more memory than there is: type a --memory_budget"):
        Buffers().empty(2**44)  # 70 TB
