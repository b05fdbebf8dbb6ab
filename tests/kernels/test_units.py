from __future__ import annotations

import pytest
import reference
import torch
from torch import nn

from mmdefense.kernels.units import (
    gradient_norms,
    kth_smallest,
    mean_activations,
    parameters_by_name,
    prune,
    pruning_masks,
    rank,
    select_sub_weights,
    weight_change,
    zero,
)
from mmdefense.kernels.unlearning import mean_gradient
from mmdefense.protocol import UnitGroup

GROUPS = [
    UnitGroup("conv", 4, {"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "norm.bias": 0}),
    UnitGroup("linear", 5, {"linear.weight": 0, "linear.bias": 0}, kind="neuron"),
    UnitGroup("heads", 2, {"heads.weight": 1}, width=3, kind="head"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(7, 5)
        self.heads = nn.Linear(6, 4)


@pytest.fixture
def net():
    """All entries differ from zero."""
    net, generator = Net().double(), torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.uniform_(0.5, 1, generator=generator)
    return net


@pytest.fixture(params=["floats", "ties"])
def change(request, net):
    """Absolute changes by name: all different, or small whole numbers with many ties."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, value in net.named_parameters():
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        found[name] = drawn if request.param == "floats" else (drawn * 4).floor()
    return found


def test_weight_change_sums_the_weights_of_each_unit(change):
    found = weight_change(change, GROUPS)
    for group, values in zip(GROUPS, found, strict=True):
        expected = [reference.unit_sum(change, group, unit) for unit in range(group.size)]
        assert values.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_norm_is_the_l2_norm_of_the_weights_of_each_unit(change):
    squares = {name: value.square() for name, value in change.items()}
    for group, values in zip(GROUPS, gradient_norms(change, GROUPS), strict=True):
        expected = [reference.unit_sum(squares, group, u) ** 0.5 for u in range(group.size)]
        assert values.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("descending", [True, False])
def test_ranking_is_global_and_keeps_the_order_of_ties(change, descending):
    whole = [score.floor() for score in weight_change(change, GROUPS)]  # exact in either order
    expected = reference.ranking([score.tolist() for score in whole], descending)
    assert rank(whole, descending=descending) == expected
    equal = [torch.ones(3), torch.ones(2)]
    assert rank(equal, descending=descending) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("share", [0.01, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_sub_weights_are_those_of_the_list_of_floats_version(change, share, count):
    chosen = rank(weight_change(change, GROUPS), descending=True)[:count]
    found = select_sub_weights(change, GROUPS, chosen, share)
    assert all(mask.shape == change[name].shape for name, mask in found.items())
    assert reference.where(found) == reference.sub_weights(change, GROUPS, chosen, share)


def test_sub_weights_are_pooled_over_groups_and_taken_with_their_ties():
    groups = [UnitGroup("a", 2, {"a": 0}), UnitGroup("b", 1, {"b": 1}, width=2)]
    change = {"a": torch.tensor([[9.0, 1.0], [8.0, 8.0]]), "b": torch.tensor([[7.0, 7.0]])}
    found = select_sub_weights(change, groups, [(0, 0), (1, 0)], 0.5)  # of 9, 1, 7, 7
    assert found["a"].tolist() == [[True, False], [False, False]]
    assert found["b"].tolist() == [[True, True]]
    assert select_sub_weights(change, groups, [], 0.5) == {}


def test_marked_entries_are_set_to_zero_and_no_others(net, change):
    chosen = [(0, 1), (2, 0)]
    marked = select_sub_weights(change, GROUPS, chosen, 0.5)
    before = parameters_by_name(net)
    zero(net, marked)
    for name, value in net.named_parameters():
        mask = marked.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, 0.0, before[name])), name


def test_prune_zeroes_every_entry_of_the_chosen_units_and_no_other(net):
    chosen = [(0, 3), (2, 1), (0, 0), (1, 4)]
    before = parameters_by_name(net)
    masks = pruning_masks(net, GROUPS, chosen)
    prune(net, GROUPS, chosen)
    gone = {
        (name, index)
        for group, unit in chosen
        for name, axis in GROUPS[group].axes.items()
        for index in reference.entries_of(before[name].shape, axis, unit, GROUPS[group].width)
    }
    after = dict(net.named_parameters())
    assert reference.where({name: value == 0 for name, value in after.items()}) == gone
    for name, value in after.items():
        assert torch.equal(value, before[name] * masks.get(name, 1)), name
    assert set(masks) == {name for group in GROUPS for name in group.axes}


def test_silenced_units_do_not_reach_the_output(adapter, samples):
    groups = adapter.unit_groups()
    chosen = [(0, 1)]
    prune(adapter.model, groups, chosen)
    batch = samples.everything()
    expected = adapter.logits(batch.inputs)
    with torch.no_grad():
        adapter.model[0].bias[1] += 100
        adapter.model[0].weight[1] -= 3
    assert torch.equal(adapter.logits(batch.inputs), expected)


def test_mean_activations_are_those_of_one_sample_at_a_time(adapter, samples):
    groups = adapter.unit_groups()
    layers = [group.layer for group in groups]
    alone = [adapter.features(one, layers) for one in reference.one_by_one(samples)]
    adapter.model.train()
    found = mean_activations(adapter, samples, groups, batch_size=3)
    for group, values in zip(groups, found, strict=True):
        expected = torch.stack([features[group.layer][0] for features in alone]).mean(0)
        torch.testing.assert_close(values, expected)
    assert all(module.training for module in adapter.model.modules())


def test_a_shared_weight_stands_under_each_of_its_names():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    groups = [UnitGroup(n, 3, {f"{n}.weight": 0, f"{n}.bias": 0}) for n in ("0", "1")]
    change = {name: value.abs() for name, value in parameters_by_name(net).items()}
    scores = weight_change(change, groups)
    assert torch.equal(*scores)
    prune(net, groups, [(1, 2)])
    assert net[0].weight[2].count_nonzero() == 0


def test_gradient_norms_of_frozen_weights_are_zero(adapter, samples):
    batch = samples.everything()
    groups = adapter.unit_groups()
    whole = gradient_norms(mean_gradient(adapter, batch), groups)
    assert all(score.min() >= 0 and score.max() > 0 for score in whole)
    adapter.model[0].weight.requires_grad_(False)
    part = gradient_norms(mean_gradient(adapter, batch), groups)
    assert part[0].count_nonzero() == 0
    torch.testing.assert_close(part[1:], whole[1:])


@pytest.mark.parametrize("shape", ["floats", "ties", "sorted", "constant"])
def test_kth_smallest_is_that_of_the_sorted_values(shape):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    values = {
        "floats": values,
        "ties": (values * 5).floor(),
        "sorted": values.sort().values,
        "constant": torch.ones(1000),
    }[shape]
    for k in (1, 2, 37, 500, 999, 1000):
        for stride in (1, 8, 64, 5000):
            assert kth_smallest(values, k, stride) == values.sort().values[k - 1]


def test_kth_smallest_survives_a_sample_that_misleads():
    values = torch.arange(1000.0)
    values[::10] = 5000  # all that the sample sees
    assert kth_smallest(values, 450, stride=10) == values.sort().values[449]
