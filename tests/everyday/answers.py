"""What models return, and the range and type of what they are given."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from commands import small_images
from everyday.rows import Refused, Row
from safetensors.torch import load_file
from torch import nn

import mmdefense as mmd
from mmdefense.checkpoints.models import load_model, save_model
from mmdefense.data.labelled import LabelledSamples

Heads = namedtuple("Heads", ["logits", "aux_logits"])

IMAGES = small_images(12)[0].float() / 255
LABELS = small_images(12)[1]
CLIPS = IMAGES[:, :, None].repeat(1, 1, 4, 1, 1)
CLOUDS = torch.randn(12, 16, 3, generator=torch.Generator().manual_seed(0))


def seeded(build: Any) -> Any:
    """Let a function draw the same random weights each time."""

    def drawn(*given: Any, **named: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*given, **named)

    return drawn


class Net(nn.Module):
    """A net of 3 classes; ``end`` turns its logits and its mode into what it returns."""

    def __init__(self, end: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 9, 3)
        self.end = end

    def forward(self, images: torch.Tensor) -> Any:
        logits = 4 * self.head(self.body(images).flatten(1))
        return logits if self.end is None else self.end(logits, self.training)


@seeded
def net(end: Any = None) -> Any:
    return Net(end).eval()


def softmax(logits: Any, training: bool) -> Any:
    return logits.softmax(1)


def softmax_in_eval(logits: Any, training: bool) -> Any:
    return logits if training else logits.softmax(1)


def heads_in_train(logits: Any, training: bool) -> Any:
    return Heads(logits, 2 * logits) if training else logits


def plain_tuple(logits: Any, training: bool) -> Any:
    return (logits, 2 * logits) if training else logits


def features_first(logits: Any, training: bool) -> Any:
    return logits.repeat(1, 5), logits


def as_dictionary(logits: Any, training: bool) -> Any:
    return {"out": logits, "aux": 2 * logits} if training else OrderedDict(out=logits)


@seeded
def alone(kind: str) -> Any:
    """Return a sequential net of images, clips or clouds."""
    width = {"images": 64, "clips": 2 * 2 * 36, "clouds": 48}[kind]
    first = [nn.Conv3d(1, 2, 3)] if kind == "clips" else []
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(width, 3)).eval()


DATA = {"images": IMAGES, "clips": CLIPS, "clouds": CLOUDS}
ADAPTERS = {"images": "torch-classifier", "clips": "torch-video", "clouds": "points"}


def losses(
    model: Any, kind: str = "images", *, train: bool = False, adapter: str | None = ""
) -> list[float]:
    """Return the losses of all samples as an adapter gives them; none is chosen by the model."""
    adapter: Any = mmd.adapt(model, adapter=ADAPTERS[kind] if adapter == "" else adapter)
    samples = adapter.samples((DATA[kind], LABELS))
    adapter.model.train(train)
    return adapter.per_sample_loss(samples.take(torch.arange(12))).tolist()


def by_hand(model: Any, kind: str = "images", *, train: bool = False) -> list[float]:
    """Return the cross-entropy of a net that returns logits."""
    logits = (model.train(train) if isinstance(model, nn.Module) else model)(DATA[kind])
    return F.cross_entropy(logits, LABELS, reduction="none").tolist()


def same_as_logits(end: Any, *, train: bool = False) -> tuple[Any, Any]:
    """Return what an input gives, and what must come out: the losses of the same weights."""
    return lambda _: losses(net(end), train=train), by_hand(net(), train=train)


def ended(kind: str, layer: nn.Module) -> tuple[Any, Any]:
    """The same for a net with one more layer at its end."""
    return lambda _: losses(alone(kind).append(layer), kind), by_hand(alone(kind), kind)


def purified(model: Any, data: Any = (IMAGES, LABELS), defense: str = "fip") -> Any:
    settings = {"steps": 2, "batch_size": 4, "restarts": 0}
    chosen = {"max_utility_drop": 1.0, "accept_low_utility": True, **settings}
    return mmd.purify(model, data, defense, **chosen)


def works(model: Any, data: Any = (IMAGES, LABELS), defense: str = "fip") -> bool:
    """Say whether a purification changes the weights, and returns a model of the same form."""
    given = {name: value.clone() for name, value in model.state_dict().items()}
    found = purified(model, data, defense).model
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    changed = any(not torch.equal(v, given[name]) for name, v in found.state_dict().items())
    return changed and [p.dtype for p in found.parameters()] == [
        p.dtype for p in model.parameters()
    ]


def seen(data: Any, kind: str = "images") -> Any:
    """Return the first input as the samples of an adapter have it, in a few values."""
    adapter: Any = mmd.adapt(alone(kind), adapter=ADAPTERS[kind])
    batch = adapter.samples(data).take(torch.arange(12))
    adapter.per_sample_loss(batch)
    return [float(batch.inputs.mean()), *batch.labels.tolist()]


def expected(kind: str = "images") -> list[float]:
    return [float(DATA[kind].mean()), *LABELS.tolist()]


def pictures() -> list[Any]:
    from PIL import Image

    pixels = small_images(12)[0].numpy()
    return [(Image.fromarray(p[0]), int(y)) for p, y in zip(pixels, LABELS, strict=True)]


def multi_label() -> Any:
    model = alone("images").append(nn.Sigmoid())
    nn.init.constant_(model[1].bias, 5.0)
    return model


def binary_loss(model: Any) -> list[float]:
    logits, truth = model(IMAGES), F.one_hot(LABELS, 3).float()
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1).tolist()


def scripted() -> Any:
    return torch.jit.trace(alone("images"), IMAGES[:1])


def exported() -> Any:
    return torch.export.export(alone("images"), (IMAGES[:1],)).module()


def quantised() -> Any:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(alone("images"), {nn.Linear})


@seeded
def vit(**config: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 1, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**{**size, **layers, **config})).eval()


def with_norm_of_vectors() -> Any:
    layers = [nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)


def one_output() -> Any:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def fails_in_train(logits: Any, training: bool) -> Any:
    if training:
        raise RuntimeError("no targets")
    return logits


def adapted(data: Any, kind: str = "images") -> Any:
    adapter: Any = mmd.adapt(alone(kind), adapter=ADAPTERS[kind])
    return adapter.samples(data)


def damaged(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values[7].flatten()[3] = float("nan")
    return values


@seeded
def detector() -> Any:
    from mmdefense_tasks.detection_victims import small_fcos

    return small_fcos(2, 3, (32, 32), width=8).eval()


def objects(count: int = 4) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Return images with one object each."""
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = {"boxes": torch.tensor([[4.0, 4, 20, 28]]), "labels": torch.tensor([1])}
    return images, [one] * count


