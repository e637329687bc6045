"""Sort-of-CLEVR: pictures, questions, and answers against a second solver that looks at the pixels."""

from __future__ import annotations

import hashlib
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ait.data import (
    SORT_OF_CLEVR_TEST_IMAGES,
    SORT_OF_CLEVR_TRAIN_IMAGES,
    QuestionDataset,
    decode_question,
    sort_of_clevr,
)
from ait.data.sort_of_clevr import (
    ANSWERS,
    COLOURS,
    KINDS,
    _answer_non_relational,
    _answer_relational,
    _answer_ternary,
    _draw_centres,
    _paint,
)

# Recorded: models are judged over years on what a seed draws.
SHA256_OF_20_IMAGES_OF_SEED_1 = "accb10c8daeb70c4424cacd52a546298c6fe2c16759a8c65899fd0f131be0508"

Scene = list[tuple[int, int, str]]  # x, y and shape of each colour


@pytest.fixture(scope="module")
def data() -> QuestionDataset:
    return sort_of_clevr(500, seed=11)


@pytest.fixture(scope="module")
def many() -> QuestionDataset:
    return sort_of_clevr(5000, seed=12)


def _look(image: Tensor) -> Scene | None:
    """The objects that are seen in an image, or None where one covers the rim of another."""
    pixels = image.permute(1, 2, 0).numpy()
    scene = []
    for ink in COLOURS.values():
        rows, columns = np.nonzero((pixels == ink).all(axis=2))
        if len(rows) == 0 or np.ptp(rows) != 10 or np.ptp(columns) != 10:
            return None
        x, y = int(columns.min()) + 5, int(rows.min()) + 5
        is_square = any((c - x) ** 2 + (r - y) ** 2 > 25 for r, c in zip(rows.tolist(), columns.tolist(), strict=True))
        scene.append((x, y, "square" if is_square else "circle"))
    return scene


def _angle(corner: tuple, one: tuple, other: tuple) -> float:
    """In degrees, at ``corner``; its cosine is exact for right angles and points in a line."""
    first, second = (one[0] - corner[0], one[1] - corner[1]), (other[0] - corner[0], other[1] - corner[1])
    product = first[0] * second[0] + first[1] * second[1]
    squares = (first[0] ** 2 + first[1] ** 2) * (second[0] ** 2 + second[1] ** 2)
    if product * product == squares:
        return 0.0 if product > 0 else 180.0
    return 90.0 if product == 0 else math.degrees(math.acos(product / math.sqrt(squares)))


def _solve(scene: Scene, a: int, b: int | None, kind: str, subtype: int) -> str:
    """The answer to one question, as a word or a number, by the letter of the task's description."""
    ax, ay, a_shape = scene[a]
    others = [thing for colour, thing in enumerate(scene) if colour not in (a, b)]
    if kind == "non-relational":
        return a_shape if subtype == 0 else "yes" if (ax, ay)[subtype - 1] < 37.5 else "no"
    if kind == "relational":
        if subtype == 2:
            return str(sum(shape == a_shape for _, _, shape in scene))
        best = None
        for x, y, shape in others:  # in the order of the colours; only a better one replaces
            distance = math.dist((x, y), (ax, ay))
            if best is None or (distance < best[0] if subtype == 0 else distance > best[0]):
                best = (distance, shape)
        assert best is not None
        return best[1]
    assert b is not None
    bx, by, _ = scene[b]
    dx, dy = bx - ax, by - ay
    count = 0
    for x, y, _ in others:
        if subtype == 0:
            count += min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by)
        elif subtype == 1:
            if dx == 0:
                count += x == ax and abs(y - ay) <= 12
            else:
                count += abs((y - ay) * dx - dy * (x - ax)) <= 12 * abs(dx)
        else:
            corners = ((ax, ay), (bx, by), (x, y))
            largest = max(_angle(corners[i], corners[i - 1], corners[i - 2]) for i in range(3))
            count += 90 <= largest < 180
    return ("yes" if count else "no") if subtype == 1 else str(count)


