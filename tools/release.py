"""What a release of one package checks and changes; the session `release` runs it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.version import Version

from tools.packages import PACKAGES, ROOT, import_name, pyproject

_NUMBERS = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
_HEADING = re.compile(r"^## (?:Unreleased|\d\S* \(not released yet\))$", re.MULTILINE)
_ABOUT = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
UNRELEASED = "Unreleased"


def tag(package: str, version: str) -> str:
    """Return the tag of a release."""
    return f"{package}-v{version}"


def last_version(package: str, tags: Iterable[str]) -> str | None:
    """Return the highest version of a package that has a tag; None before its first release."""
    start = tag(package, "")
    versions = [name.removeprefix(start) for name in tags if name.startswith(start)]
    return max((v for v in versions if _NUMBERS.fullmatch(v)), key=Version, default=None)


def present_version(package: str) -> str:
    """Return the version that the sources say."""
    found = _ABOUT.search(about(package))
    assert found is not None
    return found[1]


def about(package: str) -> str:
    """Return the text of the file that has the version."""
    return (ROOT / about_path(package)).read_text(encoding="utf-8")


def about_path(package: str) -> str:
    """Return where that file is, from the root."""
    return f"packages/{package}/src/{import_name(package)}/__about__.py"


def refusals(package: str, version: str, tags: Iterable[str]) -> list[str]:
    """Tell why a package cannot be released as this version; nothing if it can."""
    if package not in PACKAGES:
        return [f"the package must be one of {', '.join(PACKAGES)}. Got {package!r}."]
    if not _NUMBERS.fullmatch(version):
        return [f"the version must be three numbers, as in 0.2.0. Got {version!r}."]
    tags = set(tags)
    if tag(package, version) in tags:
        return [f"the tag {tag(package, version)} exists."]
    last, present = last_version(package, tags), present_version(package)
    found = []
    if last is not None and Version(version) <= Version(last):
        found.append(f"the version must be higher than the last release, {last}. Got {version}.")
    # The first release may be the version that the sources have had from the beginning.
    if Version(version) < Version(present):
        found.append(f"the version must not be lower than the sources', {present}. Got {version}.")
    for sibling in PACKAGES:
        for text in requirements(sibling):
            required = Requirement(text)
            if required.name == package and version not in required.specifier:
                found.append(f"{sibling} does not admit it: {text}")
    return list(dict.fromkeys(found))


def requirements(package: str) -> list[str]:
    """Return what a package requires, with its extras."""
    project = pyproject(package)["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [*project["dependencies"], *(text for extra in extras for text in extra)]


def may_break(last: str, version: str) -> bool:
    """Tell whether the public names may change between two versions: before 1, by minor."""
    before, after = Version(last).release, Version(version).release
    return before[0] != after[0] or (before[0] == 0 and before[1] != after[1])


def bumped(text: str, version: str) -> str:
    """Return an `__about__.py` with another version."""
    changed, count = _ABOUT.subn(f'__version__ = "{version}"', text)
    if count != 1:
        raise ValueError(f"__about__.py must have one line of __version__. Got {count}.")
    return changed


def dated(changelog: str, version: str, day: str) -> str:
    """Return a changelog whose open section is a release of a day, under a new open one.

    Raises:
        ValueError: there is no open section, more than one, or nothing in it.
    """
    found = list(_HEADING.finditer(changelog))
    if len(found) != 1:
        raise ValueError(
            f"the changelog must have one section {UNRELEASED!r} or '(not released yet)'. "
            f"Got {len(found)}."
        )
    start, end = found[0].span()
    if not changelog[end:].partition("\n## ")[0].strip():
        raise ValueError("the changelog's open section must not be empty.")
    return f"{changelog[:start]}## {UNRELEASED}\n\n## {version} - {day}{changelog[end:]}"
