"""What a run's judge said of its students' answers beside the teacher's, as `eval.side_by_side` counts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError

FOLDER, RETENTION = "retention", "retention.json"  # in the folder of evaluation
FIELDS = {"suite", "model", "value", "stderr", "ci95", "wins", "ties", "losses", "num_questions", "num_pairs", "judge"}


def read_retention(eval_dir: Path) -> tuple[Mapping[str, Any], ...]:
    """One row a suite and student; none where nothing was compared. Raises DataError."""
    path = eval_dir / FOLDER / RETENTION
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text("utf-8"))
        if not all(isinstance(row, dict) and row.keys() == FIELDS for row in rows):
            raise ValueError("rows have other fields")
    except (OSError, ValueError, TypeError) as exc:
        raise DataError(f"not a list of retentions ({exc})", where=path) from exc
    return tuple(rows)
