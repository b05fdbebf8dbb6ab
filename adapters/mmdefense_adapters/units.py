"""Finds the prunable units of any network from one forward pass, and describes them as data."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.kernels.hooks import mode, watch_modules
from mmdefense.protocol import ReadAt, UnitGroup

__all__ = ["capture_heads", "find_head", "find_units"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "c_proj", "o", "output.dense", "project.0")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


def find_units(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[UnitGroup], str | None]:
    """Return the unit groups in the order of execution, and the name of the output layer.

    Convolution filters carry the norm that reads their output; linear layers give one unit per row;
    an attention block gives its heads, on the input axis of its output projection, so that fused
    and separate query, key and value projections need no special cases. The output layer is left
    out: its rows are the classes.

    Args:
        model: Any network.
        forward: Runs ``model`` once on some input and returns its output tensor.
    """
    names = {module: name for name, module in model.named_modules()}
    calls, norm_of, answer = _trace(model, forward)
    head = find_head(calls, answer)
    attention = _attention_blocks(model)
    inside = {layer for block in attention for layer in block.modules()}
    groups: list[UnitGroup] = []
    for module in calls:
        if module in attention:
            if not _readable(module, attention[module][0], calls):
                continue
            groups.append(_heads(*attention[module], names))
        elif module is head or module in inside:
            continue
        elif _is_layer(module):
            groups.append(_rows(module, norm_of.get(module), names))
    return groups, names.get(head) if head is not None else None


def _trace(
    model: nn.Module, forward: Callable[[], Any]
) -> tuple[list[nn.Module], dict[nn.Module, nn.Module], dict[nn.Module, Tensor]]:
    """Return modules by first call, the BatchNorm after each convolution, and each last output."""
    order: dict[nn.Module, None] = {}
    producer: dict[int, nn.Module] = {}
    kept: list[Any] = []  # keeps tensors alive, so that ids are not reused
    norm_of: dict[nn.Module, nn.Module] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        order.setdefault(module)
        if isinstance(module, _NORMS) and given and id(given[0]) in producer:
            norm_of[producer[id(given[0])]] = module
        if _is_layer(module) and isinstance(output, Tensor):
            producer[id(output)] = module
            outputs[module] = output
            kept.append(output)

    with (
        torch.no_grad(),
        mode(model, train=False),
        watch_modules(list(model.modules()), note),
    ):
        answer = forward()
    return list(order), norm_of, {**outputs, model: answer}


def find_head(calls: list[nn.Module], outputs: dict[nn.Module, Tensor]) -> nn.Module | None:
    """Return the layer whose output is the model's output, up to a reshape.

    If there is none, because the output was pooled or cast, the last layer with a row per class.
    """
    answer = outputs[next(reversed(outputs))]
    layers = [module for module in reversed(calls) if _is_layer(module)]
    for module in layers:
        if outputs[module].untyped_storage().data_ptr() == answer.untyped_storage().data_ptr():
            return module
    last = next(iter(layers), None)
    return last if last is not None and _outputs(last) == answer.shape[-1] else None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or _is_transposed(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether it is the ``Conv1D`` of GPT-2: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _input_axis(module: nn.Module) -> int:
    """Return the axis of the weight that the inputs index."""
    return 0 if _is_transposed(module) else 1


def _outputs(module: nn.Module) -> int:
    return int(module.weight.shape[1 - _input_axis(module)])  # type: ignore[index]


def _inputs(projection: nn.Module) -> int:
    return int(projection.weight.shape[_input_axis(projection)])  # type: ignore[index]


def _attention_blocks(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, int]]:
    """Return each attention block with its output projection and its number of heads."""
    found: dict[nn.Module, tuple[nn.Module, int]] = {}
    for module in model.modules():
        if "attention" not in type(module).__name__.lower():
            continue
        candidates = (_part(module, path) for path in _OUTPUT_PROJECTIONS)
        projection = next((p for p in candidates if p is not None and _is_linear(p)), None)
        if projection is None:
            continue
        count = _head_count(module, projection)
        if count and _inputs(projection) % count == 0:
            found[module] = (projection, count)
    return found


def _part(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path in a module, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _readable(block: nn.Module, projection: nn.Module, calls: Sequence[nn.Module]) -> bool:
    """Return whether the heads' outputs are readable; blocks that use bare weights hide them."""
    return isinstance(block, nn.MultiheadAttention) or projection in calls


def _head_count(module: nn.Module, projection: nn.Module) -> int | None:
    # A decoder's may differ from its config's; a two-part block has the count in its first part.
    parts = (getattr(module, name, None) for name in ("attention", "self", "config"))
    for owner in (module, *parts):
        for name in _HEAD_COUNTS:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    return _inputs(projection) // size if isinstance(size, int) and size else None


def _heads(projection: nn.Module, count: int, names: dict[nn.Module, str]) -> UnitGroup:
    layer, width = names[projection], _inputs(projection) // count
    axes = {f"{layer}.weight": _input_axis(projection)}
    return UnitGroup(layer, count, axes, width=width, kind="head", read_at=ReadAt(side="input"))


def _rows(module: nn.Module, norm: nn.Module | None, names: dict[nn.Module, str]) -> UnitGroup:
    layer, linear = names[module], _is_linear(module)
    axes = {f"{layer}.{name}": 0 for name, _ in module.named_parameters(recurse=False)}
    axes[f"{layer}.weight"] = 1 - _input_axis(module)
    read = layer
    if norm is not None:
        scaled = {f"{names[norm]}.{name}": 0 for name, _ in norm.named_parameters(recurse=False)}
        axes |= scaled
        # A group norm's output for a unit depends on its neighbours, so units are read before it.
        if scaled and not isinstance(norm, nn.GroupNorm):
            read = names[norm]
    kind, axis = ("neuron", -1) if linear else ("filter", 1)
    return UnitGroup(layer, _outputs(module), axes, kind=kind, read_at=ReadAt(read, axis=axis))


@contextmanager
def capture_heads(
    model: nn.Module, layers: Sequence[str], keep: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``keep`` with the name and the input of each output projection of attention.

    ``nn.MultiheadAttention`` never calls its projection: the block is run again with an identity
    projection and otherwise the same weights. In train mode with dropout that run draws its own
    mask.

    Args:
        model: The model that contains the blocks.
        layers: Names of the output projections.
        keep: Receives the projection's input, shape ``(N, L, heads * head_dim)``, with its graph.
    """
    with ExitStack() as stack:
        for name in layers:
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                hook = _keep_twin(parent, name, keep)
                handle = parent.register_forward_hook(hook, with_kwargs=True)
            else:
                handle = model.get_submodule(name).register_forward_hook(_keep_input(name, keep))
            stack.callback(handle.remove)
        yield


def _keep_input(name: str, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, given: tuple[Any, ...], __: Any) -> None:
        keep(name, given[0])

    return hook


def _keep_twin(
    attention: nn.MultiheadAttention, name: str, keep: Callable[[str, Tensor], None]
) -> Callable[..., None]:
    """Return a hook that runs a twin whose output projection is the identity.

    The twin shares all other parameters, so that gradients reach them.
    """
    twin = copy.copy(attention)
    twin._forward_hooks, twin._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
    twin._modules = dict(attention._modules)
    twin.out_proj = copy.deepcopy(attention.out_proj)
    nn.init.eye_(twin.out_proj.weight)
    if twin.out_proj.bias is not None:
        nn.init.zeros_(twin.out_proj.bias)

    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
        heads = twin(*given, **named)[0]
        keep(name, heads if attention.batch_first else heads.transpose(0, 1))

    return hook
