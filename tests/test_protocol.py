"""What an adapter may state, and the parts of a unit group that follow from others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mmdefense import registry
from mmdefense.protocol import InputAdapter, ReadAt, Traits, UnitGroup, missing_members, traits


def test_what_is_not_stated_has_its_default():
    assert traits(SimpleNamespace()) == Traits()
    stated = SimpleNamespace(score_name="BLEU", optimizer="adamw", layer_norm=True, mean=[0.5])
    expected = Traits(score_name="BLEU", optimizer="adamw", layer_norm=True, mean=[0.5])
    assert traits(stated) == expected


def test_a_class_states_what_does_not_need_a_model():
    class Kind:
        task = "t"
        priority = 3
        generic = True

        @property
        def layer_norm(self):
            raise AssertionError("asks the model")

    class Special(Kind):
        pass

    assert traits(Kind) == Traits(task="t", priority=3, generic=True)
    assert traits(Special) == Traits(task="t", priority=3)  # generic is not inherited


@pytest.mark.parametrize("name", registry.names("adapters"))
def test_every_adapter_states_its_task_and_has_inputs_to_perturb(name):
    kind = registry.load("adapters", name)
    assert traits(kind).task in registry.names("tasks")
    absent = set(missing_members(kind, InputAdapter))
    assert absent <= {"model", "chance", "classes"}  # of an instance


def test_the_outer_parameters_are_those_of_the_last_module():
    axes = {"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "norm.bias": 0}
    group = UnitGroup("conv", 4, axes, read_at=ReadAt("norm", axis=1))
    assert group.outer == {"norm.weight": 0, "norm.bias": 0}
    alone = UnitGroup("conv", 4, {"conv.weight": 0, "conv.bias": 0})
    assert alone.outer == dict(alone.axes)
