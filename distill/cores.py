"""Cores of this machine."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may use (a container's share, where the system tells)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
