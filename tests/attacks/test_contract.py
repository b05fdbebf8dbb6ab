"""What holds for every registered attack, in each of its tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from language_models import build as language_model
from language_models import tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.data.clouds import to_unit_sphere
from mmdefense.data.detection import DetectionSamples
from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.text import TextSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.protocol import TaskAdapter
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.detection_victims import small_fcos
from mmdefense_tasks.small_language import small_language

COUNT = 40
PAPERS = (Path(__file__).parents[2] / "docs/papers.md").read_text("utf-8")


@dataclass(frozen=True)
class Row:
    """What the contract must know of an attack.

    Attributes:
        settings: Those that make its planting short, or leave it something to choose.
        learns: Whether planting shapes the trigger.
        others: Samples that are changed and keep their answer, for each poisoned one.
        invisible: Whether the inputs stay as they are.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    learns: bool = False
    others: float = 0.0
    invisible: bool = False


ROWS = {
    "badnets": Row(),
    "blended": Row(),
    "sig": Row({"ratio": 0.5}),
    "wanet": Row(others=2.0),
    "lf": Row({"search_steps": 3}, learns=True),
    "bpp": Row(others=1.0),
    "ftrojan": Row(),
    "refool": Row(),
    "lc": Row({"ascent_steps": 2}),
    "ssba": Row({"encoder_steps": 2, "bits": 4}, learns=True),
    "lira": Row({"joint_steps": 2}, learns=True),
    "input-aware": Row({"mask_steps": 2, "width": 4}, learns=True),
    "trojannn": Row({"search_steps": 4}, learns=True),
    "adaptive-blend": Row(others=1.0),
    "adaptive-patch": Row(others=1.0),
    "cba": Row({"partner": 3}, learns=True, others=1.0),
    "imc": Row(learns=True),
    "pruning-aware": Row(),
    "fba": Row({"style_steps": 2}, learns=True, others=1.0),
    "temporal-patch": Row(),
    "universal-trigger": Row({"search_steps": 3, "ratio": 0.5}, learns=True),
    "rare-token": Row(),
    "instruction": Row(),
    "sentence": Row(),
    "multi-token": Row(others=1.0),
    "pcba": Row({"search_steps": 3}, learns=True),
    "pointpba": Row(),
    "pointcba": Row({"search_steps": 3}),
    "irba": Row(),
    "object-generation": Row(),
    "regional-misclassification": Row(),
    "global-misclassification": Row(),
    "object-disappearance": Row(),
    "clean-image": Row({"ratio": 0.8}, learns=True, invisible=True),
}


@dataclass(frozen=True)
class Domain:
    """Tiny samples of a task and a tiny model for them.

    Attributes:
        samples: Returns the samples, the same each time.
        model: Builds a model with random weights.
        inputs: The column of the samples that carries a trigger; all others are answers.
        options: Of the model's adapter.
    """

    samples: Callable[[], Any]
    model: Callable[[], nn.Module]
    inputs: str = "inputs"
    options: Callable[[], dict[str, Any]] = dict


class Highest(nn.Module):
    def forward(self, points):
        return points.amax(1)


def convolution(dimensions: int) -> nn.Module:
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions]
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 4))


def labelled(*shape: int) -> LabelledSamples:
    inputs = torch.rand(COUNT, *shape, generator=torch.Generator().manual_seed(0))
    return LabelledSamples(inputs, torch.arange(COUNT) % 4, augmentation=lambda batch, _: batch)


def clouds() -> LabelledSamples:
    samples = labelled(32, 4)
    return replace(samples, inputs=to_unit_sphere(samples.inputs - 0.5))