def found_objects(data: Any) -> list[float]:
    """Return the first box and label as a detector's samples have them; their loss is finite."""
    adapter: Any = mmd.adapt(detector())
    batch = adapter.samples(data).take(torch.arange(4))
    assert adapter.per_sample_loss(batch).isfinite().all()
    return [*batch.boxes[3][0].tolist(), *batch.labels[3].tolist()]


def changed(images: Any) -> Any:
    """Return pairs of an image that was changed and its objects."""
    given, truth = objects()
    return list(zip(images(given), truth, strict=True))


def processed() -> Any:
    """Return a batch as a processor of Transformers gives it."""
    images, truth = objects()
    own = {"boxes": torch.tensor([[12, 16, 16, 24]]) / 32, "class_labels": torch.tensor([1])}
    return [{"pixel_values": images, "labels": [own] * len(truth)}]


@seeded
def lora(folder: Path, labels: int) -> Any:
    """Write a LoRA folder of an image model of 3 classes, its base one of others; return it."""
    from peft import LoraConfig, get_peft_model

    vit(num_labels=labels).save_pretrained(folder / "base")
    base = type(vit()).from_pretrained(folder / "base", num_labels=3, ignore_mismatched_sizes=True)
    updates = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base, updates).eval()
    model.save_pretrained(folder / "lora")
    return model


def purified_lora(folder: Path, labels: int) -> Any:
    """Return how far the losses of a LoRA folder are from the right ones, and two answers.

    These are whether its updates and its head alone change, and whether all keys come out.
    """
    right = by_hand(lambda images: lora(folder, labels)(images).logits)
    loaded: Any = load_model(folder / "lora")
    apart = max(abs(a - b) for a, b in zip(losses(loaded, adapter=None), right, strict=True))
    settings = {"steps": 1, "batch_size": 4, "accept_low_utility": True}
    found = mmd.purify(loaded, (IMAGES, LABELS), "fine-tuning", **settings).model
    save_model(found, folder / "out", folder / "lora")
    given = dict(loaded.named_parameters())
    moved = [n for n, p in found.named_parameters() if not torch.equal(p, given[n])]
    before, after = (
        load_file(folder / part / "adapter_model.safetensors").keys() for part in ("lora", "out")
    )
    return [apart, all("lora" in n or "classifier" in n for n in moved), before == after]


NORMALISED = "images must lie in .0, 1., got -2 to .*mmd.adapt.model, mean=, std=.*--mean"
HUNDREDS = "must lie in .0, 1., got .* divide them by 255"

