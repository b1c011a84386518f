"""Tables of what `make tune` measured: a file a GPU in `tables/`, from which the kernels take their tilings."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "tables"


def table_path(device: torch.device) -> Path:
    """The file of a device's kind, whether or not there is one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@cache
def gemm_shapes(device: torch.device) -> dict[str, dict[int, dict[str, Any]]]:
    """Measured shapes by "<columns>x<inner>" and number of rows.

    An entry is {"plan": the fields of a GemmTiling, "library": whether cuBLAS won}.
    """
    path = table_path(device)
    if not path.is_file():
        return {}
    shapes = json.loads(path.read_text(encoding="utf-8"))["gemm"]
    return {shape: {int(rows): entry for rows, entry in measured.items()} for shape, measured in shapes.items()}
