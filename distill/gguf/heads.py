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

    Measured on normal weights: 1.4 * 2^-bits for Q4_0, Q5_0 and Q8_0, 2.5 for Q4_1 and Q5_1 (a bit of theirs goes to
    the offset), 0.4 for floats by their mantissa. Qwen2.5-Coder's two matrices differ by 0.044 where they are Q5_0 and
    Q8_0 (the bound is 0.105), by 0.075 where Q4_K and Q6_K (0.234); matrices trained apart by 1 or more.
    """
    floats = {"F32": 23, "F16": 11, "BF16": 8}
    return 3 * 2.0 ** -floats.get(tensor.type.name, int(tensor.bits_per_weight))
