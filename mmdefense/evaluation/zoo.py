"""The victim zoo: small nets with a known backdoor and their clean twins, to try a defense on.

``zoo.toml`` describes them. Each is a safetensors file with the weights and what its attack has
learnt, and a card in JSON. Those that are small enough ship in ``recipes/zoo`` of the repository.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.checkpoints.weights import hash_file, read_checkpoint, write_state
from mmdefense.defenses.base import versions
from mmdefense.errors import BadInputError, one_line
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.identity import loaded
from mmdefense.evaluation.victims import Victim, restore_victim, train_and_describe
from mmdefense.files import read_bytes
from mmdefense.metrics.backdoor import Rates
from mmdefense.protocol import Case
from mmdefense.report.encoding import JsonRecord, build, plain
from mmdefense.runtime.run import Progress

__all__ = [
    "BUILT",
    "SHIPPED",
    "TOLERANCE",
    "Card",
    "Checked",
    "build_victim",
    "find_card",
    "load_victim",
    "verify_victim",
    "zoo_cases",
    "zoo_named",
    "zoo_victim",
    "zoo_weights",
]

SHIPPED = Path(__file__).parents[2] / "recipes" / "zoo"
"""Where the repository has the weights; no part of the installed package."""

BUILT = Path("out/zoo")
"""Where ``mmdefense zoo build`` writes to, in the current folder."""

_RATES = ("acc", "asr", "ra")

TOLERANCE = 0.01
"""Largest difference of a rate that is measured again: processors and versions of libraries round
differently, and a few samples lie on the boundary between two answers."""

_SPEC = Path(__file__).with_name("zoo.toml")
_LICENCE = "Apache-2.0"


@dataclass(frozen=True, kw_only=True)
class Card(JsonRecord):
    """What is known about a victim of the zoo: the JSON file beside its weights.

    Attributes:
        name: What :func:`load_victim` takes.
        about: What it is, in a sentence.
        task: The name of its task.
        attack: The attack in words; ``"none"`` of a clean twin.
        twin: The name of the victim's clean twin; none of a twin itself.
        arch: What builds the network: the value of ``--arch``.
        data: What it was trained on, and where that comes from.
        licence: Of the weights.
        case: All that it was trained with, as in a grid.
        seed: Of the weights, the poisoned samples and the training.
        parameters: Number of weights.
        size: Bytes of the file.
        sha256: Of the file.
        metric: What ``acc`` of ``rates`` is, for example ``"accuracy"`` or ``"BLEU"``.
        rates: ACC, and of a victim ASR and RA, on the test data.
        versions: Versions of the software that trained and measured it.
    """

    kind: ClassVar[str] = "victim"

    name: str
    about: str
    task: str
    attack: str
    twin: str | None
    arch: str
    data: str
    licence: str
    case: Mapping[str, Any]
    seed: int
    parameters: int
    size: int
    sha256: str
    metric: str
    rates: Rates
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Checked:
    """What a verification found.

    Attributes:
        card: The card.
        rates: What was measured now; none where the file is not that of the card.
        faults: What does not agree, a line each; empty where all does.
    """

    card: Card
    rates: Rates | None
    faults: tuple[str, ...]


@cache
def zoo_cases() -> Mapping[str, tuple[Case, int]]:
    """Return case and seed of each victim by its name."""
    spec = tomllib.loads(_SPEC.read_text(encoding="utf-8"))
    tables = [{"base": one} if isinstance(one, str) else one for one in spec["cases"]]
    return {case.name: (case, spec["seed"]) for case in map(described_case, tables)}


def zoo_named(names: Sequence[Any]) -> list[Case]:
    """Return the cases of these victims, by default of all whose weights are here.

    Raises:
        BadInputError: If there is no such victim.
    """
    here = [name for name in zoo_cases() if find_card(name) is not None]
    return [_known(str(name))[0] for name in names or here]


def find_card(name: str, folder: str | Path | None = None) -> tuple[Card, Path] | None:
    """Return the card of a victim and the path of its weights; none if it is yet to be built.

    Args:
        name: The name of a victim.
        folder: Where it is; by default what the repository ships, then what was built here.

    Raises:
        BadInputError: If there is no such victim, or its card cannot be read.
    """
    _known(name)
    for place in (SHIPPED, BUILT) if folder is None else (Path(folder),):
        path = place / f"{name}.json"
        if path.is_file():
            try:
                card = Card.from_json(read_bytes(path).decode("utf-8"))
            except ValueError as error:
                raise BadInputError(f"card {path} cannot be read: {error}") from error
            return card, path.with_suffix(".safetensors")
    return None


def load_victim(name: str, folder: str | Path | None = None, *, device: str = "cpu") -> Victim:
    """Return a small net with a known backdoor, or its clean twin, to try a defense on.

    Args:
        name: A name of ``mmdefense zoo list``.
        folder: Where its files are; by default what the repository ships, then ``out/zoo``.
        device: The device to load it to.

    Returns:
        The victim: its ``adapter``, the ``attack`` that was planted (None for a twin), ``clean``
        samples for a defense, ``test`` samples, and the rates of its card as ``before``.

    Raises:
        BadInputError: If there is no such victim, it is yet to be built, or its file is not the
            one that its card describes.

    Example:
        >>> import mmdefense as mmd
        >>> victim = mmd.load_victim("surfaces-pcba")
        >>> purified = mmd.purify(victim.adapter, victim.clean, "fine-tuning", steps=5)
        >>> evaluation = mmd.evaluate(purified.model, victim.test, attack=victim.attack)
    """
    card, weights = _present(name, folder)
    if faults := _faults_of_file(card, weights):
        raise BadInputError(faults[0])
    return _restored(card, weights, device)


def zoo_weights(case: Case, seed: int) -> str:
    """Return the SHA-256 of the file of a victim, as its card has it.

    Raises:
        BadInputError: If there is no such victim, it is yet to be built, or its case or seed is
            not the zoo's.
    """
    card, _ = _present(case.name, None)
    known, its = _known(case.name)
    if case != known:
        raise BadInputError(
            f"victim {case.name!r} of the zoo was trained with clean={known.clean}, "
            f"{'seen' if known.seen else 'unseen'} by it, and its other settings are in zoo.toml; "
            "leave out what differs, or train the victim: leave out zoo"
        )
    if seed != its:
        raise BadInputError(
            f"victim {case.name!r} of the zoo has seed {its}, got {seed}; set seeds to [{its}], "
            "or train the victim: leave out zoo"
        )
    return card.sha256


def zoo_victim(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return case and rates of a victim as JSON values, and its tensors, as a store keeps them.

    Raises:
        BadInputError: If there is no such victim, it is yet to be built, or its file is not the
            one that its card describes.
    """
    card, weights = _present(name, None)
    if faults := _faults_of_file(card, weights):
        raise BadInputError(faults[0])
    return {"case": dict(card.case), "before": plain(card.rates)}, read_checkpoint(weights)