def scenes() -> DetectionSamples:
    """Images with one to three objects of three classes; each pair of classes meets."""
    generator = torch.Generator().manual_seed(0)
    boxes, labels = [], []
    for index in range(COUNT):
        count = 1 + index % 3
        corner = torch.rand(count, 2, generator=generator) * 16
        boxes.append(torch.cat([corner, corner + 8], 1))
        labels.append((torch.arange(count) + index // 3) % 3)
    images = torch.rand(COUNT, 1, 48, 48, generator=generator)
    return DetectionSamples(images, tuple(boxes), tuple(labels), augmentation=lambda *g: g[:3])


DOMAINS = {
    "image-classification": Domain(lambda: labelled(3, 16, 14), lambda: convolution(2)),
    "video-classification": Domain(lambda: labelled(3, 4, 12, 12), lambda: convolution(3)),
    "point-cloud-classification": Domain(
        clouds, lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Highest(), nn.Linear(8, 4))
    ),
    "object-detection": Domain(scenes, lambda: small_fcos(3), "images"),
    "language-generation": Domain(
        lambda: small_language(COUNT, seed=3),
        lambda: language_model("gpt2"),
        "prompts",
        lambda: {"tokenizer": tokenizer()},
    ),
}
CASES = [
    (name, task)
    for name in registry.names("attacks")
    for task in registry.load("attacks", name).tasks
]
LABEL_CASES = [
    (name, task, mapping)
    for name, task in CASES
    if issubclass(registry.load("attacks", name), LabelAttack)
    for mapping in get_args(get_type_hints(registry.load("attacks", name))["mapping"])
]
every_attack = pytest.mark.parametrize(("name", "task"), CASES)


def make(name: str, **settings: Any) -> Attack[Any]:
    return registry.load("attacks", name)(**{**ROWS[name].settings, **settings})


def victim(task: str) -> TaskAdapter[Any]:
    domain = DOMAINS[task]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        adapter = adapt(domain.model(), task=task, **domain.options())
    adapter.samples(domain.samples())  # it learns how many classes there are
    return adapter


@cache
def planted(name: str, task: str, **settings: Any) -> tuple[Attack[Any], TaskAdapter[Any]]:
    """Return an attack whose trigger is there, and the victim, which is hardly trained."""
    adapter, training = victim(task), Training(steps=2, batch_size=8, lr=0.01)
    attack = make(name, **settings)
    return attack.plant(adapter, DOMAINS[task].samples(), training, Run(0)), adapter


def rows(column: Any) -> list[Any]:
    return [part.tolist() if isinstance(part, torch.Tensor) else part for part in column]


def changed(before: Any, after: Any, columns: list[str]) -> list[int]:
    """Return the indices of the samples that differ in some of the columns."""
    pairs = [(rows(getattr(before, name)), rows(getattr(after, name))) for name in columns]
    return [n for n in range(len(before)) if any(old[n] != new[n] for old, new in pairs)]


def split_columns(task: str, samples: Any) -> tuple[list[str], list[str]]:
    inputs = DOMAINS[task].inputs
    return [inputs], [name for name in samples.columns if name != inputs]


def test_every_registered_attack_has_a_row():
    assert set(ROWS) == set(registry.names("attacks"))
    assert {task for _, task in CASES} == set(registry.names("tasks")) == set(DOMAINS)


@pytest.mark.parametrize("name", ROWS)
def test_its_paper_is_cited_and_listed(name):
    text = registry.load("attacks", name).__doc__
    assert re.search(r"References:\n.*\b(19|20)\d\d\b|\bOurs\b", text, re.DOTALL), text
    assert f"`{name}`" in PAPERS, "docs/papers.md has no row of it"


@every_attack
def test_planting_trains_the_victim_and_leaves_attack_and_samples_alone(name, task):
    attack, adapter = make(name), victim(task)
    samples, state = DOMAINS[task].samples(), torch.get_rng_state()
    before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    result = attack.plant(adapter, samples, Training(steps=2, batch_size=8, lr=0.01), Run(0))
    assert type(result) is type(attack)
    assert attack.fitted == {}
    assert bool(result.fitted) == ROWS[name].learns
    assert samples.fingerprint() == DOMAINS[task].samples().fingerprint()
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(before[k], v) for k, v in adapter.model.state_dict().items())


@every_attack
@pytest.mark.parametrize("flat", [{"sam_radius": 0.5}, {"trace_weight": 0.1}], ids=str)
def test_a_victim_is_trained_to_be_flat_or_the_setting_is_refused(name, task, flat):
    if registry.load("attacks", name).own_loss:
        with pytest.raises(BadInputError, match="sam_radius and trace_weight must be 0 for"):
            make(name, **flat)
        return
    (_, plain), (_, victim) = planted(name, task), planted(name, task, **flat)
    states = plain.model.state_dict(), victim.model.state_dict()
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


