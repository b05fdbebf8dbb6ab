"""Find and remove backdoors in models that you did not train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdefense.errors import BadInputError, DivergenceError, MMDefenseError, UnsupportedError
    from mmdefense.evaluating import evaluate
    from mmdefense.purification import Purification, purify
    from mmdefense.registry import adapt
    from mmdefense.scanning import scan

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
    "purify",
    "scan",
]

_HOMES = {
    "BadInputError": "errors",
    "DivergenceError": "errors",
    "MMDefenseError": "errors",
    "Purification": "purification",
    "UnsupportedError": "errors",
    "adapt": "registry",
    "evaluate": "evaluating",
    "purify": "purification",
    "scan": "scanning",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``import mmdefense`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdefense' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmdefense.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
