"""The table as it grows, line by line, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

HEADINGS = ("kernel", "shape", "us", "floor us", "share", "reached", "error", "peers (us)")
WIDTHS = (28, 26, 9, 9, 6, 11, 8, 0)


@dataclass(frozen=True)
class Row:
    """Microseconds. `share_of_floor` is 1 where the kernel takes no longer than the floor."""

    kernel: str
    shape: str
    us: float | None
    floor_us: float
    size_bytes: int
    flop: int
    error: float
    peers: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    @property
    def share_of_floor(self) -> float | None:
        return self.floor_us / self.us if self.us else None

    def as_json(self) -> dict[str, Any]:
        """The row as JSON, what was reached beside what was needed; a number that JSON does not have is its name."""
        reached: dict[str, Any] = {"share_of_floor": self.share_of_floor}
        if self.us:
            reached["gb_per_s"] = self.size_bytes / self.us / 1e3
            reached["tflop_per_s"] = self.flop / self.us / 1e6 if self.flop else None
        fields = asdict(self) | reached
        return fields if math.isfinite(self.error) else fields | {"error": str(self.error)}


def total(shape: str, rows: Sequence[Row]) -> Row:
    """One after the other; a peer only where it took every one."""
    complete = all(row.us for row in rows)
    peers = set.intersection(*(set(row.peers) for row in rows))
    return Row(
        kernel=rows[0].kernel,
        shape=shape,
        us=sum(row.us or 0 for row in rows) if complete else None,
        floor_us=sum(row.floor_us for row in rows),
        size_bytes=sum(row.size_bytes for row in rows),
        flop=sum(row.flop for row in rows),
        error=max(row.error for row in rows),
        peers={name: sum(row.peers[name] for row in rows) for name in rows[0].peers if name in peers},
        failed=None if complete else "one of them did",
    )


def heading() -> str:
    return _line(HEADINGS) + "\n" + "-" * 132


def line(row: Row) -> str:
    if row.us is None:
        return _line(
            (row.kernel, row.shape, "-", f"{row.floor_us:.1f}", "-", "-", f"{row.error:.1e}", f"FAILED: {row.failed}")
        )
    arithmetic = row.flop / row.us / 1e6
    reached = (
        f"{arithmetic:.0f} TFLOP/s"
        if arithmetic * 1e3 > 250 * row.size_bytes / row.us / 1e3
        else f"{row.size_bytes / row.us / 1e3:.0f} GB/s"
    )
    peers = ", ".join(f"{name} {us:.1f}" for name, us in row.peers.items())
    error = "exact" if row.error == 0 else f"{row.error:.1e}"
    share = f"{row.share_of_floor:.0%}"
    return _line((row.kernel, row.shape, f"{row.us:.1f}", f"{row.floor_us:.1f}", share, reached, error, peers))


def _line(cells: tuple[str, ...]) -> str:
    padded = [
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ]
    return "  ".join(padded).rstrip()