def _class_of(answer: str, kind: str) -> int:
    words = {"yes": 0, "no": 1, "square": 2, "circle": 3}
    return words[answer] if answer in words else int(answer) + (3 if kind == "relational" else 4)


def test_sizes_of_the_protocol() -> None:
    assert (SORT_OF_CLEVR_TRAIN_IMAGES, SORT_OF_CLEVR_TEST_IMAGES) == (9_800, 200)


def test_has_ten_questions_of_each_kind_about_every_image(data: QuestionDataset) -> None:
    assert len(data) == 500 * 30 and data.images.shape == (500, 3, 75, 75) and data.image_shape == (3, 75, 75)
    assert (data.image_index * 3 + data.kinds).bincount().tolist() == [10] * 1500
    assert data.questions.shape == (15_000, 18) and data.questions.dtype == torch.uint8
    assert {data.image_index.dtype, data.labels.dtype, data.kinds.dtype, data.subtypes.dtype} == {torch.int64}
    assert data.classes == ANSWERS and len(set(ANSWERS)) == 10
    assert repr(data) == "sort_of_clevr: 15000 questions about 500 images of 3 x 75 x 75, 10 classes"


def test_answers_equal_those_of_a_plain_solver_that_looks_at_the_pixels(data: QuestionDataset) -> None:
    scenes = [_look(image) for image in data.images]
    seen, compared = {index for index, scene in enumerate(scenes) if scene is not None}, set()
    assert len(seen) >= 250
    for index, question, label in zip(
        data.image_index.tolist(), data.questions.tolist(), data.labels.tolist(), strict=True
    ):
        scene = scenes[index]
        if scene is None:
            continue
        kind, subtype = KINDS[question[12:15].index(1)], question[15:18].index(1)
        b = question[6:12].index(1) if kind == "ternary" else None
        answer = _solve(scene, question[:6].index(1), b, kind, subtype)
        assert label == _class_of(answer, kind), (scene, decode_question(question))
        assert decode_question(question, label).endswith(f"? {answer}")
        compared.add((kind, subtype, answer))
    # Every answer occurred that can, but for the rarest: four in one box, none that makes an obtuse triangle.
    assert len(compared - {("ternary", 0, "4"), ("ternary", 2, "0")}) == 6 * 2 + 6 + 4 + 4


def test_answers_equal_the_plain_solvers_where_ties_lines_and_rims_abound() -> None:
    # Centres on a coarse grid, without regard to overlap: equal distances, right angles and points in a line abound.
    random = np.random.RandomState(5)
    grid = np.array(list(itertools.product(range(9, 70, 12), repeat=2)))
    centres = np.stack([grid[random.permutation(len(grid))[:6]] for _ in range(300)])
    shapes = random.randint(0, 2, (300, 6))
    pairs = [(a, b, subtype) for a in range(5) for b in range(5) if a != b for subtype in range(3)]
    a, b, subtypes = (np.broadcast_to(column, (300, len(pairs))) for column in np.array(pairs).T)
    answers = {
        "non-relational": _answer_non_relational(centres, shapes, a, subtypes),
        "relational": _answer_relational(centres, shapes, a, subtypes),
        "ternary": _answer_ternary(centres, a, b, subtypes),
    }
    for image in range(300):
        scene = [
            (x, y, ("square", "circle")[shape])
            for (x, y), shape in zip(centres[image].tolist(), shapes[image].tolist(), strict=True)
        ]
        for kind, of_kind in answers.items():
            for question, (first, second, subtype) in enumerate(pairs):
                answer = _solve(scene, first, second if kind == "ternary" else None, kind, subtype)
                assert of_kind[image, question] == _class_of(answer, kind), (scene, kind, first, second, subtype)


