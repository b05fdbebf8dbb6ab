"""``import mmdefense`` loads no model library, and ``mmdefense --help`` not even torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torchvision", "transformers", "timm", "datasets", "sklearn", "picklescan")
FRONT = "import mmdefense; mmdefense.purify, mmdefense.adapt, mmdefense.BadInputError"


def loaded_by(statement: str, watched: tuple[str, ...]) -> list[str]:
    """Return which of the watched packages a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


@pytest.mark.parametrize("statement", ["import mmdefense", FRONT])
def test_import_loads_no_model_library(statement):
    assert loaded_by(statement, HEAVY) == []


@pytest.mark.parametrize("statement", ["import mmdefense", "import mmdefense.cli.app"])
def test_import_is_light_enough_for_help(statement):
    assert loaded_by(statement, ("torch", *HEAVY)) == []


def test_the_check_can_fail(tmp_path):
    (tmp_path / "timm.py").touch()
    assert loaded_by(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import timm", HEAVY) == [
        "timm"
    ]


def test_every_public_name_resolves():
    import mmdefense

    for name in mmdefense.__all__:
        assert getattr(mmdefense, name) is not None
    assert dir(mmdefense) == sorted(mmdefense.__all__)


def test_an_unknown_name_is_an_attribute_error():
    import mmdefense

    with pytest.raises(AttributeError, match="no attribute 'purfy'"):
        mmdefense.purfy  # noqa: B018
