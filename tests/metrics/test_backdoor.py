from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.data.labelled import LabelledSamples
from mmdefense.metrics.backdoor import (
    Rates,
    TriggeredSamples,
    defense_effectiveness_rating,
    measure,
)
from mmdefense_adapters.torch_classifier import TorchClassifier


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
    states = [Rates(acc=acc, asr=asr, ra=0.0) for acc, asr in (before, after)]
    assert defense_effectiveness_rating(*states) == pytest.approx(rating, abs=5e-5)


def test_der_needs_both_rates_of_both_models():
    assert defense_effectiveness_rating(Rates(acc=1.0), Rates(acc=1.0, asr=0.0)) is None


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
    assert metrics == Rates(acc=0.25, asr=0.5, ra=0.5)
