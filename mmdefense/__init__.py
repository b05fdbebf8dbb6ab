"""Find and remove backdoors in models that you did not train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdefense.errors import BadInputError, DivergenceError, MMDefenseError, UnsupportedError
    from mmdefense.evaluation.zoo import load_victim
    from mmdefense.pipeline.evaluating import evaluate
    from mmdefense.pipeline.purification import Purification, purify
    from mmdefense.pipeline.scan import scan
    from mmdefense.registry import adapt

__version__ = "0.1.0.dev0"

__all__ = [
    "BadInputError",
    "DivergenceError",
    "MMDefenseError",
    "Purification",
    "UnsupportedError",
    "__version__",
    "adapt",
    "evaluate",
    "load_victim",
    "purify",
    "scan",
]

_HOMES = {
    "BadInputError": "errors",
    "DivergenceError": "errors",
    "MMDefenseError": "errors",
    "Purification": "pipeline.purification",
    "UnsupportedError": "errors",
    "adapt": "registry",
    "evaluate": "pipeline.evaluating",
    "load_victim": "evaluation.zoo",
    "purify": "pipeline.purification",
    "scan": "pipeline.scan",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``import mmdefense`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdefense' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmdefense.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
