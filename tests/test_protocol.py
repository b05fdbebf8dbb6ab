"""What an adapter lacks is told by name, and without touching the adapter."""

from __future__ import annotations

from mmdefense.protocol import TaskAdapter, TriggerAdapter, lacking


class Partial:
    """Has some members of the protocol, one of which cannot be had yet."""

    def __init__(self):
        self.model = None

    @property
    def chance(self):
        raise AssertionError("was evaluated")

    def samples(self, data):
        return data


def test_missing_members_are_named_and_none_is_evaluated():
    assert lacking(Partial(), TaskAdapter) == [
        "per_sample_loss",
        "sampled_loss",
        "score",
        "features",
        "embedding",
        "unit_groups",
        "fork",
    ]


def test_members_of_the_protocol_that_is_extended_count_too():
    missing = lacking(Partial(), TriggerAdapter)
    assert {"fork", "stamp"} <= set(missing)
    assert not {"model", "chance", "samples"} & set(missing)
