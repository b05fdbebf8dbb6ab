"""Find outliers among a model's weights: no data is needed, and nothing is run.

Three measures, each of them a hint, not a proof. Any model has outliers of the first two, even an
untrained one: they are for information. A row of the head that is an outlier beyond chance is a
low-level finding:

- channels whose Lipschitz constant exceeds their layer's mean by u deviations (CLP),
- layers whose largest singular value is large against the same layer of other blocks,
- rows of the output head whose norm or bias is far from the other classes'.

A model is read as its state dict, in the order of registration if that is known, so that CNNs,
ViTs and transformers look the same; a matrix has one row per channel.

References:
    [CLP] Zheng, Tang, Li, Liu. *Data-free Backdoor Removal based on Channel Lipschitzness*. ECCV
    2022. arXiv:2208.03111. Implemented: the constant of a convolution with its BatchNorm, and u = 3
    deviations within a layer. Beyond the paper: linear layers, whose channel is a row; heads are
    measured by their own rule.
    [NC] Wang et al. *Neural Cleanse*. IEEE S&P 2019, for the anomaly index by median absolute
    deviation. [IH] Iglewicz, Hoaglin. *How to Detect and Handle Outliers*. ASQC 1993, for its
    bound of 3.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor, nn

from mmdefense.findings import Finding, Rule
from mmdefense.kernels.outliers import anomaly_index

__all__ = [
    "channel_lipschitz",
    "largest_singular_value",
    "scan_weights",
    "spectral_excess",
]

CHANNEL = Rule(
    id="weights-channel-lipschitz",
    level="info",
    measured="the largest channel Lipschitz constant of a layer, in standard deviations from the "
    "mean",
    reference="3 standard deviations over the channels of the layer (CLP, ECCV 2022)",
    meaning="A channel that amplifies much more than its neighbours may serve a trigger.",
    blind_spot="triggers spread over many channels; some layers of any model have such channels.",
)
SPECTRUM = Rule(
    id="weights-spectrum",
    level="info",
    measured="the largest singular value of a layer over the RMS of all its singular values",
    reference="the same layer of the other blocks, threshold 3.5 by median absolute deviation",
    meaning="One direction of this layer outweighs the rest, unlike in the matching layers of "
    "the other blocks. This is also so in clean models whose layers differ in shape.",
    blind_spot="layers with fewer than four matching layers; a backdoor that is in all of them.",
)
HEAD = Rule(
    id="weights-head-row",
    level="low",
    measured="norm and bias of a row of the output head, by median absolute deviation",
    reference="3.5 over the rows of the head, or the largest value expected by chance",
    meaning="The class or token is easier to reach than others; backdoors favour their target.",
    blind_spot="classes that training data favoured; heads with fewer than five rows.",
)

NOT_FINITE = Rule(
    id="weights-not-finite",
    level="medium",
    measured="values that are NaN or infinite",
    reference="finite numbers only",
    meaning="The weight is damaged, by accident or on purpose: `purify` and `evaluate` refuse "
    "such a model.",
    blind_spot="what the weight was before: the other measures skip it.",
)

U = 3.0
"""Standard deviations from the mean that CLP tolerates; the paper's default."""
ANOMALY = 3.5
SISTERS, ROWS = 5, 5
STRONGEST = 10
"""Findings of each measure; on a large model more would hide the first ones. Our choice."""
_HEADS = re.compile(r"(model\.)?(classifier|head|fc|linear|lm_head|score|output)\.weight")
_EMBEDDINGS = re.compile(r"(emb|wte|wpe|shared\.|position|relative_attention_bias|_token)")


def scan_weights(
    model: nn.Module | Mapping[str, Tensor], *, u: float = U, ordered: bool = True
) -> list[Finding]:
    """Return the outliers among a model's weights, the strongest of each measure.

    Args:
        model: A model or its state dict.
        u: Standard deviations from the mean above which a channel is reported.
        ordered: Whether the weights are in the order of registration. Otherwise the layer before a
            BatchNorm is unknown, and the head is found only by its name.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    broken = _not_finite(state)
    state = {name: value for name, value in state.items() if name not in broken}
    layers = _matrices(state, _transposed(model))
    head = _head(model, layers, ordered)
    body = {name: weight for name, weight in layers.items() if name != head}
    found = [
        [NOT_FINITE.found(name, value) for name, value in broken.items()],
        _strongest(_channels(body, _norm_scales(state) if ordered else {}, u)),
        _strongest(_spectra(body)),
    ]
    if head:
        found.append(_strongest(_head_rows(layers[head], state, head)))
    return [finding for findings in found for finding in findings]


def _not_finite(state: Mapping[str, Tensor]) -> dict[str, str]:
    counts = {
        name: (int((~value.detach().float().isfinite()).sum()), value.numel())
        for name, value in state.items()
        if value.is_floating_point()
    }
    return {name: f"{bad} of {every}" for name, (bad, every) in counts.items() if bad}


def _strongest(findings: Iterator[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -float(finding.value))[:STRONGEST]


def _transposed(model: nn.Module | Mapping[str, Tensor]) -> set[str]:
    """Return the weights whose second axis counts the outputs, if the module says so."""
    if not isinstance(model, nn.Module):
        return set()
    kinds = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D")  # the last: GPT-2
    return {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ in kinds}


def _matrices(state: Mapping[str, Tensor], transposed: set[str]) -> dict[str, Tensor]:
    """Return the weights of layers, channels first, without embeddings and empty ones.

    Without a module, a matrix whose bias fits only its second axis is treated as GPT-2's kind.
    """
    found = {}
    for name, value in state.items():
        is_layer = value.ndim >= 2 and value.is_floating_point() and value.numel() > 0
        if not is_layer or _EMBEDDINGS.search(name):
            continue
        outputs = state.get(name.removesuffix("weight") + "bias", value[:, 0]).shape[0]
        is_transposed = name in transposed or outputs == value.shape[1] != value.shape[0]
        weight = value.transpose(0, 1) if is_transposed else value
        found[name] = weight.detach()
    return found


def _norm_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors by which the BatchNorm after a convolution scales its channels.

    A BatchNorm belongs to the convolution that is registered just before it, if the widths agree:
    ``|gamma| / sqrt(var + eps)``, with PyTorch's default eps.
    """
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    scales = {}
    for before, after in pairwise(layers):
        var, gamma = state.get(f"{after}.running_var"), state.get(f"{after}.weight")
        weight = state.get(f"{before}.weight")
        if var is None or weight is None or weight.ndim < 2 or len(weight) != len(var):
            continue
        scale = (var.detach().float() + 1e-5).rsqrt()
        scales[f"{before}.weight"] = scale if gamma is None else scale * gamma.detach().abs()
    return scales


