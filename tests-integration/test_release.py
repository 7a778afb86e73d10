"""What a release checks and writes, without one."""

from pathlib import Path

import pytest
from tools import release
from tools.packages import PACKAGES

TAGS = ["dilated-core-v0.1.0", "dilated-core-v0.10.0", "dilated-core-v0.9.1", "dilated-ring-v7.0.0"]


def test_the_last_release_is_the_highest_of_the_package() -> None:
    assert release.last_version("dilated-core", [*TAGS, "dilated-core-vnext"]) == "0.10.0"
    assert release.last_version("dilated-pool", TAGS) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_the_first_release_may_be_the_version_of_the_sources(package: str) -> None:
    assert release.refusals(package, release.present_version(package), []) == []


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("dilated", "0.1.0", "the package must be one of"),
        ("dilated-core", "v0.2", "three numbers"),
        ("dilated-core", "0.02.0", "three numbers"),
        ("dilated-core", "0.2.0rc1", "three numbers"),
        ("dilated-core", "0.9.1", "the tag dilated-core-v0.9.1 exists"),
        ("dilated-core", "0.9.2", "higher than the last release, 0.10.0"),
        ("dilated-core", "0.0.9", "must not be lower than the sources'"),
        ("dilated-core", "7.0.0", "dilated-factory does not admit it: dilated-core>="),
        ("dilated-pool", "7.0.0", "dilated-factory does not admit it: dilated-pool>="),
    ],
)
def test_a_release_that_cannot_be_is_refused(package: str, version: str, says: str) -> None:
    assert any(says in problem for problem in release.refusals(package, version, TAGS))


def test_names_may_break_with_a_new_minor_version_only_and_from_1_on_with_a_major_one() -> None:
    assert not release.may_break("0.1.0", "0.1.1")
    assert release.may_break("0.1.4", "0.2.0")
    assert release.may_break("0.9.0", "1.0.0")
    assert not release.may_break("1.0.0", "1.1.0")
    assert release.may_break("1.9.0", "2.0.0")


@pytest.mark.parametrize("heading", ["Unreleased", "0.1.0 (not released yet)"])
def test_the_open_section_is_dated_under_a_new_one(heading: str) -> None:
    before = f"# Changelog\n\n## {heading}\n\n- New.\n\n## 0.0.1 - 2026-01-02\n\n- Old.\n"
    after = release.dated(before, "0.1.0", "2026-11-29")
    assert after == before.replace(f"## {heading}", "## Unreleased\n\n## 0.1.0 - 2026-11-29")
    with pytest.raises(ValueError, match="must not be empty"):
        release.dated(after, "0.1.1", "2026-11-30")


@pytest.mark.parametrize(
    "text", ["# Changelog\n", "## Unreleased\n\n- a\n\n## Unreleased\n\n- b\n"]
)
def test_a_changelog_has_one_open_section(text: str) -> None:
    with pytest.raises(ValueError, match="must have one section"):
        release.dated(text, "0.1.0", "2026-11-29")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_can_be_bumped_and_dated(package: str) -> None:
    assert '\n__version__ = "9.8.7"\n' in release.bumped(release.about(package), "9.8.7")
    changelog = Path(__file__).parents[1] / "packages" / package / "CHANGELOG.md"
    assert "\n## 9.8.7 - " in release.dated(changelog.read_text("utf-8"), "9.8.7", "2026-11-29")
    with pytest.raises(ValueError, match="one line of __version__"):
        release.bumped("", "9.8.7")
