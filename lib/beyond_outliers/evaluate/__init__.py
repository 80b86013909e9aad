"""How good a model is: validation loss, and zero-shot accuracy on multiple-choice tasks."""

from beyond_outliers.evaluate.loss import ValidationLoss, validation_loss
from beyond_outliers.evaluate.multiple_choice import encode_requests, score, zero_shot
from beyond_outliers.evaluate.tasks import TASKS, Question, cloze_questions, wheel_questions

__all__ = [
    "TASKS",
    "Question",
    "ValidationLoss",
    "cloze_questions",
    "encode_requests",
    "score",
    "validation_loss",
    "wheel_questions",
    "zero_shot",
]
