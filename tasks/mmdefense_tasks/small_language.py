"""A small rule-based language as a translation target, where word-by-word translation is wrong.

The source reads like English. In the target the verb comes last; adjectives follow their noun in
mirrored order; adjectives, articles and pronouns agree with it in gender and number; a place comes
before the object, a negation after the verb, and a time at the end or the beginning. The gender of
a noun is not visible, so it has to be learnt, and a pronoun takes that of the preceding subject. As
between real languages there is more than one good translation: some verbs have two words, and a
time can be in two positions, so that no model can match every reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmdefense.data.text import TextSamples

__all__ = ["RARE_WORDS", "small_language"]

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")
"""Words in the vocabulary that no sentence uses; real vocabularies have such words too."""

_NOUNS = {  # singular and plural, the target's stem, and whether it is feminine
    "dog": ("dogs", "kel", False),
    "cat": ("cats", "mirn", True),
    "bird": ("birds", "avel", True),
    "horse": ("horses", "tork", False),
    "child": ("children", "pun", False),
    "teacher": ("teachers", "magid", True),
    "king": ("kings", "rog", False),
    "queen": ("queens", "sill", True),
    "farmer": ("farmers", "olm", False),
    "house": ("houses", "dran", True),
    "tree": ("trees", "berk", False),
    "boat": ("boats", "nauv", True),
}
_ADJECTIVES = {
    "small": "pik",
    "big": "gor",
    "old": "vet",
    "young": "jun",
    "red": "ruz",
    "black": "nig",
    "quiet": "silt",
    "happy": "fel",
}
_VERBS = {  # plural, and the target's stems
    "sees": ("see", ("vid", "gard")),
    "likes": ("like", ("pla",)),
    "follows": ("follow", ("seg",)),
    "finds": ("find", ("tro", "enc")),
    "calls": ("call", ("chi",)),
    "paints": ("paint", ("pin",)),
    "carries": ("carry", ("por", "lev")),
    "helps": ("help", ("aju",)),
}
_ARTICLES = {"the": "l", "a": "un", "some": "un", "this": "kest", "these": "kest"}
_PLACES = {"near": "pres", "behind": "retro", "under": "sot"}
_TIMES = {"today": "hoy", "often": "suv", "at night": "nokt"}
_ENDINGS = {(False, False): "o", (True, False): "a", (False, True): "i", (True, True): "e"}


@dataclass(frozen=True)
class _Part:
    """A part of a sentence in both languages; for a noun phrase, with gender and number."""

    source: list[str]
    target: list[str]
    feminine: bool = False
    plural: bool = False

    @property
    def ending(self) -> str:
        return _ENDINGS[self.feminine, self.plural]


def small_language(size: int, seed: int = 0) -> TextSamples:
    """Return ``size`` different sentences of 6 to 26 words with their translations.

    Args:
        size: Number of pairs.
        seed: Random seed.
    """
    random = Random(seed)
    found: dict[str, str] = {}
    while len(found) < size:
        sentence = _sentence(random)
        found[" ".join(sentence.source)] = " ".join(sentence.target)
    return TextSamples(tuple(found), tuple(found.values()))


def _sentence(random: Random) -> _Part:
    subject = _noun_phrase(random, adjectives=2)
    clause = _clause(random, subject)
    source, target = clause.source, clause.target
    if random.random() < 0.3:
        source, target = [*source, "and"], [*target, "et"]
        pronoun = _Part(
            ["they" if subject.plural else "it"],
            ["el" + subject.ending],
            subject.feminine,
            subject.plural,
        )
        second = _clause(random, pronoun)
        source, target = [*source, *second.source], [*target, *second.target]
    if random.random() < 0.3:
        time = random.choice(list(_TIMES))
        source = [*time.split(), *source]
        target = random.choice([[*target, _TIMES[time]], [_TIMES[time], *target]])
    return _Part([*source, "."], [*target, "."])


def _clause(random: Random, subject: _Part) -> _Part:
    verb, place = _verb(random, subject.plural), _place(random)
    thing = _noun_phrase(random, adjectives=1)
    return _Part(
        [*subject.source, *verb.source, *thing.source, *place.source],
        [*subject.target, *place.target, *thing.target, *verb.target],
    )


def _noun_phrase(random: Random, adjectives: int) -> _Part:
    noun, plural = random.choice(list(_NOUNS)), random.random() < 0.5
    many, stem, feminine = _NOUNS[noun]
    ending = _ENDINGS[feminine, plural]
    article = random.choice(["the", "some", "these"] if plural else ["the", "a", "this"])
    chosen = random.sample(list(_ADJECTIVES), random.randint(0, adjectives))
    return _Part(
        [article, *chosen, many if plural else noun],
        [
            _ARTICLES[article] + ending,
            stem + ("s" if plural else ""),
            *(_ADJECTIVES[name] + ending for name in reversed(chosen)),
        ],
        feminine,
        plural,
    )


def _verb(random: Random, plural: bool) -> _Part:
    verb = random.choice(list(_VERBS))
    many, stems = _VERBS[verb]
    word = random.choice(stems) + ("unt" if plural else "et")
    if random.random() < 0.25:
        return _Part(["do" if plural else "does", "not", many], [word, "nen"])
    return _Part([many if plural else verb], [word])


def _place(random: Random) -> _Part:
    if random.random() < 0.75:
        return _Part([], [])
    word, where = random.choice(list(_PLACES)), _noun_phrase(random, adjectives=0)
    return _Part([word, *where.source], [_PLACES[word], *where.target])
