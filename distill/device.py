"""The device that a stage had: the GPUs by name, else the processor. No torch: NVIDIA's own tool is asked."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

TIMEOUT_S = 30


@cache
def device_name() -> str:
    """`NVIDIA H200`, `8 x NVIDIA H200`, or the processor's name where this process may use no GPU."""
    names = _gpu_names(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not names:
        return processor_name()
    kinds = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in kinds.items())


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; empty where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = _gpu_names(visible)
    if visible is None or not names:
        return tuple(str(number) for number in range(len(names)))
    return tuple(part.strip() for part in visible.split(","))[: len(names)]


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu_names(visible: str | None) -> list[str]:
    """Names of the GPUs that CUDA would show; `visible` are its own numbers or ids of them, None for all."""
    if (tool := shutil.which("nvidia-smi")) is None or (visible is not None and visible.strip() in ("", "-1")):
        return []
    chosen = [] if visible is None else [f"--id={visible}"]
    command = [tool, *chosen, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
