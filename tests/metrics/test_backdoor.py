from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import (
    BackdoorMetrics,
    TriggeredSamples,
    accuracy,
    attack_success_rate,
    defense_effectiveness_rating,
    measure,
    robust_accuracy,
)
from mmdefense_adapters.torch_classifier import TorchClassifier

LABELS = torch.tensor([0, 1, 1, 2, 2])
TARGETS = torch.zeros(5, dtype=torch.int64)


def test_accuracy_is_the_share_of_equal_classes():
    assert accuracy(torch.tensor([0, 1, 2, 2, 0]), LABELS) == pytest.approx(3 / 5)


def test_asr_and_ra_leave_out_samples_of_the_target():
    predicted = torch.tensor([0, 0, 1, 0, 1])  # of those with labels 1 1 2 2: two hits, one right
    assert attack_success_rate(predicted, LABELS, TARGETS) == pytest.approx(2 / 4)
    assert robust_accuracy(predicted, LABELS, TARGETS) == pytest.approx(1 / 4)


def test_all_to_all_counts_every_sample():
    targets = (LABELS + 1) % 3
    predicted = torch.tensor([1, 2, 1, 2, 1])
    assert attack_success_rate(predicted, LABELS, targets) == pytest.approx(2 / 5)
    assert robust_accuracy(predicted, LABELS, targets) == pytest.approx(2 / 5)


def test_nothing_to_measure_is_refused():
    with pytest.raises(BadInputError, match="one shape"):
        accuracy(LABELS, LABELS[:2])
    with pytest.raises(BadInputError, match="one shape"):
        accuracy(LABELS[:0], LABELS[:0])
    for metric in (attack_success_rate, robust_accuracy):
        with pytest.raises(BadInputError, match="nothing to measure"):
            metric(TARGETS, TARGETS, TARGETS)


@pytest.mark.parametrize(
    ("before", "after", "rating"),
    [
        ((0.9182, 0.9379), (0.9029, 0.0170), 0.9528),  # FT-SAM, Table 1: BadNets-A2O, FT
        ((1.0, 1.0), (1.0, 0.0), 1.0),
        ((0.9, 0.9), (0.9, 0.9), 0.5),
        ((0.8, 0.5), (0.9, 0.6), 0.5),  # a rise of either counts for nothing
        ((1.0, 0.3), (0.0, 0.3), 0.0),
    ],
)
def test_der(before, after, rating):
    states = [BackdoorMetrics(acc=acc, asr=asr, ra=0.0) for acc, asr in (before, after)]
    assert defense_effectiveness_rating(*states) == pytest.approx(rating, abs=5e-5)


def test_measure_scores_each_of_the_three_sets():
    # one pixel per class: the net answers with the brightest one
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(net[1].weight)
    adapter = TorchClassifier(net)
    pixels = torch.eye(3)[:, None, None, :]
    answers = torch.tensor([1, 0, 0, 2])
    samples = LabelledSamples(pixels[answers], torch.tensor([1, 1, 1, 1]))
    attacked = LabelledSamples(pixels[answers], torch.tensor([0, 0, 0, 0]))
    truth = LabelledSamples(pixels[answers], torch.tensor([1, 1, 2, 2]))
    twins = LabelledSamples(pixels[answers], answers)
    metrics = measure(adapter, samples, TriggeredSamples(attacked, truth, twins), batch_size=3)
    assert metrics == BackdoorMetrics(acc=0.25, asr=0.5, ra=0.5)
