"""Checked seeds and counts of the generated data sets."""

from __future__ import annotations

import operator

import numpy as np


def seeded(seed: int, what: str) -> np.random.RandomState:
    """A stream of random numbers that is the same for a seed on every machine and with every release of numpy.

    numpy promises that RandomState's streams never change, and makes no such promise for its newer generators. A single
    number is limited to 32 bits there, hence the two halves.

    Args:
        seed: in ``[0, 2^63)``.
        what: what errors name.

    Raises:
        ValueError: ``seed`` is no whole number in that range.
    """
    number = whole_number(seed, f"{what}: expected a seed that is a whole number in [0, 2^63), got {seed!r}")
    if not 0 <= number < 2**63:
        raise ValueError(f"{what}: expected a seed in [0, 2^63), got {number}")
    return np.random.RandomState([number & 0xFFFFFFFF, number >> 32])


def image_count(num_images: int, what: str) -> int:
    """``num_images`` as a plain integer of at least 1, or a ValueError."""
    message = f"{what}: expected num_images to be a whole number of at least 1, got {num_images!r}"
    number = whole_number(num_images, message)
    if number < 1:
        raise ValueError(message)
    return number


def whole_number(value: int, message: str) -> int:
    """``value`` as a plain integer, numpy's and torch's included; a ValueError with ``message`` for anything else."""
    if isinstance(value, bool):
        raise ValueError(message)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(message) from None
