"""Images for peers: named sets and a user's own, balanced splits, and batches that live on the device."""

from codistill.data.image_set import ImageSet
from codistill.data.loader import DeviceLoader
from codistill.data.sets import load_set
from codistill.data.splits import Splits, make_splits

__all__ = ["DeviceLoader", "ImageSet", "Splits", "load_set", "make_splits"]
