"""A box of hostile files: booby-trapped, oversized, looping, nested, and things that are no files at all.

Each case is one change to a healthy world (`tests.pipelines.tiny_world`), the commands that open what was changed, and
words that the one line must have. Traps write `world / TRAP`, wherever they run.
"""

from tests.hostile import data, models, settings
from tests.hostile.case import DOCTOR, TRAP, Case

__all__ = ["CASES", "DOCTOR", "TRAP", "Case"]

CASES = [*models.CASES, *settings.CASES, *data.CASES]