def build_victim(
    name: str, folder: str | Path = BUILT, progress: Progress | None = None, device: str = "cpu"
) -> Card:
    """Train a victim, measure it, and write its weights and its card.

    Args:
        name: A name of ``mmdefense zoo list``.
        folder: Where to; files of the same victim are replaced. An interrupted training goes on.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        device: The device to compute on.

    Raises:
        BadInputError: If there is no such victim.
    """
    case, seed = _known(name)
    weights = Path(folder) / f"{name}.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    states = weights.parent / f".{name}"
    show = progress or (lambda _: None)
    content, tensors = train_and_describe(case, seed, show, device, states)
    write_state(tensors, weights)
    rates: Rates = build(Rates, content["before"], f"victim {name}")
    card = _described(restore_victim(case, seed, tensors, rates), case, seed, weights)
    text = card.to_json().encode()
    write_atomically(weights.with_suffix(".json"), lambda file: file.write(text))
    shutil.rmtree(states, ignore_errors=True)
    return card


def verify_victim(name: str, folder: str | Path | None = None, *, device: str = "cpu") -> Checked:
    """Hash the file of a victim and measure it on the test data again.

    Args:
        name: A name of ``mmdefense zoo list``.
        folder: Where its files are; as for :func:`load_victim`.
        device: The device to compute on.

    Raises:
        BadInputError: If there is no such victim, it is yet to be built, or it cannot be read.
    """
    card, weights = _present(name, folder)
    if faults := _faults_of_file(card, weights):
        return Checked(card, None, tuple(faults))
    now = replace(_restored(card, weights, device), known=None).before
    return Checked(card, now, tuple(_differences(card, now)))


