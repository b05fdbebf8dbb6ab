"""Reading and validating labelled data from the user: tensors, arrays, batches, data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdefense.data.labelled import LabelledBatch
from mmdefense.errors import BadInputError, one_line

__all__ = [
    "INPUT_NAMES",
    "check_scaling",
    "check_values",
    "is_array",
    "labelled_tensors",
    "names_of",
    "tensor_of",
    "told",
]

INPUT_NAMES = ("pixel_values", "image", "images", "img", "video", "points", "inputs", "x")
"""Keys of inputs in a dictionary, in order of preference."""

_LABEL_NAMES = ("labels", "label", "targets", "target", "y")
_CLOSE = 1e-3  # how far resizing may overshoot [0, 1] by rounding


def labelled_tensors(data: Any, name: str, axes: int) -> tuple[Tensor, Tensor]:
    """Return inputs ``(N, ...)`` and labels ``(N,)`` from the user's data.

    Args:
        data: A pair of tensors or arrays; or a sequence of pairs or dictionaries, each a sample or
            a batch, such as a data set or a loader.
        name: What the inputs are called in messages.
        axes: Number of axes of one input: 3 for an image, 4 for a clip, 2 for a cloud.

    Raises:
        BadInputError: If it is something else, the inputs have different shapes, or the labels are
            not whole numbers.
    """
    if _is_pair(data) and all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        inputs, labels = data
        return tensor_of(inputs), _whole(labels)
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise BadInputError(
            f"clean data must be a pair ({name}, labels), or samples or batches of such pairs, got "
            f"{told(data)}"
        )
    pairs = [_pair(item, name) for item in ([data] if isinstance(data, Mapping) else data)]
    if not pairs:
        raise BadInputError(f"clean data must hold at least one sample ({name}), got none")
    batched = pairs[0][0].ndim > axes
    shapes = {tuple(inputs.shape[batched:]) for inputs, _ in pairs}
    if len(shapes) > 1:
        raise BadInputError(
            f"{name} must have one shape, got {', '.join(map(str, sorted(shapes)[:3]))}; resize "
            "images to one size, or sample the same number of points from each cloud"
        )
    join = torch.cat if batched else torch.stack
    return join([inputs for inputs, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _pair(item: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return one sample or batch, with labels of shape ``(N,)``."""
    if isinstance(item, LabelledBatch):
        return item.inputs, item.labels
    found = names_of(item, INPUT_NAMES, _LABEL_NAMES)
    inputs, labels = item if _is_pair(item) else found or (None, None)
    if is_array(inputs):
        inputs = tensor_of(inputs)
        if name == "clips" and found and "pixel_values" in item:
            inputs = inputs.transpose(-4, -3)  # processors put the frames before the channels
        return inputs, _whole(labels)
    raise BadInputError(f"clean data must give pairs ({name}, label), got {told(item)}")


def names_of(item: Any, *names: Sequence[str]) -> tuple[Any, ...] | None:
    """Return the values for one key of each group in a dictionary, or None."""
    if not isinstance(item, Mapping):
        return None
    found = [next((key for key in group if key in item), None) for group in names]
    return None if None in found else tuple(item[key] for key in found)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, an array, or a picture of Pillow."""
    return isinstance(value, (Tensor, np.ndarray)) or hasattr(value, "getbands")


def tensor_of(value: Any) -> Tensor:
    """Return a tensor, an array as a tensor, or a picture of Pillow as uint8 ``(C, H, W)``."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "getbands"):
        pixels = np.array(value)
        if value.mode not in {"L", "RGB", "RGBA"}:
            raise BadInputError(
                f"a picture must be of mode L, RGB or RGBA, got {value.mode!r}; convert it first"
            )
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        return torch.from_numpy(np.ascontiguousarray(pixels))
    try:
        return torch.as_tensor(np.ascontiguousarray(value))
    except TypeError as error:
        raise BadInputError(f"an array must hold numbers, got {value.dtype}") from error


