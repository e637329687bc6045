"""What is read off a model's answers, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("tyro")

from evaluation import MOST_MISTAKES, confusion_matrix, question_results, worst_mistakes

from ait.data import ImageDataset, ImageSplits, decode_question, sort_of_clevr


def _dataset(labels: list[int], classes: int = 3) -> ImageDataset:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return ImageDataset(images, torch.tensor(labels), [f"class {index}" for index in range(classes)])


def test_the_confusion_matrix_counts_true_classes_in_rows() -> None:
    matrix = confusion_matrix(_dataset([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0]))
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]


def test_the_worst_mistake_is_the_surest_wrong_answer() -> None:
    data = _dataset([0, 0, 2, 1])
    logits = torch.tensor([[0.0, 1.0, 0.0], [9.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    arrays = worst_mistakes(data, logits, "test")
    assert arrays["images"][:, 0, 0, 0].tolist() == [2, 0]
    assert (arrays["labels"].tolist(), arrays["predictions"].tolist()) == ([2, 0], [0, 1])
    expected = [math.exp(5) / (math.exp(5) + 2), math.e / (math.e + 2)]
    assert arrays["probabilities"].tolist() == pytest.approx(expected)
    assert str(arrays["split"]) == "test" and arrays["classes"].tolist() == ["class 0", "class 1", "class 2"]
    assert "captions" not in arrays and arrays["confusion"].sum() == 4


def test_there_may_be_no_mistake_or_many() -> None:
    perfect = worst_mistakes(_dataset([0, 1]), torch.eye(3)[:2], "validation")
    assert perfect["images"].shape == (0, 1, 2, 2) and perfect["labels"].shape == (0,)
    many = worst_mistakes(_dataset([0] * 50), torch.eye(3)[[1] * 50], "validation")
    assert len(many["images"]) == MOST_MISTAKES


def test_mistakes_with_questions_have_captions() -> None:
    data = sort_of_clevr(2, 0)
    wrong = torch.nn.functional.one_hot((data.labels + 1) % 10, 10).float()
    arrays = worst_mistakes(data, wrong, "test")
    assert arrays["captions"][0] == decode_question(data[0][1], data[0][2])


def test_questions_are_counted_by_kind_beside_what_needs_no_image() -> None:
    train, test = sort_of_clevr(50, 0), sort_of_clevr(20, 1)
    parts = ImageSplits(train, train, test, (0.5,) * 3, (0.5,) * 3)
    predictions = test.labels.clone()
    relational = (test.kinds == 1).nonzero().squeeze(1)
    predictions[relational[:30]] = (predictions[relational[:30]] + 1) % 10
    results = question_results(parts, predictions)["test_by_kind"]
    assert {kind: (each["correct"], each["total"]) for kind, each in results.items()} == {
        "non-relational": (200, 200),
        "relational": (170, 200),
        "ternary": (200, 200),
    }
    for kind, each in enumerate(results.values()):
        answers: dict[tuple[int, ...], list[int]] = {}
        chosen = [index for index in range(len(train)) if train.kinds[index] == kind]
        for index in chosen:
            answers.setdefault(tuple(train.questions[index].tolist()), []).append(int(train.labels[index]))
        most = [int(train.labels[index]) for index in chosen]
        majority = min(set(most), key=lambda answer: (-most.count(answer), answer))
        asked = [index for index in range(len(test)) if test.kinds[index] == kind]
        by_question = {
            question: min(set(given), key=lambda answer, given=given: (-given.count(answer), answer))
            for question, given in answers.items()
        }
        right = [by_question.get(tuple(test.questions[i].tolist()), 0) == int(test.labels[i]) for i in asked]
        assert each["question_only_accuracy"] == pytest.approx(sum(right) / len(asked))
        same = sum(int(test.labels[i]) == majority for i in asked)
        assert each["majority_accuracy"] == pytest.approx(same / len(asked))
    assert question_results(ImageSplits(_dataset([0]), _dataset([0]), _dataset([0]), (0.5,), (0.5,)), predictions) == {}
