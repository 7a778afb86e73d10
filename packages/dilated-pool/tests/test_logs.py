"""Logs, replays, tables and pictures."""

import json
import runpy
import sys

import pytest
import torch

from dilated_pool import (
    EventKind,
    EventLog,
    UnifiedMemoryPool,
    offload_activations,
    plot_timeline,
    replay,
    stats_table,
)


@pytest.fixture
def log():
    pool = UnifiedMemoryPool(overhead=None)
    with pool.record() as events:
        with pool.borrow((5, 7), dtype=torch.int16), pool.borrow((300,)):
            pass
        pool.lease((5, 7)).release()
        pool.trim()
    return events


def test_a_log_tells_what_happened_in_order(log):
    events = list(log)
    kinds = [event.kind.value for event in events]
    pairs = ["grow", "lease", "grow", "lease", "release", "release", "grow", "lease", "release"]
    assert kinds == [*pairs, "trim", "trim", "trim"]
    assert [event.live_bytes for event in events] == [0, 70, 70, 1270, 70, 0, 0, 140, 0, 0, 0, 0]
    assert events[-1].reserved_bytes == 0
    assert events[1].shape == (5, 7)
    assert events[1].dtype == "int16"
    assert events[1].device == "cpu"
    assert [event.lease for event in events if event.kind is EventKind.RELEASE] == [2, 1, 3]
    assert events == sorted(events, key=lambda event: event.seconds)


def test_recording_ends_with_its_context_and_does_not_nest():
    pool = UnifiedMemoryPool()
    again = pool.record()
    with pool.record() as events, pytest.raises(RuntimeError, match="recorded already"):
        again.__enter__()
    pool.lease((3,)).release()
    assert len(events) == 0


def test_a_log_survives_a_file(log, tmp_path):
    path = tmp_path / "log.jsonl"
    log.write(path)
    lines = path.read_text().splitlines()
    assert len(lines) == len(log)
    assert json.loads(lines[1])["shape"] == [5, 7]
    assert list(EventLog.read(path)) == list(log)


@pytest.mark.parametrize(
    "line", ["no json", "[]", "{}", '{"kind": "lost"}', '{"kind": "grow", "more": 1}']
)
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1, is not an event"):
        EventLog.read(path)


def test_a_replay_makes_the_same_leases(log):
    result = replay(log, UnifiedMemoryPool())
    assert result.seconds > 0
    assert result.stats.total_leases == 3
    assert result.stats.total_leased_bytes == 70 + 1200 + 140
    assert result.stats.peak_live_bytes == 1270
    assert result.stats.live_bytes == 0


def test_a_replay_releases_what_the_log_does_not_and_skips_what_began_before():
    pool = UnifiedMemoryPool()
    before = pool.lease((5,))
    with pool.record() as events:
        before.release()
        after = pool.lease((7,))
    result = replay(events, UnifiedMemoryPool(), device="cpu")
    assert result.stats.total_leases == 1
    assert result.stats.live_bytes == 0
    after.release()


def test_the_log_of_a_training_step_replays_with_little_fragmentation():
    net = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True)
    pool = UnifiedMemoryPool()
    with pool.record() as events:
        for _ in range(3):
            with offload_activations(pool, min_bytes=0):
                loss = net(torch.randn(2, 67, 32)).sum()
            loss.backward()
    stats = replay(events, UnifiedMemoryPool()).stats
    assert stats.total_leases >= 30
    assert stats.fragmentation <= 1.25


def test_a_table_shows_all_counters():
    rich = pytest.importorskip("rich.console")
    pool = UnifiedMemoryPool(limit_bytes=3 << 20)
    with pool.borrow((1 << 19,)):
        console = rich.Console(width=100, record=True, file=sys.stderr)
        console.print(stats_table(pool.stats(), title="Mine"))
    text = console.export_text()
    for words in ("Mine", "limit_bytes", "3.00 MiB", "live_bytes", "2.00 MiB", "fragmentation"):
        assert words in text


def test_a_timeline_is_a_picture(log, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    plot_timeline(log, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_empty_timeline_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="events must hold at least one"):
        plot_timeline([], tmp_path / "timeline.png")


def complaint(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dilated_pool", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("dilated_pool", run_name="__main__")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m dilated_pool: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [None, b"{", b"\xff", b"[" * 90_000, b'{"kind": "lease"}', b'{"kind": 7}'],
    ids=range(6),
)
@pytest.mark.parametrize("command", ["replay", "plot"])
def test_a_log_that_cannot_be_used_is_one_line(command, content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_bytes(content)
    drawn = [str(tmp_path / "x.png")] if command == "plot" else []
    complaint(monkeypatch, capsys, command, str(path), *drawn)


def test_a_log_that_cannot_be_replayed_is_one_line(log, tmp_path, monkeypatch, capsys):
    path = tmp_path / "log.jsonl"
    log.write(path)
    for option in (["--device", "abacus"], ["--limit-bytes", "-1"], ["--limit-bytes", "1"]):
        complaint(monkeypatch, capsys, "replay", str(path), *option)


def test_the_command_line_replays_and_draws(log, tmp_path, monkeypatch, capsys):
    path = tmp_path / "log.jsonl"
    log.write(path)
    monkeypatch.setattr(sys, "argv", ["dilated_pool", "replay", str(path), "--device", "cpu"])
    runpy.run_module("dilated_pool", run_name="__main__")
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["total_leases"] == "3"
    pytest.importorskip("matplotlib")
    picture = tmp_path / "log.png"
    monkeypatch.setattr(sys, "argv", ["dilated_pool", "plot", str(path), str(picture)])
    runpy.run_module("dilated_pool", run_name="__main__")
    assert picture.exists()


@pytest.mark.parametrize("missing", ["matplotlib.figure", "rich.table"])
def test_what_the_extra_brings_is_named_where_it_is_missing(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    name = missing.partition(".")[0]
    calls = {
        "rich": lambda: stats_table(UnifiedMemoryPool().stats()),
        "matplotlib": lambda: plot_timeline([], tmp_path / "timeline.png"),
    }
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "{name}>='):
        calls[name]()