def _ternary(centres: list[tuple[int, int]], subtype: int) -> int:
    """The answer about red and green."""
    zero = np.zeros((1, 1), np.int64)
    return int(_answer_ternary(np.array([centres]), zero, zero + 1, zero + subtype)[0, 0])


FAR = [(5, 65), (20, 65), (35, 65)]  # where they do not matter


@pytest.mark.parametrize(
    ("asked", "subtype", "label", "why"),
    [
        ([(10, 10), (30, 30), (20, 20)], 0, 5, "inside the box"),
        ([(10, 10), (30, 30), (30, 10)], 0, 5, "at the box's corner"),
        ([(30, 30), (10, 10), (10, 20)], 0, 5, "on the rim of a box from B to A"),
        ([(10, 10), (30, 30), (31, 20)], 0, 4, "a pixel outside the box"),
        ([(10, 10), (50, 10), (69, 22)], 1, 0, "at the band's rim, beyond B"),
        ([(10, 10), (50, 10), (30, 23)], 1, 1, "a pixel outside the band"),
        ([(50, 10), (10, 10), (30, 22)], 1, 0, "the band from B to A is the same"),
        ([(10, 10), (30, 20), (20, 27)], 1, 0, "the band is measured upright: 12 from the line at x = 20"),
        ([(10, 10), (30, 20), (20, 28)], 1, 1, "13 upright, though less than 12 at a right angle"),
        ([(60, 10), (60, 40), (60, 22)], 1, 0, "on a vertical line, 12 from A"),
        ([(60, 10), (60, 40), (60, 23)], 1, 1, "on a vertical line, 13 from A"),
        ([(60, 10), (60, 40), (60, 52)], 1, 1, "on a vertical line, 12 from B"),
        ([(60, 10), (60, 40), (61, 15)], 1, 1, "beside a vertical line"),
    ],
)
def test_ternary_answer_at_the_limit(asked: list[tuple[int, int]], subtype: int, label: int, why: str) -> None:
    assert _ternary(asked + FAR, subtype) == label, why


@pytest.mark.parametrize(
    ("third", "counts"),
    [((10, 40), True), ((9, 40), True), ((11, 40), False), ((25, 10), False), ((60, 10), False), ((25, 25), True)],
    ids=["right", "obtuse", "acute", "in line between", "in line beyond", "right at C"],
)
def test_obtuse_and_right_triangles_count_and_points_in_a_line_do_not(third: tuple[int, int], counts: bool) -> None:
    # The other three stand over the middle of AB, so high that all of their triangles are acute.
    acute = [(25, 60), (24, 69), (26, 69)]
    assert _ternary([(10, 10), (40, 10), third, *acute], 2) == 4 + counts


@pytest.mark.parametrize(("subtype", "others"), [(0, [(20, 37), (54, 37)]), (1, [(5, 5), (69, 69)])])
def test_of_equal_distances_the_lowest_colour_index_wins(subtype: int, others: list[tuple[int, int]]) -> None:
    rest = [(37, 57), (37, 59), (57, 40)] if subtype == 0 else [(37, 20), (37, 54), (20, 37)]
    centres = np.array([[(37, 37), others[0], others[1], *rest]])
    if subtype == 0:
        assert (37 - 20) ** 2 == (54 - 37) ** 2
    zero = np.zeros((1, 1), np.int64)
    for green in (0, 1):  # green and blue are equally far and differ in shape: green's is the answer
        shapes = np.array([[0, green, 1 - green, 1 - green, 1 - green, 1 - green]])
        assert _answer_relational(centres, shapes, zero, zero + subtype)[0, 0] == 2 + green


@pytest.mark.parametrize(("position", "label"), [(5, 0), (37, 0), (38, 1), (69, 1)])
def test_left_and_upper_half_end_between_37_and_38(position: int, label: int) -> None:
    zero = np.zeros((1, 1), np.int64)
    shapes = np.zeros((1, 6), np.int64)
    for subtype in (1, 2):
        centres = np.full((1, 6, 2), 74 - position)
        centres[0, 0, subtype - 1] = position
        assert _answer_non_relational(centres, shapes, zero, zero + subtype)[0, 0] == label


