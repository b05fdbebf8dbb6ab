"""What each metric that is shown is called in a column, and what it is."""

from __future__ import annotations

__all__ = ["DEFINITIONS", "heading"]

DEFINITIONS = {
    "accuracy": "Accuracy: share of clean samples whose largest logit is that of their label.",
    "mAP@50": "Mean average precision on clean images: the mean over the classes of the area under "
    "the precision-recall curve, where a detection counts that has an IoU of at least 0.5 with an "
    "object of its class (COCO's AP50).",
    "AP@50": "Average precision at IoU 0.5, image by image: over the objects of an image, the mean "
    "of the precision at which each is found. It stands in for mAP@50, of which single images "
    "have no share.",
    "BLEU": "SacreBLEU of what the model writes by greedy decoding, against the right answers: the "
    "geometric mean of the shares of its 1- to 4-grams that are right, times a penalty for answers "
    "that are too short.",
    "n-gram accuracy": "Share of an answer's 1- to 4-grams whose tokens are all predicted, each "
    "token after the right ones before it. It stands in for BLEU, of which single answers have no "
    "share.",
    "perplexity": "exp of the mean negative log-likelihood of the answers' tokens, in nats; lower "
    "is better, 1 is certain of every token.",
}
"""By the name of the metric."""


def heading(metric: str) -> str:
    """Return what a column of a metric is called: ACC, where it is the accuracy, else its name."""
    return "ACC" if metric == "accuracy" else metric
