from __future__ import annotations

from hypothesis import settings

# A deadline is wall time, which a machine that does other things stretches; the suite's timeout bounds whole tests.
settings.register_profile("potstill", deadline=None)
settings.load_profile("potstill")
