"""The sessions of nox: `./noxw --list` names them, `./noxw` runs the default ones."""

from __future__ import annotations

import ast
import email
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import nox
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

ROOT = Path(__file__).parent
PACKAGES = ("dilated-core", "dilated-pool", "dilated-sparse", "dilated-ring", "dilated-factory")
SUBSETS = (
    ("core",),
    ("core", "pool"),
    ("core", "ring"),
    ("core", "sparse"),
    ("core", "ring", "pool"),
    ("core", "sparse", "ring"),
    ("core", "pool", "sparse", "ring", "factory"),
)
EACH_SUBSET = [
    nox.param(tuple(f"dilated-{part}" for part in subset), id="+".join(subset))
    for subset in SUBSETS
]
EACH_PACKAGE = [nox.param(package, id=package) for package in PACKAGES]

TEST_TOOLS = (
    "hypothesis>=6.130,<7",
    "pytest>=9,<10",
    "pytest-randomly>=4,<6",
    "pytest-timeout>=2.4,<3",
    "pytest-xdist>=3.6,<4",
)
# The two whose verdict changes with a new release are pinned more narrowly.
RUFF = "ruff>=0.17.6,<0.18"
MYPY = "mypy>=2.4.1,<2.5"

nox.needs_version = ">=2026.2"
nox.options.default_venv_backend = "uv"
nox.options.sessions = [
    "lint",
    "types",
    "imports",
    "tests",
    "integration",
    "isolated",
    "lowest",
    "alone",
]

# With bytecode forbidden, each process of a fresh environment would compile all of torch again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# Default sessions


@nox.session
def lint(session: nox.Session) -> None:
    """Check format and style with ruff."""
    install(session, RUFF)
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all packages with mypy, strictly."""
    group = "--group=packages/dilated-factory/pyproject.toml:test"
    install(session, MYPY, "nox", *TEST_TOOLS, group, *editable(*PACKAGES))
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check which package may import which with import-linter."""
    install(session, "import-linter>=2.3,<3")
    sources = (str(ROOT / "packages" / package / "src") for package in PACKAGES)
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(sources)})


@nox.session
@nox.parametrize("package", EACH_PACKAGE)
def tests(session: nox.Session, package: str) -> None:
    """Test one package, installed with only what it declares."""
    install_for_tests(session, package)
    run_pytest(session, f"packages/{package}/tests")


