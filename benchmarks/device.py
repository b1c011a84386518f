"""Where a benchmark ran, and where its result goes: benchmarks/results/<device>/<name>.json."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

from distill.manifest import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = match.group(1)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(name: str, result: dict[str, Any], *, device: str | None = None) -> Path:
    path = RESULTS / (device or device_name()) / f"{name}.json"
    write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return path
