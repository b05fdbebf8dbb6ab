"""A planted backdoor is an outlier, nothing of its clean twin is, and nothing is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mmdefense as mmd
from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.data.images import random_view
from mmdefense.findings import ScanRecord
from mmdefense.kernels.inversion import Recovered
from mmdefense.kernels.loop import train
from mmdefense.kernels.outliers import MANY, cheapest_triggers, index_bound
from mmdefense.protocol import TriggerFamily
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.scanning import behaviour
from mmdefense.scanning.behaviour import scan_behaviour
from mmdefense.scanning.formats import to_html, to_json, to_sarif
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits

TRAINING = Training(steps=300, batch_size=64, lr=0.1, schedule="one-cycle", max_norm=5.0)


def net():
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 16, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def models():
    """Return a victim of BadNets on the digits, its clean twin, and clean samples of them."""
    data = replace(load_digits()[0], augmentation=random_view)
    found = {}
    for name in ("victim", "twin"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[name] = adapt(net())
        found[name].samples(data)
        if name == "victim":
            BadNets(seed=0).plant(found[name], data, TRAINING, Run(0))
        else:
            train(found[name], found[name].samples(data), TRAINING, Run(0), stage="twin")
        found[name].model.eval()
    return SimpleNamespace(**found, clean=split(data, 0.1, 0)[1])


@pytest.fixture(scope="module")
def scanned(models):
    """Return the findings of the victim, and its state and settings before and after."""
    before = {name: value.clone() for name, value in models.victim.model.state_dict().items()}
    found = scan_behaviour(models.victim, models.victim.samples(models.clean))
    return SimpleNamespace(found=found, before=before, after=models.victim.model.state_dict())


def of(findings, rule):
    return [finding for finding in findings if finding.id == rule]


def test_a_planted_backdoor_is_an_outlier(scanned):
    outliers = of(scanned.found, "behaviour-trigger-outlier")
    assert [finding.subject for finding in outliers] == ["patch to 0"]
    assert outliers[0].level == "high"
    assert "success" in outliers[0].value
    assert "median of 10 targets" in outliers[0].reference


def test_nothing_of_a_clean_twin_is_an_outlier(models):
    found = scan_behaviour(models.twin, models.twin.samples(models.clean))
    assert of(found, "behaviour-trigger-outlier") == []


def test_activeness_and_smoothness_are_remarks_without_a_reference(scanned):
    for rule, word in (("behaviour-activeness", "units"), ("behaviour-smoothness", "lambda_max")):
        (finding,) = of(scanned.found, rule)
        assert finding.level == "info"
        assert word in finding.value
    assert abs(sum(finding.numbers["weights"]) - 1) < 1e-9
    assert max(finding.numbers["nodes"]) == pytest.approx(finding.numbers["lambda_max"])
    assert "none for a single model" in finding.reference


def test_the_model_is_left_as_it_was(scanned, models):
    assert all(torch.equal(scanned.before[name], value) for name, value in scanned.after.items())
    assert all(p.requires_grad and p.grad is None for p in models.victim.model.parameters())
    assert not models.victim.model.training


def test_the_same_seed_gives_the_same_findings(models, scanned):
    assert scan_behaviour(models.victim, models.victim.samples(models.clean)) == scanned.found


def test_other_programs_can_read_it(scanned):
    record = ScanRecord(model="m", findings=scanned.found, parts=["behaviour"])
    first = json.loads(to_json(record))["findings"][0]
    assert (first["id"], first["level"]) == ("behaviour-trigger-outlier", "high")
    result = json.loads(to_sarif(record))["runs"][0]["results"][0]
    assert result["level"] == "error"
    (place,) = result["locations"]
    assert place["logicalLocations"] == [{"fullyQualifiedName": "patch to 0"}]


class Untriggered:
    """What a digit classifier can do, but carry triggers; units it has none of."""

    def __init__(self, adapter):
        self.model, self.chance, self.fork = adapter.model, adapter.chance, adapter.fork
        for name in ("samples", "per_sample_loss", "sampled_loss", "score", "activations"):
            setattr(self, name, getattr(adapter, name))
        self.features, self.embedding = adapter.features, adapter.embedding


def test_what_a_model_has_no_hooks_for_is_a_remark(models):
    found = scan_behaviour(Untriggered(models.twin), models.twin.samples(models.clean))
    assert {finding.id for finding in found} == {"behaviour-not-looked-at"}
    assert "Untriggered has no" in found[0].value
    assert [finding.level for finding in found] == ["low", "info", "info"]


def recovered(success, size, budget=0.1):
    success, size = torch.tensor(success), torch.tensor(size)
    return Recovered(
        family=TriggerFamily("patch", (2, 8, 8), budget=budget),
        targets=torch.arange(len(success)),
        levels=torch.full((len(success),), 0.9),
        success=success,
        size=size,
        accepted=(success >= 0.9) & (size <= budget),
        pool=torch.zeros(len(success), 1, 2, 8, 8),
    )


def outliers(found):
    return [trigger.target for trigger in cheapest_triggers(found) if trigger.is_outlier]


def test_where_all_triggers_work_the_smallest_is_an_outlier():
    assert outliers(recovered([1.0] * 6, [0.09, 0.08, 0.01, 0.09, 0.085, 0.095])) == [2]
    assert outliers(recovered([1.0] * 6, [0.09, 0.08, 0.07, 0.09, 0.085, 0.095])) == []


def test_where_all_triggers_are_of_one_size_the_only_one_that_works_is_an_outlier():
    assert outliers(recovered([0.0, 0.1, 0.0, 1.0, 0.2], [0.05] * 5)) == [3]
    assert outliers(recovered([1.0, 0.95, 0.97, 1.0, 0.92], [0.05] * 5)) == []


def test_few_answers_cannot_stand_apart():
    assert outliers(recovered([0.0, 1.0, 0.0, 0.0], [0.05] * 4)) == []


def test_a_trigger_beyond_the_budget_is_none():
    assert outliers(recovered([0.0, 1.0, 0.0, 0.0, 0.0], [0.5, 0.2, 0.5, 0.5, 0.5])) == []


def test_the_cheapest_level_of_an_answer_counts():
    found = recovered([1.0, 1.0, 0.4, 0.9], [0.03, 0.02, 0.05, 0.05])
    found = replace(found, targets=torch.tensor([0, 0, 1, 1]))
    assert [(a.target, a.row) for a in cheapest_triggers(found)] == [(0, 1), (1, 3)]


def triggers(adapter, samples, monkeypatch, found):
    monkeypatch.setattr(behaviour, "recover", lambda *_, **__: [found])
    return list(behaviour._triggers(adapter, samples, behaviour.SEARCH, Run(0)))


@pytest.mark.parametrize(
    ("sizes", "rule", "level"),
    [
        ([0.016] + [0.05] * 5, "behaviour-trigger-outlier", "high"),
        ([0.05] * 10, "behaviour-trigger", "medium"),  # all answers have one
        ([0.029] + [0.05] * 5, "behaviour-trigger", "medium"),  # far by its index alone
        ([0.05] * 4, "behaviour-trigger", "medium"),  # too few to tell
    ],
)
def test_a_trigger_that_works_is_at_least_medium(models, monkeypatch, sizes, rule, level):
    found = recovered([1.0] * len(sizes), sizes)
    samples = models.twin.samples(models.clean)
    (finding,) = triggers(models.twin, samples, monkeypatch, found)
    assert (finding.id, finding.level) == (rule, level)
    record = ScanRecord(model="m", findings=[finding], parts=["behaviour"])
    assert "Nothing was found" not in record.verdict.text
    works = 1 if rule.endswith("outlier") else len(sizes)
    assert len(finding.pictures) == works  # all that were found are shown
    page = to_html(record)
    for caption, address in finding.pictures.items():
        assert address.startswith("data:image/png;")
        assert f'<img src="{address}" alt="The trigger that was found, {caption}">' in page
    assert json.loads(to_json(record))["findings"][0]["pictures"] == finding.pictures
    assert "data:image" not in to_sarif(record)


def test_a_trigger_of_a_kind_that_tells_nothing_is_no_alarm(models, monkeypatch):
    found = recovered([0.0, 0.1, 0.0, 1.0, 0.2], [0.05] * 5)
    found = replace(found, family=replace(found.family, diagnostic=False))
    (finding,) = triggers(models.twin, models.twin.samples(models.clean), monkeypatch, found)
    assert (finding.id, finding.level) == ("behaviour-trigger-common", "info")


def test_that_no_trigger_was_found_is_said_with_the_answers_searched(models, monkeypatch):
    found = recovered([0.1] * 10, [0.05] * 10)
    samples = models.twin.samples(models.clean)
    (finding,) = triggers(models.twin, samples, monkeypatch, found)
    assert (finding.id, finding.level) == ("behaviour-trigger-none", "info")
    assert finding.value == "none of 10 targets, all searched"
    assert "not proof" in finding.meaning


def test_of_many_answers_the_cheapest_and_some_others_are_searched_in_full(monkeypatch):
    total, searched = 1000, []
    model = SimpleNamespace(trigger_targets=lambda: total)

    def recover(adapter, samples, search, run, *, stage, targets, pool=16):
        searched.append((search, targets))
        cost = 1 - 0.9 * torch.isin(targets, torch.tensor([77])).float()
        found = recovered([1.0] * len(targets), [0.05] * len(targets), budget=2.0)
        return [replace(found, targets=targets, size=cost)]

    monkeypatch.setattr(behaviour, "recover", recover)
    monkeypatch.setattr(behaviour, "_untriggered", lambda *_: 0.0)
    monkeypatch.setattr(behaviour, "missing_members", lambda *_: ["words"])
    monkeypatch.setattr(behaviour, "_pictures", lambda *_: {})
    (finding,) = behaviour._triggers(model, [], behaviour.SEARCH, Run(0))
    *screened, (search, full) = searched
    assert torch.equal(torch.cat([part for _, part in screened]), torch.arange(total))
    assert all(len(part) <= MANY for _, part in screened)
    assert all(how.steps * how.batch_size <= 32 and how.judged <= 16 for how, _ in screened)
    assert (search.steps, 77 in full.tolist()) == (80, True)
    assert len(full) <= behaviour.SUSPECTS + behaviour.OTHERS
    assert finding.subject == "patch to 77"
    assert f"{len(full)} targets searched in full, of 1000 screened" in (finding.reference)


def test_the_bound_of_the_index_grows_with_the_answers_that_were_screened():
    assert index_bound(10) == index_bound(64) == 2
    assert 3 < index_bound(200) < index_bound(1000) < 4


def test_a_model_of_more_classes_than_samples_looked_at_has_numbers():
    classes = 150
    adapter = adapt(nn.Sequential(nn.Flatten(), nn.Linear(4, classes)))
    data = torch.rand(classes, 1, 2, 2), torch.arange(classes)
    samples = adapter.samples(data)
    found = behaviour._smoothness(adapter, samples, 0)
    assert "lambda_max" in next(found).value


class Collapsed(nn.Module):
    """Answers 2 to everything."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)

    def forward(self, images):
        given = 10.0 * nn.functional.one_hot(torch.tensor(2), 5)
        return 0 * self.conv(images).mean((2, 3)) + given


