"""Every example of a docstring runs as it stands there, and the public functions have one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import fitted_net, small_images, write_images
from safetensors.torch import save_file

import mmdefense
import mmdefense_adapters
import mmdefense_tasks
from mmdefense.data.labelled import LabelledSamples
from mmdefense.registry import adapt

ROOT = Path(__file__).parents[1]
ROOTS = (mmdefense, mmdefense_adapters, mmdefense_tasks)
CLASSES = ("left", "right", "stop")


def modules() -> Iterator[ModuleType]:
    for root in ROOTS:
        yield root
        for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if not found.name.endswith("__main__"):  # importing that runs the command line
                yield importlib.import_module(found.name)


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for module in modules() for test in finder.find(module)]
    return {test.name: test for test in tests if test.examples}


EXAMPLES = examples()


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder with a reader's model, the module of its class, and images by class."""
    net, (images, labels) = fitted_net(), small_images()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text("from commands import Net as SignNet\n")
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    write_images(tmp_path / "images", images, labels)
    for number, name in enumerate(CLASSES):
        (tmp_path / "images" / str(number)).rename(tmp_path / "images" / name)


@pytest.fixture
def names(readers_folder):
    """What every example may use: a model that is right about its images, and an adapter."""
    net, (images, labels) = fitted_net(), small_images()
    images = images.float() / 255
    samples = LabelledSamples(images, labels, classes=CLASSES)
    adapter = adapt(net)
    adapter.samples(samples)
    return {
        "torch": torch,
        "model": net,
        "images": images,
        "labels": labels,
        "samples": samples,
        "adapter": adapter,
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_it_stands(name, names):
    test = EXAMPLES[name]
    test.globs = test.globs | names
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_example_is_skipped(name):
    options = [example.options for example in EXAMPLES[name].examples]
    assert not any(given.get(doctest.SKIP) for given in options)


@pytest.mark.parametrize("name", sorted(set(mmdefense.__all__) - {"__version__"}))
def test_the_public_names_have_an_example(name):
    found = getattr(mmdefense, name)
    assert f"{found.__module__}.{name}" in EXAMPLES


def functions_of_pages() -> Iterator[str]:
    """Yield each function of ours that a Python block of the documents imports."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.S | re.M):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("mmdefense"):
                    module = importlib.import_module(node.module)
                    for found in (getattr(module, alias.name) for alias in node.names):
                        if inspect.isroutine(found):
                            yield f"{found.__module__}.{found.__name__}"


@pytest.mark.parametrize("name", sorted(set(functions_of_pages())))
def test_the_functions_of_the_documents_have_an_example(name):
    assert name in EXAMPLES
