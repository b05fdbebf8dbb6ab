from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mmdefense.kernels.fisher import loss_and_trace
from mmdefense.kernels.spectral import Spectrum, spectral_weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def shaken(spectrum, seed=0):
    """Set random shifts; the first value of each weight falls to zero, by far."""
    generator = torch.Generator().manual_seed(seed)
    for shift, (_, values, _) in zip(spectrum.shifts, spectrum.bases, strict=True):
        drawn = torch.rand(shift.shape, generator=generator, dtype=torch.float64) - 0.3
        shift.data.copy_(drawn * values.max())
        shift.data[0] = -2 * values[0]
    return spectrum


@pytest.fixture
def layers():
    """One layer of each kind, apart from each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 5, 3),
                "wide": nn.Conv1d(2, 8, 2, groups=2),
                "norm": nn.BatchNorm2d(5),
                "linear": nn.Linear(7, 4),
                "embedding": nn.Embedding(6, 3),
                "attention": nn.MultiheadAttention(4, 2),
            }
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_shift_gives_the_weights_back_bit_for_bit(layers, dtype):
    layers.to(dtype)
    layers["conv"].to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    Spectrum(list(spectral_weights(layers).values())).write()
    for name, value in layers.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_shifts_move_the_singular_values_and_nothing_else(layers, memory):
    layers.double()["conv"].to(memory_format=memory)
    weights = spectral_weights(layers)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    spectrum = shaken(Spectrum(list(weights.values())))
    spectrum.write()
    after = layers.state_dict()
    assert list(after) == list(before)
    for (name, _), shift in zip(weights.items(), spectrum.shifts, strict=True):
        left, values, right = torch.linalg.svd(before[name].flatten(1), full_matrices=False)
        expected = left @ torch.diag(F.relu(values + shift)) @ right
        found = after[name].flatten(1)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
        assert not torch.allclose(after[name], before[name])
    for name in before.keys() - weights.keys():
        assert torch.equal(after[name], before[name]), name


def test_the_second_write_forgets_the_first(layers):
    weights = list(spectral_weights(layers).values())
    spectrum = Spectrum(weights)
    before = [weight.clone() for weight in weights]
    shaken(spectrum).write()
    for shift in spectrum.shifts:
        shift.data.zero_()
    spectrum.write()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_shapes_and_dtypes_stay(layers, dtype):
    layers.to(dtype)
    before = {name: (v.shape, v.dtype) for name, v in layers.state_dict().items()}
    shaken(Spectrum(list(spectral_weights(layers).values()))).write()
    assert {name: (v.shape, v.dtype) for name, v in layers.state_dict().items()} == before


def test_a_half_precision_weight_is_rounded_once(layers):
    """The sum is made in fp32, so its error is that of one rounding to bfloat16."""
    weight = layers.to(torch.bfloat16)["linear"].weight
    start = weight.detach().double()
    spectrum = shaken(Spectrum([weight]))
    left, values, right = (part.double() for part in spectrum.bases[0])
    change = F.relu(values + spectrum.shifts[0].double()) - values
    exact = start + (left * change) @ right
    spectrum.write()
    error = (weight.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8).all()


def test_every_matrix_is_found_and_nothing_else(layers):
    assert set(spectral_weights(layers)) == {
        "conv.weight",
        "wide.weight",
        "linear.weight",
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    layers["conv"].weight.requires_grad_(False)
    assert "conv.weight" not in spectral_weights(layers)
    assert list(spectral_weights(nn.Linear(2, 3))) == ["weight"]


def test_a_matrix_of_a_layer_of_its_own_class_is_found():
    class Transposed(nn.Module):  # as GPT-2's layers are
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))

    assert list(spectral_weights(nn.Sequential(Transposed(), nn.LayerNorm(2)))) == ["0.weight"]


def test_a_tied_weight_is_found_once():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    net[1].weight = net[0].weight
    assert list(spectral_weights(net)) == ["0.weight"]
    before = net[0].weight.detach().clone()
    shaken(Spectrum(list(spectral_weights(net).values()))).write()
    assert net[1].weight is net[0].weight
    assert not torch.allclose(net[1].weight, before)


class Explicit:
    """The same model with its weights computed from the shifts, by autograd."""

    def __init__(self, adapter, spectrum, names):
        self.adapter, self.spectrum, self.names = adapter, spectrum, names
        self.model = adapter.model

    def weights(self):
        return {
            name: ((left * F.relu(values + shift)) @ right).view_as(weight)
            for name, weight, shift, (left, values, right) in zip(
                self.names,
                self.spectrum.weights,
                self.spectrum.shifts,
                self.spectrum.bases,
                strict=True,
            )
        }

    def logits(self, inputs):
        return functional_call(self.model, self.weights(), (inputs,))

    def per_sample_loss(self, batch):
        return F.cross_entropy(self.logits(batch.inputs), batch.labels, reduction="none")


@pytest.fixture
def pair(adapter):
    """The model with its shifts written, and its explicit twin."""
    weights = spectral_weights(adapter.model)
    spectrum = shaken(Spectrum(list(weights.values())))
    spectrum.write()
    return adapter, spectrum, Explicit(adapter, spectrum, list(weights))


def test_pull_back_is_autograd_through_the_parametrisation(pair, samples):
    adapter, spectrum, explicit = pair
    batch = samples.everything()
    loss = adapter.per_sample_loss(batch).mean()
    torch.testing.assert_close(loss, explicit.per_sample_loss(batch).mean())
    found = spectrum.pull_back(torch.autograd.grad(loss, spectrum.weights))
    expected = torch.autograd.grad(explicit.per_sample_loss(batch).mean(), spectrum.shifts)
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-14)
    assert all(float(gradient[0]) == 0 for gradient in found)  # these values fell to zero
    assert all(gradient.count_nonzero() > 0 for gradient in found)


def test_the_trace_over_shifts_is_differentiated_exactly(pair, samples):
    adapter, spectrum, explicit = pair
    batch = samples.everything()
    _, trace = loss_and_trace(
        adapter,
        batch,
        spectrum.weights,
        torch.Generator().manual_seed(3),
        "empirical",
        spectrum.pull_back,
    )
    _, expected = loss_and_trace(
        explicit, batch, spectrum.shifts, torch.Generator().manual_seed(3), "empirical"
    )
    torch.testing.assert_close(trace, expected)
    found = spectrum.pull_back(torch.autograd.grad(trace, spectrum.weights))
    torch.testing.assert_close(
        reference.flat(found), reference.gradient_of(expected, spectrum.shifts)
    )