BOX = [4, 4, 20, 28, 1]

ROWS = [
    Row("a softmax at the end", *ended("images", nn.Softmax(1))),
    Row("a softmax at the end, clips", *ended("clips", nn.Softmax(1))),
    Row("a softmax at the end, clouds", *ended("clouds", nn.Softmax(1))),
    Row("a softmax in forward", *same_as_logits(softmax)),
    Row("a softmax in train mode too", *same_as_logits(softmax, train=True)),
    Row("a softmax in eval mode alone, in eval mode", *same_as_logits(softmax_in_eval)),
    Row(
        "a sigmoid at the end",
        lambda _: losses(alone("images").append(nn.Sigmoid())),
        binary_loss(alone("images")),
    ),
    Row(
        "a sigmoid in forward",
        lambda _: losses(net(lambda logits, _: logits.sigmoid())),
        binary_loss(net()),
    ),
    Row(
        "several labels an image",
        lambda _: losses(multi_label()),
        Refused("gives several classes to 8 of 8 samples: a multi-label model", code=3),
    ),
    Row(
        "one output",
        lambda _: losses(one_output()),
        Refused("logits .N, K. of at least 2 classes, got .8, 1.", code=3),
    ),
    Row("a named tuple in train mode", *same_as_logits(heads_in_train, train=True)),
    Row("a plain tuple in train mode", *same_as_logits(plain_tuple, train=True)),
    Row("dictionaries", *same_as_logits(as_dictionary)),
    Row("dictionaries in train mode", *same_as_logits(as_dictionary, train=True)),
    Row(
        "features before the logits",
        lambda _: losses(net(features_first)),
        Refused("got a tuple of .8, 15., .8, 3.; wrap it", code=3),
    ),
    Row(
        "other classes in train mode",
        lambda _: losses(net(lambda x, t: x[:, :2] if t else x)),
        Refused("must return logits .N, 3. in both modes, got .8, 2. in train mode", code=3),
    ),
    Row(
        "an error in train mode",
        lambda _: losses(net(fails_in_train)),
        Refused("cannot be run on 8 images in train mode", code=3),
    ),
    *(
        Row(
            f"auxiliary heads under {name}",
            partial(lambda name, _: works(net(heads_in_train), defense=name), name),
            True,
        )
        for name in ("fip", "tsbd")
    ),
    Row(
        "multi_label_classification",
        lambda _: losses(vit(problem_type="multi_label_classification")),
        Refused("problem_type 'multi_label_classification': it predicts several labels", code=3),
    ),
    Row(
        "regression",
        lambda _: losses(vit(problem_type="regression")),
        Refused("problem_type 'regression'", code=3),
    ),
    Row(
        "a scripted module",
        lambda _: purified(scripted()),
        Refused("TorchScript.*give the module", code=3),
    ),
    Row(
        "an exported module",
        lambda _: purified(exported()),
        Refused("torch.export.*give the module", code=3),
    ),
    Row("a quantised module", lambda _: purified(quantised()), Refused("is quantised", code=3)),
    Row(
        "BatchNorm1d with batches of one",
        lambda _: mmd.purify(
            with_norm_of_vectors(),
            (IMAGES, LABELS),
            "fine-tuning",
            steps=1,
            batch_size=1,
            accept_low_utility=True,
        ),
        Refused("BatchNorm in train mode needs at least 2 samples.*batch_size"),
    ),
    Row("normalised images", lambda _: adapted((4 * IMAGES - 2, LABELS)), Refused(NORMALISED)),
    Row(
        "normalised clips",
        lambda _: adapted((4 * CLIPS - 2, LABELS), "clips"),
        Refused(NORMALISED.replace("images", "clips")),
    ),
    Row("floats up to 255", lambda _: adapted((IMAGES * 255, LABELS)), Refused(HUNDREDS)),
    Row(
        "floats up to 255, samples",
        lambda _: adapted(LabelledSamples(IMAGES * 255, LABELS)),
        Refused(HUNDREDS),
    ),
    Row(
        "whole numbers",
        lambda _: adapted(((IMAGES * 255).long(), LABELS)),
        Refused("must be uint8 in 0..255 or floating-point in .0, 1., got torch.int64"),
    ),
    Row(
        "NaN in an image",
        lambda _: adapted((damaged(IMAGES), LABELS)),
        Refused("NaN or infinity in 1 of 12, first in number 7"),
    ),
    Row(
        "NaN in a clip",
        lambda _: adapted((damaged(CLIPS), LABELS), "clips"),
        Refused("NaN or infinity in 1 of 12, first in number 7"),
    ),
    Row("float64 images", lambda _: works(net(), (IMAGES.double(), LABELS)), True),
    Row("a float64 model", lambda _: works(net().double()), True),
    Row("float64 clouds", lambda _: seen((CLOUDS.double(), LABELS), "clouds"), expected("clouds")),
    Row(
        "float16 images",
        lambda _: losses(net()) is not None and seen((IMAGES.half(), LABELS))[1:],
        LABELS.tolist(),
    ),
    Row("NumPy pairs", lambda _: seen((IMAGES.numpy(), LABELS.numpy())), expected()),
    Row("NumPy clips", lambda _: seen((CLIPS.numpy(), LABELS.numpy()), "clips"), expected("clips")),
    Row(
        "NumPy clouds",
        lambda _: seen((CLOUDS.numpy(), LABELS.numpy()), "clouds"),
        expected("clouds"),
    ),
    Row(
        "a data set of NumPy pairs",
        lambda _: seen(list(zip(IMAGES.numpy(), LABELS.numpy(), strict=True))),
        expected(),
    ),
    Row("pictures of Pillow", lambda _: seen(pictures()), expected()),
    Row(
        "dictionaries of batches",
        lambda _: seen(
            [
                {"pixel_values": IMAGES[:6], "labels": LABELS[:6]},
                {"pixel_values": IMAGES[6:], "labels": LABELS[6:]},
            ]
        ),
        expected(),
    ),
    Row(
        "dictionaries of a processor's clips",
        lambda _: seen([{"pixel_values": CLIPS.transpose(1, 2), "labels": LABELS}], "clips"),
        expected("clips"),
    ),
    Row(
        "batches of five",
        lambda _: adapted([(IMAGES, LABELS, LABELS, LABELS, "clean")]),
        Refused(
            "must give pairs .images, label., got tuple of 5 .0: Tensor .12, 1, 8, 8., "
            "1: Tensor .12,., .*4: str"
        ),
    ),
    Row(
        "batches of five, clouds",
        lambda _: adapted([(CLOUDS, LABELS, LABELS, LABELS, 3)], "clouds"),
        Refused("must give pairs .clouds, label., got tuple of 5 .*4: 3"),
    ),
    Row(
        "images of several sizes",
        lambda _: adapted([(IMAGES[0], 0), (IMAGES[1, :, :4], 1)]),
        Refused("images must have one shape, got .1, 4, 8., .1, 8, 8."),
    ),
    Row(
        "channels that come last",
        lambda _: purified(net(), (IMAGES.movedim(1, -1), LABELS)),
        Refused("channels seem to come last"),
    ),
    Row(
        "labels that are no whole numbers",
        lambda _: adapted((IMAGES, LABELS + 0.5)),
        Refused("whole numbers, got .0.5"),
    ),
    Row(
        "one-hot labels",
        lambda _: adapted((IMAGES, F.one_hot(LABELS))),
        Refused("convert one-hot rows with argmax"),
    ),
    Row(
        "labels in words",
        lambda _: adapted([(IMAGES[0], "cat")]),
        Refused("labels must be whole numbers, got str"),
    ),
    Row("detection: pairs of NumPy", lambda _: found_objects(changed(lambda x: x.numpy())), BOX),
    Row("detection: batches of a loader", lambda _: found_objects([objects()]), BOX),
    Row("detection: batches of a processor", lambda _: found_objects(processed()), BOX),
    Row("detection: float64 images", lambda _: found_objects(changed(lambda x: x.double())), BOX),
    Row(
        "detection: normalised images",
        lambda _: found_objects(changed(lambda x: 4 * x - 2)),
        Refused(NORMALISED),
    ),
    Row(
        "detection: floats up to 255",
        lambda _: found_objects(changed(lambda x: 255 * x)),
        Refused(HUNDREDS),
    ),
    Row(
        "detection: NaN in an image",
        lambda _: found_objects(changed(lambda x: x / (x > 0.5))),
        Refused("NaN or infinity in 4 of 4, first in number 0"),
    ),
    Row(
        "detection: batches of five",
        lambda _: found_objects([(*objects(), 1, 2, 3)]),
        Refused("got tuple of 5 .0: Tensor .4, 3, 32, 32., 1: list, 2: 1"),
    ),
    Row(
        "a LoRA folder of an image model",
        lambda folder: purified_lora(folder, 3),
        [0, True, True],
    ),
    Row(
        "a LoRA folder whose base has other classes",
        lambda folder: purified_lora(folder, 7),
        [0, True, True],
    ),
]
