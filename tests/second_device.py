"""A second device without hardware: tensors that say they lie elsewhere, and refuse to be mixed with those on the CPU as a GPU's do.

They hold a CPU tensor and work on it, so that results are the CPU's to the bit, whatever control flow depends on them. (`FakeTensorMode` has no
values, no backward pass without a GPU, and does not mind a CPU generator.) The device is called ``lazy``, a name that torch knows and that autograd
runs in the CPU's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("lazy", 0)
aten = torch.ops.aten
_CROSSING = (aten.copy_.default, aten._to_copy.default)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations whose indices, the second argument, may lie on the CPU."""
_JOINING = (aten.cat.default, aten.stack.default)
"""Operations that do not take a scalar from the CPU."""


class SecondTensor(Tensor):
    """A tensor on the second device; ``home`` holds its values."""

    home: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, home: Tensor) -> SecondTensor:
        layout = {"strides": home.stride(), "storage_offset": home.storage_offset(), "dtype": home.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, home.size(), device=SECOND, **layout)
        tensor.home = home
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _work(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.home.tolist()  # which torch refuses to subclasses

    def __repr__(self) -> str:
        return f"SecondTensor({self.home})"


def _work(function: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation on the CPU's values if a GPU would run it, too."""
    given = tree_leaves((args, kwargs))
    there = [value for value in given if isinstance(value, SecondTensor)]
    onto = bool(there) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == SECOND.type
    if function is aten.copy_.default:
        onto = isinstance(args[0], SecondTensor)
    elif there and function not in _CROSSING:
        bound = tree_leaves((args[0], *args[2:], kwargs)) if function in _INDEXING else given
        here = [value for value in bound if isinstance(value, Tensor) and not isinstance(value, SecondTensor)]
        if any(value.ndim or function in _JOINING for value in here):
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {SECOND} and cpu")
    if onto and any(isinstance(value, torch.Generator) for value in given):
        raise RuntimeError(f"{function}: expected a generator of {SECOND}, found one of the cpu")

    def home(value: Any) -> Any:
        if isinstance(value, SecondTensor):
            return value.home
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == SECOND.type else value

    args, kwargs = tree_map(home, (args, kwargs))
    known = {id(tensor.home): tensor for tensor in there}  # what is changed in place stays the same object

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return SecondTensor(value) if onto else value

    return tree_map(back, function(*args, **kwargs))


class _Factories(TorchFunctionMode):
    """Functions that torch does not hand to a dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == SECOND:
            return function(*args, **{**kwargs, "device": "cpu"}).to(SECOND)
        if function in (Tensor.new_tensor,) and args[0].device == SECOND:
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(SECOND)
        return function(*args, **kwargs)


class SecondDevice(TorchDispatchMode):
    """Inside it, tensors can be made on and moved to :data:`SECOND`.

    Attributes:
        convolutions: How many ran on each device, by its type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = {"cpu": 0, SECOND.type: 0}
        self._factories = _Factories()

    def __enter__(self) -> SecondDevice:
        self._factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten.convolution.default:
            self.convolutions[args[0].device.type] += 1
        kwargs = kwargs or {}
        if SecondTensor not in types and torch.device(kwargs.get("device") or "cpu").type != SECOND.type:
            return function(*args, **kwargs)  # nobody's business
        return _work(function, args, kwargs)


class _SecondAccelerator(CPUAccelerator):
    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [SECOND]

    def setup_device(self, device: torch.device) -> None:
        pass


@contextmanager
def second_device(monkeypatch: Any) -> Iterator[SecondDevice]:
    """The same, where Lightning's ``accelerator="auto"`` finds the second device, as it would find a GPU.

    Whoever keeps torch's random state without saying of which devices fails: on a machine with several GPUs that takes hold of them all.
    """
    autocast, enabled, fork_rng = torch.autocast, torch.is_autocast_enabled, torch.random.fork_rng

    def known(device: str) -> str:
        return "cpu" if device == SECOND.type else device

    def fork_named(devices: Any = None, **kwargs: Any) -> Any:
        if devices is None:
            raise AssertionError("fork_rng() without devices takes hold of every GPU")
        return fork_rng(devices, **kwargs)

    monkeypatch.setattr(torch.random, "fork_rng", fork_named)
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast(known(device), *args, **kwargs))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled(known(device)))
    monkeypatch.setitem(
        AcceleratorRegistry,
        SECOND.type,
        {"accelerator": _SecondAccelerator, "init_params": {}, "accelerator_name": SECOND.type},
    )
    monkeypatch.setattr(_AcceleratorConnector, "_choose_auto_accelerator", staticmethod(lambda: SECOND.type))
    monkeypatch.setattr(
        _AcceleratorConnector,
        "_choose_strategy",
        lambda self: SingleDeviceStrategy(device=SECOND if self._accelerator_flag == SECOND.type else "cpu"),
    )
    with SecondDevice() as device:
        yield device
