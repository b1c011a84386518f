"""Intervals of shares against published values."""

from __future__ import annotations

import pytest

from distill.intervals import wilson


def test_wilson_intervals() -> None:
    """Against published values: 10 of 100, and none of 20 (Newcombe 1998 gives 0.1611 for 0 of 20)."""
    assert wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
