"""Text of edited versions: what it is made of, and that its sides are apart."""

import random
import re
from itertools import groupby
from pathlib import Path

import pytest

from dilated_factory.training.revisions import edited, write_revisions
from dilated_factory.training.token_cache import hash_share

HEADER = re.compile(rb"^# (sources/\d+\.py)(, edited)?\n", re.MULTILINE)


@pytest.fixture
def sources(tmp_path: Path) -> list[tuple[str, Path]]:
    found = []
    for number in range(43):
        path = tmp_path / f"{number}.py"
        lines = (f"name_{'abcdefghijk'[i % 11]}{number} = {i}\n" for i in range(7 * number + 5))
        path.write_text("".join(lines))
        found.append((f"sources/{number}.py", path))
    return found


def test_each_version_is_followed_by_its_edit_and_a_file_is_on_one_side(
    sources: list[tuple[str, Path]], tmp_path: Path
) -> None:
    write_revisions(sources, tmp_path / "out", train=30_011, held_out=3001, seed=5)
    sides = {name: (tmp_path / "out" / name).read_bytes() for name in ("train", "held-out")}
    assert [len(text) // 10_000 for text in sides.values()] == [3, 0]
    for side, text in sides.items():
        _, *parts = HEADER.split(text)
        pieces = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        runs = [list(run) for _, run in groupby(pieces, key=lambda piece: bool(piece[1]))]
        assert len(runs) % 2 == 0
        for before, after in zip(runs[::2], runs[1::2], strict=True):
            assert [name for name, _, _ in before] == [name for name, _, _ in after]
            for (name, _, old), (_, _, new) in zip(before, after, strict=True):
                assert (hash_share(name) < 0.1) == (side == "held-out")
                assert new != old
                kept = [line for line in new.splitlines() if b"new_" not in line]
                assert set(kept) <= set(old.splitlines())
    again = tmp_path / "again"
    write_revisions(sources, again, train=30_011, held_out=3001, seed=5)
    assert (again / "train").read_bytes() == sides["train"]


@pytest.mark.parametrize("text", [b"", b"x = 1\n", b"while False:\n    break\n"])
def test_what_has_no_name_stays(text: bytes) -> None:
    assert edited(text, random.Random(0)) == text


def test_an_edit_changes_one_name_everywhere_and_leaves_a_line_out() -> None:
    text = b"first(class_)\nclass second:\n    first = first_\n    return\n"
    found = {edited(text, random.Random(seed)) for seed in range(64)}
    assert b"new_first(class_)\nclass second:\n    new_first = first_\n" in found
    assert all(each.count(b"\n") == 3 and b"new_class s" not in each for each in found)
