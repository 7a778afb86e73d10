"""Text of versions: what it is made of, and that its sides are apart."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

from dilated_factory.errors import CorpusError
from dilated_factory.training.revisions import PAGE, VERSIONS, edited, write_revisions
from dilated_factory.training.token_cache import hash_share


def test_versions_of_a_page_follow_each_other_and_a_file_is_on_one_side(tmp_path: Path) -> None:
    files = []
    for number in range(43):
        path = tmp_path / f"{number}.py"
        path.write_text("".join(f"v{number} = name_{chr(97 + i % 26)} + {i}\n" for i in range(150)))
        files.append((f"sources/{number}.py", path))
    write_revisions(files, tmp_path / "out", train=60_013, held_out=5003, seed=5)
    for side, least in (("train", 60_013), ("held-out", 5003)):
        text = (tmp_path / "out" / side).read_bytes()
        assert least <= len(text) < least + VERSIONS * (PAGE + 1)
        for number in range(43):
            is_held_out = hash_share(f"sources/{number}.py".encode()) < 0.1
            assert (f"v{number} = ".encode() in text) <= (is_held_out == (side == "held-out"))
        while text:
            pages = [text[i * (PAGE + 1) :][: PAGE + 1] for i in range(VERSIONS)]
            assert {(len(page), page[PAGE:]) for page in pages} == {(PAGE + 1, b"\n")}
            assert len({page.lower() for page in pages}) == 1
            assert all(a != b for a, b in pairwise(pages))
            text = text[VERSIONS * (PAGE + 1) :]
    write_revisions(files, tmp_path / "again", train=60_013, held_out=5003, seed=5)
    for side in ("train", "held-out"):
        assert (tmp_path / "again" / side).read_bytes() == (tmp_path / "out" / side).read_bytes()


@pytest.mark.parametrize("size", [0, PAGE])
def test_files_without_a_page_are_refused_before_anything_is_written(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "short.py"
    path.write_bytes(b"#" * size)
    files = [(f"{number}.py", path) for number in range(43)]
    with pytest.raises(CorpusError, match=r"more than 1024 bytes, .* Got 0 and 0\."):
        write_revisions(files, tmp_path / "out", train=1, held_out=1, seed=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [b"", b"x = 1\n", b"while False:\n    break\n"])
def test_what_has_no_name_stays(text: bytes) -> None:
    assert edited(text, random.Random(0)) == text


def test_an_edit_changes_one_name_everywhere() -> None:
    text = b"first(class_)\nclass second:\n    first = first_\n    return\n"
    found = {edited(text, random.Random(seed)) for seed in range(64)}
    assert b"FIRST(class_)\nclass second:\n    FIRST = first_\n    return\n" in found
    assert all(each.lower() == text and each != text for each in found)
    assert not any(b"CLASS " in each or b"RETURN" in each for each in found)
