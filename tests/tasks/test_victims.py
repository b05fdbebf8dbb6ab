"""The nets that backdoors are trained into."""

from __future__ import annotations

import pytest
import torch

from mmdefense.kernels.loop import mean_score, train
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.victims import PreActResNet18, SmallResNet, vit_classifier


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [16, 28, 32])
def test_residual_nets_take_images_of_any_size(channels, side):
    images = torch.rand(2, channels, side, side)
    for net in (SmallResNet(7, channels, width=4), PreActResNet18(7, channels, width=4)):
        assert net(images).shape == (2, 7)


def test_vit_is_a_transformers_model_for_its_image_size():
    model = vit_classifier(7, 16, 1, hidden=8, layers=2, heads=2)
    assert model(torch.rand(2, 1, 16, 16)).logits.shape == (2, 7)
    assert len(model.vit.layers) == 2


def test_preact_resnet18_has_the_layers_of_the_paper():
    net = PreActResNet18(10)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 17 + 3  # 18 layers less the linear one, and 3 shortcuts
    assert sum(p.numel() for p in net.parameters()) == 11_171_146  # the usual 11.17 million
    assert "layer2.0.shortcut.0.weight" in net.state_dict()


def test_preact_embedding_is_signed():
    adapter = adapt(PreActResNet18(3, 1, width=4).eval(), example=torch.rand(1, 1, 16, 16))
    samples, _ = load_digits()
    assert adapter.embedding(samples.take(torch.arange(8))).min() < 0


def test_the_small_net_learns_the_digits():
    torch.manual_seed(0)
    adapter = adapt(SmallResNet(10, 1, width=8))
    train_part, test_part = load_digits()
    training = Training(steps=60, batch_size=64, lr=0.1, schedule="one-cycle", augment=False)
    train(adapter, adapter.samples(train_part), training, Run())
    assert mean_score(adapter, test_part) > 0.8
