"""What does not fit into memory is computed in parts, to the same numbers in float64."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from limits import limited
from torch import nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.batch import TensorBatch
from mmdefense.data.detection import DetectionBatch
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.curvature import gradient_norm_penalty, hessian_product
from mmdefense.kernels.fisher import fisher_diagonal, penalised_gradient
from mmdefense.kernels.loop import mean_loss_gradient, scores, train
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.units import mean_activations
from mmdefense.kernels.unlearning import unlearn
from mmdefense.notes import Note
from mmdefense.runtime.memory import RandomState, Room, fitted, in_parts, is_out_of_memory, roomy
from mmdefense.runtime.run import Run, copy_state
from mmdefense.training import Training
from mmdefense_adapters.torch_classifier import TorchClassifier

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def room():
    """Samples that fit are found out afresh, and what is told is kept in ``stated``."""
    made = Room()
    made.said = []
    made.notify = made.said.append
    with roomy(made):
        yield made


def exhausted(_):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def test_the_allocator_of_the_cpu_says_what_is_looked_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_a_part_of_any_batch_has_its_rows_of_every_field(samples):
    batch = samples.everything()
    assert batch.rows(slice(0, 7)) is batch
    cut = batch.rows(slice(2, 5))
    assert torch.equal(cut.inputs, batch.inputs[2:5])
    assert torch.equal(cut.labels, batch.labels[2:5])
    boxes = tuple(torch.full((n, 4), float(n)) for n in range(4))
    found = DetectionBatch(torch.rand(4, 1, 2, 2), boxes, tuple(b[:, 0].long() for b in boxes))
    assert [len(b) for b in found.rows(slice(1, 3)).boxes] == [1, 2]


def test_the_size_is_halved_until_it_fits_and_then_kept(room):
    tried = []

    def compute(rows):
        tried.append([row.stop - row.start for row in rows])
        if max(tried[-1]) > 4:
            exhausted(rows)
        return [(row.start, row.stop) for row in rows]

    model = nn.Linear(1, 1)
    assert fitted(compute, 13, "work", model) == [(0, 2), (2, 5), (5, 7), (7, 10), (10, 13)]
    assert [max(sizes) for sizes in tried] == [13, 5, 3]
    assert sum(tried[-1]) == 13
    fitted(compute, 40, "work", model)
    assert max(tried[-1]) <= 3
    fitted(compute, 4, "other work", model)
    assert tried[-1] == [4]
    assert room.sizes == {"work": 3}


def test_it_is_said_once(room):
    model = nn.Linear(1, 1)
    for what in ("this", "that"):
        fitted(lambda rows: None if len(rows) > 1 else exhausted(rows), 8, what, model)
    assert len(room.said) == 1
    assert "memory ran out in this with 8 samples at once" in room.said[0]
    assert "at most 4" in room.said[0]


def test_one_sample_that_is_too_much_is_one_line(room):
    with pytest.raises(UnsupportedError, match="one sample at a time") as caught:
        fitted(exhausted, 8, "training", nn.Linear(1, 1))
    assert "\n" not in str(caught.value)
    assert not room.said


def test_another_error_is_not_met_by_smaller_batches(room):
    def compute(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fitted(compute, 8, "training", nn.Linear(1, 1))
    assert not room.sizes


def test_outside_of_a_run_the_size_is_kept_by_model(build, draw):
    batch, asked = draw(8).everything(), []
    adapter = limited(build(), 2, asked)
    with pytest.warns(Note, match="micro-batches"):
        in_parts(adapter.score, batch, "scoring", adapter.model)
    in_parts(adapter.score, batch, "scoring", adapter.model)
    assert [n for _, n in asked] == [8, 4] + 8 * [2]


def test_nothing_of_a_failed_attempt_is_held_when_the_next_begins(room):
    held = []

    def compute(rows):
        assert all(ref() is None for ref in held)
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        if len(rows) < 4:
            exhausted(rows)

    gc.disable()
    try:
        fitted(compute, 8, "work", nn.Linear(1, 1))
    finally:
        gc.enable()
    assert len(held) == 3


def test_random_states_and_statistics_go_back_with_a_failed_attempt(room):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(8, 2)

    def compute(rows):
        drawn = [torch.rand(3, generator=generator), torch.rand(3)]
        drawn += [model(inputs[row]).detach() for row in rows]
        if len(rows) < 4:
            exhausted(rows)
        return drawn

    def outcome(sizes):
        for buffer, value in zip(model.buffers(), fresh, strict=True):
            buffer.copy_(value)
        room.sizes = dict(sizes)
        torch.manual_seed(5)
        generator.manual_seed(5)
        found = fitted(compute, 8, "work", model, generator)
        return [*found, *(b.clone() for b in model.buffers()), torch.rand(2)]

    fresh = [buffer.clone() for buffer in model.buffers()]
    known, found = outcome({"work": 2}), outcome({})
    assert all(torch.equal(a, b) for a, b in zip(known, found, strict=True))


def test_a_state_of_eval_mode_copies_no_statistics():
    assert not RandomState(nn.BatchNorm1d(2).eval()).statistics


def compared(build, work, size=3):
    """Return what ``work`` gives with room for all samples, and with room for ``size``."""
    asked = []
    whole, parts = work(build()), work(limited(build(), size, asked))
    sizes = [n for _, n in asked]
    assert max(sizes) > size  # it was tried
    assert min(sizes) <= size
    return whole, parts


def assert_same(build, work, room, size=3):
    whole, parts = compared(build, work, size)
    torch.testing.assert_close(parts, whole, **EXACT)
    assert len(room.said) == 1


def parameters_of(adapter):
    return list(adapter.model.parameters())


def test_the_gradient_of_the_loss_is_that_of_the_whole_batch(build, room, samples):
    def work(adapter):
        return mean_loss_gradient(adapter, samples.everything(), parameters_of(adapter))

    assert_same(build, work, room)


@pytest.mark.parametrize("form", ["true", "empirical"])
def test_the_gradient_of_the_trace_is_that_of_the_whole_batch(build, room, samples, form):
    def work(adapter):
        return penalised_gradient(
            adapter,
            samples.everything(),
            parameters_of(adapter),
            torch.Generator().manual_seed(4),
            0.3,
            form,
            lambda gradients: [3 * g for g in gradients],
        )

    assert_same(build, work, room)


@pytest.mark.parametrize("form", ["true", "empirical"])
def test_the_diagonal_is_that_of_the_whole_batches(build, room, samples, form):
    def work(adapter):
        noise = torch.Generator().manual_seed(4)
        return fisher_diagonal(
            adapter, samples, parameters_of(adapter), noise, form=form, batch_size=5
        )

    assert_same(build, work, room, size=2)


@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_the_gradient_norm_penalty_is_that_of_the_whole_batch(build, room, samples, norm):
    def work(adapter):
        parameters = parameters_of(adapter)
        gradient_norm_penalty(
            adapter, samples.everything(), parameters, radius=0.1, mix=0.6, norm=norm
        )
        return [p.grad for p in parameters]

    assert_same(build, work, room)


def test_a_hessian_product_is_that_of_the_whole_batch(build, room, samples):
    def work(adapter):
        parameters = parameters_of(adapter)
        return hessian_product(adapter, samples, parameters)(
            [torch.ones_like(p) for p in parameters]
        )

    assert_same(build, work, room)


@pytest.mark.parametrize("kind", [scores, head_activations, mean_activations, pruning_curve])
def test_what_is_read_of_a_model_is_the_same_in_parts(build, room, samples, kind):
    def work(adapter):
        more = {
            mean_activations: [adapter.unit_groups()],
            pruning_curve: [[2, 0, 1], [0, 1, 3]],
        }.get(kind, [])
        return kind(adapter, samples, *more)

    assert_same(build, work, room)


def test_training_in_parts_is_training(build, room, draw):
    plan = Training(steps=6, batch_size=8, lr=0.1, batch_norm="eval", check_every=2)

    def work(adapter):
        mean = train(adapter, draw(20), plan, Run())
        return [torch.tensor(mean).double(), *copy_state(adapter.model).values()]

    with pytest.warns(Note, match="memory ran out") as told:
        whole, parts = compared(build, lambda a: within(Room(), work, a))
    torch.testing.assert_close(parts[1:], whole[1:], **EXACT)
    assert len(told) == 1


def within(room, work, *arguments):
    with roomy(room):
        return work(*arguments)


def test_unlearning_in_parts_is_unlearning(build, room, draw):
    def work(adapter):
        settings = {"stop": 0.0, "lr": 0.05, "batch_size": 8, "max_epochs": 2}
        for module in adapter.model.modules():  # the loop trains it in train mode
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        adapter.model[1] = _Fixed(adapter.model[1])
        unlearn(adapter, draw(16), Run(), **settings)
        return list(copy_state(adapter.model).values())

    assert_same(build, work, room)


class _Fixed(nn.Module):
    """A BatchNorm that normalises by its running statistics in every mode."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, inputs):
        norm = self.norm
        return nn.functional.batch_norm(
            inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias, False
        )


