"""Findings: outcomes of checks that are listed for a person, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.errors import PotstillError, UserInputError


@dataclass(frozen=True)
class Finding:
    """One check's outcome; `fault` is what an error would be raised as."""

    check: str
    state: Literal["ok", "warning", "error"]
    text: str
    fault: type[PotstillError] = UserInputError

    @property
    def exit_code(self) -> int:
        """The fault's for an error; a warning changes no exit code."""
        return self.fault.exit_code if self.state == "error" else 0
