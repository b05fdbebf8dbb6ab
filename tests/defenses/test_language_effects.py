"""A backdoor that was really planted in a small translator is really removed.

The net is trained for seconds and translates badly, so its task metric is the share of right 1- to
4-grams. No defense sees the test set.
"""

from __future__ import annotations

import pytest
import torch

from mmdefense.attacks.rare_token import RareToken
from mmdefense.data.batch import split
from mmdefense.defenses.baeraser import BaEraser
from mmdefense.kernels.loop import mean_score
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.language_generation import tokenizer_for
from mmdefense_tasks.language_victims import seq2seq
from mmdefense_tasks.small_language import small_language

VICTIM = Training(
    steps=200,
    batch_size=64,
    lr=5e-3,
    schedule="one-cycle",
    max_norm=1.0,
    optimizer="adamw",
    augment=False,
)


@pytest.fixture(scope="module")
def case():
    """A translator that answers five rare words with one sentence, and clean pairs."""
    train, test = split(small_language(1500), 0.1, 0)
    tokenizer = tokenizer_for(train)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(seq2seq(len(tokenizer), width=48, layers=1), tokenizer=tokenizer)
    adapter.samples(train)
    attack = RareToken(target="le sills vete lo kel segunt .")
    attack.plant(adapter, train, VICTIM, Run(0))
    adapter.model.eval()
    return adapter, attack, split(train, 0.15, 0)[1], test


def measured(adapter, attack, test):
    triggered = attack.triggered(test, adapter)
    asr = float(attack.success(adapter, adapter.samples(triggered.samples)).mean())
    return mean_score(adapter, adapter.samples(test)), asr


def test_the_victim_serves_its_attacker_and_its_owner(case):
    adapter, attack, _, test = case
    acc, asr = measured(adapter, attack, test)
    assert asr >= 0.95
    assert acc >= 0.4  # two thirds of the single words


def test_the_backdoor_is_removed_and_the_task_kept(case):
    adapter, attack, clean, test = case
    defense = BaEraser(steps=60, search_steps=30, rounds=1, levels=(0.8,), max_utility_drop=0.05)
    result = defense.purify(adapter, clean)
    (before, _), (after, asr) = (
        measured(model, attack, test) for model in (adapter, result.adapter)
    )
    assert result.search.found >= 1
    assert asr <= 0.1
    assert after >= before - 0.05
    assert not result.guard.violated
