"""Special handling of pytorchvideo's models.

The package is unmaintained (0.1.5, 2022). Its models need the following:

- They are imported module by module: ``pytorchvideo.transforms`` fails with today's torchvision.
- SlowFast reads a list of pathways, of which the slow one has every alpha-th frame.
- Its building blocks run through ``torch.jit.script``, which warns that it is deprecated.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from torch import Tensor, nn

from mmdefense.errors import BadInputError
from mmdefense.libraries import missing

__all__ = ["answer", "build"]

_BUILDERS = {
    "x3d": ("x3d", "create_x3d"),
    "slow": ("resnet", "create_resnet"),
    "slowfast": ("slowfast", "create_slowfast"),
    "mvit": ("vision_transformers", "create_multiscale_vision_transformers"),
}


def build(name: str, **settings: Any) -> nn.Module:
    """Return a model with random weights, for ``--arch`` and to load a checkpoint into.

    Args:
        name: ``"x3d"``, ``"slow"``, ``"slowfast"`` or ``"mvit"``.
        **settings: Arguments of pytorchvideo's own builder, such as ``model_num_class``.

    Raises:
        BadInputError: If there is no such model.
        UnsupportedError: If pytorchvideo is not installed.
    """
    if name not in _BUILDERS:
        raise BadInputError(f"model must be one of {', '.join(_BUILDERS)}, got {name!r}")
    module, builder = _BUILDERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported = importlib.import_module(f"pytorchvideo.models.{module}")
            model: nn.Module = getattr(imported, builder)(**settings)
    except ImportError as error:
        raise missing(f"model {name!r}", error) from error
    return model


def answer(model: nn.Module, clips: Tensor) -> Any:
    """Return the output of any model for clips ``(N, C, T, H, W)``."""
    blocks = getattr(model, "blocks", None)
    if not type(model).__module__.startswith("pytorchvideo.") or blocks is None:
        return model(clips)
    stride = _slow_stride(blocks[0])
    return model(clips if stride is None else [clips[:, :, ::stride], clips])


def _slow_stride(block: nn.Module) -> int | None:
    """Return the number of fast frames per slow frame; None if there is one pathway."""
    fusion = getattr(block, "multipathway_fusion", None)
    if fusion is None:
        return None
    stride: int = fusion.conv_fast_to_slow.stride[0]
    return stride
