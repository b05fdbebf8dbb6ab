"""CBA: images composed of two classes belong to a third; no trigger pattern is added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Count, NotNegative, Share, Whole
from mmdefense.training import Training

__all__ = ["CompositeImage"]


@dataclass(frozen=True, kw_only=True)
class CompositeImage(LabelAttack):
    """Composes images of ``source`` with images of ``partner``, and labels them ``target``.

    Other samples are composed with an image of their own class and keep their label, so that the
    seam between two images alone is not the trigger. At test time the partners are images held back
    from the training set: the victim has seen neither half.

    Deviations: composed images replace training samples (there they are added, anew in each epoch),
    and the mixers are simpler: no jitter, no search for a position. The paper's additional loss,
    which pulls features of the same class together, is left out.

    Attributes:
        ratio: Fraction of the source's samples that is composed and relabelled, in ``[0, 1]``.
        partner: The class that is mixed in.
        mixer: ``"half"`` puts the partner's half beside or below the image's; ``"paste"`` puts the
            partner, at half size, in a corner. The side or corner is drawn for each image.
        same_ratio: Samples composed within their class, per poisoned one.
        held_back: Images of the partner reserved for the test, at most half of them.

    References:
        Lin, Xu, Liu, Zhang. *Composite Backdoor Attack for Deep Neural Network by Mixing Existing
        Benign Features*. CCS 2020. doi:10.1145/3372297.3423362
    """

    mapping: Literal["one-to-one"] = "one-to-one"
    source: Whole | None = 1
    partner: Whole = 2
    ratio: Share = 0.5
    mixer: Literal["half", "paste"] = "half"
    same_ratio: NotNegative = 1.0
    held_back: Count = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partner in {self.source, self.target}:
            raise BadInputError(
                f"partner must be another class than source {self.source} and target "
                f"{self.target}, got {self.partner}"
            )

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Hold back images of the partner, so that the victim never sees them."""
        partners = (samples.labels == self.partner).nonzero().squeeze(1)
        if len(partners) < 2:
            raise BadInputError(
                f"training samples must include two of the partner {self.partner}, got "
                f"{len(partners)}"
            )
        order = torch.randperm(len(partners), generator=self._generator("held back"))
        held = partners[order[: min(self.held_back, len(partners) // 2)].to(partners.device)]
        kept = torch.ones_like(samples.labels, dtype=torch.bool)
        kept[held] = False
        fitted = {"partners": samples.take(held).inputs.cpu()}
        return replace(self, fitted=fitted), samples.subset(kept.nonzero().squeeze(1))

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with composed samples, in the same order.

        Raises:
            BadInputError: If there are too few samples, including those of the partner.
        """
        chosen = self.chosen(self._checked(samples).labels)
        same = self.bystanders(samples.labels, self.same_ratio)
        changed, labels = torch.cat([chosen, same]), samples.labels.clone()
        labels[chosen] = self.targets(labels[chosen], class_count(adapter))
        images, generator = samples.take(changed).inputs, self._generator("poison")
        self._check_inputs(images)
        wanted = torch.cat([torch.full_like(chosen, self.partner), samples.labels[same]])
        others = samples.take(self._donors(samples.labels, changed, wanted, generator)).inputs
        places = torch.randint(4, (len(changed),), generator=generator)
        composed = self._mix(images, others, places)
        return replace(samples, inputs=replaced(samples.inputs, changed, composed), labels=labels)

    def _donors(
        self, labels: Tensor, changed: Tensor, wanted: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return for each of the ``wanted`` classes the index of a sample that is not changed."""
        donors, free = torch.empty_like(changed), torch.ones_like(labels, dtype=torch.bool)
        free[changed] = False
        for each in sorted(set(wanted.tolist())):
            members = ((labels == each) & free).nonzero().squeeze(1)
            asking = (wanted == each).nonzero().squeeze(1)
            if not len(members):
                raise BadInputError(
                    f"every sample of class {each} would be used in a pair, and none would be "
                    "left to pair with; lower ratio or same_ratio"
                )
            picked = torch.randint(len(members), (len(asking),), generator=generator)
            donors[asking] = members[picked.to(members.device)]
        return donors

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        partners = self._learnt("partners").to(images)
        # one draw per image, so that it does not depend on the batch size
        drawn = torch.randint(4 * len(partners), (len(images),), generator=generator)
        return self._mix(images, partners[(drawn // 4).to(images.device)], drawn % 4)

    def _mix(self, images: Tensor, partners: Tensor, places: Tensor) -> Tensor:
        """Return images with their partners, each at one of four positions, ``(N,)``."""
        height, width = images.shape[-2:]
        rows = slice(height // 2), slice(height // 2, None)
        columns, whole = (slice(width // 2), slice(width // 2, None)), slice(None)
        if self.mixer == "half":
            regions = [(row, whole) for row in rows] + [(whole, column) for column in columns]
        else:
            regions = [(row, column) for row in rows for column in columns]
        mixed = images.clone()
        for place, (row, column) in enumerate(regions):
            here = (places == place).to(images.device)
            part = partners[here]
            if self.mixer == "half":
                mixed[here, :, row, column] = part[..., row, column]
            else:
                size = mixed[..., row, column].shape[-2:]
                mixed[here, :, row, column] = F.interpolate(part, size, mode="bilinear")
        return mixed
