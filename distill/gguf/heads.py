"""Whether a model's head is its embedding, and which of the two stored matrices to take for it.

A GGUF file does not say. llama.cpp writes the matrix of a tied model once, but quantisers often give the head more bits
than the embedding, and then it is there twice: read as it stands, such a model has a fifth more parameters, and trains
two matrices where its makers had one.
"""

from __future__ import annotations

import numpy as np

from distill.gguf.families import EMBEDDING, HEAD
from distill.gguf.header import GgufFile, GgufTensor
from distill.gguf.rows import read_rows

SAMPLED_ROWS = 512


def is_tied(file: GgufFile) -> bool:
    """Tell by comparing rows, spread over the vocabulary: two roundings of one matrix differ by no more than both
    quantisations lose, two matrices that were trained apart by about their own size."""
    embedding, head = file.tensors[EMBEDDING], file.tensors.get(HEAD)
    if head is None:
        return True
    if head.shape != embedding.shape:
        raise file.fault(f"has shape {list(head.shape)}, must have {list(embedding.shape)}", HEAD)
    rows = np.unique(np.linspace(0, embedding.shape[0] - 1, SAMPLED_ROWS).astype(int))
    one, other = read_rows(file, EMBEDDING, rows), read_rows(file, HEAD, rows)
    size = float(np.sqrt(np.square(other, dtype=np.float64).mean()))
    difference = float(np.sqrt(np.square(one - other, dtype=np.float64).mean()))
    return difference <= (_loss(embedding) + _loss(head)) * size


def better_matrix(file: GgufFile) -> str:
    """The name of the one that keeps more bits a weight, of a tied model."""
    return max(
        filter(file.tensors.__contains__, (EMBEDDING, HEAD)), key=lambda name: file.tensors[name].bits_per_weight
    )


def _loss(tensor: GgufTensor) -> float:
    """A bound on what a quantisation loses of a matrix, relative to its root mean square: 3 * 2^-bits.

    Measured on normal weights the loss is 1.2 to 1.7 * 2^-bits for Q2_K to Q8_0; floats have their mantissa's bits.
    """
    floats = {"F32": 23, "F16": 11, "BF16": 8}
    return 3 * 2.0 ** -floats.get(tensor.type.name, int(tensor.bits_per_weight))
