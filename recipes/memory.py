"""Measure the peak memory of FIP and Fast FIP against a fine-tune and a LoRA fine-tune.

    python recipes/memory.py -o out/memory    # on two cores: about ten minutes
    python recipes/memory.py --smoke          # does it run at all: half a minute

What it shows: for each way of training the same GPT-2 (random weights; memory does not ask for
better ones), what it adds at its peak to a process that has loaded the model, with and without
gradient checkpointing, at one batch size and length. Each is measured in a process of its own, as
`mmdefense/evaluation/peak.py` says. The defenses are measured whole: the private copy of the model
and the states that the utility guard may go back to are in it. The two fine-tunes are plain loops
over the given model, and keep no such thing.

Measured: see "Memory" in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmdefense.data.text import IGNORED, TokenBatch, TokenSamples
from mmdefense.defenses.base import TrainingDefense, versions
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.evaluation.peak import peak_growth
from mmdefense.kernels.hooks import mode, recomputed
from mmdefense_adapters.huggingface_causal import HFCausalLM
from mmdefense_tasks.language_victims import train_tokenizer

DEFENSES: dict[str, type[TrainingDefense]] = {
    "FIP": FIP,
    "Fast FIP": FastFIP,
    "fine-tuning, as a defense": FineTuning,
}
LOOPS = ("fine-tune, plain loop", "LoRA fine-tune, plain loop")
SIDES = (*DEFENSES, *LOOPS)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is.

    Attributes:
        width: Features of the GPT-2, of which every 64 are a head.
        layers: Blocks.
        vocabulary: Tokens.
        batch: Samples per update.
        length: Tokens per sample.
        steps: Updates; the peak is reached in the first few.
        rank: Of LoRA.
    """

    width: int = 256
    layers: int = 4
    vocabulary: int = 8000
    batch: int = 4
    length: int = 64
    steps: int = 4
    rank: int = 8


SMOKE = Size(width=64, layers=2, vocabulary=100, batch=2, length=8, steps=4)


def made(size: Size, device: torch.device, *, lora: bool = False) -> HFCausalLM:
    """Return the model in its adapter, with LoRA around it where that is asked for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=max(1, size.width // 64),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config).to(device)
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=size.rank, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings)
    return HFCausalLM(model, tokenizer=train_tokenizer(["a b c"]))


def clean(size: Size) -> TokenSamples:
    """Return random tokens: as many samples as leave a whole batch to learn from."""
    count = round(size.batch / 0.8)
    ids = torch.randint(5, size.vocabulary, (count, size.length))
    stands = torch.ones_like(ids, dtype=torch.bool)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return TokenSamples(TokenBatch(ids, stands, stands, labels), ("",) * count, torch.arange(5, 9))


def worked(side: str, size: Size, *, again: bool, adapter: HFCausalLM) -> None:
    """Train once, with gradient checkpointing (``again``) or without."""
    samples = adapter.samples(clean(size))
    if side in LOOPS:
        plain_loop(adapter, samples.take(torch.arange(size.batch)), size, again=again)
        return
    shared: Any = {"steps": size.steps, "batch_size": size.batch, "max_utility_drop": 1.0}
    DEFENSES[side](gradient_checkpointing=again, **shared).purify(adapter, samples)


def plain_loop(adapter: HFCausalLM, batch: TokenBatch, size: Size, *, again: bool) -> None:
    """Train what is trainable by SGD with momentum, as the defenses do."""
    model = adapter.model
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9
    )
    if again:
        with recomputed(model):
            plain_loop(adapter, batch, size, again=False)
        return
    with mode(model, train=True):
        for _ in range(size.steps):
            optimizer.zero_grad(set_to_none=True)
            adapter.per_sample_loss(batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def measured(side: str, size: Size, device: torch.device, *, again: bool) -> dict[str, Any]:
    """Return peak growth in bytes, and how many values are trained, of the present process."""
    lora = side.startswith("LoRA")
    worked(side, SMOKE, again=again, adapter=made(SMOKE, device, lora=lora))
    adapter = made(size, device, lora=lora)
    growth = peak_growth(lambda: worked(side, size, again=again, adapter=adapter), device)
    trained = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    if side in DEFENSES:
        trained = DEFENSES[side]().trained(adapter)
    weights = sum(p.numel() for p in adapter.model.parameters())
    return {"growth": growth, "trained": trained, "weights": weights}


def in_a_process(side: str, options: argparse.Namespace, *, again: bool) -> dict[str, Any]:
    """Return :func:`measured` of a process that has done nothing else."""
    command = [sys.executable, __file__, "--device", str(options.device), "--one", side]
    command += ["--smoke"] * options.smoke + ["--again"] * again
    # Large pieces go back to the system when they are freed: a peak is then what was in use.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=settings)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def cell(growths: list[int]) -> str:
    """Return the median in MiB, with the least and the greatest."""
    least, median, most = (round(f(growths) / 2**20) for f in (min, statistics.median, max))
    return f"{median} ({least} to {most})"


def table(rows: dict[str, dict[str, Any]], size: Size, about: str) -> str:
    """Return what was measured as Markdown."""
    lines = [
        f"GPT-2, {size.layers} layers, {size.width} wide, {size.vocabulary} tokens, float32; batch "
        f"{size.batch} of {size.length} tokens; {about}.",
        "",
        "| training | values trained | of the model | peak, MiB | with checkpointing, MiB |",
        "|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        share = row["trained"] / row["weights"]
        cells = (
            side,
            f"{row['trained']:,}",
            f"{share:.2%}",
            cell(row["plain"]),
            cell(row["again"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every side, and write the table."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("out/memory"), help="the folder")
    parser.add_argument("--device", type=torch.device, default=torch.device(usual))
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--smoke", action="store_true", help="small: that it runs, no more")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = replace(SMOKE, width=128) if options.smoke else Size()
    if options.one:
        print(json.dumps(measured(options.one, size, options.device, again=options.again)))
        return
    rows: dict[str, dict[str, Any]] = {}
    repeats = 1 if options.smoke else options.repeats
    for side in SIDES:
        row: dict[str, Any] = {"plain": [], "again": []}
        for _ in range(repeats):
            for name, again in (("plain", False), ("again", True)):
                found = in_a_process(side, options, again=again)
                row[name].append(found.pop("growth"))
                row |= found
        rows[side] = row
    about = versions()
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(rows, size, f"{options.device}, torch {about['torch']}, {repeats} repetitions")
    record = {"size": asdict(size), "versions": about, "rows": rows}
    (options.out / "memory.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
