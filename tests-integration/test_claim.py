"""What benchmarks/claim.py makes before it trains: its options, and the text in which names are."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import claim

DEFINITION = re.compile(rb"\n\n\ndef ([a-z]{14})\(value\):\n    return value\n\n\n")
USE = re.compile(rb"^    found = ([a-z]{14})\(value\)\n", re.MULTILINE)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
@pytest.mark.parametrize(
    "option", ["minutes", "seeds", "tokens", "rates", "short-share", "names-share", "workers"]
)
def test_a_number_out_of_bounds_is_refused_in_one_line(option, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--small", "--paths", f"--{option}={value}"])
    with pytest.raises(SystemExit) as raised:
        claim.main()
    assert raised.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--{option}" in last
    assert value in last


@pytest.mark.parametrize(
    "bad", ["--rates=", "--rates=1e-3,,2e-3", "--minutes=0", "--short-share=1"]
)
def test_an_edge_is_refused(bad, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--small", "--paths", bad])
    with pytest.raises(SystemExit, match="2"):
        claim.main()


def test_sown_names_are_used_between_lines_once_and_behind_their_definition(tmp_path):
    scale = claim.SMALL._replace(names_share=0.3)
    (tmp_path / "train").mkdir()
    # The last line is long, without an end, and uses are due behind it.
    lines = b"".join(b"value = %d\n" % i for i in range(3000)) + b"x" * 900
    (tmp_path / "train" / "text").write_bytes(lines)
    claim.sow_names(tmp_path, scale)
    text = (tmp_path / claim.training_folder(scale) / "text").read_bytes()
    defined = {m[1]: m.end() for m in DEFINITION.finditer(text)}
    used = {m[1]: m.start() for m in USE.finditer(text)}
    assert len(DEFINITION.findall(text)) == len(defined)
    assert len(USE.findall(text)) == len(used) > 100
    assert all(at >= defined[name] + 256 for name, at in used.items())
    assert USE.sub(b"", DEFINITION.sub(b"", text)) == lines
