"""What the tests of all packages share: sources, hypothesis profiles, skips for missing GPUs."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent
LEFT_OUT = pytest.StashKey[str]()
SOURCES = {path.parent.name: path.parent.parent for path in ROOT.glob("packages/*/src/*/py.typed")}

# On a machine where no package is installed, test this tree's sources. Where one is installed,
# only what it declares may be found.
if not any(importlib.util.find_spec(name) for name in SOURCES):
    folders = [str(folder) for folder in SOURCES.values()]
    sys.path[:0] = folders
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *inherited])

# The first call of an operator is slow, and so is a busy machine: no example has a deadline.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=5000)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default")
)


# Marks of plugins that arrange tests and decide nothing about them: known without the plugins too.
PLUGIN_MARKS = {
    "xdist": "xdist_group(name): tests that share one worker; without pytest-xdist all do",
    "timeout": "timeout(seconds): what ends a test that hangs; without pytest-timeout nothing does",
}
# Its conftest.py imports what the package requires, before any test could be skipped.
FACTORY_TESTS = ROOT / "packages" / "dilated-factory" / "tests"
FACTORY_NEEDS = ("matplotlib", "numpy", "pydantic", "rich", "safetensors", "typer")
FACTORY_LACKS = [name for name in FACTORY_NEEDS if importlib.util.find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks of absent plugins known."""
    for plugin, mark in PLUGIN_MARKS.items():
        if not config.pluginmanager.hasplugin(plugin):
            config.addinivalue_line("markers", mark)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests of dilated-factory out where what it requires is missing, and say so."""
    if collection_path != FACTORY_TESTS or not FACTORY_LACKS:
        return None
    config.stash[LEFT_OUT] = f"{FACTORY_TESTS.relative_to(ROOT)}: not installed: " + ", ".join(
        FACTORY_LACKS
    )
    return True


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which tests were left out, and what is missing."""
    if (left_out := config.stash.get(LEFT_OUT, None)) is not None:
        terminalreporter.write_line(f"LEFT OUT {left_out}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need more GPUs than there are."""
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if needed == 1 and not item.get_closest_marker("gpu"):
            continue
        found = cuda_device_count()
        if found < needed:
            reason = f"needs {needed} CUDA device{'s' * (needed > 1)}, found {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


def cuda_device_count() -> int:
    """Count the CUDA devices; torch is imported only where a test asks for one."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_collection_finish() -> None:
    """Spare the collector most of its rounds: the long ones look at all of torch.

    Not by gc.freeze: hypothesis 6.130 then finds nobody who refers to its generators, and warns.
    """
    gc.collect()
    gc.set_threshold(50_000, 20, 50)
