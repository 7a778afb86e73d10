"""What a wheel and an sdist of a package must hold."""

from __future__ import annotations

import email
import tarfile
import zipfile
from pathlib import Path

from tools.packages import import_name


def wheel_problems(wheel: Path, package: str, version: str) -> list[str]:
    """Tell what is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"{import_name(package)}-{version}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    problems = []
    for required in (f"{import_name(package)}/py.typed", f"{info}/licenses/LICENSE"):
        if required not in names:
            problems.append(f"{wheel.name}: {required} is missing")
    roots = {name.split("/")[0] for name in names}
    if roots != {import_name(package), info}:
        problems.append(f"{wheel.name}: holds more than the package: {sorted(roots)}")
    if metadata["Version"] != version:
        problems.append(f"{wheel.name}: version is {metadata['Version']}, not {version}")
    if not metadata.get_payload():
        problems.append(f"{wheel.name}: no README in the metadata")
    return problems


def sdist_problems(sdist: Path, stem: str) -> list[str]:
    """Tell what is wrong with an sdist."""
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{stem}/") for name in archive.getnames()}
    required = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO"}
    problems = [f"{sdist.name}: {name} is missing" for name in sorted(required - names)]
    # hatchling always adds the .gitignore that it obeyed.
    allowed = required | {".gitignore"}
    extra = {name for name in names - allowed if not name.startswith("src/")}
    problems += [f"{sdist.name}: {name} does not belong there" for name in sorted(extra)]
    return problems


def difference(wheel: Path, rebuilt: Path) -> list[str]:
    """Tell where a wheel that was rebuilt from the sdist differs from the one from the tree."""
    first, second = digests(wheel), digests(rebuilt)
    changed = sorted(name for name in first | second if first.get(name) != second.get(name))
    return [f"{wheel.name}: {name} differs when built from the sdist" for name in changed]


def digests(wheel: Path) -> dict[str, int]:
    """Return the checksum of each file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist()}
