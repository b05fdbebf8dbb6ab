"""What fields declare is checked at every construction: type, choices and bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

import pytest
from annotated_types import Interval, MinLen

from mmdefense import registry
from mmdefense.defenses.fip import FIP
from mmdefense.errors import BadInputError
from mmdefense.settings import Count, OpenShare, Positive, Share, _hints, check_settings


@dataclass(frozen=True, kw_only=True)
class Made:
    share: Share = 0.5
    some: Annotated[tuple[OpenShare, ...], MinLen(1)] = (0.5,)
    pair: tuple[Positive, int] = (1.0, 2)
    count: Count | None = None
    kind: Literal["a", "b"] = "a"
    half_open: Annotated[float, Interval(gt=0, le=1)] = 1.0
    free: object = None

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"share": "much"}, "share must be a number, got 'much'"),
        ({"share": True}, "share must be a number, got True"),
        ({"share": float("nan")}, "share must be a number that is finite"),
        ({"some": ()}, "some must not be empty, got"),
        ({"some": (0.5, 1)}, r"some must lie in \(0, 1\), got \(0.5, 1\)"),
        ({"pair": (0, 1)}, r"pair must be positive, got \(0, 1\)"),
        ({"pair": (1, 2, 3)}, "pair must be a list"),
        ({"pair": (1.0, 10**12)}, "pair must be at most"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 2.5}, "count must be a whole number or None, got 2.5"),
        ({"kind": "c"}, "kind must be 'a' or 'b', got 'c'"),
        ({"half_open": 0}, r"half_open must lie in \(0, 1\], got 0"),
    ],
    ids=str,
)
def test_a_value_that_is_not_as_declared_is_refused(wrong, words):
    with pytest.raises(BadInputError, match=words):
        Made(**wrong)


@pytest.mark.parametrize(
    "right", [{"share": 0}, {"some": [0.1]}, {"count": 7}, {"pair": (0.5, -3)}, {"free": object()}]
)
def test_a_value_as_declared_is_taken(right):
    Made(**right)


CHOICES = [
    (kind, name, field.name)
    for kind in ("defenses", "attacks")
    for name in registry.names(kind)
    for field in dataclasses.fields(registry.load(kind, name))
    if get_origin(_hints(registry.load(kind, name)).get(field.name)) is Literal
]
NUMBERS = [
    (kind, name, field)
    for kind in ("defenses", "attacks")
    for name in registry.names(kind)
    for field, hint in _hints(registry.load(kind, name)).items()
    if {int, float}
    & set(
        map(
            _bare := lambda h: get_args(h)[0] if get_origin(h) is Annotated else h,
            [hint, *get_args(hint)],
        )
    )
    and get_origin(_bare(hint)) is not tuple
]


def _given(kind, name):
    needs = {"combination": (1, 2)} if name == "clean-image" else {}
    return registry.load(kind, name), needs


@pytest.mark.parametrize(("kind", "name", "field"), CHOICES)
def test_an_unknown_choice_is_refused_by_every_defense_and_attack(kind, name, field):
    made, needs = _given(kind, name)
    with pytest.raises(BadInputError, match=f"{field} .*must"):
        made(**needs, **{field: "ture"})


@pytest.mark.parametrize(("kind", "name", "field"), NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", 1e300], ids=str)
def test_no_defense_or_attack_takes_a_number_that_is_none(kind, name, field, value):
    made, needs = _given(kind, name)
    with pytest.raises(BadInputError, match=f"{field} "):
        made(**needs, **{field: value})


def test_a_copy_is_checked_as_well():
    with pytest.raises(BadInputError, match="trace must be"):
        dataclasses.replace(FIP(), trace="ture")
