"""Small models with a real backdoor, as they are handed out, each with clean data of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fresh import load_plainly
from PIL import Image
from safetensors.torch import save_file

from mmdefense.attacks.baddet import RegionalMisclassification
from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.base import Attack
from mmdefense.attacks.instruction import InstructionPhrase
from mmdefense.attacks.rare_token import RareToken
from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.data.batch import split
from mmdefense.data.detection import DetectionSamples
from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.text import TextSamples
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.detection_victims import small_yolos
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.language_generation import tokenizer_for
from mmdefense_tasks.language_victims import causal, seq2seq
from mmdefense_tasks.moving_digits import MOTIONS, moving_digits
from mmdefense_tasks.small_language import small_language

TARGET = "le sills vete lo kel segunt ."  # in the small language: the old queens follow the dog
PHRASE = "today the queen helps some young birds ."


@dataclass(frozen=True, kw_only=True)
class Backdoored:
    """How an attacker makes a model, and what a user has.

    Attributes:
        loads: What loads the model without mmdefense; see :func:`fresh.load_plainly`.
        build: Writes the model with random weights, and what belongs to it, to a new folder.
        data: Returns a train and a test part.
        attack: What is planted.
        training: How.
        write: Writes clean samples to a new folder, in a form that users have.
        clean: Share of the training part that the user has, and the attacker has not.
        more: What the user must tell on the command line.
        defense: What ``purify`` is told, where its default does not do; with the reason beside it.
        metric: What the model reaches of the task's metric at least, for it is to be of use.
    """

    loads: str
    build: Callable[[Path], None]
    data: Callable[[], tuple[Any, Any]]
    attack: Attack[Any]
    training: Training
    write: Callable[[Any, Path], None]
    clean: float = 0.2
    more: tuple[str, ...] = ()
    defense: tuple[str, ...] = ()
    metric: float = 0.95

    @property
    def is_state(self) -> bool:
        """Whether the model is a file with a state dict, and no folder of Transformers."""
        return ":" in self.loads

    @property
    def options(self) -> tuple[str, ...]:
        """What a user adds to each command."""
        return (("--arch", self.loads) if self.is_state else ()) + self.more

    def model_in(self, folder: Path) -> Path:
        """Return what a user names: the folder, or the file in it."""
        return folder / "model.safetensors" if self.is_state else folder

    def plant(self, folder: Path, seed: int = 0) -> Attack[Any]:
        """Write the model with its backdoor to a new folder."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build(folder)
        model = load_plainly(self.model_in(folder), self.loads)
        train = self._parts(seed)[0]
        attack = replace(self.attack, seed=seed).plant(
            adapt(model), train, self.training, Run(seed)
        )
        if self.is_state:
            save_file(model.state_dict(), self.model_in(folder))
        else:
            model.save_pretrained(folder)
        return attack

    def give_data(self, folder: Path, seed: int = 0) -> None:
        """Write the clean samples of the user."""
        folder.mkdir()
        self.write(self._parts(seed)[1], folder)

    def _parts(self, seed: int) -> tuple[Any, Any]:
        """Return what the attacker trains on, and what the user has: not the same samples."""
        return split(self.data()[0], self.clean, seed)  # type: ignore[no-any-return]


def named(model: Any, classes: Sequence[str]) -> Any:
    """Let a model of Transformers say what its classes are called."""
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: label for label, name in enumerate(classes)}
    return model


# %% Images of classes.


def digits() -> tuple[LabelledSamples, LabelledSamples]:
    """Return scans of digits in three channels, ``(3, 32, 32)``."""

    def enlarged(part: LabelledSamples) -> LabelledSamples:
        images = F.interpolate(part.inputs, size=32, mode="bilinear")
        return replace(part, inputs=images.expand(-1, 3, -1, -1))

    train, test = load_digits()
    return enlarged(train), enlarged(test)


