"""Shares with their intervals."""

from __future__ import annotations

import pytest
import torch

from mmdefense.report.evaluation import EvaluatedData, EvaluatedModel, Evaluation, Proportion


def test_the_interval_is_wilsons():
    share = Proportion.of(torch.tensor([1.0] * 8 + [0.0] * 2))
    assert share.value == pytest.approx(0.8)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # by hand


def test_a_perfect_score_is_not_certain():
    share = Proportion.of(torch.ones(30))
    assert share.high == pytest.approx(1.0)
    assert share.low == pytest.approx(1 / (1 + 1.96**2 / 30))


@pytest.mark.parametrize(("hits", "finding"), [(0, False), (2, False), (15, True)])
def test_a_finding_is_beyond_the_error_of_the_sample(hits, finding):
    asr = Proportion.of(torch.tensor([1.0] * hits + [0.0] * (20 - hits)))
    assert evaluation(asr).finding is finding
    assert evaluation(None).finding is False


def evaluation(asr):
    return Evaluation(
        model=EvaluatedModel(name="net", architecture="Net", parameters=1, sha256="aa"),
        data=EvaluatedData(name="images", split="test", samples=3, fingerprint="bb"),
        task="image-classification",
        metric="accuracy",
        value=1.0,
        score=Proportion.of(torch.ones(3)),
        score_name="accuracy",
        asr=asr,
    )


def test_an_evaluation_comes_back_out_of_its_json():
    written = evaluation(Proportion.of(torch.ones(4)))
    assert Evaluation.from_json(written.to_json()) == written
