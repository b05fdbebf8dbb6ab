"""Execute notebooks of the gallery and keep what they show: ``execute.py [NAME...]``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
_LANGUAGE = "python"


def execute(path: Path, folder: Path) -> Any:
    """Return a notebook with what it shows, executed in a folder.

    Args:
        path: The notebook, which stays as it is.
        folder: Where it runs.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return notebook


def strip(notebook: Any) -> None:
    """Take off what changes from run to run: counts, times and the versions of the kernel."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": _LANGUAGE}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": _LANGUAGE}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None


def main() -> None:
    """Execute the named notebooks, by default all."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, for it names a path
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # figures depend on the number of threads
    for path in [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        strip(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
