"""Image data sets with fixed splits, held as bytes and augmented by whole batches.

Importing this needs torch and numpy alone; a data set that needs more says which extra to install.
"""

from ait.data.augment import crop_padded, flip_horizontally, normalize, random_crop, random_horizontal_flip
from ait.data.dataset import ImageDataset, LabelledImages, stratified_choice
from ait.data.folders import LazyImageDataset, image_folder, imagenet100, oxford_pet
from ait.data.images import cifar10, cifar100, digits
from ait.data.sheets import read_sheets, write_sheets
from ait.data.sort_of_clevr import (
    SORT_OF_CLEVR_TEST_IMAGES,
    SORT_OF_CLEVR_TRAIN_IMAGES,
    QuestionDataset,
    decode_question,
    sort_of_clevr,
)
from ait.data.splits import ImageSplits, list_images, load_images
from ait.data.triangle import TRIANGLE_TEST_IMAGES, TRIANGLE_TRAIN_IMAGES, triangle

__all__ = [
    "SORT_OF_CLEVR_TEST_IMAGES",
    "SORT_OF_CLEVR_TRAIN_IMAGES",
    "TRIANGLE_TEST_IMAGES",
    "TRIANGLE_TRAIN_IMAGES",
    "ImageDataset",
    "ImageSplits",
    "LabelledImages",
    "LazyImageDataset",
    "QuestionDataset",
    "cifar10",
    "cifar100",
    "crop_padded",
    "decode_question",
    "digits",
    "flip_horizontally",
    "image_folder",
    "imagenet100",
    "list_images",
    "load_images",
    "normalize",
    "oxford_pet",
    "random_crop",
    "random_horizontal_flip",
    "read_sheets",
    "sort_of_clevr",
    "stratified_choice",
    "triangle",
    "write_sheets",
]
