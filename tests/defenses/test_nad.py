from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledBatch
from mmdefense.defenses.nad import NAD, attention_distance, attention_layers
from mmdefense.errors import UnsupportedError
from mmdefense.registry import adapt
from mmdefense.runtime.run import copy_state

ONE = {"steps": 1, "lr": 0.1, "momentum": 0.0, "max_norm": None, "max_utility_drop": 1.0,
       "restarts": 0}  # fmt: skip
SIZES = (("a", 7), ("b", 4))


def slow_map(values, n):
    """Return the attention map of one sample, as a list, of activations ``(N, L, C)``."""
    raw = [sum(float(v) ** 2 for v in position) for position in values[n]]
    length = sum(value**2 for value in raw) ** 0.5
    return [value / length for value in raw]


def test_the_distance_is_that_of_normalised_maps_one_sample_at_a_time():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {name: torch.randn(3, size, 5, generator=generator).double() for name, size in SIZES}
        for _ in range(2)
    )
    found = attention_distance(student, teacher)
    for n in range(3):
        expected = sum(
            (a - b) ** 2
            for name, _ in SIZES
            for a, b in zip(slow_map(student[name], n), slow_map(teacher[name], n), strict=True)
        )
        assert found[n].item() == pytest.approx(expected, rel=1e-12)
    assert attention_distance(student, student).tolist() == [0, 0, 0]


def test_one_update_descends_loss_and_distance_to_the_teacher(learnt, corners):
    """Against autograd of the formula, its maps read by a hook of this test's own."""
    defense = NAD(**ONE, batch_size=24, teacher_steps=0, beta=3.0, layers=1)
    batch = split(corners, defense.holdout, defense.seed)[0].everything()
    found = copy_state(defense.purify(learnt, corners).model)
    twin, teacher = learnt.fork(), learnt.fork()
    twin.model.train()
    teacher.model.eval()
    maps = []

    def keep(_, __, output):  # the BatchNorm behind the one convolution, before ReLU
        raw = output.square().sum(1).flatten(1)
        maps.append(raw / raw.norm(dim=1, keepdim=True))

    for adapter in (twin, teacher):
        adapter.model[1].register_forward_hook(keep)
    loss = twin.per_sample_loss(batch).mean()
    teacher.logits(batch.inputs)
    objective = loss + 3.0 * (maps[0] - maps[1].detach()).square().sum(1).mean()
    parameters = list(twin.model.parameters())
    gradients = torch.autograd.grad(objective, parameters)
    for (name, parameter), gradient in zip(twin.model.named_parameters(), gradients, strict=True):
        expected = parameter.detach() - 0.1 * gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    # The statistics are updated once.
    torch.testing.assert_close(found["1.running_mean"], twin.model[1].running_mean)


def test_layers_are_even_among_those_with_positions(taught):
    adapter, samples = taught("small-resnet")
    batch = samples.take(torch.tensor([0]))
    filters = [g.layer for g in adapter.unit_groups() if g.kind == "filter"]
    assert attention_layers(adapter, batch, 1) == [filters[-1]]
    assert attention_layers(adapter, batch, 3)[-1] == filters[-1]
    assert attention_layers(adapter, batch, 1000) == filters


def test_a_net_over_vectors_is_refused_in_one_line():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = LabelledBatch(torch.rand(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="several positions"):
        attention_layers(adapt(net, example=batch.inputs), batch, 3)
