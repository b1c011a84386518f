"""Rows of a GGUF tensor, dequantised: a few at a time, so that no tensor need be in memory as FP32."""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from distill.gguf.header import GgufFile, GgufTensor


def stored_rows(file: GgufFile, tensor: GgufTensor) -> np.ndarray:
    """The tensor's bytes as they lie in the file, uint8 [rows, bytes of a row], mapped and not yet read."""
    shape = (tensor.num_rows, tensor.row_bytes)
    return np.memmap(file.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)


def read_rows(file: GgufFile, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """These rows (all where none are named) in FP32 [rows, columns]; a vector is one row.

    Raises CheckpointError for a quantisation that `gguf` cannot undo.
    """
    tensor = file.tensors[name]
    if not _is_known(tensor.type):
        raise file.fault(f"has a quantisation that cannot be undone: {tensor.type.name}", name)
    stored = np.ascontiguousarray(stored_rows(file, tensor)[rows])
    return dequantize(stored, tensor.type).reshape(len(stored), tensor.shape[-1])


@cache
def _is_known(kind: GGMLQuantizationType) -> bool:
    """Tell by trying, on a block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
