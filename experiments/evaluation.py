"""What the answers of a model say: confusions, worst mistakes, and questions by kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from results import wilson_interval
from torch import Tensor

from ait.data import ImageSplits, QuestionDataset, decode_question
from ait.data.sort_of_clevr import KINDS

MOST_MISTAKES = 24


def confusion_matrix(data: Any, predictions: Tensor) -> Tensor:
    """Counts ``(classes, classes)``: rows are true classes, columns what was answered."""
    classes = len(data.classes)
    return (data.labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)


def worst_mistakes(data: Any, logits: Tensor, split: str) -> dict[str, np.ndarray]:
    """The images whose wrong answer was given with most certainty, for the report.

    Args:
        data: an image data set of ``n`` images.
        logits: ``(n, classes)``.
        split: ``"validation"`` or ``"test"``.

    Returns:
        ``images (m, C, H, W)`` uint8, ``labels``, ``predictions`` and ``probabilities`` (of the wrong answer) ``(m,)``,
        worst first, at most 24; ``captions (m,)`` where there are questions; ``classes``, ``split``, and ``confusion``
        of all images.
    """
    probability, prediction = logits.double().softmax(1).max(1)
    wrong = (prediction != data.labels).nonzero().squeeze(1)
    worst = wrong[probability[wrong].argsort(descending=True, stable=True)[:MOST_MISTAKES]]
    items = [data[int(index)] for index in worst]
    images = [image.numpy() for image, *_ in items]
    arrays = {
        "images": np.stack(images) if images else np.zeros((0, *data.image_shape), np.uint8),
        "labels": data.labels[worst].numpy(),
        "predictions": prediction[worst].numpy(),
        "probabilities": probability[worst].numpy(),
        "classes": np.array(data.classes, dtype=str),
        "split": np.array(split),
        "confusion": confusion_matrix(data, prediction).numpy(),
    }
    if isinstance(data, QuestionDataset):
        arrays["captions"] = np.array([decode_question(question, label) for _, question, label in items], dtype=str)
    return arrays


def question_results(splits: ImageSplits, predictions: Tensor) -> dict[str, Any]:
    """Accuracy by kind of question, beside what can be had without looking at the images.

    ``majority_accuracy`` is that of the most frequent training answer of the kind; ``question_only_accuracy`` that of
    the most frequent training answer to the very same question, the best that a model of questions alone can do.

    Returns:
        ``{"test_by_kind": {kind: ...}}``, or nothing for data without questions.
    """
    train, test = splits.train, splits.test
    if not isinstance(train, QuestionDataset) or not isinstance(test, QuestionDataset):
        return {}
    answers = len(train.classes)
    _, which = torch.unique(torch.cat([train.questions, test.questions]), dim=0, return_inverse=True)
    which_train, which_test = which[: len(train)], which[len(train) :]
    counts = (which_train * answers + train.labels).bincount(minlength=(int(which.max()) + 1) * answers)
    by_question = counts.view(-1, answers).argmax(1)[which_test]
    results = {}
    for kind, name in enumerate(KINDS):
        chosen = test.kinds == kind
        total = int(chosen.sum())
        if total == 0:
            continue
        labels = test.labels[chosen]
        majority = train.labels[train.kinds == kind].bincount(minlength=answers).argmax()
        correct = int((predictions[chosen] == labels).sum())
        results[name] = {
            "correct": correct,
            "total": total,
            "accuracy": correct / total,
            "interval_95": wilson_interval(correct, total),
            "majority_accuracy": (labels == majority).double().mean().item(),
            "question_only_accuracy": (labels == by_question[chosen]).double().mean().item(),
        }
    return {"test_by_kind": results}
