"""Devices' abilities: which run the Triton kernels, and which Hopper's own in Gluon."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

FP8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with E4M3
HOPPER_CAPABILITY = (9, 0)
GLUON = "3.6."  # of Triton; Gluon, still experimental there, changes between releases


def runs_kernels(tensor: Tensor) -> bool:
    """True on a GPU with FP8, or for any tensor where Triton interprets; False without Triton."""
    if not _has_triton():
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return has_fp8(tensor.device)


@cache
def runs_hopper_kernels(device: torch.device) -> bool:
    """True on a GPU of compute capability 9.0 with the Triton release that the Gluon kernels are written for."""
    if device.type != "cuda" or not _has_triton() or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    import triton

    return torch.cuda.get_device_capability(device) == HOPPER_CAPABILITY and triton.__version__.startswith(GLUON)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Count a GPU's multiprocessors; interpreted, a few, so that work spans programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def has_fp8(device: torch.device) -> bool:
    """True on a GPU whose tensor cores take E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
