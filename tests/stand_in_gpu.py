"""A GPU that is none: its tensors lie in ordinary memory, and it refuses and counts what a GPU refuses and waits for.

Tensors of both devices in one operation are refused. Written down is what makes the host wait: values that come back
without `non_blocking`, numbers that Python asks for, and results whose size depends on values. What a kernel of CUDA
computes, and how fast, no stand-in can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from patchcore.features import layers
from patchcore.methods import staging

GPU = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
_DEPEND_ON_VALUES = (
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
)
_BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")  # which take indices of the host as well


class GpuTensor(torch.Tensor):
    """A tensor that says it is on the GPU; its values are in the attribute `values`."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=GPU
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called after the GPU was gone")


class StandInGpu(TorchDispatchMode):
    """Carries out what is asked of the GPU.

    Attributes:
        waits: What the host had to wait for, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        wrappers = {id(leaf.values): leaf for leaf in leaves if isinstance(leaf, GpuTensor)}
        on_gpu = bool(wrappers)
        if func is _ATEN.copy_.default:
            on_gpu = isinstance(args[0], GpuTensor)
        elif kwargs.get("device") is not None:
            on_gpu = kwargs["device"].type == "cuda"
        if wrappers:
            self._look_at(func, args, kwargs, leaves, on_gpu)
        result = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))

        def on_device(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return wrappers[id(leaf)] if id(leaf) in wrappers else GpuTensor(leaf)

        return tree_map(on_device, result) if on_gpu else result

    def _look_at(self, func: Any, args: Any, kwargs: Any, leaves: list[Any], on_gpu: bool) -> None:
        name = func.overloadpacket.__name__
        if func in _COPIES:
            blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not on_gpu and blocking:
                self.waits.append(f"{name} to the host")
            return
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, GpuTensor) and leaf.dtype == torch.bool]
        if name in _DEPEND_ON_VALUES or (name in _BY_INDEX and masks):
            self.waits.append(name)
        at_home = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, GpuTensor)]
        if name in _BY_INDEX and isinstance(args[0], GpuTensor):
            at_home = [leaf for leaf in at_home if not any(leaf is index for index in args[1])]
        if any(leaf.ndim for leaf in at_home):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")


def _begin_without_gradients(context: Any) -> None:
    context.stand_in = torch.no_grad()
    context.stand_in.__enter__()


def _end_without_gradients(context: Any, *error: Any) -> None:
    context.stand_in.__exit__(*error)


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, GpuTensor):
        return leaf.values
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


@contextmanager
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGpu]:
    """Let `cuda:0` be a stand-in while the context lasts; where there is a real one, it is not for this process."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # else indexing asks the driver
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # which looks for a driver
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # they keep their type else
    monkeypatch.setattr(
        layers, "_EXTRACTORS", WeakValueDictionary()
    )  # one that is there would be moved, for others too
    done: Callable[[], None] = lambda: None  # noqa: E731
    monkeypatch.setattr(staging, "_mark_on", lambda device: SimpleNamespace(synchronize=done))
    monkeypatch.setattr(staging, "_page_locked", torch.empty)
    # Inference mode has no views of tensors of another class.
    monkeypatch.setattr(torch.inference_mode, "__enter__", _begin_without_gradients)
    monkeypatch.setattr(torch.inference_mode, "__exit__", _end_without_gradients)
    with StandInGpu() as gpu:
        yield gpu
