"""The device's name, asked of a stand-in for NVIDIA's tool: no GPU is at hand where the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.device import device_name, processor_name
from distill.manifest import read_manifest, run_stage

TOOL = """#!/bin/sh
[ "$1" = "--id=1" ] && { echo "NVIDIA H100"; exit; }
[ "$1" = "--id=9" ] && { echo "No devices were found"; exit 6; }
printf 'NVIDIA H200\nNVIDIA H200\nNVIDIA H100\n'
"""


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    device_name.cache_clear()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(TOOL)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "2 x NVIDIA H200, NVIDIA H100"),
        ("1", "NVIDIA H100"),
        ("", processor_name()),
        ("-1", processor_name()),
        ("9", processor_name()),
    ],
)
def test_gpus_are_named_as_this_process_may_use_them(
    visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_name() == name


@pytest.mark.usefixtures("tool")
def test_a_stage_says_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    run_stage("x", {}, {}, tmp_path / "out", lambda: {}, [])
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.device == "NVIDIA H100"


def test_without_the_tool_it_is_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_name() == processor_name() != ""
