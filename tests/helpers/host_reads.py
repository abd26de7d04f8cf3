"""Counts operators that make the host wait for the device."""

from torch.utils._python_dispatch import TorchDispatchMode


class CountHostReads(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    READS = ("_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.READS):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))
