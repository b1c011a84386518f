"""Kinds of work units that the grouped products of many tokens take."""

from __future__ import annotations

FULL_UNIT, TAILED_UNIT, HALF_UNIT, UNIT_KINDS = 0, 1, 2, 4