def _whole(labels: Any) -> Tensor:
    """Return labels as int64, shape ``(N,)``.

    Raises:
        BadInputError: If one is not a whole number, or a sample has several.
    """
    try:
        found = tensor_of(labels) if isinstance(labels, np.ndarray) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInputError(
            f"labels must be whole numbers, got {told(labels)} ({one_line(error)})"
        ) from error
    if found.ndim > 1:
        raise BadInputError(
            f"labels must be whole numbers of shape (N,), got {found.dtype} of shape "
            f"{tuple(found.shape)}; convert one-hot rows with argmax(1)"
        )
    whole = found.long().reshape(-1)
    if not torch.equal(whole.to(found.dtype), found.reshape(-1)):
        raise BadInputError(f"labels must be whole numbers, got {found.reshape(-1)[:3].tolist()}")
    return whole


def told(value: Any) -> str:
    """Describe a value and its elements in a few words."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} of {', '.join(f'{key!r}: {_short(part)}' for key, part in value.items())}"
    if isinstance(value, (tuple, list)):
        places = ", ".join(f"{index}: {_short(part)}" for index, part in enumerate(value[:8]))
        return f"{kind} of {len(value)} ({places}{', ...' if len(value) > 8 else ''})"
    return kind


def _short(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return told(value)
    return repr(value) if isinstance(value, (int, float)) else type(value).__name__


def check_values(values: Tensor, name: str, *, bounded: bool) -> None:
    """Reject inputs that are not finite or, if ``bounded``, not in ``[0, 1]``.

    Args:
        values: Inputs ``(N, ...)``; uint8 is read as ``[0, 255]`` elsewhere.
        name: Their name in messages.
        bounded: Whether they must lie in ``[0, 1]``.

    Raises:
        BadInputError: If they are not valid; the message names their range and the remedy.
    """
    if values.dtype == torch.uint8 or not values.numel():
        return
    if not values.is_floating_point():
        if bounded and values.dtype != torch.bool:
            raise BadInputError(
                f"{name} must be uint8 in 0..255 or floating-point in [0, 1], got {values.dtype}; "
                "convert them, for example with images.to(torch.uint8)"
            )
        return
    least, most = (float(value) for value in torch.aminmax(values))
    if not (np.isfinite(least) and np.isfinite(most)):
        damaged = (~values.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise BadInputError(
            f"{name} must hold finite numbers, got NaN or infinity in {len(damaged)} of "
            f"{len(values)}, first in number {int(damaged[0])}"
        )
    if bounded and (least < -_CLOSE or most > 1 + _CLOSE):
        raise BadInputError(
            f"{name} must lie in [0, 1], got {least:.3g} to {most:.3g}; {_why(least, most)}"
        )


def check_scaling(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Reject a mean or std that inputs cannot be normalised with.

    Raises:
        BadInputError: If one of the two is missing, a value is not finite, or a standard deviation
            is not above 0.
    """
    if (mean is None) != (std is None):
        raise BadInputError("mean and std must be given together, got one of them")
    for name, values in (("mean", mean), ("std", std)):
        try:
            given = [float(value) for value in values or ()]
        except (TypeError, ValueError) as error:
            raise BadInputError(f"{name} must be numbers, got {values!r:.80}") from error
        wrong = [v for v in given if not np.isfinite(v) or (name == "std" and v <= 0)]
        if wrong:
            rule = "finite" if name == "mean" else "finite and above 0"
            raise BadInputError(f"{name} must be {rule} for each channel, got {wrong[0]}")


def _why(least: float, most: float) -> str:
    if least >= 0 and most > 2:
        return f"divide them by {'255' if most <= 255 else 'their largest possible value'}"
    return (
        "leave out Normalize and pass its values instead: mmd.adapt(model, mean=, std=), or "
        "--mean and --std"
    )
