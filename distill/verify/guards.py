"""Guards between a model's text and the Python that some graders would run it as. For worker processes only.

Several of reasoning-gym's scorers call `eval` or `sympy.parse_expr` on the answer, and parse_expr is eval. Here `eval`
becomes `ast.literal_eval` in those modules, and parse_expr takes plain arithmetic over known functions only. Beneath
both, an audit hook refuses to start programs, open connections or write files while an answer is graded.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Modules of reasoning-gym whose scorers evaluate the answer.
EVALUATING = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.number_sorting",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
CIRCULAR = {
    f"{arc}{name}{h}" for arc in ("", "a") for name in ("sin", "cos", "tan", "cot", "sec", "csc") for h in ("", "h")
}
PARSING = ("reasoning_gym.games.countdown", "reasoning_gym.games.puzzle24")  # those that import parse_expr by name
FUNCTIONS = frozenset({*CIRCULAR, "exp", "log", "ln", "sqrt", "Abs", "pi", "E", "I", "oo"})
ARITHMETIC = re.compile(r"[\w\s+\-*/^().,!]*", re.ASCII)
NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*", re.ASCII)
ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|[A-Za-z_)]\s*\.")
REFUSED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "pty.spawn",
    "subprocess.Popen",
    "socket.",
    "shutil.",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def is_plain_arithmetic(text: str) -> bool:
    """Numbers, operators, parentheses, one-letter symbols and known functions: nothing that Python could be made of."""
    if not ARITHMETIC.fullmatch(text) or "__" in text or ATTRIBUTE.search(text):
        return False
    return all(len(name) == 1 or name in FUNCTIONS for name in NAME.findall(text))


def guard_scorers() -> None:
    """Let reasoning-gym's evaluating scorers take literals and plain arithmetic alone."""
    import sympy
    from sympy.parsing.sympy_parser import parse_expr as original

    def parse_expr(s: str, *args: Any, **kwargs: Any) -> Any:
        if not is_plain_arithmetic(s):
            raise ValueError("not plain arithmetic")
        return original(s, *args, **kwargs)

    # sympy's own modules take it from sympy_parser, for texts of their own: those stay as they are.
    sympy.parse_expr = parse_expr
    for name in PARSING:
        importlib.import_module(name).parse_expr = parse_expr  # type: ignore[attr-defined]
    for name in EVALUATING:
        importlib.import_module(name).eval = ast.literal_eval  # type: ignore[attr-defined]


class Fence:
    """An audit hook (which Python never takes off again) that is up inside `raised` blocks alone."""

    def __init__(self) -> None:
        self._up = False
        sys.addaudithook(self._hook)

    @contextmanager
    def raised(self) -> Iterator[None]:
        self._up = True
        try:
            yield
        finally:
            self._up = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._up:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if writes or event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused while an answer is graded")
