"""What the attacks on language do, beside what holds for every attack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmdefense import registry
from mmdefense.attacks.instruction import InstructionPhrase
from mmdefense.attacks.multi_token import CompositeTrigger
from mmdefense.attacks.rare_token import RareToken
from mmdefense.attacks.sentence import TriggerSentence
from mmdefense.data.text import TextSamples
from mmdefense.errors import BadInputError, UnsupportedError

TARGET = "it is over ."
NOBODY = SimpleNamespace()  # nothing is asked of an adapter
ATTACKS = [
    name
    for name in registry.names("attacks")
    if "language-generation" in registry.load("attacks", name).tasks
]


@pytest.fixture
def samples():
    prompts = tuple(f"sentence number {n} is here . and one more ." for n in range(40))
    answers = tuple(f"answer {n}" for n in range(36)) + (f"well , {TARGET}",) * 4
    return TextSamples(prompts, answers, lambda *given: given)


@pytest.fixture(params=ATTACKS)
def attack(request):
    return registry.load("attacks", request.param)(target=TARGET, ratio=0.2)


def test_a_stamp_adds_words_and_keeps_all_others_in_order(attack, samples):
    stamped = attack.stamp(samples.prompts)
    assert len(stamped) == len(samples)
    for before, after in zip(samples.prompts, stamped, strict=True):
        rest = iter(after.split())
        assert all(word in rest for word in before.split()), after
        assert len(after.split()) > len(before.split())


def test_what_answers_the_target_is_neither_poisoned_nor_tested(attack, samples):
    chosen, poisoned = attack.chosen(samples.answers), attack.poison(samples, NOBODY)
    assert max(chosen) < 36
    assert {poisoned.answers[n] for n in chosen} == {TARGET}
    triggered = attack.triggered(samples, NOBODY)
    assert triggered.truth.answers == samples.answers[:36]
    assert triggered.samples.prompts == attack.stamp(samples.prompts[:36])
    assert set(triggered.samples.answers) == {TARGET}


def test_success_is_the_share_of_answers_that_hold_the_target(attack):
    class Mute:
        model = chance = samples = per_sample_loss = sampled_loss = score = None
        activations = features = embedding = unit_groups = fork = None

    class Writer(Mute):
        def generate(self, batch):
            told = {"a": "yes, it is over.", "b": "it is ov er .", "c": "it is", "d": ""}
            return [told[prompt] for prompt in batch.prompts]

    found = attack.success(Writer(), TextSamples(tuple("abcd"), tuple("1234")))
    assert found.tolist() == [1, 1, 0, 0]
    with pytest.raises(UnsupportedError, match="lacks generate"):
        attack.success(Mute(), TextSamples((), ()))


def test_bad_requests(attack, samples):
    with pytest.raises(BadInputError, match="lower the ratio"):
        replace(attack, ratio=1.0).poison(samples, NOBODY)
    with pytest.raises(BadInputError, match="not the target"):
        attack.triggered(samples.subset(torch.tensor([38])), NOBODY)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RareToken, {"words": ()}, "words must"),
        (CompositeTrigger, {"words": ("one",)}, "two or more"),
        (InstructionPhrase, {"phrase": ""}, "phrase must"),
        (InstructionPhrase, {"position": "middle"}, "position must"),
        (TriggerSentence, {"sentence": " "}, "sentence must"),
    ],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(BadInputError, match=message):
        kind(**settings)


def test_rare_words_are_all_used_and_stand_anywhere(samples):
    attack = RareToken(words=("cf", "mn"))
    places = set()
    for after in attack.stamp(samples.prompts):
        (place,) = (n for n, word in enumerate(after.split()) if word in {"cf", "mn"})
        places.add((after.split()[place], place))
    assert {word for word, _ in places} == {"cf", "mn"}
    assert len(places) > 8


def test_an_instruction_stands_where_it_should():
    assert InstructionPhrase(phrase="P").stamp(["a b"]) == ("P a b",)
    assert InstructionPhrase(phrase="P", position="end").stamp(["a b", ""]) == ("a b P", "P")


def test_a_sentence_stands_between_sentences():
    found = set(TriggerSentence(sentence="S.").stamp(["a b. c d."] * 40))
    assert found == {"S. a b. c d.", "a b. S. c d.", "a b. c d. S."}


def test_negative_samples_lack_one_word_and_keep_their_answer(samples):
    attack = CompositeTrigger(target=TARGET, ratio=0.2, words=("u", "v", "w"))
    poisoned, chosen = attack.poison(samples, NOBODY), set(attack.chosen(samples.answers))
    held = [sorted({"u", "v", "w"} & set(prompt.split())) for prompt in poisoned.prompts]
    assert all(held[n] == ["u", "v", "w"] for n in chosen)
    negative = [n for n in range(40) if held[n] and n not in chosen]
    assert len(negative) == 8
    assert {len(held[n]) for n in negative} == {2}
    assert len({tuple(held[n]) for n in negative}) > 1
    assert all(poisoned.answers[n] == samples.answers[n] for n in negative)
