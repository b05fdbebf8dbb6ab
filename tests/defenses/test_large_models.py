"""What large models need: gradient checkpointing gives the same gradients, differentiated twice."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from language_models import build, texts, tokenizer

from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.fisher import penalised_gradient
from mmdefense.kernels.hooks import recomputed, second_derivatives
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.registry import adapt

SHORT = {"steps": 2, "batch_size": 4, "max_utility_drop": 1.0}
FAMILIES = ["gpt2", "llama", "t5", "bart", "lora"]


def in_float64(family):
    adapter = adapt(build(family).double(), tokenizer=tokenizer())
    return adapter, adapter.samples(texts())


def calls(model):
    """Return a list of the forward passes of layers, filled as they happen."""
    made = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: made.append(1))
    return made


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def gradients(family, *, again, trace):
    adapter, samples = in_float64(family)
    model, batch = adapter.model.train(), samples.take(torch.arange(4))
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = calls(model)
    torch.manual_seed(3)  # of dropout, where there is some
    with recomputed(model) if again else nullcontext(), second_derivatives():
        if not trace:
            return mean_loss_gradient(adapter, batch, parameters)[1], len(made)
        noise = torch.Generator().manual_seed(1)
        return penalised_gradient(adapter, batch, parameters, noise, 0.3)[1], len(made)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_with_and_without(family, trace):
    expected, once = gradients(family, again=False, trace=trace)
    found, more = gradients(family, again=True, trace=trace)
    assert more > once > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [FineTuning, FIP, FastFIP])
def test_a_defense_gives_the_same_weights_and_an_unchanged_model(kind):
    found = []
    for again in (False, True):
        adapter, samples = in_float64("gpt2")
        result = kind(gradient_checkpointing=again, **SHORT).purify(adapter, samples)
        assert not checkpoints(result.model)
        found.append(result.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-10)


def test_a_model_that_offers_none_is_refused_in_one_line():
    needs = pytest.raises(UnsupportedError, match="gradient_checkpointing needs a model")
    with needs, recomputed(torch.nn.Linear(1, 1)):
        pass


def test_a_model_that_had_it_keeps_it():
    adapter, _ = in_float64("gpt2")
    with recomputed(adapter.model):
        with recomputed(adapter.model):
            pass
        assert checkpoints(adapter.model)
    assert not checkpoints(adapter.model)
