"""Bounds of what is read from files of others."""

from __future__ import annotations

from pydantic import Field

from distill.recipe.config import Config


class ReadLimits(Config):
    """How much a file of problems, traces or benchmark questions may hold: one that holds more is refused, not cut.

    They keep a small file from becoming all of the memory (a compressed line of gigabytes, a million brackets). Raise
    one where a file of yours is honestly larger.
    """

    line_mib: int = Field(16, ge=1, le=1_024, description="a line of JSON, or the texts of one row of Parquet")
    file_gib: int = Field(64, ge=1, description="a whole file, uncompressed")
    rows: int = Field(20_000_000, ge=1, description="lines or rows of a file")
    nesting: int = Field(64, ge=1, le=500, description="brackets within brackets of a line")

    @property
    def line_bytes(self) -> int:
        return self.line_mib << 20

    @property
    def file_bytes(self) -> int:
        return self.file_gib << 30


DEFAULT_LIMITS = ReadLimits()
