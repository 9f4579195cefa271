"""Flat search by faiss, with the arithmetic that the processor has.

The BLAS library inside the faiss packages names the processors it knows, and computes as on one of 2004 on those that
came after it: five times slower here. It can be told; without that, faiss would be easy to beat.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}  # what torch found: the newest of it that the library knows


def tell_faiss_the_processor() -> None:
    """Name the processor to faiss's BLAS library, which looks when faiss is first imported."""
    core = CORES.get(torch.backends.cpu.get_cpu_capability())
    if core is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)


def flat_index(bank: np.ndarray, threads: int) -> Any:
    """Return a flat index of Euclidean distances over a memory bank float32 [M, D].

    Args:
        bank: Its rows.
        threads: Of the search.
    """
    tell_faiss_the_processor()
    import faiss

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)  # the two may share a number
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    return index