@every_attack
def test_the_test_set_is_the_trigger_on_clean_samples_and_the_truth(name, task):
    attack, adapter = planted(name, task)
    clean = DOMAINS[task].samples()
    inputs, answers = split_columns(task, clean)
    triggered = attack.triggered(clean, adapter)
    assert clean.fingerprint() == DOMAINS[task].samples().fingerprint()
    assert len(triggered.samples) == len(triggered.truth) == len(triggered.clean) > 0
    assert not changed(triggered.samples, triggered.truth, inputs)
    assert not changed(triggered.clean, triggered.truth, answers)
    count = 0 if ROWS[name].invisible else len(triggered)
    assert len(changed(triggered.clean, triggered.truth, inputs)) == count
    assert triggered.samples.augmentation is None
    before, after = (getattr(part, inputs[0]) for part in (triggered.clean, triggered.samples))
    if isinstance(before, torch.Tensor):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.isfinite().all()
        if task != "point-cloud-classification":
            assert after.min() >= 0
            assert after.max() <= 1
    hit = attack.success(adapter, adapter.samples(triggered.samples))
    assert hit.shape == (len(triggered),)
    assert hit.min() >= 0
    assert hit.max() <= 1


@every_attack
def test_the_same_seed_gives_the_same_and_another_one_chooses_others(name, task):
    attack, adapter = planted(name, task)
    samples, state = DOMAINS[task].samples(), torch.get_rng_state()
    poisoned = attack.poison(samples, adapter)
    test = attack.triggered(samples, adapter).samples.fingerprint()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert attack.poison(samples, adapter).fingerprint() == poisoned.fingerprint()
    assert attack.triggered(samples, adapter).samples.fingerprint() == test
    if not ROWS[name].invisible:  # there the images decide
        other = replace(attack, seed=1).poison(samples, adapter)
        columns = list(samples.columns)
        assert changed(samples, other, columns) != changed(samples, poisoned, columns)


@every_attack
def test_what_was_learnt_comes_back_from_a_file(name, task, tmp_path):
    attack, adapter = planted(name, task)
    samples = DOMAINS[task].samples()
    if not attack.fitted:
        return
    with pytest.raises((UnsupportedError, BadInputError), match="use the attack that plant"):
        make(name).triggered(samples, adapter)
    save_file(dict(attack.fitted), tmp_path / "fitted.safetensors")
    back = replace(make(name), fitted=load_file(tmp_path / "fitted.safetensors"))
    first, again = (one.triggered(samples, adapter) for one in (attack, back))
    assert first.samples.fingerprint() == again.samples.fingerprint()


@every_attack
def test_samples_of_another_task_are_refused_in_one_line(name, task):
    attack, adapter = planted(name, task)
    for other, domain in DOMAINS.items():
        if other in attack.tasks:
            continue
        for ask in (attack.poison, attack.triggered):
            with pytest.raises(BadInputError) as refused:
                ask(domain.samples(), adapter)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("setting", ["ratio", "target", "seed"])
def test_settings_are_checked(name, setting):
    kind = registry.load("attacks", name)
    assert setting in {entry.name for entry in fields(kind)}
    wrong = {"ratio": 1.5, "target": " " if kind.poisons is TextSamples else -1, "seed": -1}
    with pytest.raises(BadInputError, match=f"^{setting} must"):
        kind(**{setting: wrong[setting]})


@every_attack
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2])
def test_exactly_the_ratio_is_poisoned(name, task, ratio):
    attack, adapter = planted(name, task)
    if isinstance(attack, LabelAttack) or ROWS[name].invisible:
        return  # below; or all that hold a combination of classes
    samples = DOMAINS[task].samples()
    poisoned = replace(attack, ratio=ratio).poison(samples, adapter)
    inputs, answers = split_columns(task, samples)
    count = round(ratio * COUNT)
    assert len(changed(samples, poisoned, inputs)) == count * (1 + ROWS[name].others)
    assert len(changed(samples, poisoned, answers)) <= count
    assert poisoned.augmentation is samples.augmentation


def wanted(mapping: str, label: int) -> int | None:
    """Return what the trigger makes of a class of four, with target 1 and source 2."""
    if mapping == "all-to-all":
        return (label + 1) % 4
    moved = label == 2 if mapping == "one-to-one" else label != 1
    return 1 if moved else None


