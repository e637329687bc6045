"""Image data sets with fixed splits, held as bytes and augmented by whole batches.

Importing this needs torch and numpy alone; a data set that needs more says which extra to install.
"""

from ait.data.augment import crop_padded, flip_horizontally, normalize, random_crop, random_horizontal_flip
from ait.data.dataset import ImageDataset, stratified_choice
from ait.data.images import cifar10, cifar100, digits
from ait.data.sheets import read_sheets, write_sheets
from ait.data.splits import ImageSplits, list_images, load_images

__all__ = [
    "ImageDataset",
    "ImageSplits",
    "cifar10",
    "cifar100",
    "crop_padded",
    "digits",
    "flip_horizontally",
    "list_images",
    "load_images",
    "normalize",
    "random_crop",
    "random_horizontal_flip",
    "read_sheets",
    "stratified_choice",
    "write_sheets",
]
