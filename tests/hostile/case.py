"""A hostile file: how it is made, which commands open it, what they must say; and what several kinds of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

TRAP = "the-trap-has-run"
DEEP = 20_000

DOCTOR = ("doctor", "recipe.yaml")
RUN = ("run", "recipe.yaml", "--out", "runs")
GENERATE = ("generate", "recipe.yaml", "--out", "runs")

Make = Callable[[Path], object]
Commands = tuple[tuple[str, ...], ...]


class Case(NamedTuple):
    """`make` changes a world. `slow`: it takes seconds, of the machine or by the clock."""

    name: str
    make: Make
    commands: Commands
    says: str
    slow: bool = False


def cases(commands: Commands, makes: Mapping[str, tuple[Make, str]], *, slow: bool = False) -> list[Case]:
    """One case a name, each with what its line must say."""
    return [Case(name, make, commands, says, slow) for name, (make, says) in makes.items()]


def content(name: str, text: str | bytes) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        (world / name).unlink(missing_ok=True)
        data = text.encode() if isinstance(text, str) else text
        (world / name).write_bytes(data.replace(b"TRAP", str(world / TRAP).encode()))

    return make


def instead(name: str, of: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something that is no file in the place of one."""

    def make(world: Path) -> None:
        (world / name).unlink(missing_ok=True)
        of(world / name)

    return make


def without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def in_a_circle(path: Path) -> None:
    path.symlink_to(path)


def sparse(size: int) -> Callable[[Path], None]:
    def of(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return of


def deep_json() -> str:
    return "[" * DEEP + "]" * DEEP


def recipe(**changes: Any) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        tree = yaml.safe_load((world / "recipe.yaml").read_text())
        (world / "recipe.yaml").write_text(yaml.safe_dump(tree | changes))

    return make
