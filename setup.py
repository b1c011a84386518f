"""The wheel: every package of the tree below `potstill`, so that nothing installed is called `eval` or `distill`.

In a checkout the packages lie at the top and import one another as `from distill.x import y`. In a wheel they are
`potstill.distill` and so on: the names of modules in their absolute imports get `potstill.` in front, at the places
that `ast` gives, and nothing else of a line changes. Code that names a module in a string derives it from
`__package__`. An editable install leaves the tree as it is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

TOP = "potstill"
TREE = ("distill", "teacher", "students", "eval", "pipelines")


def below_top(source: bytes) -> bytes:
    """The source of a module with its imports of the tree's packages below `TOP`. Raises ValueError for `import x.y`,
    which binds a name that the wheel has not."""
    lines = source.splitlines(keepends=True)
    for row, column in sorted(_imported_names(ast.parse(source)), reverse=True):
        line = lines[row - 1]
        assert line[column:].startswith(tuple(name.encode() for name in TREE)), line
        lines[row - 1] = line[:column] + f"{TOP}.".encode() + line[column:]
    return b"".join(lines)


def _imported_names(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Row, from 1, and column in bytes of every name of a module of the tree that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_of_tree(node.module or ""):
            yield node.lineno, node.col_offset + len("from ")
        elif isinstance(node, ast.Import):
            for alias in filter(lambda alias: _is_of_tree(alias.name), node.names):
                if alias.asname is None:
                    raise ValueError(f"line {node.lineno}: write `from ... import`, got `import {alias.name}`")
                yield alias.lineno, alias.col_offset


def _is_of_tree(module: str) -> bool:
    return module.partition(".")[0] in TREE


class BuildBelowTop(build_py):
    """Copies a module, then rewrites its imports in the copy."""

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        copy, is_new = super().build_module(module, module_file, package)
        Path(copy).write_bytes(below_top(Path(copy).read_bytes()))
        return copy, is_new


packages = find_packages(include=[pattern for name in (TOP, *TREE) for pattern in (name, f"{name}.*")])
if "editable_wheel" in sys.argv:
    setup(packages=packages)
else:
    places = {name if name == TOP else f"{TOP}.{name}": name.replace(".", "/") for name in packages}
    setup(packages=list(places), package_dir=places, cmdclass={"build_py": BuildBelowTop})
