"""Docstrings of public names have examples, which say what happens, and explain their letters."""

import doctest
import importlib
import inspect
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PACKAGES = ["dilated_core", "dilated_ring", "dilated_sparse", "dilated_pool", "dilated_factory"]
# What stands in the brackets of a shape, (B, N + 1, ...), and the letters there.
PART = r"(?:\.\.\.|\w+(?: [+/*-] \w+)*)"
SHAPE = re.compile(rf"(?<![\w.])\(({PART}(?:, {PART})*,?)\)")
LETTER = re.compile(r"\b(?:[A-Z](?:_\w+)?|n)\b")
EXAMPLE = re.compile(r"^ *(?:>>>|\.\.\. ).*", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL | doctest.NORMALIZE_WHITESPACE


def names() -> list[Any]:
    """Classes and functions by the package that defines them; other names have no docstring."""
    found = []
    for package in PACKAGES:
        try:
            distribution(package.replace("_", "-"))
        except PackageNotFoundError:
            skip = pytest.mark.skip(reason=f"{package} is not installed")
            found.append(pytest.param(package, "", id=package, marks=skip))
            continue
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, ModuleType):
                found += [(package, f"{name}.{inner}") for inner in thing.__all__]
            elif getattr(thing, "__module__", "").partition(".")[0] == package and (
                inspect.isclass(thing) or inspect.isfunction(thing)
            ):
                found.append((package, name))
    return found


@pytest.mark.parametrize(("package", "name"), names())
def test_a_public_name_has_an_example_that_is_right(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module(package)
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part)
    space = {"torch": torch} | {each: getattr(module, each) for each in module.__all__}
    text = inspect.getdoc(thing) or ""
    test = doctest.DocTestParser().get_doctest(text, space, name, None, 0)
    assert test.examples
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with torch.random.fork_rng():
        runner.run(test, out=told.append)
    text = "".join(told)
    if missing := re.search(r"(?:MissingPackage|Import)Error: (.* needs .*pip install.*)", text):
        pytest.skip(missing[1])
    assert not told, text


def shapes_of(thing: Any) -> set[str]:
    """Letters of the shapes in the docstrings of a class or function, and of a class's methods."""
    inner = [x for name, x in vars(thing).items() if not name.startswith("_")]
    inner = [x.fget if isinstance(x, property) else getattr(x, "__func__", x) for x in inner]
    ours = [x for x in inner if inspect.isfunction(x)] if inspect.isclass(thing) else []
    texts = [EXAMPLE.sub("", inspect.getdoc(each) or "") for each in (thing, *ours)]
    shapes = [shape for text in texts for shape in SHAPE.findall(text) if "," in shape]
    return {letter for shape in shapes for letter in LETTER.findall(shape)}


@pytest.mark.parametrize(("package", "name"), names())
def test_the_letters_of_shapes_are_explained_in_the_docstring(package: str, name: str) -> None:
    thing: Any = importlib.import_module(package)
    for part in name.split("."):
        thing = getattr(thing, part)
    text = inspect.getdoc(thing) or ""
    told = re.search(r"^Shapes: (.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert shapes_of(thing) <= set(LETTER.findall(told[1] if told else ""))


def test_letters_of_shapes_are_found() -> None:
    def example() -> None:
        """Of (B, N, H_kv, D) and (S + 1,), not of sqrt(D, E), (F) or (a, 2).

        >>> (X, Y)
        """

    assert shapes_of(example) == {"B", "N", "H_kv", "D", "S"}
