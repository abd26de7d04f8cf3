"""An accelerator made of the CPU: its tensors say that they live elsewhere and refuse the CPU's, transfers are counted.

What a GPU would not forgive shows on a machine that has none: tensors of two devices in one operator, numbers read
back in a step, small things sent there in a step (the host waits for both), float64 where a device has none (MPS).
Numbers are computed by the CPU's kernels, so a run gives the CPU's figures to the last bit. No kernel, no stream and
no speed of any GPU is tested by this.

Import it before codistill, and before the first backward of the process: autograd counts the devices once.
"""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
TAKE_HOST_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")  # and send them over


class _Module(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("simulated", _Module())
DEVICE = torch.device("simulated:0")


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=DEVICE,
        )

    def __init__(self, raw):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside the simulation")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, *_args, **_options):
        raise TypeError("a tensor of the device is no NumPy array; use .cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnDevice(self.raw.detach().clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.raw.__reduce_ex__(protocol)  # a checkpoint is read to the CPU anyway


class Simulated(TorchDispatchMode):
    """While it is on, `DEVICE` can be used.

    Args:
        float64: Whether the device has it.
    """

    current = None

    def __init__(self, float64=True):
        super().__init__()
        self.float64 = float64
        self.waits = Counter()
        """Times the host waited for the device, by operator."""

    def __enter__(self):
        Simulated.current = self
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        there = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
        if name in ("_to_copy", "copy_"):
            from_there = isinstance(args[1 if name == "copy_" else 0], OnDevice)
            to_there = isinstance(args[0], OnDevice) if name == "copy_" else there
            sent = to_there and not from_there and kwargs.get("non_blocking", args[2:3] == (True,))
            self.waits[name] += from_there != to_there and not sent  # the host goes on where `non_blocking`
        elif ours:
            self._check(name, tensors)
            self.waits[name] += name in READS
        if there and asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        own = {id(x.raw): x for x in ours}
        args, kwargs = tree_map_only(OnDevice, lambda x: x.raw, (args, kwargs))
        return tree_map(lambda x: self._as_it_is_there(x, own, there), func(*args, **kwargs))

    def _check(self, name, tensors):
        """Refuse what a GPU refuses: tensors of two devices, but for single numbers and indices."""
        if not any(x.dim() for x in tensors if not isinstance(x, OnDevice)):
            return
        if name not in TAKE_HOST_INDICES:
            shapes = [f"{'device' if isinstance(x, OnDevice) else 'CPU'} {tuple(x.shape)}" for x in tensors]
            raise RuntimeError(f"{name} mixes devices: {', '.join(shapes)}")
        self.waits[name] += 1

    def _as_it_is_there(self, x, own, there):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        if id(x) in own:  # an operator in place gives back what it was given
            return own[id(x)]
        if there and x.dtype is torch.float64 and not self.float64:
            raise TypeError("the device has no float64")
        return OnDevice(x) if there else x


def _empty_strided(size, stride, *, dtype=None, **_options):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size, *, dtype=None, **_options):
    return OnDevice(torch.empty(size, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    Simulated.current.waits["a list sent over"] += 1
    target.raw.copy_(source)
    return target


# Numbers from Python (a list as index, torch.tensor(..., device=...)) reach a device below the mode.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("empty.memory_format", _empty, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
# Modules move by new parameters, as one of another class cannot take an old one's place.
torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.inference_mode = torch.no_grad  # inference tensors cannot be wrapped