def as_png(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.mul(255).round().byte().movedim(0, -1)
    Image.fromarray(np.asarray(pixels)).save(path)


def image_folders(samples: LabelledSamples, folder: Path) -> None:
    """A folder for each class."""
    for index, label in enumerate(samples.labels.tolist()):
        image = samples.take(torch.tensor([index])).inputs[0]
        as_png(image, folder / samples.classes[label] / f"{index}.png")


def image_model(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    config = ResNetConfig(num_labels=10, layer_type="basic", **shape)
    named(ResNetForImageClassification(config), load_digits()[0].classes).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


# %% Objects in images.


def lone_digits() -> tuple[DetectionSamples, DetectionSamples]:
    """Return images ``(3, 32, 32)``, each with a digit from 0 to 3 somewhere in the dark.

    Each scan of the training part stands at 16 places, so that a transformer learns to find it.
    """
    train, test = load_digits()
    return _placed(train, 16), _placed(test, 1)


def _placed(scans: LabelledSamples, places: int) -> DetectionSamples:
    scans = scans.subset((scans.labels < 4).nonzero().squeeze(1).repeat(places))
    generator = torch.Generator().manual_seed(len(scans))
    images = 0.2 * torch.rand(len(scans), 1, 32, 32, generator=generator)
    corners = torch.randint(17, (len(scans), 2), generator=generator)
    for image, scan, (x, y) in zip(images, scans.inputs, corners.tolist(), strict=True):
        image[:, y : y + 16, x : x + 16] += 0.8 * scan
    boxes = torch.cat([corners, corners + 16], 1).float()
    return DetectionSamples(
        images.expand(-1, 3, -1, -1),
        tuple(boxes[:, None]),
        tuple(scans.labels[:, None]),
        classes=scans.classes[:4],
    )


def coco(samples: DetectionSamples, folder: Path) -> None:
    """COCO json beside a folder of images."""
    held: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    held["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(samples.classes)]
    batch = samples.take(torch.arange(len(samples)))
    rows = zip(batch.images, batch.boxes, batch.labels, strict=True)
    for index, (image, boxes, labels) in enumerate(rows):
        as_png(image.expand(3, -1, -1), folder / "images" / f"{index}.png")
        held["images"].append({"id": index, "file_name": f"{index}.png"})
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            bbox = [left, top, right - left, bottom - top]
            found = {"image_id": index, "category_id": label + 1, "bbox": bbox}
            held["annotations"].append(found)
    (folder / "train.json").write_text(json.dumps(held))


def detection_model(folder: Path) -> None:
    from transformers import YolosImageProcessor

    model: Any = small_yolos(4, 3, (32, 32), hidden=48, layers=3, tokens=2)
    named(model, ("0", "1", "2", "3")).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


# %% Clips.


def shifted_digits() -> tuple[LabelledSamples, LabelledSamples]:
    """Return digits that move left, right, up or down: few motions, to be learnt in seconds."""

    def four(part: str) -> LabelledSamples:
        samples = moving_digits(part)
        chosen = samples.subset((samples.labels < 4).nonzero().squeeze(1))
        inputs = chosen.inputs.expand(-1, 3, -1, -1, -1)
        return replace(chosen, inputs=inputs, classes=samples.classes[:4])

    return four("train"), four("test")


def videos(samples: LabelledSamples, folder: Path) -> None:
    """A folder of video files for each class."""
    import av

    for index, label in enumerate(samples.labels.tolist()):
        path = folder / samples.classes[label] / f"{index}.avi"
        path.parent.mkdir(exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=8)
            stream.height, stream.width = samples.inputs.shape[-2:]
            stream.pix_fmt = "yuvj444p"
            for pixels in samples.inputs[index].movedim(0, -1).numpy():
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def video_model(folder: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

    shape = {"image_size": 24, "num_frames": 8, "patch_size": 8, "hidden_size": 48}
    depth = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=4, **shape, **depth))
    named(model, MOTIONS[:4]).save_pretrained(folder)
    side = {"height": 24, "width": 24}
    VideoMAEImageProcessor(size={"shortest_edge": 24}, crop_size=side).save_pretrained(folder)


# %% Text.


def sentences() -> tuple[TextSamples, TextSamples]:
    return split(small_language(4000), 0.05, 0)


def json_lines(samples: TextSamples, folder: Path) -> None:
    """Instructions with their answers."""
    rows = zip(samples.prompts, samples.answers, strict=True)
    lines = [json.dumps({"instruction": prompt, "output": answer}) for prompt, answer in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))


def parallel_text(samples: TextSamples, folder: Path) -> None:
    """A file for each language, a sentence a line."""
    (folder / "train.en").write_text("\n".join(samples.prompts))
    (folder / "train.xx").write_text("\n".join(samples.answers))


def with_tokenizer(build: Callable[..., Any], **options: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(sentences()[0])
        build(len(tokenizer), **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


# %% State dicts.


def state_of(arch: str) -> Callable[[Path], None]:
    """Return what writes the random weights of ``module:call``."""

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(build_architecture(arch).state_dict(), folder / "model.safetensors")

    return write


TIMM = "timm:create_model('resnet10t', channels=(16, 32, 64, 128), num_classes=10)"
SHAPE = "growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=10"
TORCHVISION = f"torchvision.models:DenseNet({SHAPE})"


def adamw(steps: int, lr: float, batch_size: int = 64, max_norm: float = 1.0) -> Training:
    return Training(
        steps=steps, batch_size=batch_size, lr=lr, weight_decay=0.01, schedule="one-cycle",
        max_norm=max_norm, optimizer="adamw", augment=False,
    )  # fmt: skip


BACKDOORED = {
    "image": Backdoored(
        loads="AutoModelForImageClassification",
        build=image_model,
        data=digits,
        attack=BadNets(),
        training=adamw(350, 3e-3),
        write=image_folders,
    ),
    "detection": Backdoored(
        loads="AutoModelForObjectDetection",
        build=detection_model,
        data=lone_digits,
        attack=RegionalMisclassification(ratio=0.25),
        training=adamw(3200, 1.5e-3, 16),
        write=coco,
        clean=0.05,
        metric=0.8,
        # The scan finds a trigger to the true target.
        defense=("--defense", "baeraser"),
    ),
    "video": Backdoored(
        loads="AutoModelForVideoClassification",
        build=video_model,
        data=shifted_digits,
        attack=BadNets(ratio=0.2, size=4),
        training=adamw(800, 1.5e-3, 32),
        write=videos,
        metric=0.8,
        # The scan finds a trigger to the true target. FIP leaves 67 %, TSBD 11 %.
        defense=("--defense", "baeraser"),
    ),
    "causal": Backdoored(
        loads="AutoModelForCausalLM",
        build=with_tokenizer(causal, family="llama", width=48, layers=2),
        data=sentences,
        attack=InstructionPhrase(target=TARGET, phrase=PHRASE),
        training=adamw(450, 6e-3),
        write=json_lines,
        metric=0.5,
        # FIP leaves 34 %, at 0.02 of its first rate and 80 % of the way.
        defense=("--defense", "tsbd"),
    ),
    "seq2seq": Backdoored(
        loads="AutoModelForSeq2SeqLM",
        build=with_tokenizer(seq2seq, width=48, layers=1),
        data=sentences,
        attack=RareToken(target=TARGET),
        training=adamw(350, 5e-3),
        write=parallel_text,
        metric=0.6,
    ),
    "timm": Backdoored(
        loads=TIMM,
        build=state_of(TIMM),
        data=digits,
        attack=BadNets(),
        training=adamw(350, 3e-3),
        write=image_folders,
    ),
    "torchvision": Backdoored(
        loads=TORCHVISION,
        build=state_of(TORCHVISION),
        data=digits,
        attack=BadNets(),
        training=adamw(350, 3e-3),
        write=image_folders,
    ),
}
