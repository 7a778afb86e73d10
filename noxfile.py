"""The sessions of nox: `./noxw --list` names them, `./noxw` runs the default ones."""

from __future__ import annotations

import datetime
import os
import runpy
import shutil
import sys
from itertools import chain
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.insert(0, str(Path(__file__).parent))

from tools import release as steps
from tools.built import difference, sdist_problems, wheel_problems
from tools.installing import (
    LOCK,
    LOWEST_LOCK,
    editable,
    install,
    uv_build_wheel,
    uv_environment,
    wheels,
    write_lock,
)
from tools.packages import (
    PACKAGES,
    ROOT,
    declared_siblings,
    import_name,
    optional_siblings,
    outside_requirements,
)

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
    # With pytest 9.2 the groups of pytest-xdist 3.8 are spread over the workers.
    "pytest>=9,<9.2",
    "pytest-randomly>=4,<6",
    "pytest-timeout>=2.4,<3",
    "pytest-xdist>=3.6,<4",
)
# The two whose verdict changes with a new release are pinned more narrowly.
RUFF = "ruff>=0.17.6,<0.18"
MYPY = "mypy>=2.4.1,<2.5"
IMPORT_LINTER = "import-linter>=2.3,<3"
GRIFFE = "griffe==2.4.1"
BUILD_TOOLS = ("hatch>=1.16,<2", "twine>=6.1,<7")
SITE_TOOLS = (
    "matplotlib>=3.9",
    "mkdocs>=1.6.1,<2",
    "mkdocs-material>=9.8,<10",
    "mkdocstrings>=1,<2",
    "mkdocstrings-python>=2,<3",
)

