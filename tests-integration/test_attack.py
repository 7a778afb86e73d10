"""The campaign of tools/attack: a short part of it with a fixed seed, and that it can fail."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("core", "factory", "pool", "ring", "sparse"):
    pytest.importorskip(f"dilated_{package}")

ROOT = Path(__file__).parents[1]
# How many of each target: what some ten seconds are enough for; all is `./noxw -s attack`.
SOME = {
    "attention,packed,cache,blocks": 120,
    "pool,threads,configurations": 25,
    "killed,full,damaged,lines": 6,
}


def attack(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.attack", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("names", SOME)
def test_no_promise_is_broken(names: str, tmp_path: Path) -> None:
    count = str(SOME[names])
    options = ("--cases", count, "--seed", "27", "--failures", str(tmp_path))
    done = attack("--targets", names, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{count} cases     0 failures") == len(names.split(","))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.xdist_group("attack-ranks")
def test_no_promise_is_broken_across_ranks(tmp_path: Path) -> None:
    done = attack("--targets", "ring", "--cases", "20", "--seed", "27", "--failures", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_campaign_goes_on_where_it_was(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    common = ("--targets", "packed,cache", "--state", str(state), "--failures", str(tmp_path))
    attack(*common, "--cases", "3", "--seed", "5")
    written = json.loads(state.read_text())
    assert written.pop("seconds").keys() == {"packed", "cache"}
    assert written == {"seed": 5, "done": {"packed": 3, "cache": 3}, "failed": {}}
    assert "seed 5" in attack(*common, "--cases", "4").stdout
    assert json.loads(state.read_text())["done"] == {"packed": 4, "cache": 4}


# In a process of its own: the product is broken on purpose.
BROKEN = """
import sys
from dilated_core import dilated_attention
from tools.attack import __main__ as campaign, numeric

def wrong(query, *arguments, **options):
    out, lse = dilated_attention(query, *arguments, **options)
    return out + (out.shape[1] > 5) * 1e-2, lse

numeric.dilated_attention = wrong
sys.exit(campaign.main(sys.argv[1:]))
"""


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository is where modules are looked for, whoever started pytest."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.usefixtures("repository")
def test_a_broken_promise_becomes_a_minimal_test(tmp_path: Path) -> None:
    options = ["--targets", "attention", "--cases", "9", "--seed", "1", "--failures", str(tmp_path)]
    command = [sys.executable, "-c", BROKEN, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    written = sorted(tmp_path.glob("test_attention_*.py"))
    assert written
    space: dict[str, Any] = {}
    exec(written[0].read_text(), space)
    assert space["CASE"]["length"] == 6  # nothing shorter fails
    assert space["CASE"]["batch"] == 1
    # Without what was broken it passes.
    next(value for name, value in space.items() if name.startswith("test_"))()


@pytest.mark.usefixtures("repository")
def test_the_same_seed_draws_the_same_cases() -> None:
    from tools.attack.__main__ import targets

    for name, target in targets().items():
        one, other = (target.draw(random.Random(f"7/{name}")) for _ in range(2))
        assert one == other
        assert json.loads(json.dumps(one)) == json.loads(json.dumps(other))