def test_picture_equals_opencvs_also_where_objects_overlap() -> None:
    cv2 = pytest.importorskip("cv2")
    random = np.random.RandomState(3)
    centres, shapes = _draw_centres(200, random), random.randint(0, 2, (200, 6))
    overlaps = 0
    for image, image_centres, image_shapes in zip(_paint(centres, shapes), centres, shapes, strict=True):
        direct = np.full((75, 75, 3), 255, np.uint8)
        for (x, y), shape, ink in zip(image_centres.tolist(), image_shapes.tolist(), COLOURS.values(), strict=True):
            if shape == 0:
                cv2.rectangle(direct, (x - 5, y - 5), (x + 5, y + 5), ink, -1)
            else:
                cv2.circle(direct, (x, y), 5, ink, -1)
        np.testing.assert_array_equal(image, direct.transpose(2, 0, 1))
        overlaps += (image != 255).any(axis=0).sum() < np.where(image_shapes == 0, 121, 81).sum()
    assert overlaps > 20


def test_inks_are_those_of_the_task(data: QuestionDataset) -> None:
    inks = data.images[:20].permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist()
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 156, 0), (128, 128, 128), (255, 255, 0)]
    assert list(COLOURS.values()) == colours and list(COLOURS) == ["red", "green", "blue", "orange", "gray", "yellow"]
    assert sorted(map(tuple, inks)) == sorted([*colours, (255, 255, 255)])


def test_centres_keep_their_distance_and_reach_the_bounds() -> None:
    centres = _draw_centres(5000, np.random.RandomState(0))
    assert centres.min() == 5 and centres.max() == 69
    squares = ((centres[:, None] - centres[:, :, None]) ** 2).sum(3)[:, ~np.eye(6, dtype=bool)]
    assert squares.min() == 100  # reached: 100 is far enough
    counts = np.bincount(centres[:, 0].ravel(), minlength=70)[5:]  # the first is drawn once: uniform
    assert np.abs(counts - 10_000 / 65).max() < 5 * np.sqrt(10_000 / 65)


def _frequencies(data: QuestionDataset, kind: int, subtype: int) -> np.ndarray:
    labels = data.labels[(data.kinds == kind) & (data.subtypes == subtype)]
    return labels.bincount(minlength=10).double().numpy() / len(labels)


# Five deviations of a share of 1/2, were all questions about an image answered alike: 5 * 0.5 / sqrt(5000).
FREQUENCY_TOLERANCE = 0.0354


@pytest.mark.parametrize(
    ("kind", "subtype", "expected"),
    [
        (0, 0, {2: 1 / 2, 3: 1 / 2}),
        # 33 of the 65 integers; less than 0.01 away from it, since later objects keep their distance.
        (0, 1, {0: 33 / 65, 1: 32 / 65}),
        (0, 2, {0: 33 / 65, 1: 32 / 65}),
        (1, 0, {2: 1 / 2, 3: 1 / 2}),
        (1, 1, {2: 1 / 2, 3: 1 / 2}),
        # Of the five others a binomial number has the same shape.
        (1, 2, {4 + more: math.comb(5, more) / 32 for more in range(6)}),
        # The rest: measured on 100,000 images of seed 987654321, about 333,000 questions each.
        (2, 0, {4: 0.6914, 5: 0.2098, 6: 0.0723, 7: 0.0219, 8: 0.0045}),
        (2, 1, {0: 0.5026, 1: 0.4974}),
        (2, 2, {4: 0.0085, 5: 0.0843, 6: 0.2852, 7: 0.4027, 8: 0.2193}),
    ],
)
def test_answers_come_as_often_as_they_should(
    many: QuestionDataset, kind: int, subtype: int, expected: dict[int, float]
) -> None:
    frequencies = _frequencies(many, kind, subtype)
    assert set(np.flatnonzero(frequencies)) == set(expected)
    for label, share in expected.items():
        assert abs(frequencies[label] - share) < FREQUENCY_TOLERANCE


