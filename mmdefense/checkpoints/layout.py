"""Write weights back with their original files, names, dtypes and shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmdefense.checkpoints.weights import read_state, write_state

__all__ = ["rewrite"]


def rewrite(model: Any, folder: Path, origin: Sequence[Path]) -> bool:
    """Give the weights that a library wrote the files, names and dtypes of the ``origin``.

    Names of the origin that the library ignores, such as buffers of an earlier version, keep their
    values. If some weight of the model has no place in the origin, or the origin is a pickle, the
    library's own files and names stay, in the dtypes of the origin.

    Args:
        model: What was written; weights that it ties are known by it alone.
        folder: Where the library wrote it, as safetensors.
        origin: The weight files that the model was read from.

    Returns:
        Whether the files are those of the origin, so that its index describes them.

    Raises:
        OSError: If a file cannot be written.
    """
    written = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    values = {name: value for state in written.values() for name, value in state.items()}
    if all(path.suffix == ".safetensors" for path in origin):
        sources = _sources([name for path in origin for name in _names(path)], values, model)
        if sources is not None:
            _write_as_stored(folder, origin, sources, model.state_dict() | values)
            return True
    _write_as_library(folder, origin, written, model.state_dict())
    return False


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _sources(
    stored: Sequence[str], written: Mapping[str, Tensor], model: Any
) -> dict[str, str] | None:
    """Return the current name of each stored name; None if a written weight has no place.

    A model with a head may have been stored without the prefix that its body has in it.
    """
    whole = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = whole.keys() | written.keys()
    with_prefix = {name: prefix + name for name in stored if prefix + name in known}
    sources = with_prefix | {name: name for name in stored if name in known}
    placed = set(sources.values())
    tied = {whole[name].data_ptr() for name in placed if name in whole}
    left = [n for n in written.keys() - placed if n not in whole or whole[n].data_ptr() not in tied]
    return None if left else sources


def _write_as_stored(
    folder: Path, origin: Sequence[Path], sources: Mapping[str, str], values: Mapping[str, Tensor]
) -> None:
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in folder.glob(pattern):
            path.unlink()  # tensors that were read from it stay readable
    for path in origin:
        stored = read_state(path)
        state = {
            name: values[sources[name]].to(old.dtype) if name in sources else old
            for name, old in stored.items()
        }
        write_state(state, folder / path.name)


def _write_as_library(
    folder: Path,
    origin: Sequence[Path],
    written: Mapping[str, Mapping[str, Tensor]],
    whole: Mapping[str, Tensor],
) -> None:
    """Write the library's files again in the stored types, and with what it stores only once."""
    stored = {name: value.dtype for path in origin for name, value in read_state(path).items()}
    for file, state in written.items():
        tied = {n: whole[n] for n in stored if n in whole and n not in state}
        content = {**state, **tied} if len(written) == 1 else state
        (folder / file).unlink()  # tensors that were read from it may lie in it still
        write_state(
            {name: value.to(stored.get(name, value.dtype)) for name, value in content.items()},
            folder / file,
        )
