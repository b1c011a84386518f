"""What of the packages no command and no benchmark reaches: definitions of modules, and methods of classes.

    python -m tests.reachability [--without-benchmarks]

Reached are, to begin with, what the package's entry points name, what `potstill` hands on, and what runs as a program:
modules with a `__main__` block, and those that a string of reached code, a Makefile, a recipe or a template names. From
there on by reading (`ast`), never by running: a definition is reached when the code of a reached one, or of a loaded
module outside of definitions, uses its name; a method when its class is reached and its name is used as an attribute or
a string anywhere in reached code. That is too generous rather than too strict: what is listed here is used by nobody,
or by tests alone.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distill", "teacher", "students", "eval", "pipelines", "potstill")
TEXTS = ("Makefile", "pyproject.toml", "**/*.yaml", "**/*.jinja", "**/*.sh")
# Bases whose classes are called by the tree alone; of other foreign bases (torch's modules, HTTP protocols, trainers)
# every method may be called by the library that they come from.
OWN_BASES = {
    "object",
    "NamedTuple",
    "Protocol",
    "ABC",
    "Enum",
    "StrEnum",
    "IntEnum",
    "Generic",
    "BaseModel",
    "TypedDict",
}
OWN_BASES |= {"Exception", "RuntimeError", "ValueError"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Target = tuple[str, str]  # a module and a definition in it; the second is empty for the module itself
Bindings = dict[str, set[Target]]


class Module:
    """One file: its definitions, the code outside of them, and what its names are bound to by imports."""

    def __init__(self, name: str, path: Path, known: set[str]) -> None:
        self.name, self.is_package = name, path.name == "__init__.py"
        self.definitions: dict[str, list[ast.AST]] = {}
        self.code: list[ast.AST] = []  # runs when the module is loaded
        self.program: list[ast.AST] = []  # runs when it is started as one
        self.imports: list[ast.Import | ast.ImportFrom] = []
        self._known, self._roots = known, {_root(name) for name in known}
        self._take(ast.parse(path.read_text(encoding="utf-8")).body)
        self.bindings = self.bound(self.imports)

    def _take(self, statements: Iterable[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports.append(node)
            elif isinstance(node, Function | ast.ClassDef):
                self.definitions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and (names := _targets(node)):
                for name in names:
                    self.definitions.setdefault(name, []).append(node)
            elif isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                self.program += node.body
            elif isinstance(node, ast.If | ast.Try | ast.With):
                handlers = node.handlers if isinstance(node, ast.Try) else []
                self.code += [node.test] if isinstance(node, ast.If) else []
                parts = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
                for part in (*parts, *(handler.body for handler in handlers)):
                    self._take(part)
            else:
                self.code.append(node)

    def bound(self, imports: Iterable[ast.Import | ast.ImportFrom]) -> Bindings:
        """What names stand for, if it is of the tree; one name may be bound in several branches or inner functions."""
        names: Bindings = {}
        for node in imports:
            for alias in node.names:
                if isinstance(node, ast.Import):
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    target, name = (whole, ""), alias.asname or whole
                else:
                    module = _absolute(node, self)
                    inner = f"{module}.{alias.name}"
                    target = (inner, "") if inner in self._known else (module, alias.name)
                    name = alias.asname or alias.name
                if _root(target[0]) in self._roots:
                    names.setdefault(name, set()).add(target)
        return names


def _root(module: str) -> str:
    return module.partition(".")[0]


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    up = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*up, *filter(None, [node.module])])


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment to names alone gives; none for others, which are code."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return (
        [part.id for part in flat if isinstance(part, ast.Name)] if all(isinstance(p, ast.Name) for p in flat) else []
    )


class Reach:
    """Grows from its roots until nothing more is reached."""

    def __init__(self, folder: Path, packages: Iterable[str]) -> None:
        paths = {
            _module_of(path.relative_to(folder)): path for name in packages for path in (folder / name).rglob("*.py")
        }
        self.modules = {name: Module(name, path, set(paths)) for name, path in paths.items()}
        self._files = {f"{name.rpartition('.')[2]}.py": name for name in paths}
        self.reached: set[tuple[str, str]] = set()
        self.methods: dict[tuple[str, str], dict[str, Function]] = {}  # of reached classes, those not reached
        self.names: set[str] = set()  # attributes and strings of reached code
        self._unread: list[tuple[Module, ast.AST]] = []
        self._loaded: set[str] = set()
        self._programs: set[str] = set()

    def load(self, name: str) -> None:
        """A module, with the packages above it, runs its code."""
        module = self.modules.get(name)
        if module is None or name in self._loaded:
            return
        self._loaded.add(name)
        self.load(name.rpartition(".")[0])
        self._load_bound(module.bindings)
        for node in module.code:
            self._read(module, node)
        for key, nodes in module.definitions.items():
            if any(self._registers(module, node) for node in nodes):
                self.reach(name, key)

    def run(self, name: str) -> None:
        """A module is started as a program."""
        if name in self.modules and name not in self._programs:
            self._programs.add(name)
            self.load(name)
            for node in self.modules[name].program:
                self._read(self.modules[name], node)
            self.run(f"{name}.__main__")

    def reach(self, where: str, what: str) -> None:
        module = self.modules.get(where)
        if module is None or (where, what) in self.reached:
            return
        self.load(where)
        if what not in module.definitions:
            if what in module.bindings:  # handed on by a package's __init__
                for target in sorted(module.bindings[what]):
                    self._use(target)
            return
        self.reached.add((where, what))
        for node in module.definitions[what]:
            if isinstance(node, ast.ClassDef) and not _foreign(module, node):
                self._read_class(module, node)
            else:
                self._read(module, node)

    def export(self, package: str) -> None:
        """All that a package hands on is for people to use, with every public method."""
        for name, targets in self.modules[package].bindings.items() if package in self.modules else ():
            self.reach(package, name)
            for target in targets:
                self.names.update(method for method in self.methods.get(target, ()) if not method.startswith("_"))

    def settle(self) -> None:
        """Read all reached code, and methods as their names come up in it."""
        while True:
            while self._unread:
                self._walk(*self._unread.pop())
            found = [(key, name) for key, methods in self.methods.items() for name in methods if name in self.names]
            if not found:
                return
            for key, name in found:
                self._read(self.modules[key[0]], self.methods[key].pop(name))

    def text(self, text: str) -> None:
        """A recipe, a Makefile, a template: modules that it starts, functions that lm-eval's task files name."""
        for name in re.findall(r"[\w.]*\w\.\w+", text):
            if f"{name}.__main__" in self.modules or (name in self.modules and self.modules[name].program):
                self.run(name)
        for file in re.findall(r"\w+\.py\b", text):
            self._run_file(file)
        for stem, what in re.findall(r"!function (\w+)\.(\w+)", text):
            self.reach(self._files.get(f"{stem}.py", ""), what)
        for where, what in re.findall(r'"([\w.]+):(\w+)"', text):
            self.reach(where, what)

    def _run_file(self, file: str) -> None:
        if file != "__init__.py" and file in self._files:
            self.run(self._files[file])
            if not self.modules[self._files[file]].program:
                self._run_whole(self._files[file])

    def _run_whole(self, name: str) -> None:
        """Its source is run by itself, so that nothing tells which of its definitions are used."""
        self.load(name)
        for what in self.modules[name].definitions if name in self.modules else ():
            self.reach(name, what)

    def _registers(self, module: Module, node: ast.AST) -> bool:
        """Whether a decorator of the tree (`@app.command()`) takes it; those of libraries only change it."""
        return any(
            isinstance(root := _leftmost(decorator), ast.Name) and root.id in module.definitions
            for decorator in getattr(node, "decorator_list", [])
            if isinstance(decorator, ast.Call | ast.Attribute)
        )

    def _read_class(self, module: Module, node: ast.ClassDef) -> None:
        kept = self.methods.setdefault((module.name, node.name), {})
        for part in (*node.bases, *node.keywords, *node.decorator_list):
            self._read(module, part)
        for part in node.body:
            if isinstance(part, Function) and not part.decorator_list and not part.name.startswith("__"):
                kept[part.name] = part
            else:
                self._read(module, part)

    def _read(self, module: Module, code: ast.AST) -> None:
        self._unread.append((module, code))

    def _walk(self, module: Module, code: ast.AST) -> None:
        local = module.bound(n for n in ast.walk(code) if isinstance(n, ast.Import | ast.ImportFrom))
        self._load_bound(local)
        for node in ast.walk(code):
            if isinstance(node, ast.Attribute):
                self.names.add(node.attr)
                self._use_chain(module, local, node)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._use_name(module, local, node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._use_string(module, node.value)

    def _load_bound(self, bindings: Bindings) -> None:
        for where, _ in sorted(set().union(*bindings.values())):
            self.load(where)

    def _use_name(self, module: Module, local: Bindings, name: str) -> None:
        if name in module.definitions and name not in local:
            self.reach(module.name, name)
        for target in sorted(local.get(name) or module.bindings.get(name, ())):
            self._use(target)

    def _use_chain(self, module: Module, local: Bindings, node: ast.Attribute) -> None:
        """`package.module.definition`, from any of its names on."""
        names = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        if not isinstance(value, ast.Name) or (value.id in module.definitions and value.id not in local):
            return
        for where, what in sorted(local.get(value.id) or module.bindings.get(value.id, ())):
            for name in reversed(names):
                if what:
                    break
                if name == "__file__":  # its source is read, to run elsewhere
                    self._run_whole(where)
                inner = f"{where}.{name}"
                where, what = (inner, "") if inner in self.modules else (where, name)
            self._use((where, what))

    def _use(self, target: Target) -> None:
        where, what = target
        if what:
            self.reach(where, what)
        else:
            self.load(where)

    def _use_string(self, module: Module, text: str) -> None:
        if text.startswith("."):  # of `f"{__package__}.worker"`
            text = (module.name if module.is_package else module.name.rpartition(".")[0]) + text
        if len(text) < 100 and text not in self.names:
            self.names.add(text)
            if text in self.modules:
                self.run(text)
            self._run_file(text.rpartition("/")[2])
            self.reach(*text.rpartition(":" if ":" in text else ".")[::2])

    def unreached(self, packages: Iterable[str]) -> Iterator[str]:
        for name, module in sorted(self.modules.items()):
            if _root(name) in packages:
                for what in module.definitions:
                    if (name, what) not in self.reached and not what.startswith("__") and what != "_":
                        yield f"{name}.{what}"
                    yield from (f"{name}.{what}.{method}" for method in self.methods.get((name, what), ()))


def _foreign(module: Module, node: ast.ClassDef) -> bool:
    for base in node.bases:
        root = _leftmost(base)
        name = base.attr if isinstance(base, ast.Attribute) else getattr(root, "id", "")
        own = isinstance(root, ast.Name) and (root.id in module.definitions or root.id in module.bindings)
        if not own and name not in OWN_BASES:
            return True
    return False


def _leftmost(node: ast.AST) -> ast.AST:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def _module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unreached(folder: Path = ROOT, *, benchmarks: bool = True, allowed: Iterable[str] = ()) -> list[str]:
    """Dotted names of all that neither a command reaches nor one of the names that are `allowed`."""
    reach = Reach(folder, (*PACKAGES, "benchmarks") if benchmarks else PACKAGES)
    for entry in tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"].values():
        reach.reach(*entry.split(":"))
    reach.export("potstill")
    for name in allowed:
        reach.reach(*name.rpartition(".")[::2])
    for name, module in reach.modules.items():
        if module.program:
            reach.run(name)
    for pattern in TEXTS:
        for path in sorted(folder.glob(pattern)):
            if not path.relative_to(folder).parts[0].startswith((".", "runs")):
                reach.text(path.read_text(encoding="utf-8"))
    reach.settle()
    return list(reach.unreached(PACKAGES))


if __name__ == "__main__":
    print("\n".join(unreached(benchmarks="--without-benchmarks" not in sys.argv[1:])))  # noqa: T201
