"""What the documents say about installing works, and is what errors advise."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
READMES = [ROOT / "README.md", *(ROOT / "packages" / name / "README.md" for name in PACKAGES)]
LINE = re.compile(r"^(?:uv )?(pip install [^#\n]*(?:#subdirectory[^#\n]*)*)", re.MULTILINE)


def installed(package: str) -> bool:
    """Tell whether a package is installed, and not only on the path."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def lines(readme: Path) -> list[str]:
    """Return the commands of pip in a README that install packages of this tree."""
    found = (line.strip() for line in LINE.findall(readme.read_text(encoding="utf-8")))
    return [line for line in found if "dilated-" in line]


def names(line: str) -> list[str]:
    """Return the packages that a command names, with their extras."""
    words = [word for word in shlex.split(line) if "dilated-" in word]
    return [word.partition(" @ ")[0].removeprefix("packages/") for word in words]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_gives_the_commands_that_errors_advise(readme: Path) -> None:
    installing = pytest.importorskip("dilated_factory.installing")
    text = readme.read_text(encoding="utf-8")
    assert lines(readme)
    for line in lines(readme):
        if f"uv {line}" in text:  # uv finds the siblings that a line leaves out
            continue
        url = "URL" if "git+" in line else None
        assert line == installing.install_command(*names(line), url=url)


def test_the_first_page_has_a_command_for_every_package() -> None:
    told = {name for line in lines(ROOT / "README.md") for name in names(line)}
    assert told >= set(PACKAGES)


def test_a_package_and_what_it_requires_are_in_one_command() -> None:
    """The table behind the commands is what the packages declare."""
    installing = pytest.importorskip("dilated_factory.installing")
    for package in PACKAGES:
        text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
        declared = tomllib.loads(text)["project"]["dependencies"]
        siblings = {re.split(r"[^\w-]", x)[0] for x in declared} & set(PACKAGES)
        assert set(names(installing.install_command(package))) == siblings | {package}


def test_nothing_advises_a_name_that_is_on_no_index() -> None:
    files = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("**/*.md")]
    bare = re.compile(r"""pip install (?:[^\n#]* )?["']?dilated-\w+(?![\w-]|\[?\w*\]? @)""")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if not path.relative_to(ROOT).parts[0].startswith(".")
        for match in bare.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_uv_finds_every_package_in_the_tree() -> None:
    uv = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert uv["workspace"]["members"] == ["packages/*"]
    assert uv["sources"] == {package: {"workspace": True} for package in PACKAGES}


@pytest.mark.slow
def test_a_git_url_installs_packages_that_work_together(tmp_path: Path) -> None:
    if not all(map(installed, PACKAGES)):
        pytest.skip("needs what all packages require to be installed")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone, or git is not installed")
    from dilated_factory.installing import install_command

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # Before 24.1 pip refuses URLs of files in a requirement.
    run(python, "-m", "pip", "install", "-q", "pip>=24.1")
    # Torch and the rest are those of this environment, without the packages of this tree.
    (tmp_path / "rest").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("dilated", "pip", "setuptools", "__pycache__")):
            (tmp_path / "rest" / entry.name).symlink_to(entry)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where).strip())
    (site / "rest.pth").write_text(str(tmp_path / "rest"), encoding="utf-8")

    line = install_command("dilated-ring", "dilated-factory[ring]", url=ROOT.as_uri())
    run(python, "-m", *shlex.split(line))
    for package in ("dilated_core", "dilated_ring", "dilated_factory"):
        (record,) = site.glob(f"{package}-*.dist-info/direct_url.json")
        told = json.loads(record.read_text(encoding="utf-8"))
        assert told["subdirectory"] == f"packages/{package.replace('_', '-')}"
    registry = "from dilated_factory import default_registry; print(*default_registry())"
    assert "ring_multihead" in run(python, "-c", registry).split()
    assert "Usage: dilated" in run(str(scripts / "dilated"), "--help")
