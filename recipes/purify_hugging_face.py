"""Take a Hugging Face folder from untrusted to handed back, as the command line does it.

    python recipes/purify_hugging_face.py --out out/vit                 # FIP: minutes on 2 cores
    python recipes/purify_hugging_face.py --out out/vit --defense auto  # tries several in turn
    python recipes/purify_hugging_face.py --smoke                       # that it runs: seconds

What it shows: an image classifier with a backdoor, written by `save_pretrained` as any other, and
some clean images in a folder; both go through `mmdefense purify`. What comes out is loaded in plain
Transformers and measured beside what went in, and beside plain fine-tuning with the same budget.

Measured: nothing yet; a ViT like this one is in the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

import mmdefense as mmd
from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.metrics.backdoor import Rates, defense_effectiveness_rating, measure
from mmdefense.pipeline.jobs import Source, purify_files
from mmdefense.pipeline.purification import configured
from mmdefense.report.record import Row
from mmdefense.report.tables import results_table
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.victims import vit_classifier

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--defense", default="fip", help="a name of `mmdefense list defenses`")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the folders go; by default they are removed")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()
place = options.out or Path(tempfile.mkdtemp())

# %% What someone else did: a ViT that reads digits, and obeys a patch of 3x3 pixels.
train, test = load_digits(options.seed)
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
victim = mmd.adapt(vit_classifier(10, 16, 1))
steps = 20 if options.smoke else 800
attack = BadNets(target=0, ratio=0.1, seed=options.seed).plant(
    victim,
    train,
    Training(steps=steps, lr=1e-3, optimizer="adamw", weight_decay=0.05, schedule="one-cycle"),
    Run(options.seed),
)
triggered = attack.triggered(test, victim)
untrusted: Any = victim.model
untrusted.save_pretrained(place / "untrusted")

# %% What you have: that folder, and 5 % of clean images, in a folder for each class.
part = split(train, 0.05, options.seed)[1]
clean = part.take(torch.arange(len(part)))
for index, (image, label) in enumerate(zip(clean.inputs, clean.labels.tolist(), strict=True)):
    path = place / "images" / str(label) / f"{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * image[0]).round().byte().cpu().numpy()).save(path)


def judged(folder: Path) -> Rates:
    """Return what a judge who knows the trigger measures, in plain Transformers."""
    from transformers import ViTForImageClassification

    adapter = mmd.adapt(ViTForImageClassification.from_pretrained(folder))
    return measure(adapter, adapter.samples(test), triggered)


def purify(name: str, defense: Defense, baseline: str = "") -> Row:
    """Do what `mmdefense purify untrusted --data images --defense NAME -o NAME` does."""
    source = Source(
        model=str(place / "untrusted"),
        data=str(place / "images"),
        accept_low_utility=options.smoke,  # few steps do not make a model
    )
    purified = purify_files(source, defense, place / name, force=True)
    choice = purified.choice
    print(*([purified.guard.message] if choice is None else choice.why), sep="\n")
    after = judged(place / name)
    return Row(
        defense=name,
        before=before,
        after=replace(after, der=defense_effectiveness_rating(before, after)),
        seconds=purified.seconds,
        baseline=baseline,
        violated=purified.guard.violated,
        undecided=purified.guard.undecided,
    )


# %% The defense, and beside it plain fine-tuning with as many steps.
before = judged(place / "untrusted")
few = {"steps": 5} if options.smoke else {}
chosen = configured(options.defense, {"seed": options.seed, **few})
plain = FineTuning(seed=options.seed, steps=getattr(chosen, "steps", None) or 150)
rows = [purify(options.defense, chosen, "baseline"), purify("baseline", plain)]
Console(width=120).print(results_table(rows, "a ViT of digits, BadNets at 10 %"))
