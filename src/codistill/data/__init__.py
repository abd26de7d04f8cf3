"""Data: named sets and a user's own, balanced splits, and batches of arrays or of files."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.data.content_hashes import count_known as count_known
    from codistill.data.content_hashes import known_hashes as known_hashes
    from codistill.data.content_hashes import sample_checksum as sample_checksum
    from codistill.data.datasets import SETS as SETS
    from codistill.data.datasets import load_set as load_set
    from codistill.data.decode import ENDINGS as ENDINGS
    from codistill.data.decode import hash_content as hash_content
    from codistill.data.decode import read_pixels as read_pixels
    from codistill.data.device_loader import DeviceLoader as DeviceLoader
    from codistill.data.external_test_set import count_trained_images as count_trained_images
    from codistill.data.external_test_set import load_external_test_set as load_external_test_set
    from codistill.data.file_loader import FileLoader as FileLoader
    from codistill.data.folder_listing import LeftOut as LeftOut
    from codistill.data.folder_listing import is_hidden as is_hidden
    from codistill.data.image_files import ImageFiles as ImageFiles
    from codistill.data.image_set import ImageSet as ImageSet
    from codistill.data.image_set import Provenance as Provenance
    from codistill.data.lazy_images import LazyImages as LazyImages
    from codistill.data.loader import Augmentation as Augmentation
    from codistill.data.loader import Loader as Loader
    from codistill.data.loader import LoaderOptions as LoaderOptions
    from codistill.data.mixup import Mixer as Mixer
    from codistill.data.normalization import with_normalization as with_normalization
    from codistill.data.partitioned_loader import PartitionedLoader as PartitionedLoader
    from codistill.data.partitioned_loader import divide_images as divide_images
    from codistill.data.partitioned_loader import part_seed as part_seed
    from codistill.data.rotations import NUM_ROTATIONS as NUM_ROTATIONS
    from codistill.data.rotations import rotate_images as rotate_images
    from codistill.data.splits import Splits as Splits
    from codistill.data.splits import make_splits as make_splits

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "content_hashes": "count_known known_hashes sample_checksum",
        "datasets": "SETS load_set",
        "decode": "ENDINGS hash_content read_pixels",
        "device_loader": "DeviceLoader",
        "external_test_set": "count_trained_images load_external_test_set",
        "file_loader": "FileLoader",
        "folder_listing": "LeftOut is_hidden",
        "image_files": "ImageFiles",
        "image_set": "ImageSet Provenance",
        "lazy_images": "LazyImages",
        "loader": "Augmentation Loader LoaderOptions",
        "mixup": "Mixer",
        "normalization": "with_normalization",
        "partitioned_loader": "PartitionedLoader divide_images part_seed",
        "rotations": "NUM_ROTATIONS rotate_images",
        "splits": "Splits make_splits",
    },
)
