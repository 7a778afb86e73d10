"""Text of edited versions: what it is made of, and that its sides are apart."""

import random
import re
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from dilated_factory.training.revisions import edited, write_revisions
from dilated_factory.training.token_cache import hash_share

HEADER = re.compile(rb"^# (sources/\d+\.py), version (\d)\n", re.MULTILINE)


@pytest.fixture
def sources(tmp_path: Path) -> list[tuple[str, Path]]:
    found = []
    for number in range(43):
        path = tmp_path / f"{number}.py"
        lines = (f"name_{'abcdefghijk'[i % 11]} = {number}{i}\n" for i in range(7 * number + 5))
        path.write_text("".join(lines))
        found.append((f"sources/{number}.py", path))
    return found


def test_versions_follow_each_other_with_one_edit_each_and_a_file_is_on_one_side(
    sources: list[tuple[str, Path]], tmp_path: Path
) -> None:
    write_revisions(sources, tmp_path / "out", train=30_011, held_out=3001, seed=5)
    sides = {name: (tmp_path / "out" / name).read_bytes() for name in ("train", "held-out")}
    assert [len(text) // 10_000 for text in sides.values()] == [3, 0]
    for side, text in sides.items():
        _, *parts = HEADER.split(text)
        pieces = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        versions = [list(run) for _, run in groupby(pieces, key=lambda piece: piece[1])]
        assert [run[0][1] for run in versions] == [b"%d" % n for n in (1, 2, 3, 4, 5)] * (
            len(versions) // 5
        )
        for run in versions:
            for name, _, _ in run:
                assert (hash_share(name) < 0.1) == (side == "held-out")
        for before, after in pairwise(versions):
            if after[0][1] == b"1":
                continue
            assert [name for name, _, _ in before] == [name for name, _, _ in after]
            changed = [(old, new) for (_, _, old), (_, _, new) in zip(before, after, strict=True)]
            ((old, new),) = [(old, new) for old, new in changed if old != new]
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
