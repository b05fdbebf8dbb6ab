"""Everything that has a name is found by it; a stranger's plug-in enters by the same door."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from torch import nn

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError, UnsupportedError

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
TABLES = PROJECT["project"]["entry-points"]
ROWS = [(group.removeprefix("mmdefense."), name) for group, rows in TABLES.items() for name in rows]
BASES = {"defenses": Defense, "attacks": Attack}


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_every_row_of_the_table_resolves(kind, name):
    found = registry.load(kind, name)
    assert found.__doc__
    assert kind not in BASES or issubclass(found, BASES[kind])


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(BadInputError, match=r"unknown defense 'tsdb'; did you mean 'tsbd'\?"):
        registry.load("defenses", "tsdb")


def test_a_strange_name_gets_the_list():
    with pytest.raises(BadInputError, match=r"choose from .*badnets, blended"):
        registry.load("attacks", "quicksilver")


class Stranger:
    """Someone else's adapter."""

    priority = 99

    def __init__(self, model: nn.Module, **options: object) -> None:
        self.model, self.options = model, options

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        return isinstance(model, nn.Bilinear)


def test_a_plug_in_is_found_and_chosen_by_the_model(plug):
    plug("adapters", stranger="test_registry:Stranger")
    adapter = registry.adapt(nn.Bilinear(1, 1, 1), mean=3)
    assert type(adapter).__name__ == "Stranger"
    assert adapter.options == {"mean": 3}
    assert type(registry.adapt(nn.Linear(1, 1))).__name__ == "TorchClassifier"


def test_the_task_says_what_a_plain_module_reads():
    net = nn.Sequential(nn.Linear(3, 3))
    found = {
        task: registry.adapter_for(net, task).__name__
        for task in ("image-classification", "video-classification", "point-cloud-classification")
    }
    assert list(found.values()) == ["TorchClassifier", "TorchVideoClassifier", "PointClassifier"]
    with pytest.raises(UnsupportedError, match="no adapter of language-generation accepts a Seq"):
        registry.adapt(net, task="language-generation")


def test_a_plug_in_of_no_task_serves_the_task_that_is_named(plug):
    plug("adapters", stranger="test_registry:Stranger")
    assert type(registry.adapt(nn.Bilinear(1, 1, 1), task="poetry")).__name__ == "Stranger"


def test_a_plug_in_whose_library_is_missing_is_passed_by(plug):
    plug("adapters", broken="no_such_package.adapters:Adapter")
    assert type(registry.adapt(nn.Linear(1, 1))).__name__ == "TorchClassifier"
    with pytest.raises(UnsupportedError, match="needs the package 'no_such_package'"):
        registry.load("adapters", "broken")
