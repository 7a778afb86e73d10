"""What SECURITY.md says of readers, by harmless files: refused in one line, and nothing is run."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dilated_core import DilatedPattern
from dilated_factory import InputError
from dilated_factory.configs.files import MOST_BYTES, read_regular, read_values
from dilated_factory.corpora.tokens import MOST_FILE_BYTES, MOST_TOKENS, load_tokenizer
from dilated_factory.interop.checkpoints import read_checkpoint
from dilated_factory.slides.models import loaded
from dilated_factory.slides.readers import read_slide_features
from dilated_factory.tools.pattern_page import pattern_page
from dilated_factory.training.checkpoints import MOST_STATE_BYTES
from dilated_factory.training.embedding_files import read_embeddings
from dilated_factory.training.lock import holder
from dilated_factory.training.run_folder import MOST_LINE_BYTES

# An array of numpy that is in no archive.
ARRAY = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
ARRAY += b" " * (127 - len(ARRAY)) + b"\n" + bytes(4)
RUN: list[str] = []


def ran(word: str) -> str:
    RUN.append(word)
    return word


class Calls:
    """A harmless function that would be called by whoever unpickles this."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ran, ("called",)


def torch_file(path: Path) -> Path:
    torch.save({"features": torch.ones(2, 3), "more": Calls()}, path)
    return path


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(torch_file(tmp_path / "weights.pt"))
    with pytest.raises(InputError, match="holds more than tensors"):
        read_slide_features(torch_file(tmp_path / "slide.pt"))
    objects = np.array([Calls(), Calls()], dtype=object)
    np.savez(tmp_path / "slide.npz", features=objects)
    with pytest.raises(InputError, match="not a whole"):
        read_slide_features(tmp_path / "slide.npz")
    assert RUN == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"x" * 99, ARRAY])
@pytest.mark.parametrize("ending", [".pt", ".npz"])
def test_a_feature_file_that_is_none_is_refused(
    tmp_path: Path, ending: str, content: bytes
) -> None:
    path = tmp_path / f"slide{ending}"
    path.write_bytes(content)
    for read in (read_slide_features, *([read_embeddings] if ending == ".npz" else [])):
        with pytest.raises(InputError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_any_file_in_the_place_of_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    table = b"slide,patient,mutated,value\n0,p0,no,0.0\n1,p1,yes,0.125\n"
    drawn = random.Random(0)  # torch's reader takes bytes for commands: of a stack, of a memory
    commands = (bytes(drawn.choices(b"(.)0abdeghjlopstu}]\x80\x85\n1", k=30)) for _ in range(200))
    for content in (table, *commands):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pt"):
            loaded(read_checkpoint, path)


def test_a_page_holds_no_text_that_ends_its_script() -> None:
    page = pattern_page(DilatedPattern([8], [1]), 16, 2, is_causal=True)
    assert page.count("</script>") == page.count("<script")
    # A pattern takes none of a user's words.
    with pytest.raises(ValueError, match="head_offsets"):
        DilatedPattern([8], [1], head_offsets="</script>")  # type: ignore[arg-type]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.timeout(30)
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "any.json")
    with pytest.raises(InputError, match="must be a regular file"):
        read_values(tmp_path / "any.json")
    with pytest.raises(InputError, match="must be a regular file"):
        read_regular("/dev/zero")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="must be a regular file"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "lock")
    assert holder(tmp_path) == "another process"


def test_a_lock_says_its_holder_whatever_it_holds(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"", b" " * (MOST_BYTES + 1)):
        (tmp_path / "lock").write_bytes(content)
        assert holder(tmp_path)


def test_the_document_tells_the_bounds_of_the_code() -> None:
    text = (Path(__file__).parents[3] / "SECURITY.md").read_text(encoding="utf-8")
    assert f"{MOST_BYTES >> 20} MiB a file" in text
    assert f"| {MOST_STATE_BYTES >> 20} MiB |" in text
    assert f"| {MOST_FILE_BYTES >> 20} MiB |" in text
    assert f"ids of 2^{MOST_TOKENS.bit_length() - 1} and more" in text
    assert f"{MOST_LINE_BYTES >> 10} KiB a line" in text


def test_settings_in_a_file_are_data(tmp_path: Path) -> None:
    for values in ({"kind": "dilated", "__class__": "os.system"}, {"kind": "os.system"}):
        (tmp_path / "any.json").write_text(json.dumps(values))
        from dilated_factory.configs.kinds import read_config

        with pytest.raises(InputError):
            read_config(tmp_path / "any.json")
