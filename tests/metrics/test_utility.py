"""Which scores are near chance, and which raise is no purification."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmdefense.errors import LowUtilityError
from mmdefense.metrics.utility import check_raise, near_chance


def right(*counts: int, of: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and classes: of each class ``of`` samples, so many of them right."""
    scores = torch.cat([(torch.arange(of) < count).float() for count in counts])
    return scores, torch.arange(len(counts)).repeat_interleave(of)


@pytest.mark.parametrize(
    ("counts", "chance", "level"),
    [
        ((5, 5, 5, 5), 1 / 4, 1 / 4),  # as good as a guess
        ((20, 0, 0, 0), 1 / 4, 1 / 4),  # always the same class
        ((7, 6, 7, 5), 1 / 4, 1 / 4),  # a little better, within the error
        ((20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), 1 / 12, None),  # clearly above: the raise tells it
        ((19, 18, 20, 17), 1 / 4, None),
        ((12, 11, 13, 10), 1 / 4, None),  # a hard task, and no guess
        ((8, 8), 1 / 1000, None),  # two classes of a thousand, at 40 %
        ((9, 19), 1 / 2, None),  # one class worse than chance, balanced accuracy 0.7
        ((20,), 1 / 4, None),  # one class alone, and right
        ((3,), 1 / 4, 1 / 4),
    ],
)
def test_what_is_near_chance(counts, chance, level):
    found = near_chance(*right(*counts), chance)
    assert found == (None if level is None else pytest.approx(level))


def test_one_right_class_of_those_present_is_no_more_than_a_constant():
    """Folders ant, cat, dog for a model of ant, bee, cat, dog: only ant is right."""
    assert near_chance(*right(100, 0, 0, of=100), 1 / 4) == pytest.approx(1 / 3)
    assert near_chance(*right(100, 50, 0, of=100), 1 / 4) is None


def test_few_samples_do_not_tell_a_model_from_a_guess():
    assert near_chance(*right(2, 1, of=2), 1 / 2) is None  # nor would four right ones
    assert near_chance(*right(4, 2, of=4), 1 / 2) == 1 / 2
    assert near_chance(*right(20, 10, of=20), 1 / 2) is None


def test_imbalanced_classes_do_not_make_a_good_model_look_like_a_guess():
    scores = torch.cat([torch.ones(97), torch.tensor([1.0, 1.0, 0.0])])
    classes = torch.cat([torch.zeros(97), torch.ones(3)]).long()
    assert near_chance(scores, classes, 1 / 2) is None
    scores[classes == 1] = 0  # but always the frequent class is one
    assert near_chance(scores, classes, 1 / 2) == 1 / 2


def test_scores_without_classes_are_compared_with_chance_alone():
    assert near_chance(torch.full((50,), 0.04), None, 0.02) == 0.02
    assert near_chance(torch.full((50,), 0.16), None, 0.02) is None


@pytest.mark.parametrize(
    ("before", "after", "margin", "refused"),
    [
        (0.40, 1.00, 0.1, True),
        (0.263, 1.00, 0.1, True),
        (0.40, 1.00, 0.5, False),  # within the error
        (0.97, 0.99, 0.01, False),
        (0.45, 0.60, 0.03, False),  # data of another domain
        (0.80, 0.97, 0.02, True),
        (0.90, 0.80, 0.02, False),
    ],
)
def test_a_raise_far_beyond_its_error_is_refused(before, after, margin, refused):
    adapter = SimpleNamespace(misreadings="the labels")
    if not refused:
        check_raise(adapter, before, after, margin)
        return
    with pytest.raises(LowUtilityError, match=r"check the labels; if .* --accept-low-utility"):
        check_raise(adapter, before, after, margin)
    check_raise(adapter, before, after, margin, accept=True)
