"""Sort-of-CLEVR: coloured squares and circles, and questions about one, about its relation to others, and about two."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ait.data._random import image_count, seeded, whole_number
from ait.data.dataset import batch_indices, check_batch_size, stratified_choice

if TYPE_CHECKING:
    from typing import Self

SORT_OF_CLEVR_TRAIN_IMAGES = 9_800
SORT_OF_CLEVR_TEST_IMAGES = 200
QUESTIONS_PER_KIND = 10  # and image
KINDS = ("non-relational", "relational", "ternary")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 156, 0),
    "gray": (128, 128, 128),
    "yellow": (255, 255, 0),
}
# Classes 4 to 9 mean 1 to 6 objects where the asked one is counted itself, and none to five where it is not.
ANSWERS = ("yes", "no", "square", "circle", "least count", *(f"least count + {more}" for more in range(1, 6)))

_SIZE = 75  # pixels a side
_REACH = 5  # a shape's pixels go from its centre - 5 to its centre + 5
_YES, _NO, _SHAPE, _COUNT = 0, 1, 2, 4  # first answer of each sort; of shapes, 0 is a square and 1 a circle
_NUM_COLOURS, _TERNARY_COLOURS = len(COLOURS), 5  # of which a ternary question draws two


class QuestionDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Images and questions about them: a map-style data set with an item a question, ``(image, question, label)``.

    Args:
        images: ``(n, C, H, W)`` uint8; ``(n, 3, 75, 75)`` in Sort-of-CLEVR.
        image_index: ``(m,)`` int64, the image that each question is about, in ``[0, n)``.
        questions: ``(m, q)`` uint8 of zeros and ones.
        labels: ``(m,)`` int64 in ``[0, len(classes))``.
        kinds: ``(m,)`` int64, index into ``KINDS``.
        subtypes: ``(m,)`` int64, 0 to 2, the question within its kind.
        classes: names of the answers. What a count's class means depends on the question, hence the neutral names in
            ``ANSWERS``; :func:`decode_question` says the number.
        name: what errors call this data set.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        images: Tensor,
        image_index: Tensor,
        questions: Tensor,
        labels: Tensor,
        kinds: Tensor,
        subtypes: Tensor,
        classes: Sequence[str] = ANSWERS,
        name: str = "QuestionDataset",
    ) -> None:
        for what, tensor, dims in (("images (n, C, H, W)", images, 4), ("questions (m, q)", questions, 2)):
            if tensor.dtype != torch.uint8 or tensor.dim() != dims:
                raise ValueError(
                    f"{name}: expected {what} of dtype torch.uint8, got {tuple(tensor.shape)}, {tensor.dtype}"
                )
        numbers = {
            "image_index": (image_index, len(images)),
            "labels": (labels, len(classes)),
            "kinds": (kinds, len(KINDS)),
            "subtypes": (subtypes, 3),
        }
        for what, (tensor, stop) in numbers.items():
            if tensor.dtype != torch.int64 or tensor.shape != questions.shape[:1]:
                raise ValueError(
                    f"{name}: expected {what} ({len(questions)},) of dtype torch.int64, "
                    f"got {tuple(tensor.shape)}, {tensor.dtype}"
                )
            if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= stop):
                raise ValueError(
                    f"{name}: expected {what} in [0, {stop}), got [{int(tensor.min())}, {int(tensor.max())}]"
                )
        self.images = images
        self.image_index = image_index
        self.questions = questions
        self.labels = labels
        self.kinds = kinds
        self.subtypes = subtypes
        self.classes = tuple(classes)
        self.name = name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """``(image (C, H, W) uint8, question (q,) float32, label)``."""
        return self.images[self.image_index[index]], self.questions[index].float(), int(self.labels[index])

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        return (
            f"{self.name}: {len(self)} questions about {len(self.image_index.unique())} images of "
            f"{channels} x {height} x {width}, {len(self.classes)} classes"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor, name: str | None = None) -> Self:
        """The questions at ``indices (m,)`` int64, or where a mask ``(len(self),)`` is true; the images are shared."""
        part = copy.copy(self)
        part.image_index, part.questions = self.image_index[indices], self.questions[indices]
        part.labels, part.kinds, part.subtypes = self.labels[indices], self.kinds[indices], self.subtypes[indices]
        part.name = name or self.name
        return part

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Self, Self]:
        """Splits off all questions about a share of the images, the same at every call: ``(the rest, the share)``.

        Args:
            fraction: size of the share, in (0, 1); ``round(fraction * n)`` of the ``n`` images that are asked about.
            seed: of the choice.

        Raises:
            ValueError: ``fraction`` is outside (0, 1).
        """
        if not 0 < fraction < 1:
            raise ValueError(f"{self.name}: expected a fraction in (0, 1), got {fraction!r}")
        asked = self.image_index.unique()
        chosen = asked[stratified_choice(torch.zeros_like(asked), round(fraction * len(asked)), seed)]
        is_chosen = torch.isin(self.image_index, chosen)
        return self.subset(~is_chosen), self.subset(is_chosen)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Goes once through the questions.

        Args:
            batch_size: ``B``; the last batch may be smaller.
            generator: draws the order; without one, questions come in their stored order.
            drop_last: leave out a last batch that is smaller.

        Returns:
            Iterator over ``(images (B, C, H, W) uint8, questions (B, q) float32, labels (B,) int64)``.

        Raises:
            ValueError: ``batch_size < 1``.
        """
        check_batch_size(batch_size, self.name)
        return self._batches(batch_size, generator, drop_last)

    def _batches(
        self, batch_size: int, generator: torch.Generator | None, drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for chosen in batch_indices(len(self), batch_size, generator, drop_last):
            yield self.images[self.image_index[chosen]], self.questions[chosen].float(), self.labels[chosen]


def sort_of_clevr(
    num_images: int, seed: int, *, kinds: Sequence[str] = KINDS, question_dim: int = 18
) -> QuestionDataset:
    """Generates images of six coloured shapes, and ten questions of each kind about every image.

    On a white ground lie six objects, one of each of ``COLOURS``: a square (the centre +-5 pixels) or a circle (radius
    5, its pixels those with ``dx^2 + dy^2 <= 25``, as OpenCV's ``circle`` draws it), each with 1/2. Centres are uniform
    integers in ``[5, 70)^2``, drawn again while closer than 10 to an object that is there. The questions, with their
    colours and subtypes uniform:

    - non-relational, about A: 0 its shape; 1 is its ``x < 37.5``; 2 is its ``y < 37.5``.
    - relational, about A: 0 the shape of the closest other object, 1 of the furthest (of equally far ones, the first
      colour's); 2 how many objects have its shape, itself included.
    - ternary, about A and B, two different ones of the first five colours: how many others 0 lie in the axis-aligned
      box of both centres, rim included; 2 make a triangle with them whose largest angle is at least 90 and under 180
      degrees; 1 does another lie on a band around the line through both,
      ``abs((y - A_y) dx - dy (x - A_x)) <= 12 abs(dx)`` with ``(dx, dy) = B - A``; where ``dx = 0``, with
      ``x = A_x`` and ``abs(y - A_y) <= 12``.

    Args:
        num_images: ``n``; the protocol has ``SORT_OF_CLEVR_TRAIN_IMAGES`` and, under another seed,
            ``SORT_OF_CLEVR_TEST_IMAGES``.
        seed: in ``[0, 2^63)``; the same images for the same number and seed, on every machine, whatever is asked.
        kinds: of ``KINDS``; a kind's questions are the same whatever other kinds are asked.
        question_dim: entries of a question. 18: ``[0:6]`` A's colour, ``[6:12]`` B's (of ternary questions),
            ``[12:15]`` kind, ``[15:18]`` subtype. 11, without ternary questions: ``[0:6]`` colour, ``[6]``
            non-relational, ``[7]`` relational, ``[8:11]`` subtype.

    Returns:
        ``10 * len(kinds) * n`` questions, image by image and within one kind by kind, about ``(n, 3, 75, 75)`` images.

    Raises:
        ValueError: an argument is not as above.

    Source: Santoro et al., A simple neural network module for relational reasoning, 2017; ternary questions as in
    Goyal et al., Coordination Among Neural Modules Through a Shared Global Workspace, 2022.
    """
    count = image_count(num_images, "sort_of_clevr")
    random = seeded(seed, "sort_of_clevr")
    asked = _kind_indices(kinds)
    if question_dim not in (18, 11):
        raise ValueError(f"sort_of_clevr: expected question_dim 18 or 11, got {question_dim!r}")
    if question_dim == 11 and 2 in asked:
        raise ValueError(
            f"sort_of_clevr: expected kinds without 'ternary', which 11 entries cannot ask, got {tuple(kinds)!r}"
        )
    centres = _draw_centres(count, random)
    shapes = random.randint(0, 2, (count, _NUM_COLOURS), np.int64)
    # Everything is drawn, whatever is asked: so the questions of a kind do not depend on the other kinds.
    size = (count, len(KINDS), QUESTIONS_PER_KIND)
    first = random.randint(0, _NUM_COLOURS, size, np.int64)
    subtypes = random.randint(0, 3, size, np.int64)
    first[:, 2] = random.randint(0, _TERNARY_COLOURS, size[::2], np.int64)
    second = random.randint(0, _TERNARY_COLOURS - 1, size[::2], np.int64)
    second += second >= first[:, 2]  # uniform over the other four

    answers = np.stack(
        [
            _answer_non_relational(centres, shapes, first[:, 0], subtypes[:, 0]),
            _answer_relational(centres, shapes, first[:, 1], subtypes[:, 1]),
            _answer_ternary(centres, first[:, 2], second, subtypes[:, 2]),
        ],
        axis=1,
    )
    shape = (count, len(asked), QUESTIONS_PER_KIND)
    kind_of = np.broadcast_to(np.array(asked)[:, None], shape).reshape(-1)
    second_of = np.full(size, -1)
    second_of[:, 2] = second
    questions = _encode(
        first[:, asked].reshape(-1),
        second_of[:, asked].reshape(-1),
        kind_of,
        subtypes[:, asked].reshape(-1),
        question_dim,
    )
    return QuestionDataset(
        images=torch.from_numpy(_paint(centres, shapes)),
        image_index=torch.arange(count).repeat_interleave(len(asked) * QUESTIONS_PER_KIND),
        questions=torch.from_numpy(questions),
        labels=torch.from_numpy(answers[:, asked].reshape(-1)),
        kinds=torch.from_numpy(kind_of.astype(np.int64)),
        subtypes=torch.from_numpy(subtypes[:, asked].reshape(-1)),
        name="sort_of_clevr",
    )


def decode_question(question: Tensor | np.ndarray | Sequence[float], label: int | None = None) -> str:
    """Puts a question, and its answer where one is given, into words.

    Args:
        question: ``(18,)`` or ``(11,)`` of zeros and ones, laid out as :func:`sort_of_clevr` says.
        label: class of the answer; counts are told as numbers.

    Raises:
        ValueError: ``question`` is no question of either layout, or ``label`` is no answer to it.
    """
    entries = torch.as_tensor(question)
    if entries.shape not in ((18,), (11,)):
        raise ValueError(f"decode_question: expected a question (18,) or (11,), got {tuple(entries.shape)}")
    if not bool(((entries == 0) | (entries == 1)).all()):
        raise ValueError(f"decode_question: expected zeros and ones, got {entries.tolist()}")
    is_long = len(entries) == 18
    kind = _position(entries, "kind", 12, 15) if is_long else _position(entries, "kind", 6, 8)
    subtype = _position(entries, "subtype", len(entries) - 3, len(entries))
    names = list(COLOURS)
    colour = names[_position(entries, "first colour", 0, 6)]
    other = ""
    if kind == 2:
        other = names[_position(entries, "second colour", 6, 12)]
        if other == colour:
            raise ValueError(f"decode_question: expected two different colours, got {colour} twice")
    elif is_long and bool(entries[6:12].any()):
        raise ValueError(
            f"decode_question: expected no second colour in a {KINDS[kind]} question, "
            f"got {entries[6:12].tolist()} in entries 6 to 11"
        )
    words = {
        (0, 0): f"What is the shape of the {colour} object?",
        (0, 1): f"Is the {colour} object in the left half?",
        (0, 2): f"Is the {colour} object in the upper half?",
        (1, 0): f"What is the shape of the object closest to the {colour} one?",
        (1, 1): f"What is the shape of the object furthest from the {colour} one?",
        (1, 2): f"How many objects have the shape of the {colour} one, itself included?",
        (2, 0): f"How many others lie in the box between the {colour} and the {other} object?",
        (2, 1): f"Does another object lie on the line through the {colour} and the {other} one?",
        (2, 2): f"How many others make an obtuse or right triangle with the {colour} and the {other} object?",
    }[kind, subtype]
    return words if label is None else f"{words} {_answer_in_words(kind, subtype, label)}"


def _answer_in_words(kind: int, subtype: int, label: int) -> str:
    if (kind, subtype) in ((0, 0), (1, 0), (1, 1)):
        possible = {_SHAPE: "square", _SHAPE + 1: "circle"}
    elif (kind, subtype) in ((0, 1), (0, 2), (2, 1)):
        possible = {_YES: "yes", _NO: "no"}
    elif kind == 1:
        possible = {_COUNT + more: str(1 + more) for more in range(_NUM_COLOURS)}
    else:
        possible = {_COUNT + more: str(more) for more in range(_NUM_COLOURS - 1)}  # of the four others
    message = f"decode_question: expected a label in {sorted(possible)} for this question, got {label!r}"
    number = whole_number(label, message)
    if number not in possible:
        raise ValueError(message)
    return possible[number]


def _position(entries: Tensor, what: str, start: int, stop: int) -> int:
    """Where the single one of ``entries[start:stop]`` stands."""
    section = entries[start:stop]
    if int(section.sum()) != 1:
        raise ValueError(
            f"decode_question: expected a single one for the {what} in entries {start} to {stop - 1}, "
            f"got {section.tolist()}"
        )
    return int(section.argmax())


def _kind_indices(kinds: Sequence[str]) -> list[int]:
    # The set is taken of known names alone: what a caller passes may not be hashable.
    if isinstance(kinds, str) or not kinds or not all(kind in KINDS for kind in kinds) or len(set(kinds)) < len(kinds):
        raise ValueError(f"sort_of_clevr: expected different kinds out of {KINDS}, got {kinds!r}")
    return sorted(KINDS.index(kind) for kind in kinds)


def _draw_centres(count: int, random: np.random.RandomState) -> np.ndarray:
    """``(n, 6, 2)``: x and y of the object of each colour."""
    centres = np.empty((count, _NUM_COLOURS, 2), np.int64)
    for colour in range(_NUM_COLOURS):
        pending = np.arange(count)
        while len(pending):
            drawn = random.randint(_REACH, _SIZE - _REACH, (len(pending), 2), np.int64)
            centres[pending, colour] = drawn
            squares = ((centres[pending, :colour] - drawn[:, None]) ** 2).sum(axis=2)
            pending = pending[(squares < (2 * _REACH) ** 2).any(axis=1)]
    return centres


def _paint(centres: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """``(n, 3, 75, 75)`` uint8 from centres ``(n, 6, 2)`` and shapes ``(n, 6)``."""
    images = np.full((len(centres), 3, _SIZE, _SIZE), 255, np.uint8)
    each = np.arange(len(centres))
    for colour, ink in enumerate(COLOURS.values()):
        x, y = centres[:, colour].T
        for dy in range(-_REACH, _REACH + 1):
            for dx in range(-_REACH, _REACH + 1):
                in_circle = dx * dx + dy * dy <= _REACH * _REACH
                drawn = each if in_circle else each[shapes[:, colour] == 0]
                images[drawn, :, y[drawn] + dy, x[drawn] + dx] = ink
    return images


def _of(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The values ``(n, 6, ...)`` of the objects of those colours ``(n, Q)``: ``(n, Q, ...)``."""
    return values[np.arange(len(values))[:, None], colours]


def _yes_or_no(holds: np.ndarray) -> np.ndarray:
    return np.where(holds, _YES, _NO)


def _answer_non_relational(
    centres: np.ndarray, shapes: np.ndarray, colours: np.ndarray, subtypes: np.ndarray
) -> np.ndarray:
    """Answers ``(n, Q)`` about the objects of the colours ``(n, Q)``."""
    in_first_half = _yes_or_no(_of(centres, colours) < _SIZE / 2)  # (n, Q, 2): left, upper
    return np.choose(subtypes, [_SHAPE + _of(shapes, colours), in_first_half[..., 0], in_first_half[..., 1]])


def _answer_relational(
    centres: np.ndarray, shapes: np.ndarray, colours: np.ndarray, subtypes: np.ndarray
) -> np.ndarray:
    """Answers ``(n, Q)`` about the objects of the colours ``(n, Q)``."""
    squares = ((centres[:, None] - centres[:, :, None]) ** 2).sum(axis=3)  # (n, 6, 6) distances, squared
    itself = np.eye(_NUM_COLOURS, dtype=bool)
    # argmin and argmax give the first of equal ones: the lowest colour index.
    closest = np.where(itself, np.iinfo(np.int64).max, squares).argmin(axis=2)
    furthest = np.where(itself, -1, squares).argmax(axis=2)
    of_same_shape = (shapes[:, None] == shapes[:, :, None]).sum(axis=2)  # at least 1: itself
    return np.choose(
        subtypes,
        [
            _SHAPE + _of(shapes, _of(closest, colours)),
            _SHAPE + _of(shapes, _of(furthest, colours)),
            _COUNT - 1 + _of(of_same_shape, colours),
        ],
    )


def _answer_ternary(centres: np.ndarray, first: np.ndarray, second: np.ndarray, subtypes: np.ndarray) -> np.ndarray:
    """Answers ``(n, Q)`` about the objects of the colours ``first`` and ``second``, each ``(n, Q)``."""
    a, b = _of(centres, first)[:, :, None], _of(centres, second)[:, :, None]  # (n, Q, 1, 2)
    c = centres[:, None]  # (n, 1, 6, 2)
    colours = np.arange(_NUM_COLOURS)
    is_other = (colours != first[..., None]) & (colours != second[..., None])  # (n, Q, 6)

    in_box = ((np.minimum(a, b) <= c) & (c <= np.maximum(a, b))).all(axis=3)

    ab, ac, bc = b - a, c - a, c - b
    dx, dy = ab[..., 0], ab[..., 1]
    cross = ac[..., 1] * dx - dy * ac[..., 0]
    # Where dx is 0, the first condition alone would take in the whole vertical line.
    on_band = (np.abs(cross) <= 12 * np.abs(dx)) & ((dx != 0) | (np.abs(ac[..., 1]) <= 12))

    # An angle is at least 90 degrees where the product of its sides is not positive; 180 where the points are in line.
    products = np.stack([(ab * ac).sum(axis=3), (-ab * bc).sum(axis=3), (ac * bc).sum(axis=3)])
    is_obtuse = (products <= 0).any(axis=0) & (cross != 0)

    return np.choose(
        subtypes,
        [
            _COUNT + (in_box & is_other).sum(axis=2),
            _yes_or_no((on_band & is_other).any(axis=2)),
            _COUNT + (is_obtuse & is_other).sum(axis=2),
        ],
    )


def _encode(
    first: np.ndarray, second: np.ndarray, kinds: np.ndarray, subtypes: np.ndarray, question_dim: int
) -> np.ndarray:
    """``(m, question_dim)`` uint8; ``second`` is -1 where a question is about one object."""
    questions = np.zeros((len(first), question_dim), np.uint8)
    each = np.arange(len(first))
    kind_start = 12 if question_dim == 18 else 6
    questions[each, first] = 1
    questions[each, kind_start + kinds] = 1
    questions[each, question_dim - 3 + subtypes] = 1
    about_two = second >= 0
    questions[each[about_two], 6 + second[about_two]] = 1
    return questions
