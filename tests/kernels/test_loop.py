from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from clocks import LATE, looks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.images import random_shift
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, DivergenceError
from mmdefense.kernels.loop import mean_score, optimise, scores, train
from mmdefense.kernels.spectral import Spectrum, spectral_weights
from mmdefense.runtime.run import OutOfTime, Run, copy_state
from mmdefense.training import Training
from mmdefense_adapters.torch_classifier import TorchClassifier

PLAN = Training(steps=11, batch_size=4, lr=0.1, max_norm=1.0, check_every=2)


@pytest.fixture
def noisy(build, draw):
    """Return a function that gives a net with dropout, and samples that are augmented."""

    def make():
        layers = list(build().model)
        model = nn.Sequential(*layers[:6], nn.Dropout(0.3), *layers[6:])
        return TorchClassifier(model), replace(draw(10), augmentation=random_shift)

    return make


@dataclass(frozen=True)
class Recorded(LabelledSamples):
    """Remembers which samples were taken."""

    taken: list = field(default_factory=list)

    def take(self, indices):
        self.taken.append(indices.tolist())
        return super().take(indices)


def recorded(samples):
    return Recorded(samples.inputs, samples.labels)


def interrupt_at(stop, also=None):
    def after_step(step):
        if also is not None:
            also(step)
        if step == stop:
            raise KeyboardInterrupt

    return after_step


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_training_is_plain_sgd_on_the_drawn_batches(build, draw):
    adapter, twin = build(), build()
    samples = recorded(draw(10))
    plan = replace(PLAN, momentum=0.8, weight_decay=0.1, max_norm=None)
    train(adapter, samples, plan, Run())
    twin.model.train()
    optimizer = torch.optim.SGD(twin.model.parameters(), 1.0, momentum=0.8, weight_decay=0.1)
    for step, indices in enumerate(samples.taken):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 11)) / 2
        optimizer.zero_grad()
        inputs, labels = samples.inputs[indices], samples.labels[indices]
        nn.functional.cross_entropy(twin.model(inputs), labels).backward()
        optimizer.step()
    assert len(samples.taken) == 11
    torch.testing.assert_close(copy_state(adapter.model), copy_state(twin.model))


@pytest.mark.parametrize("total", [10, 3])
def test_every_epoch_takes_each_sample_once_in_an_order_of_its_own(build, draw, total):
    samples = recorded(draw(total))
    train(build(), samples, replace(PLAN, steps=10), Run())
    assert {len(indices) for indices in samples.taken} == {4}
    row = [index for indices in samples.taken for index in indices]
    epochs = [row[start : start + total] for start in range(0, len(row) - total + 1, total)]
    assert len(epochs) == 40 // total
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}])
@pytest.mark.parametrize("stops", [(1,), (4,), (5, 6), (9,), (11,)])
def test_an_interrupted_run_goes_on_to_the_same_bits(noisy, tmp_path, changes, stops):
    plan = replace(PLAN, **changes)
    adapter, samples = noisy()
    whole = Run(seed=3)
    expected = train(adapter, samples, plan, whole)
    for stop in (*stops, None):
        twin, samples = noisy()
        run = Run(seed=3, store=RunStore(tmp_path, every=3))
        try:
            found = train(twin, samples, plan, run, after_step=interrupt_at(stop))
        except KeyboardInterrupt:
            assert stop is not None
    assert found == expected
    assert run.history == whole.history
    assert_equal_states(copy_state(twin.model), copy_state(adapter.model))


def test_a_run_whose_time_is_up_goes_on_to_the_same_bits(noisy, tmp_path):
    plan = PLAN
    adapter, samples = noisy()
    whole = Run(seed=3)
    train(adapter, samples, plan, whole)
    for _ in range(plan.steps - 1):  # each makes one update
        twin, samples = noisy()
        with pytest.raises(OutOfTime, match="train, step"):
            train(twin, samples, plan, Run(seed=3, store=RunStore(tmp_path), deadline=LATE))
    assert any((a != b).any() for a, b in zip(*map(parameters_of, (twin, adapter)), strict=True))
    run = Run(seed=3, store=RunStore(tmp_path), deadline=LATE)
    twin, samples = noisy()
    train(twin, samples, plan, run)  # one step is left, and its end is not cut off
    assert run.history == whole.history
    assert_equal_states(copy_state(twin.model), copy_state(adapter.model))


