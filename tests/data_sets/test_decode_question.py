"""decode_question: questions and answers of Sort-of-CLEVR in words, and what is no question or no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ait.data import decode_question


def _question(first: int, second: int | None, kind: int, subtype: int) -> list[int]:
    question = [0] * 18
    for entry in (first, 12 + kind, 15 + subtype, *([] if second is None else [6 + second])):
        question[entry] = 1
    return question


@pytest.mark.parametrize(
    ("question", "label", "words"),
    [
        (_question(0, None, 0, 0), 2, "What is the shape of the red object? square"),
        (_question(5, None, 0, 1), 0, "Is the yellow object in the left half? yes"),
        (_question(4, None, 0, 2), 1, "Is the gray object in the upper half? no"),
        (_question(0, None, 1, 0), 3, "What is the shape of the object closest to the red one? circle"),
        (_question(1, None, 1, 1), 2, "What is the shape of the object furthest from the green one? square"),
        (_question(2, None, 1, 2), 4, "How many objects have the shape of the blue one, itself included? 1"),
        (_question(2, None, 1, 2), 9, "How many objects have the shape of the blue one, itself included? 6"),
        (_question(3, 0, 2, 0), 4, "How many others lie in the box between the orange and the red object? 0"),
        (_question(0, 1, 2, 1), 0, "Does another object lie on the line through the red and the green one? yes"),
        (
            _question(1, 4, 2, 2),
            8,
            "How many others make an obtuse or right triangle with the green and the gray object? 4",
        ),
    ],
)
def test_question_and_answer_in_words(question: list[int], label: int, words: str) -> None:
    assert decode_question(question, label) == words
    assert decode_question(torch.tensor(question, dtype=torch.float32), label) == words
    assert decode_question(np.array(question, np.uint8), label) == words
    assert decode_question(question) == words.rsplit(" ", 1)[0]
    if not question[14]:
        short = question[:6] + question[12:14] + question[15:]
        assert decode_question(short, label) == words


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([0] * 17, r"expected a question \(18,\) or \(11,\), got \(17,\)"),
        ([[0] * 18], r"expected a question \(18,\) or \(11,\), got \(1, 18\)"),
        ([0.5] + [0] * 17, "expected zeros and ones, got "),
        ([0] * 18, "expected a single one for the kind in entries 12 to 14, got"),
        ([0] * 11, "expected a single one for the kind in entries 6 to 7, got"),
        ([0] * 12 + [1, 0, 0, 1, 1, 0], r"expected a single one for the subtype in entries 15 to 17, got \[1, 1, 0\]"),
        ([0] * 12 + [1, 0, 0, 1, 0, 0], "expected a single one for the first colour in entries 0 to 5, got"),
        (_question(0, None, 2, 0), "expected a single one for the second colour in entries 6 to 11, got"),
        (_question(0, 0, 2, 0), "expected two different colours, got red twice"),
        (_question(0, 1, 1, 0), "expected no second colour in a relational question, got"),
    ],
)
def test_refuses_to_read_what_is_no_question(question: list, message: str) -> None:
    with pytest.raises(ValueError, match="decode_question: " + message):
        decode_question(question)


@pytest.mark.parametrize(
    ("kind", "subtype", "possible"),
    [
        (0, 0, [2, 3]),
        (0, 1, [0, 1]),
        (0, 2, [0, 1]),
        (1, 0, [2, 3]),
        (1, 1, [2, 3]),
        (1, 2, [4, 5, 6, 7, 8, 9]),
        (2, 0, [4, 5, 6, 7, 8]),
        (2, 1, [0, 1]),
        (2, 2, [4, 5, 6, 7, 8]),
    ],
)
def test_refuses_a_label_that_is_no_answer_to_the_question(kind: int, subtype: int, possible: list[int]) -> None:
    question = _question(0, 1 if kind == 2 else None, kind, subtype)
    for label in (-1, *range(11), 2.5, True):
        if type(label) is int and label in possible:
            decode_question(question, label)
            continue
        with pytest.raises(ValueError) as refusal:
            decode_question(question, label)
        assert f"expected a label in {possible} for this question, got {label!r}" in str(refusal.value)
