"""What every adapter promises, for one tiny model of each family that it serves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from condition import assert_same, condition
from families import FAMILIES, N
from torch import nn

from mmdefense import registry
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.units import prune
from mmdefense.protocol import (
    GeneratingAdapter,
    HeadAdapter,
    InputAdapter,
    OutputAdapter,
    ReadingAdapter,
    TaskAdapter,
    TriggerAdapter,
    ViewingAdapter,
    WordedAdapter,
    missing_members,
    traits,
)

EVERY = torch.arange(N)
SCORES = {"object-detection": "AP@50", "language-generation": "n-gram accuracy"}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


def built(name):
    """Return an adapter, and its samples, which it has seen."""
    adapter = FAMILIES[name].wrap()
    return adapter, adapter.samples(FAMILIES[name].data(adapter))


shared = cache(built)  # for tests that leave the model as it is


@pytest.fixture
def adapter(name):
    return shared(name)[0]


@pytest.fixture
def own(name):
    """An adapter around a model that the test may change."""
    return built(name)[0]


@pytest.fixture
def samples(name):
    return shared(name)[1]


@pytest.fixture
def batch(samples):
    return samples.take(EVERY)


def layers(adapter):
    return [group.layer for group in adapter.unit_groups()]


def offering(protocol):
    """Return the families whose adapter offers an optional protocol."""
    found = []
    for name, family in FAMILIES.items():
        kind = registry.load("adapters", family.adapter)
        if set(missing_members(kind, protocol)) <= set(missing_members(kind, TaskAdapter)):
            found.append(name)
    return pytest.mark.parametrize("name", found)


def test_every_registered_adapter_has_a_family():
    assert {family.adapter for family in FAMILIES.values()} == set(registry.names("adapters"))


def test_it_is_the_registered_adapter_and_lacks_nothing(family, adapter, samples):
    assert registry.name_of("adapters", type(adapter)) == family.adapter
    assert type(adapter).accepts(adapter.model) or family.adapter == "points"
    assert missing_members(adapter, TaskAdapter) == []


def test_what_it_states_about_itself_suits_its_models(adapter, samples):
    stated, of_class = traits(adapter), traits(type(adapter))
    assert stated.task == of_class.task
    assert stated.score_name == SCORES.get(stated.task, "accuracy")
    assert stated.optimizer in {"sgd", "adamw"}
    assert 0 < adapter.chance < 1


def test_the_loss_is_of_each_sample_and_its_mean_the_training_loss(family, adapter, samples, batch):
    loss = adapter.per_sample_loss(batch)
    assert loss.shape == (N,)
    alone = [adapter.per_sample_loss(samples.take(EVERY[n : n + 1])) for n in range(N)]
    torch.testing.assert_close(loss, torch.cat(alone), **CLOSE)
    if family.training_loss is not None:
        torch.testing.assert_close(loss, family.training_loss(adapter, batch), **CLOSE)
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss.mean(), trained, allow_unused=True)
    found = [part for part in gradient if part is not None]
    assert all(part.isfinite().all() for part in found)
    assert any(part.any() for part in found)


def test_permuting_the_batch_permutes_every_answer(adapter, samples, batch):
    order = torch.tensor([3, 0, 4, 1, 2])
    named, moved = layers(adapter), samples.take(order)
    for ask in (
        adapter.per_sample_loss,
        adapter.score,
        adapter.embedding,
        lambda given: adapter.features(given, named),
    ):
        first, second = ask(batch), ask(moved)
        wanted = (
            {k: v[order] for k, v in first.items()} if isinstance(first, dict) else first[order]
        )
        torch.testing.assert_close(second, wanted, **CLOSE)


def test_the_same_question_has_the_same_answer_bit_for_bit(adapter, batch):
    assert torch.equal(adapter.per_sample_loss(batch), adapter.per_sample_loss(batch))
    torch.rand(3)  # the global state has moved on
    assert torch.equal(adapter.score(batch), adapter.score(batch))


def test_the_sampled_score_comes_with_the_loss_and_is_drawn_anew(adapter, batch):
    loss, score = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch), **CLOSE)
    assert score.shape == (N,)
    assert score.requires_grad
    _, same = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(score, same)
    _, other = adapter.sampled_loss(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(score, other)


# The first family of each class of adapters whose scores are few; for texts, see test_language.
FEW_SCORES = {
    family.adapter: name
    for name, family in reversed(FAMILIES.items())
    if family.classifies or "detection" in family.adapter
}


@pytest.mark.parametrize("name", FEW_SCORES.values())
def test_the_scores_gradient_has_mean_zero_and_the_fisher_as_covariance(adapter, samples):
    """Exactly, at the last layer and for one sample, over all scores that can be drawn.

    Each follows from fair signs, one for each class, or for a detector a single one.
    """
    signs = adapter.classes if isinstance(samples, LabelledSamples) else 1
    many = samples.take(torch.ones(8 * 2**signs, dtype=torch.int64))
    parameter = last_trained(adapter, many)
    _, scores = adapter.sampled_loss(many, torch.Generator().manual_seed(1))
    drawn = torch.cat([scores.detach()[:, None], gradients(scores, parameter)], 1)
    possible = distinct(drawn)[:, 1:]
    assert len(possible) == 2**signs
    close = {"rtol": 1e-4, "atol": 1e-4 * float(possible.abs().max()) ** 2}
    covariance = possible.mT @ possible / len(possible)
    expected = fisher(adapter, many.rows(slice(0, 1)), parameter)
    torch.testing.assert_close(covariance, expected, **close)
    assert possible.mean(0).abs().max() <= 1e-5 * possible.abs().max()


def distinct(rows):
    """Return the rows ``(R, P)`` without repetitions, up to rounding."""
    found = []
    for row in rows:
        if not any((row - other).abs().max() < 1e-4 * rows.abs().max() for other in found):
            found.append(row)
    return torch.stack(found)


def fisher(adapter, batch, parameter):
    """Return the Fisher information of one sample, ``(P, P)``.

    It is ``sum_c p_c g_c g_c^T`` with the gradient ``g_c`` of ``log p_c``, enumerated over the
    classes; of a detector ``g g^T`` with that of the loss, as its docstring has it.
    """
    if not isinstance(batch, LabelledBatch):
        (g,) = gradients(adapter.per_sample_loss(batch), parameter)
        return g[:, None] * g
    log_p = adapter.logits(batch.inputs).log_softmax(1)[0]
    g = gradients(log_p, parameter)
    return g.mT @ (log_p.detach().exp()[:, None] * g)


def last_trained(adapter, batch):
    """Return the last trained parameter that the loss depends on."""
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    loss = adapter.per_sample_loss(batch.rows(slice(0, 1))).sum()
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [p for p, g in zip(trained, found, strict=True) if g is not None and g.any()][-1]


def gradients(values, parameter):
    """Return the gradient of each of the values ``(V,)``, shape ``(V, P)``."""
    (found,) = torch.autograd.grad(
        values, parameter, torch.eye(len(values)), retain_graph=True, is_grads_batched=True
    )
    return found.flatten(1)


def test_the_score_is_a_share(adapter, batch):
    score = adapter.score(batch)
    assert score.shape == (N,)
    assert not score.requires_grad
    assert ((score >= 0) & (score <= 1)).all()


def test_features_are_one_value_a_unit_that_nothing_writes_into(adapter, batch):
    named = layers(adapter)
    features = adapter.features(batch, named)
    assert list(features) == named or set(features) == set(named)
    for group in adapter.unit_groups():
        found = features[group.layer]
        assert found.shape == (N, group.size), group
        assert found.isfinite().all()
        assert not found.requires_grad
    assert any(found.count_nonzero() for found in features.values())
    kept = {layer: found.clone() for layer, found in features.items()}
    adapter.per_sample_loss(batch)
    torch.testing.assert_close(features, kept, rtol=0, atol=0)
    for layer in named[:: max(1, len(named) // 4)]:  # by itself as in company
        alone = adapter.features(batch, [layer])[layer]
        torch.testing.assert_close(alone, kept[layer], **CLOSE)


def test_activations_come_with_a_gradient_and_the_units_last(adapter, batch):
    found = adapter.activations(batch, layers(adapter))
    for group in adapter.unit_groups():
        values = found[group.layer]
        assert values.shape[::2] == (N, group.size * group.width), group
        trained = any(adapter.model.get_parameter(name).requires_grad for name in group.axes)
        assert values.requires_grad or not trained  # DETR's backbone is frozen


def test_the_embedding_has_one_row_a_sample(adapter, batch):
    embedding = adapter.embedding(batch)
    assert embedding.ndim == 2
    assert len(embedding) == N
    assert embedding.isfinite().all()
    assert not embedding.requires_grad


def test_unit_groups_name_real_parameters_once(adapter, batch):
    parameters = dict(adapter.model.named_parameters(remove_duplicate=False))
    groups = adapter.unit_groups()
    named = [name for group in groups for name in group.axes]
    assert groups
    assert len(named) == len(set(named))
    for group in groups:
        for name, axis in group.axes.items():
            assert parameters[name].shape[axis] == group.size * group.width, name


def test_pruning_a_unit_zeroes_its_feature_and_no_other_of_its_layer(adapter, batch):
    groups = adapter.unit_groups()
    for place in sorted({0, len(groups) // 2, len(groups) - 1}):
        group = groups[place]
        before = adapter.features(batch, [group.layer])[group.layer]
        unit, fork = int(before.sum(0).argmax()), adapter.fork()
        prune(fork.model, groups, [(place, unit)])
        after = fork.features(batch, [group.layer])[group.layer]
        before[:, unit] = 0
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5, msg=str(group))


def test_a_fork_answers_the_same_and_shares_no_memory(adapter, batch):
    fork, expected = adapter.fork(), adapter.per_sample_loss(batch)
    assert torch.equal(fork.per_sample_loss(batch), expected)
    mine = {value.data_ptr() for value in adapter.model.state_dict().values() if value.numel()}
    assert mine.isdisjoint(value.data_ptr() for value in fork.model.state_dict().values())
    with torch.no_grad():
        for parameter in fork.model.parameters():
            parameter.zero_()
    assert torch.equal(adapter.per_sample_loss(batch), expected)


def calls(family, adapter, batch):
    """Return a call of each member, optional ones too, by name."""
    named, targets = layers(adapter), torch.zeros(N, dtype=torch.int64)
    data = family.data(adapter)
    found = {
        "samples": lambda: adapter.samples(data),
        "per_sample_loss": lambda: adapter.per_sample_loss(batch),
        "sampled_loss": lambda: adapter.sampled_loss(batch, torch.Generator()),
        "score": lambda: adapter.score(batch),
        "activations": lambda: adapter.activations(batch, named),
        "features": lambda: adapter.features(batch, named),
        "embedding": lambda: adapter.embedding(batch),
        "fork": adapter.fork,
    }
    if not missing_members(adapter, TriggerAdapter):
        trigger = adapter.trigger_families()[0]
        raw = torch.rand(1, N, *trigger.shape)
        found["trigger_targets"] = adapter.trigger_targets
        found["stamp"] = lambda: adapter.stamp(batch, trigger, raw)
        found["target_log_probability"] = lambda: adapter.target_log_probability(batch, targets)
        found["not_target"] = lambda: adapter.not_target(batch, targets)
    if not missing_members(adapter, InputAdapter):
        found["inputs"] = lambda: adapter.with_inputs(batch, adapter.inputs(batch))
    if not missing_members(adapter, HeadAdapter):
        found["head_inputs"] = lambda: adapter.head_inputs(batch)
    if not missing_members(adapter, ViewingAdapter):
        found["viewed"] = lambda: adapter.viewed(adapter.samples(data), "standard")
    if not missing_members(adapter, GeneratingAdapter):
        found["generate"] = lambda: adapter.generate(batch)
    return found


def mixed(adapter):
    """Bring the model into a state that only one who looks puts back."""
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    for parameter in trained[1::2]:
        parameter.requires_grad_(False)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    next(m for m in adapter.model.modules() if isinstance(m, kinds)).train()
    return condition(adapter.model)


def test_calls_leave_the_model_as_it_was(family, own, batch):
    asked, before = calls(family, own, batch), mixed(own)
    for call in asked.values():
        call()
        assert_same(before, condition(own.model))


def last_called(adapter, batch):
    """Return the layer that is called last on the way to the loss."""
    called = []
    handles = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in adapter.model.modules()
        if not list(module.children())
    ]
    adapter.per_sample_loss(batch)
    for handle in handles:
        handle.remove()
    return called[-1]


def test_calls_that_raise_leave_the_model_as_it_was(family, own, batch, monkeypatch):
    def boom(*_, **__):
        raise RuntimeError("boom")

    asked = calls(family, own, batch)
    monkeypatch.setattr(last_called(own, batch), "forward", boom)
    before, raised = mixed(own), set()
    for name, call in asked.items():
        try:
            call()
        except (RuntimeError, BadInputError):
            raised.add(name)
        assert_same(before, condition(own.model))
    assert {"per_sample_loss", "sampled_loss"} <= raised


def test_wrong_data_is_refused_in_one_line(family, adapter):
    wrong, before = family.wrong(adapter), condition(adapter.model)
    for said, data in wrong.items():
        with pytest.raises(BadInputError) as caught:
            adapter.samples(data)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert_same(before, condition(adapter.model))


CLASSIFIERS = pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.classifies]
)


@CLASSIFIERS
def test_the_score_of_a_classifier_counts_right_answers(adapter, batch):
    right = adapter.logits(batch.inputs).argmax(1)
    assert adapter.score(LabelledBatch(batch.inputs, right)).tolist() == [1.0] * N
    wrong = (right + 1) % adapter.classes
    assert adapter.score(LabelledBatch(batch.inputs, wrong)).tolist() == [0.0] * N
    assert adapter.chance == 1 / adapter.classes


@CLASSIFIERS
def test_the_classes_are_no_units_and_read_the_embedding(adapter, batch):
    head, embedding = adapter.model.get_submodule(adapter.head), adapter.embedding(batch)
    assert f"{adapter.head}.weight" not in [n for g in adapter.unit_groups() for n in g.axes]
    if isinstance(head, nn.Linear):  # up to a shift: of probabilities, logits are known so far
        expected = adapter.logits(batch.inputs).log_softmax(1)
        torch.testing.assert_close(head(embedding).log_softmax(1), expected, **CLOSE)


@offering(TriggerAdapter)
def test_triggers_can_be_searched_for(adapter, batch):
    count = adapter.trigger_targets()
    assert count >= 2
    for family in adapter.trigger_families():
        raw = torch.rand(2, N, *family.shape, generator=torch.Generator().manual_seed(0))
        raw.requires_grad_()
        stamped = adapter.stamp(batch, family, raw)
        assert len(stamped) == 2 * N
        log_p = adapter.target_log_probability(stamped, (torch.arange(2 * N) % count))
        assert log_p.shape == (2 * N,)
        assert (log_p <= 1e-5).all()
        (found,) = torch.autograd.grad(log_p.sum(), raw)
        assert found.isfinite().all()
        size = adapter.trigger_size(family, raw.detach())
        assert size.shape == (2, N)
        assert ((size >= 0) & (size <= 1)).all()
        picture = adapter.trigger_picture(family, raw[0, 0].detach())
        assert picture.ndim == 3
        assert ((picture >= 0) & (picture <= 1)).all()
    differs = adapter.not_target(batch, EVERY % count)
    assert differs.shape == (N,)
    assert differs.dtype == torch.bool


@offering(WordedAdapter)
def test_triggers_of_words_are_read_out(adapter, samples):
    (family,) = adapter.trigger_families()
    assert adapter.trigger_words(torch.rand(family.shape))
    assert adapter.target_words(adapter.trigger_targets() - 1)


@offering(HeadAdapter)
def test_the_output_layer_gives_the_score(adapter, batch):
    if not ends_in_a_linear_layer(adapter):
        with pytest.raises(UnsupportedError, match="layers=all"):
            adapter.head_weights()
        return
    weight, bias = adapter.head_weights()
    outputs = nn.functional.linear(adapter.head_inputs(batch), weight, bias)
    torch.testing.assert_close(adapter.score_outputs(batch, outputs), adapter.score(batch))


@offering(HeadAdapter)
def test_an_input_of_the_output_layer_is_pruned_as_a_unit(adapter, batch):
    frozen = hasattr(adapter.model, "peft_config")  # LoRA leaves its base as it is
    if frozen or not ends_in_a_linear_layer(adapter):
        with pytest.raises(UnsupportedError, match="layers=all"):
            adapter.head_group()
        return
    group, read = adapter.head_group(), adapter.head_inputs(batch)
    weight, bias = adapter.head_weights()
    assert group.size == read.shape[1]
    fork = adapter.fork()
    prune(fork.model, [group], [(0, 0)])
    read[:, 0] = 0
    outputs = nn.functional.linear(read, weight, bias)
    torch.testing.assert_close(fork.score(batch), adapter.score_outputs(batch, outputs))


def ends_in_a_linear_layer(adapter):
    return isinstance(adapter.model.get_submodule(adapter.head), nn.Linear)


@offering(OutputAdapter)
def test_the_classifier_is_where_no_unit_is(adapter, samples):
    found = [adapter.model.get_submodule(name) for name in adapter.class_layers()]
    assert found
    assert all(isinstance(layer.weight, nn.Parameter) for layer in found)
    assert not set(adapter.class_layers()) & set(layers(adapter))


@offering(InputAdapter)
def test_inputs_can_be_perturbed_by_gradients(adapter, batch):
    given = adapter.inputs(batch)
    assert len(given) == N
    assert not given.requires_grad
    bounds = adapter.input_bounds(batch)
    assert bounds is None or ((given >= bounds[0]).all() and (given <= bounds[1]).all())
    moved = given.clone().requires_grad_()
    loss = adapter.per_sample_loss(adapter.with_inputs(batch, moved))
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch), **CLOSE)
    (found,) = torch.autograd.grad(loss.sum(), moved)
    assert found.isfinite().all()
    assert found.any()


@offering(ReadingAdapter)
def test_what_it_reads_are_options_of_its_task(adapter, samples):
    stated = adapter.reading()
    assert isinstance(stated, Mapping)
    task = registry.load("tasks", adapter.task)
    assert "stated" in inspect.signature(task.load).parameters
    assert all(isinstance(option, str) for option in stated)


@offering(ViewingAdapter)
def test_views_alter_a_batch_and_not_the_samples(adapter, samples, batch):
    def altered(views):
        viewed = adapter.viewed(samples, views)
        assert viewed.fingerprint() == samples.fingerprint()
        return viewed.augment(batch, torch.Generator().manual_seed(0))

    words = adapter.task == "language-generation"  # which are left alone as a rule
    for views, alters in (("standard", not words), ("insertions", True), ("none", False)):
        found = altered(views)
        assert len(found) == len(batch)
        changed = not torch.equal(adapter.per_sample_loss(found), adapter.per_sample_loss(batch))
        assert changed == alters, views


@offering(GeneratingAdapter)
def test_it_writes_one_text_a_prompt(adapter, batch):
    written = adapter.generate(batch)
    assert len(written) == N
    assert all(isinstance(text, str) for text in written)
    assert adapter.generate(batch) == written