@dataclass(frozen=True)
class _Batch(TensorBatch):
    numbers: torch.Tensor
    more: tuple[str, ...]


def test_a_batch_of_ones_own_is_cut_by_its_fields():
    batch = _Batch(torch.arange(3), ("a", "b", "c"))
    assert batch.rows(slice(1, 3)).more == ("b", "c")
    assert batch.rows(slice(0, 3)) is batch


def test_training_goes_on_in_the_parts_that_were_kept(build, draw, tmp_path):
    """A size that was found out before a kill is used from the first step on after it."""

    def stop(event):
        if event.step == 4:
            raise KeyboardInterrupt

    plan = Training(steps=6, batch_size=8, lr=0.1, check_every=2)
    net, run = limited(build(), 3), Run(store=RunStore(tmp_path, every=1))
    with roomy(run.room), pytest.warns(Note):
        train(net, draw(20), plan, run)
    expected = copy_state(net.model)
    store = RunStore(tmp_path / "cut", every=1)
    first = Run(store=store, progress=stop)
    with roomy(first.room), pytest.raises(KeyboardInterrupt):
        train(limited(build(), 3), draw(20), plan, first)
    asked: list = []
    resumed, again = limited(build(), 3, asked), Run(store=store)
    with roomy(again.room):
        train(resumed, draw(20), plan, again)
    assert {n for _, n in asked} == {2}
    found = copy_state(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_model_of_dropout_gives_the_same_however_the_limit_was_found(draw):
    def model():
        torch.manual_seed(0)
        return TorchClassifier(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
        )

    plan = Training(steps=3, batch_size=8, lr=0.1)
    states = []
    for sizes in ({}, {"training": 4}):
        adapter = limited(model(), 4)
        with roomy(Room(sizes=sizes, notified=True)):
            train(adapter, draw(20), plan, Run())
        states.append(copy_state(adapter.model))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