def channel_lipschitz(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return an upper bound of each channel's Lipschitz constant, shape ``(C,)``.

    For a kernel of shape ``(C, I, ...)`` it is the largest singular value of each channel's
    ``(I, -1)`` matrix, times the scale of the BatchNorm after it; for a linear row it is the norm.

    Args:
        weight: Channels first.
        scale: Shape ``(C,)``, if a BatchNorm follows.
    """
    kernels = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    narrow = kernels if kernels.shape[1] >= kernels.shape[2] else kernels.mT
    gram = narrow.mT.double() @ narrow.double()  # as small as the kernel: 9 x 9 for 3 x 3
    values: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()
    return values if scale is None else values * scale


def _channels(
    layers: Mapping[str, Tensor], scales: Mapping[str, Tensor], u: float
) -> Iterator[Finding]:
    for name, weight in layers.items():
        if len(weight) < 2:
            continue
        constants = channel_lipschitz(weight.float(), scales.get(name))
        deviation = constants.std()
        if not deviation > 0:
            continue
        deviations = (constants - constants.mean()) / deviation
        above = int((deviations > u).sum())
        if above:
            worst = float(deviations.max())
            which = ", ".join(map(str, deviations.topk(min(above, 3)).indices.tolist()))
            yield CHANNEL.found(
                name,
                worst,
                reference=f"{u:g} standard deviations, exceeded by {above} of {len(weight)} "
                f"channels, first {which} (CLP, ECCV 2022)",
            )


def largest_singular_value(matrix: Tensor, block: int = 8, steps: int = 20) -> float:
    """Return the largest singular value, by block power iteration for a large matrix.

    References:
        Halko, Martinsson, Tropp. *Finding Structure with Randomness*. SIAM Review 53(2), 2011.
    """
    if min(matrix.shape) <= 256:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator).to(matrix)
    basis = torch.linalg.qr(start).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.mT @ (matrix @ basis)).Q
    return float(torch.linalg.matrix_norm(matrix @ basis, ord=2))


def spectral_excess(weight: Tensor) -> float:
    """Return the largest singular value over the root mean square of all, independent of scale."""
    matrix = weight.flatten(1)
    typical = float(matrix.norm()) / min(matrix.shape) ** 0.5
    return largest_singular_value(matrix) / typical if typical > 0 else 0.0


def _spectra(layers: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Yield the layers that stand out among the same layers of the other blocks."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, weight in layers.items():
        groups.setdefault((re.sub(r"\d+", "*", name), weight.ndim), []).append(name)
    for names in groups.values():
        if len(names) < SISTERS:
            continue
        values = torch.tensor([spectral_excess(layers[name].float()) for name in names])
        for name, index in zip(names, anomaly_index(values).tolist(), strict=True):
            if index > ANOMALY:
                yield SPECTRUM.found(name, index)


def _head(
    model: nn.Module | Mapping[str, Tensor], layers: Mapping[str, Tensor], ordered: bool
) -> str | None:
    """Return the name of the output head: the last linear layer, which registration puts last."""
    linear = [name for name, weight in layers.items() if weight.ndim == 2]
    if isinstance(model, nn.Module):
        kinds = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear = [name for name in linear if name in kinds]
    elif not ordered:
        linear = [name for name in linear if _HEADS.fullmatch(name)]
    return linear[-1] if linear else None


def _beyond_chance(count: int) -> float:
    """Return the index that the furthest of ``count`` normal values exceeds in one of 20 cases.

    At least the threshold of [IH]; 3.5 would always be exceeded over the rows of a vocabulary. Our
    choice.
    """
    return max(ANOMALY, NormalDist().inv_cdf(1 - 0.05 / count))


def _head_rows(weight: Tensor, state: Mapping[str, Tensor], name: str) -> Iterator[Finding]:
    if len(weight) < ROWS:
        return
    bias = state.get(name.removesuffix("weight") + "bias")
    measured = {"norm": anomaly_index(weight.float().norm(dim=1))}
    if bias is not None and len(bias) == len(weight):
        measured["bias"] = anomaly_index(bias.detach().float())
    bound = _beyond_chance(len(weight))
    for what, index in measured.items():
        for row in (index > bound).nonzero().flatten().tolist():
            threshold = f"{bound:.3g} for the {what} over {len(weight)} rows"
            value, place = float(index[row]), f"{name}[{row}]"
            yield HEAD.found(place, value, reference=f"{threshold}, by median absolute deviation")
