"""How good a model is: validation loss, and zero-shot accuracy on multiple-choice tasks."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    loss="ValidationLoss logits_of validation_loss",
    multiple_choice="encode_requests score zero_shot",
    tasks="TASKS Question cloze_questions wheel_questions",
)
