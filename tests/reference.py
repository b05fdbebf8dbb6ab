"""Slow, exact versions of what the kernels compute: one sample, one class, one float at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(tensors):
    """Return all entries in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient_of(value, parameters, **options):
    """Return the gradient of a scalar as one vector."""
    return flat(torch.autograd.grad(value, parameters, materialize_grads=True, **options))


def one_by_one(samples):
    """Yield the samples as batches of one."""
    for index in range(len(samples)):
        yield samples.take(torch.tensor([index]))


def fisher(adapter, samples, parameters, form):
    """Return the dense Fisher information, ``(P, P)``: a loop over samples and classes."""
    total = 0
    for one in one_by_one(samples):
        log_p = adapter.logits(one.inputs).log_softmax(1)[0]
        weights = log_p.exp() if form == "true" else torch.zeros_like(log_p)
        if form == "empirical":
            weights[one.labels[0]] = 1
        for weight, value in zip(weights.tolist(), log_p, strict=True):
            gradient = gradient_of(value, parameters, retain_graph=True)
            total = total + weight * torch.outer(gradient, gradient)
    return total / len(samples)


def trace_gradient(adapter, samples, parameters, form):
    """Return the whole gradient of Tr(F) as one vector, that of the probabilities included."""
    total = 0
    for one in one_by_one(samples):
        log_p = adapter.logits(one.inputs).log_softmax(1)[0]
        for label, value in enumerate(log_p):
            weight = value.exp() if form == "true" else float(label == one.labels[0])
            squared = gradient_of(value, parameters, create_graph=True).square().sum()
            total = total + weight * squared
    return gradient_of(total, parameters) / len(samples)


def hessian(loss, parameters):
    """Return the dense Hessian of a scalar, ``(P, P)``, row by row."""
    gradient = gradient_of(loss, parameters, create_graph=True)
    rows = [gradient_of(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack(rows)


def finite_differences(function, parameters, width=1e-5):
    """Return the gradient of ``function()`` as one vector, by central differences."""
    found = []
    for parameter in parameters:
        entries = parameter.data.view(-1)
        for index in range(len(entries)):
            here = float(entries[index])
            entries[index] = here + width
            above = function().item()
            entries[index] = here - width
            below = function().item()
            entries[index] = here
            found.append((above - below) / (2 * width))
    return torch.tensor(found, dtype=torch.float64)


def entries_of(shape, axis, unit, width):
    """Yield the index of every entry of a tensor that belongs to a unit."""
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        if int(index[axis]) // width == unit:
            yield tuple(index.tolist())


def unit_sum(tensors, group, unit):
    """Return the sum over the weights of one unit, a float."""
    return sum(
        float(tensors[name][index])
        for name, axis in group.axes.items()
        if tensors[name].ndim > 1
        for index in entries_of(tensors[name].shape, axis, unit, group.width)
    )


def ranking(scores, descending):
    """Return all (group, unit) in the order of their score; ties keep their order."""
    found = [
        (score, group, unit)
        for group, values in enumerate(scores)
        for unit, score in enumerate(values)
    ]
    found.sort(key=lambda entry: -entry[0] if descending else entry[0])
    return [(group, unit) for _, group, unit in found]


def sub_weights(change, groups, chosen, share):
    """Return the (name, index) of the chosen units' weights that changed most, as a set."""
    pool = [
        (float(change[name][index]), name, index)
        for group, unit in chosen
        for name, axis in groups[group].axes.items()
        if change[name].ndim > 1
        for index in entries_of(change[name].shape, axis, unit, groups[group].width)
    ]
    values = sorted((value for value, _, _ in pool), reverse=True)
    threshold = values[max(1, int(share * len(values))) - 1]
    return {(name, index) for value, name, index in pool if value >= threshold}


def where(masks: dict[str, Tensor]):
    """Return the (name, index) of every true entry, as a set."""
    return {
        (name, tuple(index)) for name, mask in masks.items() for index in mask.nonzero().tolist()
    }
