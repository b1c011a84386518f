"""Place where a benchmark ran, and where its result goes: benchmarks/results/<device>/<name>.json."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.device import processor_name

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).resolve().parent / "results"


def device_name(device: torch.device | None = None) -> str:
    """The processor's name as a folder, or the GPU's if `device` is one."""
    if device is not None and device.type == "cuda":
        import torch

        return slug(torch.cuda.get_device_name(device))
    return slug(processor_name())


def driver_version() -> str | None:
    """Version of NVIDIA's kernel module; None where it does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip() if result.stdout else None


def where_and_when(device: torch.device) -> dict[str, Any]:
    """Fields that every result of one device begins with."""
    import torch

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "driver": driver_version() if device.type == "cuda" else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_result(name: str, result: dict[str, Any], *, device: str | None = None, folder: Path | None = None) -> Path:
    """`folder` takes the place of benchmarks/results/<device>."""
    path = (folder or RESULTS / (device or device_name())) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def slug(name: str) -> str:
    """A device's name as a folder: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
