"""The structure of the sources: circles of imports, homonymous classes, long functions and files.

`python tools/structure.py [ROOT]` reads `packages/*/src` under the root of the repository, prints
what it finds and exits with 1 where there is a circle or a homonym, with 2 where it cannot read the
sources. An import counts wherever it stands: in a function, or under TYPE_CHECKING, it ties two
modules as much as at the top of a file. A name that import_module gets while it runs is not seen.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MAX_FUNCTION = 60  # lines of code
MAX_FILE = 500  # lines

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the sources.

    Attributes:
        name: under which it is imported.
        path: relative to the root of the repository.
        text: what the file holds.
        tree: its syntax.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The first part of its name."""
        return self.name.partition(".")[0]

    @property
    def lines(self) -> int:
        """All lines of the file."""
        return len(self.text.splitlines())


def read_modules(root: Path) -> dict[str, Module]:
    """All modules under `packages/*/src`, by name.

    Raises:
        ValueError: there is none, or one is not Python.
    """
    modules = {}
    for path in sorted(root.glob("packages/*/src/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts[3:]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            text = path.read_text(encoding="utf-8")
            modules[name] = Module(name, path.relative_to(root), text, ast.parse(text))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path} must be Python in UTF-8. Got: {error}") from None
    if not modules:
        raise ValueError(f"ROOT must hold Python files in packages/*/src. Got {str(root)!r}.")
    return modules


def imports(module: Module, modules: dict[str, Module]) -> dict[str, int]:
    """The modules that a module imports anywhere, each with the line where it does so first."""
    found: dict[str, int] = {}
    inside = module.name.split(".")
    if module.path.name != "__init__.py":
        inside.pop()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            targets = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for origin, name in targets:
            known = f"{origin}.{name}" if f"{origin}.{name}" in modules else origin
            if known in modules and known != module.name:
                found[known] = min(node.lineno, found.get(known, node.lineno))
    return found


def ways(graph: dict[str, dict[str, int]], start: str) -> dict[str, list[str]]:
    """The shortest chain of imports from a module to each that it reaches, perhaps itself."""
    found: dict[str, list[str]] = {}
    queue = deque([[start]])
    while queue:
        way = queue.popleft()
        for other in graph[way[-1]]:
            if other not in found:
                found[other] = [*way, other]
                queue.append(found[other])
    return found


def circles(graph: dict[str, dict[str, int]]) -> Iterator[tuple[list[str], list[str]]]:
    """Modules that all reach each other, and the shortest way round among them."""
    reached = {name: ways(graph, name) for name in sorted(graph)}
    done: set[str] = set()
    for name, others in reached.items():
        circle = [other for other in reached if other in others and name in reached[other]]
        if circle and name not in done:
            yield circle, min((reached[one][one] for one in circle), key=len)
        done.update(circle)


def homonyms(modules: dict[str, Module]) -> dict[str, list[str]]:
    """The class names that more than one module defines, each with the places."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].setdefault(module.name, f"{module.path}:{node.lineno}")
    return {name: list(found.values()) for name, found in sorted(places.items()) if len(found) > 1}


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """The place and name of each function, and its lines of code.

    Docstrings, comments and blank lines do not count; the lines of functions inside do.
    """
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, _Documented) and ast.get_docstring(node) is not None:
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = code.intersection(range(node.lineno, (node.end_lineno or 0) + 1))
            yield f"{module.path}:{node.lineno} {node.name}", len(lines)


def main(arguments: list[str]) -> int:
    """Print the structure of the sources under a root; return the exit code."""
    try:
        if len(arguments) > 1:
            raise ValueError(f"ROOT must be one folder. Got {' '.join(arguments)}.")
        modules = read_modules(Path(arguments[0] if arguments else Path(__file__).parents[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    graph = {module.name: imports(module, modules) for module in modules.values()}
    found = list(circles(graph))
    for package in sorted({module.package for module in modules.values()}):
        own = [module for module in modules.values() if module.package == package]
        print(f"{package}: {len(own)} files, {sum(module.lines for module in own)} lines")
        for circle, way in found:
            if modules[circle[0]].package == package:
                print(f"  circle of {len(circle)}: {', '.join(circle)}")
                for importer, imported in pairwise(way):
                    line = graph[importer][imported]
                    print(f"    {modules[importer].path}:{line} imports {imported}")
        for place, lines in (one for module in own for one in functions(module)):
            if lines > MAX_FUNCTION:
                print(f"  function of {lines} lines of code: {place}")
        for module in own:
            if module.lines > MAX_FILE:
                print(f"  file of {module.lines} lines: {module.path}")
    same = homonyms(modules)
    for name, places in same.items():
        print(f"class {name} is defined {len(places)} times: {', '.join(places)}")
    lines = sum(module.lines for module in modules.values())
    print(f"{lines} lines, {len(found)} circles, {len(same)} homonyms")
    return 1 if found or same else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
