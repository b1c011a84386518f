"""Where the repository lies: a test that moves to another folder still finds it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
