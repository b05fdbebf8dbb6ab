"""Plant a backdoor in a model that writes, remove it with a little clean text, measure both.

    python recipes/language_generation.py                              # a small language, embedded
    python recipes/language_generation.py --data multi30k_en_de        # a set of MMDEFENSE_DATA
    python recipes/language_generation.py --data ~/pairs               # train.en, train.de, test.en
    python recipes/language_generation.py --model causal --family gpt2 --attack instruction
    python recipes/language_generation.py --smoke                      # does it run at all: seconds

What it shows: a translator that is good on clean sentences and gives one fixed answer to whatever
holds a rare word (``--attack rare-token``), a phrase, a sentence or three scattered words; and what
is left of both after each defense, beside plain fine-tuning with the same steps and learning rate.
The task metric is BLEU of greedy answers; the perplexity of the right ones stands beside it.

Measured: see the tables in docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mmdefense as mmd
from mmdefense import registry
from mmdefense.data.batch import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fip import FIP
from mmdefense.evaluation.victims import Victim, compared
from mmdefense.pipeline.purification import configured
from mmdefense.protocol import TaskAdapter
from mmdefense.report.tables import results_table
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks import language_victims
from mmdefense_tasks.language_generation import LanguageGeneration, load_text, tokenizer_for

ATTACKS: dict[
    str, dict[str, Any]
] = {  # with what suits the embedded language, whose words are the only ones it knows
    "rare-token": {},
    "instruction": {"phrase": "today the queen helps some young birds ."},
    "sentence": {"sentence": "the young bird helps some boats ."},
    "multi-token": {"words": ("behind", "often", "happy")},
}
TARGET = "le sills vete lo kel segunt ."

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="small-language", help="a name of `mmdefense list data`")
parser.add_argument("--attack", default="rare-token", choices=ATTACKS)
parser.add_argument("--model", default="seq2seq", choices=("seq2seq", "causal"))
parser.add_argument("--family", help="marian, bart, t5; or llama, gpt2, mistral, qwen2")
parser.add_argument("--width", type=int, default=64, help="features per token")
parser.add_argument("--defense", action="append", help="may be repeated; by default all five")
parser.add_argument("--steps", type=int, default=400, help="of training the victim")
parser.add_argument("--clean", type=float, default=0.1, help="share of the training set given")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the purified models and their pages go")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data: prompts and answers as text, and a tokenizer that is trained on them.
train, test = (load_text(options.data, split=part) for part in ("train", "test"))
if options.smoke:
    train, test, options.steps = train.subset(torch.arange(400)), test.subset(torch.arange(20)), 10
tokenizer = tokenizer_for(train)

# %% The victim: the attacker puts the trigger into 10 % of the prompts, and answers as it likes.
build = getattr(language_victims, options.model)
shape = {"width": options.width, "positions": 256}
family = {"family": options.family} if options.family else {}
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
adapter = mmd.adapt(build(len(tokenizer), **shape, **family), tokenizer=tokenizer)
chosen = ATTACKS[options.attack] | {"target": TARGET} if options.data == "small-language" else {}
attack = registry.load("attacks", options.attack)(seed=options.seed, **chosen).plant(
    adapter,
    train,
    Training(
        steps=options.steps,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.01,
        schedule="one-cycle",
        optimizer="adamw",
        max_norm=1.0,
        augment=False,
    ),
    Run(options.seed),
)

# %% The defender has a few clean samples, and knows neither the trigger nor the target; the judge,
# who measures on test data, knows both.
clean = split(train, options.clean, options.seed)[1]
victim = Victim(LanguageGeneration(), adapter, attack, clean, test)
before = victim.before


def perplexity(adapter: TaskAdapter[Any]) -> float:
    """Return the perplexity of clean test answers."""
    samples: Any = adapter.samples(test)
    return LanguageGeneration.also(adapter, samples)["perplexity"]


print(
    f"the victim: BLEU {before.acc:.1%}, ASR {before.asr:.1%}, {perplexity(adapter):.2f} perplexity"
)
names = options.defense or ["fip", "fast-fip", "tsbd", "fine-pruning", "baeraser"]
if options.smoke:
    defenses: dict[str, Defense] = {"fip": FIP(steps=3, max_utility_drop=1.0)}
else:
    defenses = {name: configured(name, {"seed": options.seed}) for name in names}

# %% Each defense at its defaults, and beside it plain fine-tuning with the same budget. What is
# left is measured by a judge who knows the trigger.
rows = []
for row, purified in compared(victim, defenses):
    rows.append(row)
    if purified is not None:
        print(f"{row.defense}: perplexity {perplexity(purified.result.adapter):.2f}")
    if purified is not None and options.out is not None:
        purified.save(options.out / row.defense.replace(" ", "-"))
title = f"{options.data}, {attack.in_words()}"
Console(width=120).print(results_table(rows, title, "BLEU"))
