"""Every public name has an example in its docstring, and every example says what happens."""

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
