"""The commands that measure, plan, show and check; what they print for people and machines."""

import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory.cli import main
from dilated_factory.cli.app import COMMANDS, load_command
from dilated_factory.cli.output import seconds, size
from dilated_factory.configs.kinds import CONFIG_TYPES, parse_any
from dilated_factory.tools.planning import Workload
from dilated_factory.training import figures

Captured = pytest.CaptureFixture[str]
GROUPS = ("config", "genomes", "plan", "slides")
PATTERN = ("--segment-lengths", "4,12", "--dilation-rates", "1,3")
PNG = b"\x89PNG"


def run(capsys: Captured, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys: Captured, *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert isinstance(record, dict)
    return record


def complaint(capsys: Captured, *arguments: object) -> str:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dilated: error: ")
    assert err.count("\n") == 1
    return err


def in_a_process(
    *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    command = getattr(importlib.import_module(f"dilated_factory.cli.{name}"), name)
    text = command.info.help if name in GROUPS else inspect.getdoc(command)
    assert text is not None
    assert text.split("\n")[0] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(capsys: Captured, name: str) -> None:
    code, said, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"dilated {name}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_holds_what_markdown_takes_for_a_tag_and_drops(name: str) -> None:
    command = load_command(name)
    for each in (command, *getattr(command, "commands", {}).values()):
        texts = [each.help, *(getattr(option, "help", None) for option in each.params)]
        for text in filter(None, texts):
            assert "<" not in re.sub("`[^`]*`", "", text)


def test_the_help_comes_without_torch() -> None:
    code = (
        "import sys; from dilated_factory.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'pydantic', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done, _ = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "bench" in done.stdout


def test_the_help_comes_at_once() -> None:
    # Against an empty Python process, so that a busy machine does not decide.
    empty = min(in_a_process("-c", "import typer.rich_utils")[1] for _ in range(3))
    whole = min(in_a_process("-m", "dilated_factory", "--help")[1] for _ in range(3))
    assert whole < 0.5 or whole < 3 * empty


@pytest.mark.parametrize(
    ("words", "expected"),
    [("dilated ", "train"), ("dilated pl", "plan"), ("dilated config sch", "schema")],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    done, _ = in_a_process(
        "-m",
        "dilated_factory",
        _DILATED_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )
    assert expected in done.stdout.split(), done


def test_show_draws_in_the_terminal(capsys: Captured) -> None:
    code, said, _ = run(capsys, "show", *PATTERN, "--length", 12, "--heads", 2, "--head", 1)
    assert code == 0
    assert "head 1 of 2" in said
    seen = DilatedPattern([4, 12], [1, 3]).multiplicity(12, 2)[1]
    assert said.splitlines()[1] == "query key 0 to 11"
    rows = [line.split()[1] for line in said.splitlines()[2:]]
    assert rows == ["".join(str(int(c)) if c else "·" for c in row) for row in seen]


def test_show_writes_a_picture_and_a_page(capsys: Captured, tmp_path: Path) -> None:
    png, html = tmp_path / "p.png", tmp_path / "p.html"
    show = ("show", *PATTERN, "--length", 24, "--causal")
    code, said, _ = run(capsys, *show, "--png", png, "--html", html)
    assert code == 0
    assert str(png) in said
    assert str(html) in said
    assert png.read_bytes().startswith(PNG)
    assert "<canvas" in html.read_text()
    record = result(capsys, *show, "--heads", 3)
    seen = DilatedPattern([4, 12], [1, 3]).multiplicity(24, 3, is_causal=True)
    assert record["visible_pairs"] == int(seen.sum())
    assert record["blind_queries"] == int((seen.sum(-1) == 0).sum())
    assert record["png"] is None


def test_show_zooms_into_long_patterns(capsys: Captured) -> None:
    long = ("show", "--segment-lengths", "1024,65536", "--dilation-rates", "1,16", "--causal")
    long = (*long, "--length", 65536)
    code, said, _ = run(capsys, *long)
    title, cells, keys, *rows = said.splitlines()
    assert code == 0
    assert title.endswith("head 0 of 4, causal")
    assert cells.startswith("a cell: 1,366 queries down, 683 keys across;")
    assert keys.split() == ["query", "key", "0", "to", "65,535"]
    assert len(rows) == 48
    assert rows[0].split() == ["0", "▓▓" + "·" * 94]
    assert rows[40].split()[0] == "54,640"
    assert rows[40].split()[1][:78] == "░" * 78
    _, said, _ = run(capsys, *long, "--from", 65500, "--to", 65530)
    rows = said.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [f"{i:,}" for i in range(65500, 65530)]
    # 65,504 is a multiple of 16: its own segment of 1024 begins before what is shown.
    assert rows[4].split()[1] == "11112" + "·" * 25
    record = result(capsys, *long, "--heads", 3)
    pairs = DilatedPattern([1024, 65536], [1, 16]).flops(65536, 3, 1, is_causal=True) // 4
    assert (record["visible_pairs"], record["density"]) == (pairs, None)


def test_show_draws_a_million_positions(capsys: Captured, tmp_path: Path) -> None:
    png, html = tmp_path / "p.png", tmp_path / "p.html"
    show = ("show", "--length", 10**6, "--heads", 2, "--from", 10, "--to", 9 * 10**5)
    code, _, _ = run(capsys, *show, "--png", png, "--html", html)
    assert code == 0
    assert png.read_bytes().startswith(PNG)
    assert '"view": [10, 900000]' in html.read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--segment-lengths", "4"), "must be given together"),
        (("--segment-lengths", "4", "--dilation-rates", "1,2"), "the same number of entries"),
        (("--head", "4"), "--head must be less than --heads (4)"),
        (("--from", "32"), "--from must be less than --to"),
        (("--from", "9", "--to", "9"), "--from must be less than --to"),
        (("--to", "33"), "--to at most --length (32). Got 0 and 33."),
        (("--heads", "2", "--head-groups", "split"), "heads must be at least"),
    ],
)
def test_show_rejects(capsys: Captured, options: tuple[str, ...], says: str) -> None:
    assert says in complaint(capsys, "show", *options)


def test_bench_times_what_can_run_and_says_why_the_rest_cannot(
    capsys: Captured, tmp_path: Path
) -> None:
    png = tmp_path / "bench.png"
    config = tmp_path / "attention.toml"
    config.write_text('kind = "dilated"\nsegment_lengths = [5]\ndilation_rates = [1]\n')
    bench = ("bench", *PATTERN, "--length", 24, "--heads", 3, "--head-dim", 8, "--rounds", 2)
    code, said, _ = run(capsys, *bench, "--config", config, "--png", png, "--causal")
    assert code == 0
    for part in ("dilated, torch", "dense, torch SDPA", "file: dilated", str(png), "24 positions"):
        assert part in said
    assert "not timed: dilated, triton: it needs CUDA" in said
    assert png.read_bytes().startswith(PNG)
    record = result(capsys, *bench, "--forward-only")
    timings = {timing["name"]: timing for timing in record["timings"]}
    assert record["forward_flops"] == DilatedPattern([4, 12], [1, 3]).flops(24, 3, 8)
    assert len(timings["dilated, torch"]["rounds"]) == 2
    assert timings["dilated, torch"]["least_seconds"] > 0
    assert timings["dilated, triton"]["least_seconds"] is None


def test_bench_leaves_the_reference_out_where_it_is_too_large(capsys: Captured) -> None:
    record = result(
        capsys,
        *("bench", "--length", 4097, "--heads", 1, "--head-dim", 1, "--rounds", 1),
        "--forward-only",
    )
    obstacles = {t["name"]: t["obstacle"] for t in record["timings"]}
    assert "only up to 4096 positions" in obstacles["dilated, reference"]
    assert obstacles["dilated, torch"] is None


def test_a_contender_that_fails_does_not_stop_the_others(capsys: Captured, tmp_path: Path) -> None:
    config = tmp_path / "attention.json"
    config.write_text(
        json.dumps(
            {
                "kind": "dilated",
                "segment_lengths": [4] * 9,
                "dilation_rates": [1] * 9,
                "head_groups": "split",
            }
        )
    )
    code, said, _ = run(
        capsys, "bench", "--length", 16, "--heads", 2, "--config", config, "--rounds", 1
    )
    assert code == 0
    assert "not timed: file: dilated: ValueError: heads must be at least" in said
    assert "dense, torch SDPA" in said


PEER = "dilated_attention_pytorch"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Installs a peer whose module has a given text; it is gone afterwards."""

    def install(text: str) -> None:
        (tmp_path / PEER).mkdir()
        (tmp_path / PEER / "__init__.py").touch()
        (tmp_path / PEER / "dilated_attention.py").write_text(text)

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == PEER]:
        del sys.modules[name]


BENCH = ("bench", *PATTERN, "--length", 24, "--heads", 3, "--head-dim", 8, "--rounds", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import flash_attn_of_long_ago", "ModuleNotFoundError: No module named 'flash_attn_of"),
        (
            "raise RuntimeError('built for\\nanother torch')",
            "RuntimeError: built for another torch",
        ),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("DilatedAttention = None", "TypeError:"),
    ],
)
def test_a_peer_that_cannot_be_imported_does_not_lose_what_was_timed(
    capsys: Captured, tmp_path: Path, peer: Callable[[str], None], text: str, says: str
) -> None:
    peer(text)
    png = tmp_path / "bench.png"
    code, said, err = run(capsys, *BENCH, "--png", png)
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert any(f"not timed: dilated-attention-pytorch: {says}" in line for line in lines)
    assert "dense, torch SDPA" in said
    assert png.read_bytes().startswith(PNG)
    timings = {t["name"]: t for t in result(capsys, *BENCH)["timings"]}
    assert timings["dilated, torch"]["least_seconds"] > 0
    assert says in timings["dilated-attention-pytorch"]["obstacle"]


def test_bench_counts_the_operations_of_the_definition_only_for_what_computes_it(
    capsys: Captured, peer: Callable[[str], None]
) -> None:
    peer(
        "class DilatedAttention:\n"
        "    def __init__(self, segment_lengths, dilation_rates): pass\n"
        "    def __call__(self, q, k, v, is_causal): return q + k + v\n"
    )
    record = result(capsys, *BENCH)
    timings = {t["name"]: t for t in record["timings"]}
    ours = timings["dilated, torch"]
    flops = 3.5 * record["forward_flops"]
    assert ours["flops_per_second"] == pytest.approx(flops / ours["least_seconds"])
    for other in ("dilated-attention-pytorch", "dense, torch SDPA"):
        assert timings[other]["least_seconds"] > 0
        assert timings[other]["flops_per_second"] is None
    _, said, _ = run(capsys, *BENCH)
    row = next(line for line in said.splitlines() if "dilated-attention-pytorch" in line)
    assert row.split("│")[-2].strip() == "-"


def test_bench_prints_what_was_timed_until_ctrl_c(
    capsys: Captured, peer: Callable[[str], None]
) -> None:
    peer("raise KeyboardInterrupt")
    code, said, _ = run(capsys, *BENCH)
    assert code == 130
    assert "dense, torch SDPA" in said
    assert "interrupted: 1 not timed" in said
    code, said, _ = run(capsys, *BENCH, "--json")
    assert code == 130
    assert len(json.loads(said)["timings"]) == 4


@pytest.mark.parametrize("terminal", [True, False])
def test_bench_shows_what_it_times_on_a_terminal_only(capsys: Captured, terminal: bool) -> None:
    shown, said = shown_on_stderr(capsys, terminal, *BENCH, "--json")
    assert json.loads(said)["timings"]
    assert ("timing dense, torch SDPA" in shown) == terminal
    assert shown == "" or terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_evaluate_shows_how_far_it_is_on_a_terminal_only(
    capsys: Captured, terminal: bool, finished_run: Path
) -> None:
    options = ("--contexts", 16, "--max-bytes", 4096, "--json")
    shown, said = shown_on_stderr(capsys, terminal, "evaluate", finished_run, *options)
    assert set(json.loads(said)["bits_per_byte"]) == {"16"}
    assert ("scoring at context 16" in shown) == terminal
    assert ("counting for the Markov models" in shown) == terminal
    assert shown == "" or terminal


def shown_on_stderr(capsys: Captured, terminal: bool, *arguments: object) -> tuple[str, str]:
    """What a command writes to standard error, a terminal or not, and to standard output."""
    if not terminal:
        code, said, shown = run(capsys, *arguments)
        assert code == 0
        return shown, said
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals")
    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(ours, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w") as stderr:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        code, said, _ = run(capsys, *arguments)
    reader.join()
    os.close(ours)
    assert code == 0
    return b"".join(parts).decode(), said


def test_the_title_of_the_times_is_inside_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    pattern = DilatedPattern([1024, 4096, 16384, 65536], [1, 4, 16, 64])
    workload = Workload(pattern, 65536, 16, 128, 8, True, torch.bfloat16)
    bench = importlib.import_module("dilated_factory.cli.bench")
    figures.save_timings(tmp_path / "p.png", {"a": (1.0, 2.0)}, bench.describe(workload))
    (figure,) = drawn
    title = figure._suptitle
    figure.draw_without_rendering()
    box, page = title.get_window_extent(), figure.bbox
    assert title.get_fontsize() >= 9
    assert box.x0 >= page.x0 + 10
    assert box.x1 <= page.x1 - 10
    assert box.y1 <= page.y1
    assert box.y0 >= figure.axes[0].get_window_extent().y1


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_copied_from_the_help(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    _, said, _ = run(capsys, name, "--help")
    command = getattr(importlib.import_module(f"dilated_factory.cli.{name}"), name)
    text = inspect.cleandoc(command.info.help) if name in GROUPS else inspect.getdoc(command)
    assert text is not None
    examples = text[re.search(r"^Examples?:", text, re.MULTILINE).start() :]  # type: ignore[union-attr]
    assert said.rstrip().endswith(examples)
    assert all(len(line) <= 80 for line in examples.splitlines())
    assert said.count("Example") == 1
    assert not re.search(r"\n\s*\n\s*\n", said)


@pytest.mark.parametrize("arguments", [*((name,) for name in COMMANDS), ("config", "validate")])
def test_the_help_does_not_cut_types(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    _, said, _ = run(capsys, *arguments, "--help")
    options = said.split("Example")[0]
    # However typer writes a choice: <a|b> or [a|b].
    cut = [line for line in options.splitlines() if re.search(r"[<\[][^>\]\s]*\s", line)]
    assert [line for line in cut if "|" in line] == []


def test_plan_counts_what_the_definition_says(capsys: Captured) -> None:
    plan = ("plan", 96, *PATTERN, "--heads", 4, "--head-dim", 8, "--dtype", "float32")
    record = result(capsys, *plan, "--tflops", 0.001)
    flops = DilatedPattern([4, 12], [1, 3]).flops(96, 4, 8)
    row = 96 * 4 * 8 * 4
    assert record["flops"] == flops
    assert record["tensor_bytes"] == 4 * row + 96 * 4 * 4
    assert record["message_bytes"] == record["received_bytes"] == record["gradient_bytes"] == 0
    assert record["compute_seconds"] == pytest.approx(flops / 1e9)
    trained = result(capsys, *plan, "--tflops", 0.001, "--training", "--batch", 3)
    assert trained["flops"] == 3 * 3.5 * flops
    assert trained["memory_bytes"] == 3 * (7 * row + 96 * 4 * 4)


def test_plan_of_several_devices_is_that_of_ring(capsys: Captured) -> None:
    ring = pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    options = ("--heads", 4, "--head-dim", 8, "--dtype", "float32", "--tflops", 0.001)
    spread = ("plan", 95, *PATTERN, *options, "--devices", 24, "--gigabytes-per-second", 1)
    made = ring.plan(
        DilatedPattern([4, 12], [1, 3]),
        length=96,
        world_size=24,
        heads=4,
        head_dim=8,
        dtype=torch.float32,
        flops_per_second=1e9,
        bytes_per_second=1e9,
    )
    record = result(capsys, *spread)
    assert record["rows"] == 4
    assert record["received_bytes"] == made.traffic.forward > 0
    assert record["exchange_seconds"] == pytest.approx(made.traffic.forward / 1e9)
    trained = result(capsys, *spread, "--training")
    assert trained["received_bytes"] == made.traffic.total
    assert trained["memory_bytes"] == made.memory.peak or (
        made.memory.peak <= trained["memory_bytes"] <= 1.5 * made.memory.peak
    )
    assert "heads must be a multiple of kv_heads" in complaint(capsys, *spread, "--kv-heads", 3)


def test_plan_of_a_billion_tokens_is_quick(capsys: Captured) -> None:
    pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    start = time.process_time()
    code, said, _ = run(
        capsys,
        *("plan", 10**9, "--devices", 1024, "--training", "--tflops", 400),
        *("--gigabytes-per-second", 300),
    )
    assert time.process_time() - start < 10
    assert code == 0
    for part in ("976,563", "GiB", "TFLOP", "(given)", "ms", "1,024 devices"):
        assert part in said
    assert len(said.splitlines()[0]) < 150
    words = " ".join(said.split())
    assert (
        "gather receives 25,473,942 vectors, no more than the 46,875,024 of the rank's own" in words
    )


def test_plan_says_one_device_and_few_branches_as_they_are(capsys: Captured) -> None:
    _, said, _ = run(capsys, "plan", 96, *PATTERN, "--tflops", 1)
    assert said.startswith("DilatedPattern([4, 12], [1, 3]), 1 x 96 positions on 1 device\n")


def test_plan_measures_the_rate_where_none_is_given(capsys: Captured) -> None:
    code, said, _ = run(capsys, "plan", 512, "--heads", 1, *PATTERN)
    assert code == 0
    assert "measured here" in said


def test_plan_does_not_guess_the_speed_of_links(capsys: Captured) -> None:
    pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    code, said, _ = run(capsys, "plan", 96, *PATTERN, "--devices", 24, "--tflops", 1)
    assert code == 0
    assert said.count("unknown: no speed of the links given") == 2


def test_plan_of_several_devices_needs_ring(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = complaint(capsys, "plan", 96, *PATTERN, "--devices", 24, "--tflops", 1)
    assert (
        "in a clone of the project, pip install packages/dilated-core packages/dilated-ring" in said
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (3 << 30, "3.00 GiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("duration", "text"), [(90.0, "90.00 s"), (0.25, "250.00 ms"), (3e-6, "3.0 µs")]
)
def test_durations_are_readable(duration: float, text: str) -> None:
    assert seconds(duration) == text


def test_doctor_tells_what_works_and_why_the_rest_does_not(capsys: Captured) -> None:
    code, said, _ = run(capsys, "doctor")
    assert code == 0
    for part in ("torch", "dilated attention, torch, cpu", "agrees with the reference", "gloo"):
        assert part in " ".join(said.split())
    record = result(capsys, "doctor")
    checks = {check["what"]: check for check in record["checks"]}
    assert checks["dilated attention, reference, cpu"]["works"]
    if not torch.cuda.is_available():
        triton = checks["dilated attention, triton"]
        assert (triton["works"], triton["broken"]) == (False, False)
        assert triton["why"] == "not on this machine: no CUDA device"
    # No error of a function that the person did not call.
    assert "backend must be" not in str(record)
    assert {"CPU cores", "C compiler"} <= record["machine"].keys()
    assert record["kinds"]["dilated"] == {"works": True, "needs": ""}


@pytest.mark.parametrize("fault", ["raises", "raises ValueError", "is wrong"])
def test_doctor_finds_what_is_broken(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    doctor = importlib.import_module("dilated_factory.cli.doctor")
    right = doctor._dilated

    def wrong(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        if backend == "torch" and fault == "raises":
            raise RuntimeError("no such operator")
        if backend == "torch" and fault == "raises ValueError":
            raise ValueError("no such operator")
        out: Tensor = right(query, key, value, backend)
        return 1.1 * out if backend == "torch" else out

    monkeypatch.setattr(doctor, "_dilated", wrong)
    code, said, _ = run(capsys, "doctor", "--json")
    assert code == 1
    broken = [check for check in json.loads(said)["checks"] if check["broken"]]
    assert {check["what"] for check in broken} == {"dilated attention, torch, cpu"}
    expected = {
        "raises": "RuntimeError: no such operator",
        "raises ValueError": "ValueError: no such operator",
        "is wrong": "differs",
    }[fault]
    assert expected in broken[0]["why"]
    code, said, _ = run(capsys, "doctor")
    assert code == 1
    assert said.count("FAULT") == 1


def test_doctor_does_not_call_a_fault_what_a_backend_says_it_cannot_do(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = importlib.import_module("dilated_factory.cli.doctor")

    def refuse(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        return doctor._dilated(query, key, value, backend="triton")  # type: ignore[no-any-return]

    check = doctor._check("attention", refuse, "triton", "cpu")
    assert check == ("attention", False, "it needs CUDA tensors, these are on cpu", False)
    monkeypatch.setattr(doctor, "attention_checks", lambda: [check])
    code, said, _ = run(capsys, "doctor")
    assert code == 0
    assert "not here" in said
    assert "FAULT" not in said


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build", "550.54.15"),
        ("something else", None),
        (None, None),
    ],
)
def test_doctor_reads_the_version_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, driver: str | None
) -> None:
    doctor = importlib.import_module("dilated_factory.cli.doctor")
    if text is not None:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(doctor, "_DRIVER_FILE", tmp_path / "version")
    assert doctor.machine().get("NVIDIA driver") == driver


@pytest.mark.parametrize("named", ["nothing-of-this-name -O2", f"{sys.executable} -O2"])
def test_doctor_takes_the_compiler_that_cc_names(
    monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    doctor = importlib.import_module("dilated_factory.cli.doctor")
    monkeypatch.setenv("CC", named)
    found = doctor.machine()["C compiler"]
    assert ("none found" in found) == named.startswith("nothing")


def test_config_prints_schemas(capsys: Captured) -> None:
    code, said, _ = run(capsys, "config", "schema")
    assert code == 0
    assert list(json.loads(said)) == list(CONFIG_TYPES)
    code, said, _ = run(capsys, "config", "schema", "pool")
    assert code == 0
    assert json.loads(said)["title"] == "PoolConfig"
    assert "Did you mean 'pool'?" in complaint(capsys, "config", "schema", "pol")


def test_config_checks_files(capsys: Captured, tmp_path: Path) -> None:
    good, bad, other = tmp_path / "good.toml", tmp_path / "bad.json", tmp_path / "other.json"
    good.write_text('kind = "pool"\nlimit_bytes = 5\n')
    bad.write_text('{"kind": "pool", "limit": 5}')
    other.write_text('{"steps": 3}')
    code, said, _ = run(capsys, "config", "validate", good)
    assert (code, said) == (0, f"{good}: valid\n")
    code, said, _ = run(capsys, "config", "validate", good, bad, "--json")
    assert code == 1
    assert json.loads(said)[str(good)] == {"valid": True, "problem": None}
    assert "Did you mean 'limit_bytes'?" in json.loads(said)[str(bad)]["problem"]
    code, said, _ = run(capsys, "config", "validate", other)
    assert code == 1
    assert "kind is required" in said
    code, said, _ = run(capsys, "config", "validate", other, "--kind", "train", "--show")
    assert code == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(said.split("valid\n", 1)[1])
    assert run(capsys, "config", "validate", shown)[0] == 0
    assert "kind 'trian' is not known" in complaint(
        capsys, "config", "validate", other, "--kind", "trian"
    )
    assert "No such file" in complaint(capsys, "config", "validate", tmp_path / "none.json")
    assert parse_any({"kind": "pool"})
