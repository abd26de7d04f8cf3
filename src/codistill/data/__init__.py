"""Data: named sets and a user's own, balanced splits, and batches of arrays or of files."""

from codistill.data.datasets import load_set
from codistill.data.device_loader import DeviceLoader
from codistill.data.file_loader import FileLoader
from codistill.data.image_set import ImageSet
from codistill.data.loader import Augmentation, Loader, LoaderOptions
from codistill.data.splits import Splits, make_splits

__all__ = [
    "Augmentation",
    "DeviceLoader",
    "FileLoader",
    "ImageSet",
    "Loader",
    "LoaderOptions",
    "Splits",
    "load_set",
    "make_splits",
]
