"""How the sessions install: with uv, exact versions from the lock, this machine's torch."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import nox
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from tools.packages import ROOT

LOCK = ROOT / "requirements.lock"
LOWEST_LOCK = ROOT / "requirements-lowest.lock"
# Torch itself requires exact versions of these, which differ from one build of it to the next.
OF_TORCH = ("nvidia-", "cuda-")


def install(session: nox.Session, *requirements: str, lock: Path | None = LOCK) -> None:
    """Install with uv, in the versions of a lock file (None: the newest that are allowed).

    Torch is the one that this machine's pip would take, where it has one of its own.
    """
    lines = [] if lock is None else lock.read_text(encoding="utf-8").splitlines()
    torch = torch_version()
    if torch is not None:  # which says itself what triton it needs
        lines = [line for line in lines if not line.startswith(("torch==", "triton=="))]
        lines.append(f"torch=={torch}")
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(lines), encoding="utf-8")
    built_by = [] if lock is None else ["--build-constraint", str(LOCK)]
    session.install(
        "--constraint", str(constraints), *built_by, *requirements, env=uv_environment()
    )


def write_lock(
    session: nox.Session, path: Path, requirements: Iterable[str], *options: str
) -> None:
    """Write the exact versions that fulfil requirements on every platform and Python."""
    asked = Path(session.create_tmp()) / "asked.txt"
    asked.write_text("\n".join(sorted(set(requirements))), encoding="utf-8")
    fixed = ("--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--upgrade")
    found = session.run(
        "uv", "pip", "compile", "--quiet", "--no-config", *fixed, *options, str(asked),
        # No place where wheels of this machine lie: the lock is the same wherever it is made.
        env=uv_environment() | {"UV_FIND_LINKS": None, "UV_TORCH_BACKEND": None},
        external=True, silent=True,
    )  # fmt: skip
    lines = [line for line in str(found).splitlines() if not line.startswith(OF_TORCH)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    session.log(f"{path.name}: {len(lines)} versions")


@functools.cache
def uv_environment() -> dict[str, str]:
    """Tell uv, which does not read pip's configuration, what pip is told on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    settings = dict(re.findall(r"^global\.([\w-]+)=(.*)$", asked.stdout, re.MULTILINE))
    # What the environment says goes before what a file says.
    settings |= re.findall(r"^:env:\.([\w-]+)=(.*)$", asked.stdout, re.MULTILINE)
    same = {"cert": "SSL_CERT_FILE", "find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX"}
    environment = {
        variable: str(ast.literal_eval(settings[setting]))
        for setting, variable in same.items()
        if setting in settings
    }
    if "UV_FIND_LINKS" in environment:  # pip separates places by spaces, uv by commas
        environment["UV_FIND_LINKS"] = ",".join(environment["UV_FIND_LINKS"].split())
    return environment | {name: os.environ[name] for name in environment if name in os.environ}


@functools.cache
def torch_version() -> str | None:
    """Return the newest torch that fits this Python among the wheels that lie on this machine.

    Without a pin on it, a resolver prefers the registry's newest torch to a wheel that is here.
    """
    supported = set(sys_tags())
    versions = []
    for link in filter(None, uv_environment().get("UV_FIND_LINKS", "").split(",")):
        folder = Path(url2pathname(urlsplit(link).path) if link.startswith("file:") else link)
        for wheel in folder.glob("torch-*.whl"):
            try:
                _, version, _, tags = parse_wheel_filename(wheel.name)
            except InvalidWheelFilename:
                continue
            if tags & supported:
                versions.append(version)
    return str(max(versions)) if versions else None


def editable(*packages: str) -> list[str]:
    """Return the arguments that install packages from this tree, editable."""
    return [f"--editable=packages/{package}" for package in packages]


# The wheels that were built since nox started, by package: the sessions share them.
BUILT: dict[str, Path] = {}


def wheels(session: nox.Session, *packages: str) -> list[str]:
    """Build the wheels of packages and return their paths.

    Paths, not names: a name would let a registry's package of the same name come in.
    """
    for package in packages:
        if package not in BUILT:
            folder = (Path(session.create_tmp()) / "wheels" / package).resolve()
            shutil.rmtree(folder, ignore_errors=True)
            uv_build_wheel(session, ROOT / "packages" / package, folder)
            (BUILT[package],) = folder.glob("*.whl")
    return [str(BUILT[package]) for package in packages]


def uv_build_wheel(session: nox.Session, source: Path, folder: Path) -> None:
    """Build a wheel from a source tree or an sdist with uv."""
    arguments = ["--quiet", "--wheel", "--build-constraint", str(LOCK), "--out-dir", str(folder)]
    session.run(
        "uv", "build", *arguments, str(source), env=uv_environment(), external=True, silent=True
    )