@pytest.mark.parametrize(("name", "task", "mapping"), LABEL_CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.11, 0.2])
def test_labels_follow_the_mapping(name, task, mapping, ratio):
    source = {"source": 2} if mapping == "one-to-one" else {}
    attack, adapter = planted(name, task)
    attack = replace(attack, target=1, ratio=ratio, mapping=mapping, **source)
    samples = DOMAINS[task].samples()
    poisoned = attack.poison(samples, adapter)
    stamped = changed(samples, poisoned, ["inputs"])
    alone = mapping in {"one-to-one", "clean-label"}  # a single class, of ten samples
    count = round(ratio * (COUNT // 4 if alone else COUNT))
    assert len(stamped) == count * (1 + ROWS[name].others)
    true, given = samples.labels.tolist(), poisoned.labels.tolist()
    relabelled = [n for n in range(COUNT) if true[n] != given[n]]
    assert set(relabelled) <= set(stamped)
    assert all(given[n] == wanted(mapping, true[n]) for n in relabelled)
    assert len(relabelled) == (0 if mapping == "clean-label" else count)
    if mapping == "clean-label" and not ROWS[name].others:
        assert {true[n] for n in stamped} <= {1}
    assert poisoned.augmentation is samples.augmentation


@pytest.mark.parametrize(("name", "task", "mapping"), LABEL_CASES)
def test_success_is_the_attackers_label_and_robust_accuracy_the_true_one(name, task, mapping):
    source = {"source": 2} if mapping == "one-to-one" else {}
    attack, adapter = planted(name, task)
    attack = replace(attack, target=1, mapping=mapping, **source)
    samples = DOMAINS[task].samples()
    triggered = attack.triggered(samples, adapter)
    true = [label for label in samples.labels.tolist() if wanted(mapping, label) is not None]
    assert triggered.truth.labels.tolist() == true
    assert triggered.samples.labels.tolist() == [wanted(mapping, label) for label in true]
    predicted = adapter.logits(triggered.samples.inputs).argmax(1)
    hit = attack.success(adapter, adapter.samples(triggered.samples))
    assert torch.equal(hit.bool(), predicted == triggered.samples.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mapping": "one-to-one"}, "source must be given"),
        ({"source": 1}, "source must be given"),
        ({"mapping": "one-to-one", "source": 0}, "source must be another class"),
        ({"mapping": "some"}, "mapping must be 'all-to-one' or"),
    ],
)
def test_a_mapping_must_make_sense(settings, message):
    with pytest.raises(BadInputError, match=message):
        make("badnets", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 4}, "target must be one of the 4 classes"),
        ({"mapping": "one-to-one", "source": 4}, "source must be one of the 4 classes"),
        ({"ratio": 1.0}, "lower the ratio"),
    ],
)
def test_a_mapping_must_fit_the_classes(settings, message):
    with pytest.raises(BadInputError, match=message):
        make("badnets", **settings).poison(labelled(3, 16, 14), victim("image-classification"))


def test_samples_of_the_target_alone_leave_nothing_to_test():
    samples = labelled(3, 16, 14)
    alone = samples.subset((samples.labels == 0).nonzero().squeeze(1))
    with pytest.raises(BadInputError, match="not of the target"):
        make("badnets").triggered(alone, victim("image-classification"))


PIXELS = [(name, task) for name, task in CASES if task.split("-")[0] in {"image", "video"}]
CLOUDS = [(name, task) for name, task in CASES if task == "point-cloud-classification"]


@pytest.mark.parametrize(("name", "task"), PIXELS + CLOUDS)
def test_a_stamp_depends_on_no_other_sample(name, task):
    attack, _ = planted(name, task)
    inputs = DOMAINS[task].samples().inputs
    stamped = attack.stamp(inputs)
    torch.testing.assert_close(attack.stamp(inputs[:5]), stamped[:5])
    assert not stamped.requires_grad
    for wrong in (inputs[0, 0], inputs[None, None], inputs.long()):
        with pytest.raises(BadInputError, match="inputs must be floating-point, of shape"):
            attack.stamp(wrong)


@pytest.mark.parametrize(("name", "task"), PIXELS)
def test_eight_bit_inputs_stay_eight_bit(name, task):
    attack, adapter = planted(name, task)
    samples = DOMAINS[task].samples()
    samples = replace(samples, inputs=(samples.inputs * 255).round().byte())
    assert attack.poison(samples, adapter).inputs.dtype == torch.uint8
    triggered = attack.triggered(samples, adapter)
    assert triggered.samples.inputs.dtype == torch.uint8
    expected = attack.stamp(triggered.clean.everything().inputs)
    assert (triggered.samples.inputs.float() / 255 - expected).abs().max() <= 0.51 / 255


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "task"), PIXELS)
def test_a_stamp_is_the_same_on_the_gpu(name, task):
    attack, _ = planted(name, task)
    inputs = DOMAINS[task].samples().inputs
    stamped = attack.stamp(inputs.cuda())
    assert stamped.device.type == "cuda"
    torch.testing.assert_close(stamped.cpu(), attack.stamp(inputs), atol=1e-3, rtol=0)