def test_counts_of_ternary_questions_are_near_those_of_points_in_a_square(many: QuestionDataset) -> None:
    # Of three points uniform in a square, one lies in the box of the others with 1/9 and they make an obtuse triangle
    # with 97/150 + pi/40 (Langford 1969). Objects keep their distance, which leaves fewer flat triangles.
    counts = np.arange(10) - 4
    assert abs((_frequencies(many, 2, 0) @ counts) / 4 - 1 / 9) < 0.02
    assert abs((_frequencies(many, 2, 2) @ counts) / 4 - (97 / 150 + math.pi / 40)) < 0.08


def test_colours_and_subtypes_are_asked_alike_and_ternary_questions_never_about_yellow(many: QuestionDataset) -> None:
    for kind in range(3):
        questions = many.questions[many.kinds == kind].double()
        tolerance = 5 * 0.5 / math.sqrt(len(questions))
        colours = 5 if kind == 2 else 6
        expected = torch.tensor([1 / colours] * colours + [0.0] * (6 - colours), dtype=torch.float64)
        assert float((questions[:, :6].mean(0) - expected).abs().max()) < tolerance
        assert float((questions[:, 6:12].mean(0) - expected * (kind == 2)).abs().max()) < tolerance
        assert float((questions[:, 15:].mean(0) - 1 / 3).abs().max()) < tolerance
        assert questions[:, 12 + kind].all() and (questions[:, 12:15].sum(1) == 1).all()
    pairs = many.questions[many.kinds == 2]
    assert not (pairs[:, :6] & pairs[:, 6:12]).any()  # two different colours
    counts = (pairs[:, :6].argmax(1) * 5 + pairs[:, 6:12].argmax(1)).bincount(minlength=25).view(5, 5)
    share = counts[~torch.eye(5, dtype=torch.bool)] / len(pairs)
    assert float((share - 1 / 20).abs().max()) < 5 * math.sqrt(0.05 / len(pairs))


def test_question_says_its_kind_and_subtype(data: QuestionDataset) -> None:
    assert torch.equal(data.questions[:, 12:15].argmax(1), data.kinds)
    assert torch.equal(data.questions[:, 15:18].argmax(1), data.subtypes)


def test_eleven_entries_ask_the_same_as_eighteen() -> None:
    kinds = ("non-relational", "relational")
    long, short = (sort_of_clevr(60, 5, kinds=kinds, question_dim=dim) for dim in (18, 11))
    assert short.questions.shape == (1200, 11)
    assert torch.equal(short.questions[:, :6], long.questions[:, :6])
    assert torch.equal(short.questions[:, 6:8], long.questions[:, 12:14])
    assert torch.equal(short.questions[:, 8:11], long.questions[:, 15:18])
    assert torch.equal(short.labels, long.labels) and torch.equal(short.images, long.images)
    for index in range(0, 1200, 7):
        label = int(long.labels[index])
        assert decode_question(short.questions[index], label) == decode_question(long.questions[index], label)


@pytest.mark.parametrize("kinds", [("relational",), ("ternary", "non-relational"), list(KINDS)])
def test_a_kinds_questions_do_not_depend_on_the_other_kinds(data: QuestionDataset, kinds: Any) -> None:
    some = sort_of_clevr(500, 11, kinds=kinds)
    expected = data.subset(torch.isin(data.kinds, torch.tensor([KINDS.index(kind) for kind in kinds])))
    assert torch.equal(some.images, data.images)
    for what in ("image_index", "questions", "labels", "kinds", "subtypes"):
        assert torch.equal(getattr(some, what), getattr(expected, what))


