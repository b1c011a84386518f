"""The tilings that `make tune` measured, and which of them a product takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.dense import V3_SHAPES
from teacher.kernels.dense import tables
from teacher.kernels.dense.gemm import FastestGemm, default_tiling, fastest_gemm
from teacher.kernels.dense.reference import HOPPER_COLUMNS, GemmTiling
from teacher.model.fp8 import BLOCK

CPU = torch.device("cpu")
FEW, MANY = GemmTiling(16, 128, 4, True, 4, 6), GemmTiling(128, 256)


def forget() -> None:
    tables.gemm_shapes.cache_clear()
    fastest_gemm.cache_clear()


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of this CPU's with one shape, measured at 16 and 1,024 rows."""
    entries = {
        "16": {"plan": FEW._asdict(), "library": False},
        "1024": {"plan": MANY._asdict(), "library": True},
    }
    (tmp_path / "cpu.json").write_text(json.dumps({"gemm": {"256x512": entries}}))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1, FastestGemm(FEW, False)),
        (16, FastestGemm(FEW, False)),
        (17, FastestGemm(MANY, True)),
        (1_024, FastestGemm(MANY, True)),
        (9_000, FastestGemm(MANY, True)),
    ],
)
def test_the_next_larger_count_of_rows_decides_or_else_the_largest(rows: int, wanted: FastestGemm) -> None:
    assert fastest_gemm(CPU, rows, 256, 512) == wanted


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_a_shape_that_nobody_measured_has_a_tiling(rows: int) -> None:
    assert fastest_gemm(CPU, rows, 512, 512) == FastestGemm(default_tiling(rows, 512, 4), False)


@pytest.mark.parametrize("path", sorted(tables.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_kept_has_tilings_that_can_run(path: Path) -> None:
    shapes = json.loads(path.read_text())["gemm"]
    assert set(shapes) == {f"{n}x{k}" for n, k in V3_SHAPES}
    for entries in shapes.values():
        for entry in entries.values():
            tiling = GemmTiling(**entry["plan"])
            assert tiling.columns == HOPPER_COLUMNS or BLOCK % tiling.columns == 0
            assert tiling.rows >= 16
            assert tiling.rows & (tiling.rows - 1) == 0
            assert entry["library"] in (True, False)
            assert entry["us"] > 0