@nox.session
@nox.parametrize("packages", EACH_SUBSET)
def integration(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Test some of the packages together, installed from their wheels."""
    install(session, *TEST_TOOLS, *wheels(session, *packages))
    run_pytest(session, "tests-integration")


@nox.session
def isolated(session: nox.Session) -> None:
    """Test that each test of the integration passes alone, in a process of its own."""
    install(session, *TEST_TOOLS, *wheels(session, *PACKAGES))
    paths = ["tests-integration", "packages/dilated-factory/tests/test_behaviours.py"]
    # The examples of READMEs have processes of their own already.
    paths.append("--ignore=tests-integration/test_readme_examples.py")
    told = session.run("pytest", "--collect-only", "-q", "-p", "no:randomly", *paths, silent=True)
    # One set of parameters of each test is enough: each costs a process that loads torch.
    nodes = {x.partition("[")[0]: x for x in str(told).splitlines() if "::" in x}.values()
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = pool.map(functools.partial(run_alone, session), nodes)
        failures = [said for said in results if said is not None]
    if failures or not nodes:
        session.error("\n".join(failures) or "no test was found")
    session.log(f"{len(nodes)} tests pass alone")


@nox.session
def lowest(session: nox.Session) -> None:
    """Test all packages together with the lowest versions that they allow of what they require.

    Torch is not among them where this machine has wheels of its own.
    """
    built = wheels(session, *PACKAGES)
    install(session, "--resolution", "lowest-direct", *TEST_TOOLS, *built)
    tests = ["test_configs.py", "test_registry.py", "test_cli_tools.py"]
    tests = [f"packages/dilated-factory/tests/{name}" for name in tests]
    # Older versions of typer use what today's click, which they allow, warns of.
    old = "ignore:.* is deprecated and will be removed in Click 9:DeprecationWarning"
    run_pytest(session, "tests-integration", *tests, "-W", old)


@nox.session
@nox.parametrize("package", EACH_PACKAGE)
def alone(session: nox.Session, package: str) -> None:
    """Install one package alone, from its wheel, and import it."""
    install(session, *wheels(session, package, *declared_siblings(package)))
    session.run("uv", "pip", "check", external=True)
    module = import_name(package)
    session.run("python", "-c", f"import {module}; print({module}.__version__)")


# Sessions on request


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train a small LongNet on the standard library and evaluate it."""
    install(session, *editable("dilated-factory", *declared_siblings("dilated-factory")))
    # Waiting threads sleep: spinning ones would slow each other down on a machine that is shared.
    env = {"OMP_WAIT_POLICY": "PASSIVE"}
    session.run("dilated", "demo", "--out", "demo-run", *session.posargs, env=env)


@nox.session(default=False)
@nox.parametrize("package", EACH_PACKAGE)
def thorough(session: nox.Session, package: str) -> None:
    """Test one package with many more random examples."""
    install_for_tests(session, package)
    env = {"HYPOTHESIS_PROFILE": "thorough"}
    run_pytest(session, f"packages/{package}/tests", timeout=0, env=env)


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run the GPU tests with the Python that runs noxw, and its torch."""
    python = os.environ.get("NOXW_PYTHON", "python")
    arguments = ["-m", "gpu or multi_gpu", "packages", *session.posargs]
    session.run(python, "-m", "pytest", *arguments, external=True)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run a script of benchmarks/: `./noxw -s bench -- SCRIPT [ARGS]`."""
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    if not session.posargs or session.posargs[0] not in scripts:
        session.error(f"name a script after `--`, one of: {', '.join(scripts) or 'none yet'}")
    install(session, *editable(*PACKAGES))
    script, *arguments = session.posargs
    session.run("python", f"benchmarks/{script}", *arguments)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel and the sdist of each package into dist/ and check them."""
    install(session, "hatch>=1.16,<2", "twine>=6.1,<7")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            hatch(session, "build", str(dist))
            version = hatch(session, "version").strip().splitlines()[-1]
        stem = f"{import_name(package)}-{version}"
        wheel, sdist = dist / f"{stem}-py3-none-any.whl", dist / f"{stem}.tar.gz"
        rebuilt = (Path(session.create_tmp()) / "rebuilt").resolve()
        uv_build_wheel(session, sdist, rebuilt)
        problems = [
            *wheel_problems(wheel, package, version),
            *sdist_problems(sdist, stem),
            *difference(wheel, rebuilt / wheel.name),
        ]
        if problems:
            session.error("\n".join(problems))
    session.run("twine", "check", "--strict", *(str(path) for path in sorted(dist.iterdir())))


# Installing


def install(session: nox.Session, *requirements: str) -> None:
    """Install with uv, and with the torch that this machine's pip would take."""
    version = torch_version()
    if version is None:
        session.install(*requirements, env=uv_environment())
        return
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(f"torch=={version}\n")
    session.install("--constraint", str(constraints), *requirements, env=uv_environment())


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


def install_for_tests(session: nox.Session, package: str) -> None:
    """Install a package, what it declares, its extras of this tree, and the test tools."""
    sources = editable(package, *declared_siblings(package), *optional_siblings(package))
    group = f"--group=packages/{package}/pyproject.toml:test"
    install(session, *TEST_TOOLS, group, *sources)


def editable(*packages: str) -> list[str]:
    """Return the arguments that install packages from this tree, editable."""
    return [f"--editable=packages/{package}" for package in packages]


def declared_siblings(package: str) -> list[str]:
    """Return the packages of this tree that a package requires, directly or not."""
    found: dict[str, None] = {}
    for requirement in project_table(package)["dependencies"]:
        name = Requirement(requirement).name
        if name in PACKAGES:
            found |= dict.fromkeys([name, *declared_siblings(name)])
    return list(found)


def optional_siblings(package: str) -> list[str]:
    """Return the packages of this tree that extras of a package require."""
    extras = project_table(package).get("optional-dependencies", {}).values()
    names = [Requirement(requirement).name for extra in extras for requirement in extra]
    return [name for name in PACKAGES if name in names and name != package]


def project_table(package: str) -> dict[str, Any]:
    """Return the [project] table of a package."""
    text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def import_name(package: str) -> str:
    """Return the name under which a package is imported."""
    return package.replace("-", "_")


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
    arguments = ["--quiet", "--wheel", "--out-dir", str(folder), str(source)]
    session.run("uv", "build", *arguments, env=uv_environment(), external=True, silent=True)


# Testing


def run_pytest(
    session: nox.Session, *paths: str, timeout: int = 300, env: dict[str, str] | None = None
) -> None:
    """Run pytest on two workers, in random order, each test under a time limit in seconds."""
    arguments = ["-n", "2", "--dist", "loadgroup", "--timeout", str(timeout)]
    if os.environ.get("CI"):
        arguments.append("--randomly-seed=1")
    # One thread a worker: two workers with a thread for each core would fight over the cores.
    env = {"OMP_NUM_THREADS": "1", **(env or {})}
    session.run("pytest", *arguments, *paths, *session.posargs, env=env)


def run_alone(session: nox.Session, node: str) -> str | None:
    """Run one test in a process of its own; return what it said if it failed."""
    python = Path(session.bin) / "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", node]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else f"{node} fails alone:\n{done.stdout}{done.stderr}"


# Building and checking what was built


def hatch(session: nox.Session, *arguments: str) -> str:
    """Run hatch with environments of its own, inside the session's, and return what it says."""
    # Under the session's UV_PYTHON, hatch would install into the session's environment.
    own = {"HATCH_DATA_DIR": session.create_tmp(), "UV_PYTHON": None, "VIRTUAL_ENV": None}
    return str(session.run("hatch", *arguments, env=uv_environment() | own, silent=True))


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
