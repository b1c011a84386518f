"""Tensors of a checkpoint folder, once `distill.weights` has judged its files by their headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill import weights
from distill.errors import CheckpointError
from distill.weights import StoredTensor

_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, read from the headers alone.

    Raises CheckpointError as `distill.weights.stored_tensors` does, and for types that are not computed with here.
    """
    stored = weights.stored_tensors(folder)
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES:
            message = f"has type {tensor.dtype}; allowed: {', '.join(_DTYPES)}"
            raise CheckpointError(message, where=tensor.file, field=name)
    return stored


def read_tensors(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Values of the tensors, file by file."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as exc:
            raise CheckpointError(f"cannot be read: {exc}", where=path) from exc
