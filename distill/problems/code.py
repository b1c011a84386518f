"""Programming questions: what a row's tests are, and the question that goes with them.

Three kinds of tests, told apart by their shape:

- a text: test code. With `entry_point_field` it defines `check(candidate)` (HumanEval), else it is run as it stands;
- a list of texts: assertions (MBPP), with `setup_field` run before them;
- `{"inputs": [...], "outputs": [...]}`, or a list of `{"input", "output"}`: standard input and standard output, also as
  JSON text.

The question says how to answer. Where the tests call functions by name, it shows their signatures, taken from the
reference solution: the model cannot guess a name, and shown tests would give expected values away.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from distill.errors import DataError
from distill.recipe import DatasetSource, LocalSource
from distill.records import Problem

INSTRUCTION = "Answer with the whole program in one ```python block."


def code_problem(
    prompt: str,
    answer: str | None,
    row: Mapping[str, Any],
    source: LocalSource | DatasetSource,
    *,
    name: str,
    where: str,
) -> Problem:
    """Raises DataError naming `where` and the field that is missing or of the wrong kind."""
    assert source.tests_field is not None
    field = source.tests_field
    tests = _parse(row.get(field))
    if cases := _cases(tests):
        return _problem(f"{prompt}\n\n{INSTRUCTION}", answer, name, {"cases": cases})
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise DataError("must be test code, assertions, or inputs with their outputs", where=where, field=field)
    tree = _tree(tests, where, field)
    setup = str(row.get(source.setup_field) or "") if source.setup_field else ""
    if source.entry_point_field is not None:
        entry_point = row.get(source.entry_point_field)
        if not isinstance(entry_point, str) or not entry_point.isidentifier():
            raise DataError(
                f"must be a function's name, got {entry_point!r}", where=where, field=source.entry_point_field
            )
        return _completion(prompt, answer, tests, entry_point, setup, name)
    whole = ast.Module([*_tree(setup, where, field).body, *tree.body], [])
    free = _free_names(whole)
    remote = (free - sys.stdlib_module_names) | (_defined_names(answer) & _names(whole))
    imports = "".join(f"import {module}\n" for module in sorted(free - remote))
    signatures = _signatures(answer, remote)
    shown = f"\n\nIt is to define:\n\n```python\n{signatures}\n```" if signatures else ""
    metadata = {"tests": tests, "setup": imports + setup, "remote": sorted(remote)}
    return _problem(f"{prompt.strip()}{shown}\n\n{INSTRUCTION}", answer, name, metadata)


def _completion(prompt: str, answer: str | None, tests: str, entry_point: str, setup: str, name: str) -> Problem:
    """A beginning to be completed (HumanEval): its imports and helpers are there for the program and for the tests."""
    whole = None
    if answer is not None:
        whole = answer if entry_point in _defined_names(answer) else prompt + answer
    metadata: dict[str, Any] = {
        "tests": tests,
        "setup": f"{setup}\n{prompt if whole is None else whole}",
        "prelude": prompt,
        "entry_point": entry_point,
        # Tests may compare with the function by its own name: that is the reference, if there is one.
        "remote": [],
    }
    question = f"Complete this Python function.\n\n```python\n{prompt.strip()}\n```\n\n{INSTRUCTION}"
    return _problem(question, whole, name, metadata)


def _problem(prompt: str, answer: str | None, name: str, metadata: dict[str, Any]) -> Problem:
    return Problem(prompt=prompt, answer=answer, grader="code", source=name, metadata=metadata)


def _parse(tests: Any) -> Any:
    """JSON text as what it says; test code as it is."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(tests)
        except ValueError:
            return tests
    return tests


def _cases(tests: Any) -> list[dict[str, str]]:
    if isinstance(tests, Mapping) and isinstance(tests.get("inputs"), list) and isinstance(tests.get("outputs"), list):
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=False))
        if len(tests["inputs"]) != len(tests["outputs"]):
            return []
    elif isinstance(tests, list) and all(
        isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests
    ):
        pairs = [(test["input"], test["output"]) for test in tests]
    else:
        return []
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        return []
    return [{"input": given, "output": expected} for given, expected in pairs]


def _tree(source: str, where: str, field: str) -> ast.Module:
    try:
        return _parse_code(source)
    except (SyntaxError, ValueError, RecursionError) as exc:
        raise DataError(f"not Python ({exc})", where=where, field=field) from exc


def _parse_code(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a data set's invalid escapes are not our user's to mend
        return ast.parse(source)


def _defined_names(source: str | None) -> set[str]:
    """Functions and classes that a program defines at its top level; none where it cannot be read."""
    return {node.name for node in _definitions(source)}


def _definitions(source: str | None) -> list[ast.FunctionDef | ast.ClassDef]:
    try:
        body = _parse_code(source or "").body
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _signatures(source: str | None, names: set[str]) -> str:
    lines = []
    for node in _definitions(source):
        if node.name not in names:
            continue
        if isinstance(node, ast.FunctionDef):
            lines.append(f"def {node.name}({ast.unparse(node.args)}):")
        else:
            lines.append(f"class {node.name}:")
            inside = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            lines += [f"    def __init__({ast.unparse(part.args)}):" for part in inside]
    return "\n".join(lines)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _free_names(tree: ast.Module) -> set[str]:
    """Names that tests use and nobody defines: neither they, nor Python."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            stored |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return _names(tree) - stored - set(dir(builtins))
