"""Every installed package keeps what its metadata, its names and its arrows promise."""

import importlib
import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, metadata, version
from importlib.resources import files
from pathlib import Path

import pytest

MAY_IMPORT = {
    "dilated_core": set(),
    "dilated_pool": set(),
    "dilated_sparse": {"dilated_core"},
    "dilated_ring": {"dilated_core"},
    "dilated_factory": {"dilated_core", "dilated_pool", "dilated_ring", "dilated_sparse"},
}

# Imports all modules of a package and prints which modules of the project that brought in.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(".__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # Kernels of GPUs need triton, which a torch for the CPU does not bring along; models of
            # Hugging Face need the extra `transformers`, which brings tokenizers.
            if error.name not in ("tokenizers", "triton", "transformers"):
                raise
print(*sorted({name.split(".")[0] for name in sys.modules if name.startswith("dilated_")}))
"""


@pytest.fixture(params=MAY_IMPORT)
def name(request: pytest.FixtureRequest) -> str:
    """Give the import name of each package that is installed."""
    try:
        distribution(request.param)
    except PackageNotFoundError:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def test_the_version_is_that_of_the_metadata(name: str) -> None:
    assert importlib.import_module(name).__version__ == version(name)


def test_all_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_public_names_are_listed_once(name: str) -> None:
    listed = importlib.import_module(name).__all__
    assert len(listed) == len(set(listed))


def test_types_are_announced(name: str) -> None:
    assert files(name).joinpath("py.typed").is_file()


def test_the_metadata_is_complete(name: str) -> None:
    told = metadata(name)
    assert told["Name"] == name.replace("_", "-")
    assert told["License-Expression"] == "MIT"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Summary"]
    assert told["Description"] or told.get_payload()


def test_siblings_are_required_in_a_range_of_one_minor_version(name: str) -> None:
    siblings = [text for text in distribution(name).requires or [] if text.startswith("dilated-")]
    for text in siblings:
        requirement = text.partition(";")[0]
        if "dilated-factory[" not in requirement:  # the extra `all` names the other extras
            assert ">=0.1" in requirement
            assert "<0.2" in requirement


def test_no_import_brings_in_a_sibling_that_it_may_not(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {name} <= MAY_IMPORT[name]


def test_the_wheel_holds_the_package_and_nothing_else(name: str) -> None:
    installed = [path.as_posix() for path in distribution(name).files or []]
    roots = {path.split("/")[0] for path in installed if not path.startswith("../")}
    info = f"{name}-{version(name)}.dist-info"
    assert roots == {name, info}
    assert f"{name}/py.typed" in installed
    assert [path for path in installed if "test" in path.split("/")[-1]] == []


def test_the_public_names_are_those_of_the_snapshot(name: str) -> None:
    """A name that comes or goes is a decision: change the snapshot with it."""
    snapshots = [*(Path(__file__).parent / "public_names").glob(f"{name}*.txt")]
    assert snapshots
    for snapshot in snapshots:
        listed = importlib.import_module(snapshot.stem).__all__
        assert sorted(listed) == snapshot.read_text(encoding="utf-8").split()
