"""YAML of others: nesting, aliases and numbers are bounded before anything is made of them, and a key stands once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from distill.reading.files import Fault, read_text

SETTINGS_YAML_BYTES = 1 << 20
NESTING = 64
# With every alias written out: ten lines of aliases of aliases stand for billions of values.
MAX_VALUES = 100_000
MAX_SCALAR_CHARACTERS = 64 << 10
INTEGER_BITS = 64


def read_yaml(path: Path, fault: Fault) -> Any:
    """The value in a file of settings. Raises `fault`, naming the line where it is one."""
    return parse_yaml(read_text(path, fault, max_bytes=SETTINGS_YAML_BYTES), where=path, fault=fault)


def parse_yaml(text: str, *, where: Path | str, fault: Fault, field: str | None = None) -> Any:
    """The value of a YAML text. Raises `fault`."""
    try:
        _check(text)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: a date or a number that cannot be
        raise fault(f"not valid YAML: {exc}", where=where, field=field) from exc


def _check(text: str) -> None:
    """Go through the events, which come without recursion, and count. Raises yaml.YAMLError."""
    open_: list[tuple[str | None, int]] = [(None, 0)]
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_) > NESTING:
                raise _fault(f"nested more than {NESTING} deep", event)
            open_.append((anchor, 1))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(name == event.anchor for name, _ in open_):
                raise _fault(f"*{event.anchor} stands inside of what it names", event)
            anchor, size = None, sizes.get(str(event.anchor), 1)
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif len(event.value) > MAX_SCALAR_CHARACTERS:
            raise _fault(f"a value has more than {MAX_SCALAR_CHARACTERS} characters", event)
        if anchor is not None:
            sizes[anchor] = size
        open_[-1] = (open_[-1][0], open_[-1][1] + size)
        if open_[-1][1] > MAX_VALUES:
            raise _fault(f"holds more than {MAX_VALUES} values", event)


def _fault(message: str, event: yaml.Event) -> yaml.YAMLError:
    assert event.start_mark is not None
    return yaml.YAMLError(f"{message}, in line {event.start_mark.line + 1}")


class _Loader(yaml.SafeLoader):
    """YAML as usual, but a key that is given twice is a fault: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """An integer of a size that a setting can have; a larger one could not even be printed."""
        number: int = self.construct_yaml_int(node)
        if number.bit_length() > INTEGER_BITS:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