def _equal(one: QuestionDataset, other: QuestionDataset) -> bool:
    names = ("images", "image_index", "questions", "labels", "kinds", "subtypes")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_same_seed_draws_the_same_and_another_seed_something_else() -> None:
    first, again, other = (sort_of_clevr(20, seed) for seed in (2**63 - 1, 2**63 - 1, 2**63 - 2))
    assert _equal(first, again)
    assert not torch.equal(first.images, other.images) and not torch.equal(first.questions, other.questions)
    assert not torch.equal(sort_of_clevr(20, 1).images, sort_of_clevr(20, 1 + 2**32).images)


def test_what_a_seed_draws_never_changes() -> None:
    data = sort_of_clevr(20, seed=1)
    content = b"".join(part.numpy().tobytes() for part in (data.images, data.questions, data.labels))
    assert hashlib.sha256(content).hexdigest() == SHA256_OF_20_IMAGES_OF_SEED_1


def test_does_not_depend_on_the_number_of_threads_nor_on_global_random_states() -> None:
    expected = sort_of_clevr(50, seed=4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        np.random.seed(123)
        torch.manual_seed(123)
        with ThreadPoolExecutor(4) as pool:
            assert all(_equal(data, expected) for data in pool.map(lambda seed: sort_of_clevr(50, seed), [4] * 4))
    finally:
        torch.set_num_threads(threads)


def test_item_is_image_question_and_label(data: QuestionDataset) -> None:
    image, question, label = data[12_345]
    assert torch.equal(image, data.images[411]) and image.dtype == torch.uint8
    assert torch.equal(question, data.questions[12_345].float()) and question.dtype == torch.float32
    assert type(label) is int and label == int(data.labels[12_345])
    with pytest.raises(IndexError):
        data[15_000]


def test_batches_hold_every_question_once_with_its_image_and_label(data: QuestionDataset) -> None:
    part = data.subset(torch.arange(0, 15_000, 31))
    in_order = list(part.batches(100))
    assert [len(labels) for *_, labels in in_order] == [100, 100, 100, 100, 84]
    assert in_order[0][0].shape == (100, 3, 75, 75) and in_order[0][0].dtype == torch.uint8
    assert in_order[0][1].dtype == torch.float32 and in_order[0][2].dtype == torch.int64
    images, questions, labels = (torch.cat(parts) for parts in zip(*in_order, strict=True))
    assert torch.equal(images, part.images[part.image_index])
    assert torch.equal(questions, part.questions.float()) and torch.equal(labels, part.labels)
    order = torch.randperm(484, generator=torch.Generator().manual_seed(2))
    shuffled = list(part.batches(100, generator=torch.Generator().manual_seed(2), drop_last=True))
    assert [len(labels) for *_, labels in shuffled] == [100] * 4
    for whole, parts in zip((images, questions, labels), zip(*shuffled, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole[order[:400]])


def test_batch_size_below_one_is_refused_at_once(data: QuestionDataset) -> None:
    with pytest.raises(ValueError, match="sort_of_clevr: expected a batch size of at least 1, got 0"):
        data.batches(0)


def test_works_with_a_data_loader_and_survives_pickle(data: QuestionDataset) -> None:
    images, questions, labels = next(iter(DataLoader(data, batch_size=8, num_workers=1)))
    assert torch.equal(images, data.images[[0] * 8]) and torch.equal(questions, data.questions[:8].float())
    assert torch.equal(labels, data.labels[:8])
    assert _equal(pickle.loads(pickle.dumps(data)), data)


def test_subset_shares_the_images(data: QuestionDataset) -> None:
    part = data.subset(torch.tensor([40, 3]), "some")
    assert part.images.data_ptr() == data.images.data_ptr() and len(part) == 2 and part.name == "some"
    assert torch.equal(part[0][0], data.images[1]) and torch.equal(part.kinds, data.kinds[[40, 3]])
    assert data.name == "sort_of_clevr" and len(data) == 15_000


def test_split_is_by_image_whole_and_repeats(data: QuestionDataset) -> None:
    rest, share = data.split(0.1, seed=3)
    rest_images, share_images = set(rest.image_index.tolist()), set(share.image_index.tolist())
    assert len(share_images) == 50 and not rest_images & share_images and len(rest_images | share_images) == 500
    assert (len(rest), len(share)) == (13_500, 1500) and share.kinds.bincount().tolist() == [500] * 3
    assert rest.images.data_ptr() == share.images.data_ptr() == data.images.data_ptr()
    assert _equal(data.split(0.1, seed=3)[1], share)
    assert not torch.equal(data.split(0.1, seed=4)[1].image_index, share.image_index)
    again, part = rest.split(0.2, seed=3)  # of a part: of the images that it asks about
    assert len(part.image_index.unique()) == 90 and len(again.image_index.unique()) == 360
    assert set(part.image_index.tolist()) <= rest_images


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_refuses_a_fraction_outside_zero_to_one(data: QuestionDataset, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"sort_of_clevr: expected a fraction in \(0, 1\), got"):
        data.split(fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "expected num_images to be a whole number of at least 1, got 0"),
        ({"num_images": 2.0}, "expected num_images to be a whole number of at least 1, got 2.0"),
        ({"seed": -1}, r"expected a seed in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, r"expected a seed in \[0, 2\^63\), got 9223372036854775808"),
        ({"seed": "0"}, r"expected a seed that is a whole number in \[0, 2\^63\), got '0'"),
        ({"kinds": ("binary",)}, r"expected different kinds out of \('non-relational', .*\), got \('binary',\)"),
        ({"kinds": "ternary"}, "expected different kinds out of .*, got 'ternary'"),
        ({"kinds": ()}, r"expected different kinds out of .*, got \(\)"),
        ({"kinds": ("ternary", "ternary")}, "expected different kinds out of .*, got "),
        ({"kinds": (["ternary"],)}, "expected different kinds out of .*, got "),
        ({"question_dim": 12}, "expected question_dim 18 or 11, got 12"),
        ({"question_dim": 11}, "expected kinds without 'ternary', which 11 entries cannot ask, got .*'ternary'"),
    ],
)
def test_refuses_what_cannot_be_generated(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="sort_of_clevr: " + message):
        sort_of_clevr(**{"num_images": 2, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, r"expected images \(n, C, H, W\) of dtype torch.uint8, got .*float32"),
        ({"questions": torch.zeros(3, dtype=torch.uint8)}, r"expected questions \(m, q\) of dtype .*, got \(3,\)"),
        ({"labels": torch.tensor([0, 1])}, r"expected labels \(3,\) of dtype torch.int64, got \(2,\)"),
        ({"kinds": torch.zeros(3)}, r"expected kinds \(3,\) of dtype torch.int64, got \(3,\), torch.float32"),
        ({"image_index": torch.tensor([0, 1, 2])}, r"expected image_index in \[0, 2\), got \[0, 2\]"),
        ({"labels": torch.tensor([0, 1, 10])}, r"expected labels in \[0, 10\), got \[0, 10\]"),
        ({"kinds": torch.tensor([-1, 0, 0])}, r"expected kinds in \[0, 3\), got \[-1, 0\]"),
        ({"subtypes": torch.tensor([3, 0, 0])}, r"expected subtypes in \[0, 3\), got \[0, 3\]"),
    ],
)
def test_refuses_tensors_that_do_not_fit_each_other(change: dict[str, Tensor], message: str) -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    images, questions = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 18, dtype=torch.uint8)
    tensors = {"images": images, "questions": questions, "image_index": zeros, "labels": zeros}
    QuestionDataset(**tensors, kinds=zeros, subtypes=zeros, name="asked")
    with pytest.raises(ValueError, match="asked: " + message):
        QuestionDataset(**{**tensors, "kinds": zeros, "subtypes": zeros, **change}, name="asked")
