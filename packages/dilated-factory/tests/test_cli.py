"""The command line: what it prints, and one line for every mistake."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dilated_factory.cli import main
from dilated_factory.cli.evaluate import evaluation_table
from dilated_factory.cli.generate import Continuation
from dilated_factory.configs.models import LongNetConfig, TrainConfig
from dilated_factory.training.corpus import load_corpus, standard_library
from dilated_factory.training.evaluation import ContextScore
from dilated_factory.training.loop import Trainer
from dilated_factory.training.trained import Evaluation

from .conftest import TINY_OPTIONS

demo_module = importlib.import_module("dilated_factory.cli.demo")
Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def complaint(capsys: Captured, *arguments: object) -> str:
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    assert err.startswith("dilated: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_train_evaluate_generate(capsys: Captured, corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, said, _ = run(capsys, "train", corpus_folder, "--out", out, "--steps", 12, *TINY_OPTIONS)
    assert code == 0
    assert "bits/byte" in said
    assert "tokens/s" in said
    assert f"next: dilated evaluate {out}" in said
    assert " kB in " in said  # not 0.0 MB
    assert "MB" not in said
    assert str(out / "curves.png") in said
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    code, said, _ = run(capsys, "evaluate", out, "--contexts", "16,64")
    assert code == 0
    for part in ("LongNet", "Markov order 1", "Markov order 2", str(out / "contexts.png")):
        assert part in said
    assert (out / "contexts.png").read_bytes().startswith(b"\x89PNG")

    code, said, _ = run(capsys, "evaluate", out, "--contexts", "16,64", "--json")
    record = json.loads(said)
    assert code == 0
    assert set(record["bits_per_byte"]) == {"16", "64"}
    assert record["step"] == 12

    generate = ("generate", out, "--prompt", "def ", "--max-bytes", 30, "--seed", 5)
    code, said, _ = run(capsys, *generate)
    assert code == 0
    assert said.startswith("def ")
    assert run(capsys, *generate)[1] == said


def test_prompts_of_files_and_options_are_continued_together(
    capsys: Captured, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt"
    file.write_bytes("né ".encode() + b"\xff\x1b[2J")
    options = ("--max-bytes", 40, "--temperature", 0, "--prompt-file", file, "--prompt", "def ")
    code, said, told = run(capsys, "generate", finished_run, *options)
    assert code == 0
    assert said.startswith("def ")  # options come first, then files
    assert "né \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J" in said
    assert re.fullmatch(r"prompt \d+\.\d\d s, then [\d,]+ bytes/s\n", told)
    alone = [
        run(capsys, "generate", finished_run, "--max-bytes", 40, "--temperature", 0, *one)[1]
        for one in (("--prompt", "def "), ("--prompt-file", file))
    ]
    assert said == "".join(alone)
    default = run(capsys, "generate", finished_run, "--max-bytes", 1)
    assert default[0] == 0
    assert default[1].startswith("import ")
    assert default[2] == ""  # one byte has no rate


def test_a_stop_ends_a_continuation_and_is_not_printed(
    capsys: Captured, finished_run: Path
) -> None:
    greedy = ("generate", finished_run, "--temperature", 0, "--prompt", "def ")
    added = run(capsys, *greedy, "--max-bytes", 40)[1][len("def ") : -1]
    assert len(added) == 40
    stop = added[7:10]
    said = run(capsys, *greedy, "--max-bytes", 40, "--stop", "no such text", "--stop", stop)[1]
    assert said == "def " + added[: added.index(stop)] + "\n"


def test_text_comes_as_soon_as_no_stop_can_begin_in_it() -> None:
    text = Continuation(b"p", [b"abc", b"bd"])
    seen = []
    for byte in "xabé".encode() + b"aabd.":
        text.add(bytes([byte]))
        seen.append(text.ready)
        text.ready = ""
    assert seen == ["px", "", "", "ab", "é", "", "a", "", "a\n", ""]
    assert text.over


def test_evaluate_scores_files_of_the_users_choice(
    capsys: Captured, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new"
    file.write_bytes(b"def return import class " * 20)
    picture = tmp_path / "p.png"
    code, said, _ = run(
        capsys, "evaluate", finished_run, file, "--contexts", 32, "--out", picture, "--json"
    )
    assert code == 0
    assert json.loads(said)["picture"] == str(picture)
    assert picture.exists()


def test_evaluate_without_the_corpus_leaves_the_baselines_out(
    capsys: Captured, tiny_model: LongNetConfig, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.write_bytes(bytes(range(32, 127)) * 24)
    config = TrainConfig(model=tiny_model, paths=(str(corpus),), steps=1)
    Trainer.start(tmp_path / "run", config, load_corpus([corpus])).train()
    other = corpus.rename(tmp_path / "other")
    evaluate = ("evaluate", tmp_path / "run")
    assert "existing file or folder" in complaint(capsys, *evaluate, "--contexts", 16)
    code, said, _ = run(capsys, *evaluate, other, "--contexts", 16)
    assert code == 0
    assert "no Markov models" in said
    corpus.write_bytes(bytes(range(32, 126)) * 24)
    assert "the corpus has changed" in complaint(capsys, *evaluate, "--contexts", 16)


def test_resume_finishes_a_stopped_run(
    capsys: Captured, tiny_train: TrainConfig, tmp_path: Path
) -> None:
    trainer = Trainer.start(tmp_path / "run", tiny_train, load_corpus(tiny_train.paths))
    trainer.train(should_stop=lambda: trainer.step == 7)
    resume = ("train", "--resume", "--out", tmp_path / "run")
    assert "learning_rate is 0.008 there and 0.5 here" in complaint(
        capsys, *resume, "--learning-rate", "0.5"
    )
    assert "embed_dim is 16 there and 32 here" in complaint(capsys, *resume, "--embed-dim", 32)
    assert "steps is 40 there and 50 here" in complaint(capsys, *resume, "--steps", 50)
    assert "paths is" in complaint(capsys, "train", tmp_path, *resume[1:])
    code, said, _ = run(capsys, *resume, "--steps", 40, "--embed-dim", 16)
    assert code == 0
    assert "from step 7" in said
    assert "done: 40 steps" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "7"], "context must not be shorter than the smallest segment"),
        (["--context", "many"], "--context"),
        (["--positions", "nowhere"], "'--positions'"),
        (["--head-offsets", "odd"], "'--head-offsets'"),
        (["--dtype", "float8"], "'--dtype'"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--segment-lengths", "8,x"], "--segment-lengths must be positive whole numbers"),
        (["--segment-lengths", "8,0"], "--segment-lengths must be positive whole numbers"),
        (["--dilation-rates", "1"], "dilation_rates"),
        (["--steps", "0"], "steps"),
        (["--steps", "3", "--minutes", "1"], "exactly one of steps and minutes"),
        (["--minutes", "nan"], "minutes"),
        (["--dropout", "1.5"], "dropout"),
        (["--num-heads", "3"], "embed_dim must be a multiple of 2 * num_heads"),
        (["--checkpoint-every", "0"], "'--checkpoint-every'"),
        (["--data-parallel", "fsdp"], "--data-parallel fsdp needs several processes"),
        (["--data-parallel", "zero"], "'--data-parallel'"),
        (["--seed", "-1"], "seed"),
        (["--wat"], "--wat"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    out = tmp_path / "run"
    assert says in complaint(capsys, "train", corpus_folder, "--out", out, *TINY_OPTIONS, *options)
    assert not out.exists()


def test_a_bad_corpus_is_one_line_and_writes_nothing(capsys: Captured, tmp_path: Path) -> None:
    out, corpus = tmp_path / "run", tmp_path / "corpus"
    train = ("train", corpus, "--out", out, *TINY_OPTIONS)
    assert "path must be an existing file or folder" in complaint(capsys, *train)
    corpus.mkdir()
    assert "the corpus is empty" in complaint(capsys, *train)
    (corpus / "a").write_bytes(b"x" * 48)
    assert "at least context + 1 = 49 tokens" in complaint(capsys, *train)
    assert not out.exists()


def test_an_existing_run_is_not_overwritten(
    capsys: Captured, corpus_folder: Path, finished_run: Path
) -> None:
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    said = complaint(capsys, "train", corpus_folder, "--out", finished_run, *TINY_OPTIONS)
    assert "already exists" in said
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == before


def test_a_missing_or_damaged_run_is_one_line(
    capsys: Captured, finished_run: Path, tmp_path: Path
) -> None:
    commands = [("evaluate",), ("generate",), ("train", "--resume", "--out")]
    for command in commands:
        assert "is not a run folder" in complaint(capsys, *command, tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    file = next(damaged.glob("checkpoint-*/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    for command in commands:
        assert "is damaged: model.safetensors" in complaint(capsys, *command, damaged)


def test_bad_requests_to_a_good_run_are_one_line(capsys: Captured, finished_run: Path) -> None:
    assert "contexts must be even" in complaint(
        capsys, "evaluate", finished_run, "--contexts", "16,24"
    )
    assert "at least context + 1" in complaint(
        capsys, "evaluate", finished_run, "--contexts", 2**20
    )
    assert "--prompt" in complaint(capsys, "generate", finished_run, "--prompt", "")
    assert "--temperature" in complaint(capsys, "generate", finished_run, "--temperature", -1)
    assert "temperature" in complaint(capsys, "generate", finished_run, "--temperature", "nan")
    assert "seed must be in" in complaint(capsys, "generate", finished_run, "--seed", 2**63)
    assert "--top-k" in complaint(capsys, "generate", finished_run, "--top-k", 0)
    assert "top_p must be" in complaint(capsys, "generate", finished_run, "--top-p", 0)
    assert "--stop" in complaint(capsys, "generate", finished_run, "--stop", "")
    missing = finished_run / "missing"
    assert "--prompt-file must be" in complaint(
        capsys, "generate", finished_run, "--prompt-file", missing
    )
    (finished_run / "empty").touch()
    assert "which is empty" in complaint(
        capsys, "generate", finished_run, "--prompt-file", finished_run / "empty"
    )
    (finished_run / "empty").unlink()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none_is_one_line(capsys: Captured, finished_run: Path) -> None:
    for command in (["evaluate", finished_run], ["generate", finished_run]):
        assert "device 'cuda' is not available" in complaint(capsys, *command, "--device", "cuda")


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "demo"])
def test_help_shows_an_example(capsys: Captured, command: str) -> None:
    code, said, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"dilated {command}" in said


def test_no_command_is_help_and_a_wrong_one_is_an_error(capsys: Captured) -> None:
    code, said, _ = run(capsys)
    assert code == 0
    assert "evaluate" in said
    assert "swim" in complaint(capsys, "swim")


def test_the_demo_trains_evaluates_and_names_its_files(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tiny_model: LongNetConfig, tmp_path: Path
) -> None:
    # Narrow, of a part of the standard library, and on few bytes, but at the demo's own contexts.
    some = standard_library()[:200]
    monkeypatch.setattr(demo_module, "standard_library", lambda: some)
    monkeypatch.setattr(demo_module, "DEMO_MODEL", tiny_model.model_copy(update={"context": 512}))
    monkeypatch.setattr(demo_module, "SCORED_BYTES", 8192)
    monkeypatch.setattr(demo_module, "TRAIN_BYTES", 100_000)
    monkeypatch.setattr(demo_module, "HELD_OUT_BYTES", 20_000)
    (tmp_path / "demo").mkdir()
    code, said, err = run(capsys, "demo", "--out", tmp_path / "demo", "--minutes", "0.01")
    # A second of training teaches nothing of what is far.
    assert (code, err) == (1, "")
    folder = tmp_path / "demo-2"
    assert "dilated evaluate" not in said  # it evaluates itself
    for part in ("Markov order 2", " 2048 ", folder / "curves.png", folder / "contexts.png"):
        assert str(part) in said
    assert (folder / "contexts.png").exists()
    # Its text stays beside it, for `dilated evaluate`.
    assert (tmp_path / "demo-2-corpus" / "held-out").stat().st_size >= 20_000


@pytest.mark.parametrize(
    ("bits", "saved", "code", "says"),
    [
        (1.9, (0.5, 0.3, 0.4), 0, ("5.0% below", "beaten", "0.400 ± 0.058", "it is reached")),
        (2.1, (0.5, 0.3, 0.4), 1, ("5.0% above", "not beaten", "0.400 ± 0.058", "it is reached")),
        (1.9, (0.9, 0.0, 0.3), 1, ("5.0% below", "beaten", "0.400 ± 0.265", "it is not reached")),
        (1.9, (-0.5, -0.3, -0.4), 1, ("beaten", "-0.400 ± 0.058", "it is not reached")),
    ],
)
@pytest.mark.parametrize("orders", [(4.0, 2.0), (2.0, 4.0)])
def test_the_demo_fails_without_a_sure_gain_from_context_or_above_the_stronger_baseline(
    capsys: Captured,
    bits: float,
    saved: tuple[float, ...],
    code: int,
    says: tuple[str, ...],
    orders: tuple[float, float],
) -> None:
    # The sections differ far more than the gain: only their differences between contexts count.
    long = (1.0, 2.0, 2.7)
    short = tuple(a + b for a, b in zip(long, saved, strict=True))
    scores = [
        ContextScore(128, bits + 0.4, 300, short),
        ContextScore(512, 9.9, 300, (9.9, 9.9, 9.9)),
        ContextScore(2048, bits, 300, long),
    ]
    baselines = {f"Markov order {order}": each for order, each in enumerate(orders, start=1)}
    assert demo_module._verdict(scores, baselines, Console(width=200)) == code
    said = capsys.readouterr().out
    for part in (*says, f"Markov order {2 - (orders[0] < orders[1])}, the stronger baseline"):
        assert part in said


def test_the_title_of_an_evaluation_is_one_line() -> None:
    evaluation = Evaluation([ContextScore(64, 3.5, 98_765_432_100)], {"Markov order 1": 4.0})
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_table(evaluation))
    assert isinstance(console.file, io.StringIO)
    assert "bits per byte, on the same 98,765,432,100 bytes" in console.file.getvalue()


def test_a_pattern_that_cannot_see_the_context_is_told_and_a_longer_context_needs_no_pattern(
    capsys: Captured, corpus_folder: Path, tmp_path: Path
) -> None:
    narrow = ("--embed-dim", 16, "--num-heads", 1, "--num-layers", 2, "--steps", 1)
    train = ("train", corpus_folder, *narrow, "--context", 640, "--out")
    short = ("--segment-lengths", "8,12", "--dilation-rates", "1,1")
    code, said, _ = run(capsys, *train, tmp_path / "short", *short)
    assert code == 0
    warning = "warning: with these segments 2 layers see 23 bytes at most, of a context of 640"
    assert warning in said
    assert warning in run(capsys, "evaluate", tmp_path / "short", "--contexts", 16)[1]
    code, said, _ = run(capsys, *train, tmp_path / "own")
    assert code == 0
    assert "warning" not in said
    stored = json.loads((tmp_path / "own" / "config.json").read_text())["model"]
    assert stored["segment_lengths"][-1] == 640


def test_a_process_of_ours_keeps_the_memory_that_it_frees() -> None:
    """Pages of 64 MiB that are freed and allocated again are not asked for again."""
    program = """if True:
        import resource
        from dilated_factory.room import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                # Of what is freed at once glibc gives back all but a part.
                parts = [bytearray(b"x") * 2**22 for _ in range(16)]
                del parts
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(keep_freed_memory())
        faults()
        print(faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    can, count = done.stdout.split()
    # Else 16,384 pages each time.
    assert can == str("gnu" in sys.implementation._multiarch)
    assert can == "False" or int(count) < 4096


@pytest.mark.parametrize("told", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_command_tells_openmp_to_wait_asleep_before_torch_is_there(told: dict[str, str]) -> None:
    """On two cores beside a busy process a step of the demo took 146 ms, and so it takes 75."""
    program = """if True:
        import os, sys
        from dilated_factory import cli
        before = []
        cli.keep_freed_memory = lambda: before.append("torch" in sys.modules)
        sys.argv = ["dilated", "--help"]
        cli.main()
        assert before == [False]
        print(os.environ.get("GOMP_SPINCOUNT"))
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=kept | told,
    )  # fmt: skip
    expected = told.get("GOMP_SPINCOUNT", "None" if told else "300")
    assert done.stdout.split()[-1] == expected


def test_a_warning_of_a_command_is_one_line() -> None:
    code = (
        "import sys, warnings; from dilated_factory.cli import main; sys.argv[1:] = ['--help']; "
        "main(); warnings.warn('some\\nthing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "dilated: warning: some thing\n"