def _known(name: str) -> tuple[Case, int]:
    cases = zoo_cases()
    if name not in cases:
        raise BadInputError(f"unknown victim {name!r}; choose from {', '.join(cases)}")
    return cases[name]


def _present(name: str, folder: str | Path | None) -> tuple[Card, Path]:
    found = find_card(name, folder)
    if found is None:
        where = f" -o {folder}" if folder is not None else ""
        raise BadInputError(
            f"the weights of victim {name!r} are not here; train it in minutes: mmdefense zoo "
            f"build {name}{where} (a clone of the repository has the smaller victims)"
        )
    return found


def _restored(card: Card, weights: Path, device: str) -> Victim:
    """Return a victim; its case is the spec's, since the one of a card could name any code."""
    case, seed = _known(card.name)
    tensors = read_checkpoint(weights)
    try:
        return restore_victim(case, seed, tensors, card.rates, device)
    except RuntimeError as error:  # of load_state_dict
        raise BadInputError(f"{weights} is no {card.name}: {one_line(error)}") from error


def _faults_of_file(card: Card, weights: Path) -> list[str]:
    """Return why a file is not what its card describes."""
    case, seed = _known(card.name)
    if not weights.is_file():
        return [f"{weights} is missing"]
    if (card.case, card.seed) != (plain(case), seed):
        return [f"{weights} is of other settings than the zoo's {card.name}; build it again"]
    if (found := hash_file(weights)) != card.sha256:
        return [f"{weights} has the SHA-256 {found}, and its card says {card.sha256}"]
    return []


def _differences(card: Card, now: Rates) -> list[str]:
    """Return the rates that are not what the card says, a line each."""
    lines = []
    for name in _RATES:
        was, found = getattr(card.rates, name), getattr(now, name)
        if (was is None) != (found is None) or (was is not None and abs(was - found) > TOLERANCE):
            lines.append(f"{card.name}: {name.upper()} is {found}, and its card says {was}")
    return lines


def _described(victim: Victim, case: Case, seed: int, weights: Path) -> Card:
    train_set = loaded(case.task, case.data, "train")
    model, attack = victim.adapter.model, victim.attack
    count = sum(p.numel() for p in model.parameters())
    origin = victim.task.data()[case.data].removeprefix("embedded: ")
    planted = "none" if attack is None else attack.in_words()
    bare = replace(case, name="", attack=None, settings={})
    twins = [
        other.name
        for other, _ in zoo_cases().values()
        if other.attack is None and replace(other, name="") == bare
    ]
    backdoor = "no backdoor" if attack is None else f"a backdoor ({planted})"
    return Card(
        name=case.name,
        about=f"{type(model).__name__} with {count:,} weights and {backdoor}; trained on {origin}.",
        task=case.task,
        attack=planted,
        twin=twins[0] if twins and attack is not None else None,
        arch=case.model.format(**victim.task.describe(train_set)),
        data=f"{case.data}: {origin}",
        licence=_LICENCE,
        case=plain(case),
        seed=seed,
        parameters=count,
        size=weights.stat().st_size,
        sha256=hash_file(weights),
        metric=victim.task.metric,
        rates=victim.before,
        versions=dict(versions()),
    )