nox.needs_version = ">=2026.2"
nox.options.default_venv_backend = "uv"
nox.options.sessions = [
    "lint",
    "types",
    "imports",
    "structure",
    "docs",
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
    group = group_of("dilated-factory")
    install(session, MYPY, "nox", "mkdocs>=1.6.1,<2", *TEST_TOOLS, group, *editable(*PACKAGES))
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check which package may import which with import-linter."""
    install(session, IMPORT_LINTER)
    sources = (str(ROOT / "packages" / package / "src") for package in PACKAGES)
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(sources)})


@nox.session(venv_backend="none")
def structure(session: nox.Session) -> None:
    """Print long functions and files; fail on circles of imports and homonymous classes."""
    session.run(sys.executable, "tools/structure.py", external=True)


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
    # What extras bring, for the examples; `lowest` does without.
    options = [group_of(package) for package in packages if package == "dilated-factory"]
    install(session, *TEST_TOOLS, *options, *wheels(session, *packages))
    run_pytest(session, "tests-integration")


@nox.session
def isolated(session: nox.Session) -> None:
    """Test that each test of the integration passes alone, in a process of its own."""
    install(session, *TEST_TOOLS, *wheels(session, *PACKAGES))
    paths = ["tests-integration", "packages/dilated-factory/tests/test_behaviours.py"]
    # The examples, and what is slow, have processes of their own already.
    paths += ["-m", "not slow"]
    paths += [f"--ignore=tests-integration/test_{x}.py" for x in ("examples", "readme_examples")]
    told = session.run("pytest", "--collect-only", "-q", "-p", "no:randomly", *paths, silent=True)
    # One set of parameters of each test is enough: each costs a process that loads torch.
    lines = [line for line in reversed(str(told).splitlines()) if "::" in line]
    nodes = {line.partition("[")[0]: line for line in lines}.values()  # the first of each
    session.run("python", "-m", "tools.alone", *nodes, env={"OMP_NUM_THREADS": "1"}, log=False)


@nox.session
def lowest(session: nox.Session) -> None:
    """Test all packages together with the lowest versions that they allow of what they require.

    Torch is not among them where this machine has wheels of its own.
    """
    install(session, *TEST_TOOLS, *wheels(session, *PACKAGES), lock=LOWEST_LOCK)
    tests = ["test_configs.py", "test_registry.py", "test_cli_tools.py"]
    tests = [f"packages/dilated-factory/tests/{name}" for name in tests]
    # The oldest typer and matplotlib use what the click and pyparsing of the lock warn of.
    old = (
        "-Wignore:'click.utils.get_:DeprecationWarning",
        "-Wignore::pyparsing.warnings.PyparsingDeprecationWarning",
    )
    # The session integration runs them, and no version changes anything about most of them.
    others = ("caches", "examples", "fetched", "gpu_line", "release", "structure")
    left_out = [f"--ignore=tests-integration/test_{x}.py" for x in (*others, "tools_of_the_tests")]
    run_pytest(session, "tests-integration", *left_out, *tests, *old)


@nox.session
@nox.parametrize("package", EACH_PACKAGE)
def alone(session: nox.Session, package: str) -> None:
    """Install one package alone, from its wheel, and import it."""
    install(session, *wheels(session, package, *declared_siblings(package)))
    session.run("uv", "pip", "check", external=True)
    module = import_name(package)
    session.run("python", "-c", f"import {module}; print({module}.__version__)")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into .nox/site; `-- serve` shows it while it is written."""
    install(session, *SITE_TOOLS, *editable(*PACKAGES))
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", *(session.posargs or ["build", "--quiet"]), env=env)


# Sessions on request


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Renew the exact versions that the other sessions install: requirements*.lock."""
    tools = [RUFF, MYPY, IMPORT_LINTER, GRIFFE, *TEST_TOOLS, *BUILD_TOOLS, *SITE_TOOLS]
    tools += runpy.run_path(str(ROOT / "noxw"))["REQUIREMENTS"]
    all_of_it = (outside_requirements(package, with_options=True) for package in PACKAGES)
    write_lock(session, LOCK, chain(tools, *all_of_it))
    declared = (outside_requirements(package, with_options=False) for package in PACKAGES)
    write_lock(session, LOWEST_LOCK, chain(TEST_TOOLS, *declared), "--resolution=lowest-direct")


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Test all packages with the newest versions of everything; deprecations are listed."""
    groups = [group_of(package) for package in PACKAGES]
    install(session, *TEST_TOOLS, *groups, *wheels(session, *PACKAGES), lock=None)
    session.run("uv", "pip", "list", external=True)
    listed = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    lenient = [f"-Wdefault::{warning}" for warning in listed]
    # Each suite by itself: what one of them fails at must not hide the others.
    suites = [*(f"packages/{package}/tests" for package in PACKAGES), "tests-integration"]
    failed = []
    for suite in suites:
        try:
            run_pytest(session, suite, *lenient)
        except CommandFailed:
            failed.append(suite)
    if failed:
        session.error(f"failed with the newest versions: {', '.join(failed)}")


@nox.session(default=False)
def frameworks(session: nox.Session) -> None:
    """Run all examples and lm-evaluation-harness, with Lightning, accelerate and peft installed."""
    group = group_of("dilated-factory", "frameworks")
    install(session, *TEST_TOOLS, group, *editable("dilated-factory", "dilated-core"))
    harness = "packages/dilated-factory/tests/test_harness.py"
    run_pytest(session, "tests-integration/test_examples.py", harness)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train a small LongNet on versions of the standard library; see what its context is worth."""
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
def attack(session: nox.Session) -> None:
    """Attack every promise with random cases: `./noxw -s attack -- --minutes 60 --seed 7`."""
    install(session, *TEST_TOOLS, *editable(*PACKAGES))
    env = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "tools.attack", *session.posargs, env=env)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel and the sdist of each package into dist/ and check them."""
    install(session, *BUILD_TOOLS)
    build_packages(session, *PACKAGES)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Release one package, here only: `./noxw -s release -- dilated-core 0.2.0`.

    Bumps its version, dates its changelog, compares its public names with the last release's,
    builds and checks it, commits and tags; nothing is pushed. What fails leaves the tree as it was.
    """
    if len(session.posargs) != 2:
        session.error("name a package and a version after `--`, as in dilated-core 0.2.0")
    package, version = session.posargs
    if git(session, "status", "--porcelain"):
        session.error("the tree must be clean: commit or stash what git status lists")
    tags = git(session, "tag", "--list").split()
    if problems := steps.refusals(package, version, tags):
        session.error("\n".join(problems).removesuffix("."))
    install(session, GRIFFE, *BUILD_TOOLS)
    compare_names(session, package, version, steps.last_version(package, tags))
    changelog = ROOT / "packages" / package / "CHANGELOG.md"
    changed = {ROOT / steps.about_path(package): steps.bumped(steps.about(package), version)}
    try:
        day = datetime.date.today().isoformat()
        changed[changelog] = steps.dated(changelog.read_text(encoding="utf-8"), version, day)
    except ValueError as error:
        session.error(f"{changelog}: {error}")
    paths = [str(path) for path in changed]
    try:
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
        build_packages(session, package)
        if git(session, "diff", "--name-only"):
            git(session, "commit", "--quiet", "--message", f"{package} {version}", "--", *paths)
    except BaseException:
        git(session, "checkout", "HEAD", "--", *paths)
        raise
    name = steps.tag(package, version)
    git(session, "tag", "--annotate", "--message", f"{package} {version}", name)
    session.log(f"tagged {name}, here only; its files are in dist/")


# What they share


def install_for_tests(session: nox.Session, package: str) -> None:
    """Install a package, what it declares, its extras of this tree, and the test tools."""
    sources = editable(package, *declared_siblings(package), *optional_siblings(package))
    install(session, *TEST_TOOLS, group_of(package), *sources)


def group_of(package: str, group: str = "test") -> str:
    """Return the argument that installs a dependency group of a package."""
    return f"--group=packages/{package}/pyproject.toml:{group}"


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


def build_packages(session: nox.Session, *packages: str) -> None:
    """Build wheels and sdists of packages into an empty dist/ and check them."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for package in packages:
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


def compare_names(session: nox.Session, package: str, version: str, last: str | None) -> None:
    """Refuse a release that breaks public names where its version says that it does not."""
    if last is None:
        session.log(f"first release of {package}: there are no public names to compare with")
        return
    source = f"packages/{package}/src"
    arguments = ["--search", source, "--against", steps.tag(package, last), "--format", "oneline"]
    command = ["griffe", "check", import_name(package), *arguments]
    told = str(session.run(*command, silent=True, success_codes=[0, 1])).strip()
    session.log(told or f"no public name of {package} {last} has changed for the worse")
    if told and not steps.may_break(last, version):
        session.error(f"{version} must not break what {last} has; release the next minor version")


def git(session: nox.Session, *arguments: str) -> str:
    """Run git at the root and return what it says."""
    return str(session.run("git", *arguments, external=True, silent=True)).strip()


def hatch(session: nox.Session, *arguments: str) -> str:
    """Run hatch with environments of its own, inside the session's, and return what it says."""
    # Under the session's UV_PYTHON, hatch would install into the session's environment.
    own = {"HATCH_DATA_DIR": session.create_tmp(), "UV_PYTHON": None, "VIRTUAL_ENV": None}
    return str(session.run("hatch", *arguments, env=uv_environment() | own, silent=True))