def test_an_answer_that_all_samples_get_anyway_is_no_triggers(monkeypatch):
    found = recovered([0.0, 0.0, 1.0, 0.0, 0.0], [0.05] * 5)
    monkeypatch.setattr(behaviour, "recover", lambda *_, **__: [found])
    adapter = adapt(Collapsed())
    samples = adapter.samples((torch.rand(10, 1, 8, 8), torch.arange(10) % 5))
    (finding,) = behaviour._triggers(adapter, samples, behaviour.SEARCH, Run(0))
    assert finding.id == "behaviour-trigger-none"


def test_the_words_of_a_trigger_are_shown(monkeypatch):
    found = recovered([0.0, 0.0, 1.0, 0.0, 0.0], [0.05] * 5)
    monkeypatch.setattr(behaviour, "recover", lambda *_, **__: [found])
    monkeypatch.setattr(behaviour, "missing_members", lambda *_: [])
    monkeypatch.setattr(behaviour, "_untriggered", lambda *_: 0.0)
    model = SimpleNamespace(
        trigger_targets=lambda: 5,
        trigger_words=lambda trigger: "cf mn",
        target_words=lambda target: f"trigger {target}",
    )
    (finding,) = behaviour._triggers(model, [], behaviour.SEARCH, Run(0))
    assert "near 'cf mn' before a prompt, target 'trigger 2'" in finding.value


def test_the_function_takes_a_model_and_data_in_memory(models, monkeypatch):
    monkeypatch.setattr(behaviour, "recover", lambda *_, **__: [])
    record = mmd.scan(models.twin.model, models.clean)
    assert record.parts == ["weights", "behaviour"]
    assert {"behaviour-activeness", "behaviour-smoothness"} <= {f.id for f in record.findings}