def test_what_depends_on_earlier_steps_goes_on_from_where_it_began(noisy, tmp_path):
    plan = replace(PLAN, check_every=4, resume_every=4)

    def gradients(adapter):
        measured = []

        def compute(batch, step):
            if step % 4 == 0:
                measured[:] = [1 + step / 10]
            loss = adapter.per_sample_loss(batch).mean()
            (loss * measured[0]).backward()
            return loss

        return compute

    adapter, samples = noisy()
    optimise(adapter.model, samples, plan, Run(seed=3), gradients=gradients(adapter))
    for _ in range(2):
        twin, samples = noisy()
        run = Run(seed=3, store=RunStore(tmp_path, every=1), deadline=looks(6))
        with pytest.raises(OutOfTime):
            optimise(twin.model, samples, plan, run, gradients=gradients(twin))
    twin, samples = noisy()
    optimise(
        twin.model, samples, plan, Run(seed=3, store=RunStore(tmp_path)), gradients=gradients(twin)
    )
    assert_equal_states(copy_state(twin.model), copy_state(adapter.model))


def parameters_of(adapter):
    return list(adapter.model.parameters())


def test_parameters_that_are_not_the_models_own_are_resumed_too(build, draw, tmp_path):
    def spectral_training(run, stop):
        adapter = build()
        spectrum = Spectrum(list(spectral_weights(adapter.model).values()))

        def compute(batch, _):
            loss = adapter.per_sample_loss(batch).mean()
            pulled = spectrum.pull_back(torch.autograd.grad(loss, spectrum.weights))
            for shift, gradient in zip(spectrum.shifts, pulled, strict=True):
                shift.grad = gradient
            return loss

        optimise(
            adapter.model,
            draw(10),
            PLAN,
            run,
            gradients=compute,
            parameters=spectrum.shifts,
            after_step=interrupt_at(stop, lambda _: spectrum.write()),
        )
        return copy_state(adapter.model)

    expected = spectral_training(Run(), None)
    store = RunStore(tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        spectral_training(Run(store=store), 7)
    assert_equal_states(spectral_training(Run(store=store), None), expected)


def test_a_resumed_run_repeats_only_what_was_not_kept(build, draw, tmp_path):
    run = Run(store=RunStore(tmp_path, every=4))
    with pytest.raises(KeyboardInterrupt):
        train(build(), draw(10), PLAN, run, after_step=interrupt_at(7))
    done = []
    train(build(), draw(10), PLAN, Run(store=run.store), after_step=done.append)
    assert done == list(range(5, 12))


def test_a_finished_stage_is_not_repeated(build, draw, tmp_path):
    adapter, run = build(), Run(store=RunStore(tmp_path))
    expected = train(adapter, draw(10), PLAN, run, after_step=lambda step: step == 5)
    run.snapshot("after", adapter.model)
    twin, again = build(), Run(store=run.store)
    assert train(twin, draw(10), PLAN, again, after_step=lambda _: 1 / 0) == expected
    assert again.history == run.history
    assert [entry["step"] for entry in again.history] == [2, 4, 5]
    assert_equal_states(copy_state(twin.model), copy_state(adapter.model))


def test_states_of_the_guard_come_back_with_a_resumed_run(build, draw, tmp_path):
    def run_until(stop):
        adapter, run = build(), Run(store=RunStore(tmp_path, every=2))
        hook = interrupt_at(stop, lambda step: run.snapshot(f"step {step}", adapter.model))
        train(adapter, draw(10), PLAN, run, after_step=hook)
        return run

    with pytest.raises(KeyboardInterrupt):
        run_until(5)
    run = run_until(None)
    assert [label for label, _ in run.states] == [f"step {n}" for n in range(1, 12)]
    assert not torch.equal(run.states[0][1]["0.weight"], run.states[-1][1]["0.weight"])


def test_a_checkpoint_of_another_model_is_refused_in_one_line(build, draw, tmp_path):
    store = RunStore(tmp_path)
    train(build(), draw(10), PLAN, Run(store=store))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    with pytest.raises(BadInputError, match="delete it to start again") as caught:
        train(TorchClassifier(model), draw(10), PLAN, Run(store=store))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_diverging_run_restores_the_last_good_state(build, draw, tmp_path, where):
    adapter, twin = build(), build()
    plan = replace(PLAN, schedule="constant", max_norm=None)
    train(twin, draw(10), replace(plan, steps=6), Run())

    def compute(batch, step):
        loss = adapter.per_sample_loss(batch).mean()
        loss.backward()
        if step == 7 and where == "loss":
            return loss * math.nan
        if step == 7:  # the last before the next look, which sees this in the weights alone
            adapter.model[0].weight.grad[0, 0, 0, 0] = math.inf
        return loss

    run = Run(store=RunStore(tmp_path, every=1))
    with pytest.raises(DivergenceError, match="after step 6") as caught:
        optimise(adapter.model, draw(10), plan, run, gradients=compute)
    assert "\n" not in str(caught.value)
    assert_equal_states(copy_state(adapter.model), copy_state(twin.model))
    assert run.history[-1]["step"] == 6
    assert adapter.model[0].weight.is_contiguous()
    kept = run.recall("train.progress")
    assert kept["step"] == 6
    assert all(value.isfinite().all() for value in kept["model"].values())


class HostReads(TorchDispatchMode):
    """Counts the operations whose result the host must wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,  # item, bool, float, int
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        ):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_step_reads_from_the_device(noisy, monkeypatch):
    adapter, samples = noisy()
    read = []
    for name in ("tolist", "numpy", "cpu"):  # these need no operation on the CPU
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, f=plain, n=name: (read.append(n), f(t, *a))[1]
        )
    with HostReads() as mode:
        train(adapter, samples, replace(PLAN, steps=9, check_every=4), Run())
    assert mode.found == []
    assert read == ["tolist"] * 3  # after 4, 8 and 9 steps
    with HostReads() as mode:
        bool(samples.labels.sum() > 0)
    assert len(mode.found) == 1  # such a read would have been seen


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(noisy):
    adapter, samples = noisy()
    adapter = TorchClassifier(adapter.model.float().cuda())
    samples = replace(samples, inputs=samples.inputs.float()).to(torch.device("cuda"))

    def after_step(step):
        torch.cuda.set_sync_debug_mode("error" if step < 7 else "default")

    try:
        train(adapter, samples, replace(PLAN, steps=8, check_every=8), Run(), after_step=after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_random_state_stays_and_does_not_matter(noisy, fails):
    results = []
    for seed in (1, 2):
        adapter, samples = noisy()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        try:
            train(adapter, samples, PLAN, Run(), after_step=interrupt_at(5 if fails else None))
        except KeyboardInterrupt:
            assert fails
        assert torch.equal(torch.get_rng_state(), before)
        results.append(copy_state(adapter.model))
    assert_equal_states(*results)


def test_seed_and_stage_decide_the_result(noisy):
    def trained(seed, stage):
        adapter, samples = noisy()
        train(adapter, samples, PLAN, Run(seed=seed), stage=stage)
        return copy_state(adapter.model)["0.weight"]

    first = trained(0, "a")
    assert torch.equal(first, trained(0, "a"))
    assert not torch.equal(first, trained(1, "a"))
    assert not torch.equal(first, trained(0, "b"))


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_layout_come_back(build, draw, fails):
    adapter = build()
    adapter.model[2].train()
    modes = [module.training for module in adapter.model.modules()]
    seen = []

    def after_step(step):
        weight = adapter.model[3].weight
        seen.append(weight.is_contiguous(memory_format=torch.channels_last))
        seen.append(adapter.model.training)
        if fails:
            raise RuntimeError("boom")

    try:
        train(adapter, draw(10), PLAN, Run(), after_step=after_step)
    except RuntimeError:
        assert fails
    assert seen
    assert all(seen)
    assert [module.training for module in adapter.model.modules()] == modes
    assert adapter.model[3].weight.is_contiguous()
    assert fails or all(parameter.grad is None for parameter in adapter.model.parameters())


def test_batchnorm_in_eval_mode_keeps_its_statistics(build, draw):
    for batch_norm in ("eval", "train"):
        adapter = build()
        before = adapter.model[1].running_mean.clone()
        train(adapter, draw(10), replace(PLAN, batch_norm=batch_norm), Run())
        assert torch.equal(adapter.model[1].running_mean, before) == (batch_norm == "eval")


def test_only_the_given_or_trainable_parameters_move(build, draw):
    adapter = build()
    before = copy_state(adapter.model)
    train(adapter, draw(10), PLAN, Run(), parameters=[adapter.model[0].weight])
    moved = {
        name for name, p in adapter.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {"0.weight"}
    adapter = build()
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad_(name == "6.bias")
    train(adapter, draw(10), PLAN, Run())
    moved = {
        name for name, p in adapter.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {"6.bias"}
    adapter.model.requires_grad_(False)
    with pytest.raises(BadInputError, match="requires grad"):
        train(adapter, draw(10), PLAN, Run())


def test_the_gradient_is_clipped_as_a_whole(build, draw):
    adapter = build()
    before = copy_state(adapter.model)
    plan = replace(PLAN, steps=1, lr=1.0, momentum=0, schedule="constant", max_norm=1e-3)
    train(adapter, draw(10), plan, Run())
    moved = [p.detach() - before[name] for name, p in adapter.model.named_parameters()]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_the_returned_loss_is_the_mean_of_the_last_steps(build, draw):
    losses = []
    adapter = build()

    def compute(batch, _):
        loss = adapter.per_sample_loss(batch).mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    run = Run()
    found = optimise(adapter.model, draw(10), PLAN, run, gradients=compute)
    assert found == pytest.approx(losses[-1], rel=1e-5)  # 11 steps, read after each second
    assert run.history[0]["loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)


def test_schedules():
    rates = [replace(PLAN, steps=10, lr=2.0, schedule=s) for s in ("cosine", "constant")]
    assert [rates[0].lr_at(step) for step in (0, 5)] == pytest.approx([2, 1])
    assert {rates[1].lr_at(step) for step in range(10)} == {2.0}
    rise = replace(PLAN, steps=10, lr=2.0, schedule="one-cycle")
    assert [rise.lr_at(step) for step in (0, 1, 2, 6)] == pytest.approx([1, 2, 2, 1])
    for field_name in ("batch_size", "check_every"):
        with pytest.raises(BadInputError, match=f"{field_name} must"):
            replace(PLAN, **{field_name: 0})
    with pytest.raises(BadInputError, match="lr must"):
        replace(PLAN, lr=math.nan)


def test_no_steps_change_nothing(build, draw):
    adapter = build()
    before = copy_state(adapter.model)
    assert math.isnan(train(adapter, draw(10), replace(PLAN, steps=0), Run()))
    assert_equal_states(copy_state(adapter.model), before)


def test_scores_are_those_of_eval_mode_in_order(noisy):
    adapter, samples = noisy()
    expected = adapter.score(samples.everything())
    adapter.model.train()
    assert torch.equal(scores(adapter, samples, batch_size=3), expected)
    assert mean_score(adapter, samples, 3) == pytest.approx(float(expected.mean()))
    assert adapter.model.training
