"""The packages of this tree, and what their pyproject files say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGES = ("dilated-core", "dilated-pool", "dilated-sparse", "dilated-ring", "dilated-factory")


def import_name(package: str) -> str:
    """Return the name under which a package is imported."""
    return package.replace("-", "_")


def pyproject(package: str) -> dict[str, Any]:
    """Return the pyproject.toml of a package."""
    path = ROOT / "packages" / package / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def declared_siblings(package: str) -> list[str]:
    """Return the packages of this tree that a package requires, directly or not."""
    found: dict[str, None] = {}
    for requirement in pyproject(package)["project"]["dependencies"]:
        name = Requirement(requirement).name
        if name in PACKAGES:
            found |= dict.fromkeys([name, *declared_siblings(name)])
    return list(found)


def optional_siblings(package: str) -> list[str]:
    """Return the packages of this tree that extras of a package require."""
    extras = pyproject(package)["project"].get("optional-dependencies", {}).values()
    names = [Requirement(requirement).name for extra in extras for requirement in extra]
    return [name for name in PACKAGES if name in names and name != package]


def outside_requirements(package: str, *, with_options: bool) -> list[str]:
    """Return what a package requires from outside this tree; with options, all it may require.

    Options are its extras, its dependency groups and the tools that build it.
    """
    table = pyproject(package)
    found: list[str] = list(table["project"]["dependencies"])
    if with_options:
        found += table["build-system"]["requires"]
        for listed in table["project"].get("optional-dependencies", {}).values():
            found += listed
        for listed in table.get("dependency-groups", {}).values():
            found += listed
    return [text for text in found if Requirement(text).name not in PACKAGES]
