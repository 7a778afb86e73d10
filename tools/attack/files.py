"""Run folders killed and damaged, configurations mutated, command lines out of their own tables."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import torch

from dilated_factory import (
    LongNetConfig,
    LongNetLM,
    SlideEncoder,
    SlideEncoderConfig,
    TrainConfig,
    save_gigapath,
    to_toml,
)
from dilated_factory.cli import main
from dilated_factory.cli.app import COMMANDS, load_command
from dilated_factory.configs.kinds import CONFIG_TYPES
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.interop.torchscale import their_name
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import Trainer
from dilated_factory.training.run_folder import RunFolder

Case = dict[str, Any]
STEPS = 8
MOST_SECONDS = 40


def tiny(corpus: Path) -> TrainConfig:
    """A run that takes a moment."""
    model = LongNetConfig(
        embed_dim=8, num_heads=1, num_layers=1, segment_lengths=(8, 16), dilation_rates=(1, 2),
        context=16,
    )  # fmt: skip
    return TrainConfig(model=model, paths=(str(corpus),), steps=STEPS, batch_size=2)


@cache
def place() -> Path:
    """A folder of this process with a corpus, and a run that nothing has touched."""
    root = Path(tempfile.mkdtemp(prefix="attack-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    (root / "corpus").mkdir()
    for index in range(6):
        (root / "corpus" / f"{index}.txt").write_bytes(
            random.Random(index).randbytes(30).hex().encode()
        )
    trainer(root / "whole").train()
    half = trainer(root / "half")
    half.train(should_stop=lambda: half.step == STEPS // 2)
    (root / "tiny.json").write_text(tiny(root / "corpus").model_dump_json())
    assert main(start(root / "grown", grown=True)) == 0
    assert main(grow(root / "half", root / "heir")) == 0
    _slides(root / "slides")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    _others(root)
    return root


OTHERS = ("rows.jsonl", "tokenizer.json", "genome.fa", "genome.bed", "theirs.pt", "dict.txt")


def _others(root: Path) -> None:
    """Rows, a tokenizer, a genome and a run on it, a checkpoint of fairseq with its dictionary."""
    rows = (json.dumps({"text": f"row {index} of 20"}) for index in range(20))
    (root / "rows.jsonl").write_text("\n".join(rows))
    words = [f"w{index}" for index in range(60)]
    (root / "dict.txt").write_text("".join(f"{word} 9\n" for word in words))
    shape = LongNetConfig(
        embed_dim=8, num_heads=1, num_layers=1, vocab_size=64, context=16, segment_lengths=(8,),
        dilation_rates=(1,), positions="none",
    )  # fmt: skip
    state = {f"decoder.{their_name(name)}": x for name, x in LongNetLM(shape).state_dict().items()}
    told = argparse.Namespace(
        activation_fn="relu", decoder_embed_dim=8, decoder_attention_heads=1, tokens_per_sample=16,
        segment_length="8", dilated_ratio="1",
    )  # fmt: skip
    torch.save({"model": state, "cfg": {"model": told}}, root / "theirs.pt")
    bases = random.Random(0).choices("ACGTacgtN", k=800)
    (root / "genome.fa").write_text(f">a\n{''.join(bases[:500])}\n>b\n{''.join(bases[500:])}\n")
    (root / "genome.bed").write_text("a\t0\t400\ttrain\na\t400\t499\tvalid\nb\t3\t19\ttest\n")
    new = ["--embed-dim", "8", "--num-heads", "1", "--num-layers", "1", "--context", "16"]
    new += ["--out", str(root / "bases"), "--steps", "2", "--device", "cpu"]
    main(["genomes", "train", str(root / "genome.fa"), *new])
    learn = ["tokenize", str(root / "corpus"), "--vocab-size", "260"]
    main([*learn, "--out", str(root / "tokenizer.json")])  # each as far as its extra is there


def _slides(folder: Path) -> None:
    """Features of some slides, their labels, a task, and an encoder."""
    generator = torch.Generator().manual_seed(0)
    (folder / "features").mkdir(parents=True)
    rows = ["slide,patient,mutated,value"]
    for index in range(9):
        tiles = torch.randn(3 + index, 5, generator=generator)
        places = torch.randint(9, (3 + index, 2), generator=generator) * 256
        torch.save({"features": tiles, "coords": places}, folder / "features" / f"{index}.pt")
        rows.append(f"{index},p{index},{'yes' if index % 2 else 'no'},{index / 8}")
    (folder / "labels.csv").write_text("\n".join(rows))
    np.savez(
        folder / "embeddings.npz",
        embeddings=torch.randn(9, 4, generator=generator).numpy(), names=[str(i) for i in range(9)],
    )  # fmt: skip
    shape = SlideEncoderConfig(
        tile_dim=5, embed_dim=16, num_heads=2, num_layers=1, segment_lengths=(16,),
        dilation_rates=(1,), grid_size=9,
    )  # fmt: skip
    save_gigapath(SlideEncoder(shape), folder / "encoder.pth")
    (folder / "shape.toml").write_text(to_toml(shape))
    task = SlideTaskConfig(
        table="labels.csv", features=("features",), task="binary", labels=("mutated",), folds=3,
        epochs=1, encoder=shape, tile_size=256,
    )  # fmt: skip
    (folder / "task.toml").write_text(to_toml(task))


def trainer(path: Path) -> Trainer:
    """At step 0 in a new folder."""
    config = tiny(path.parent / "corpus")
    return Trainer.start(path, config, load_corpus(config.paths), checkpoint_every=2)


def grow(parent: Path, child: Path) -> list[str]:
    """The command that takes one step from where another run is."""
    return ["train", "--from", str(parent), "--out", str(child), "--steps", "1"]


def start(path: Path, *, grown: bool = False) -> list[str]:
    """The command that trains to the end in a folder, from the newest checkpoint if there is one.

    Args:
        path: the run folder.
        grown: begin with the weights of the run that stopped half way.
    """
    line = ["train", "--out", str(path), "--checkpoint-every", "2"]
    if (path / "config.json").exists():
        return [*line, "--resume"]
    if grown:
        return [*line, *grow(path.parent / "half", path)[1:], "--steps", str(STEPS)]
    return [*line, "--config", str(path.parent / "tiny.json")]


def is_whole(path: Path, like: str = "whole") -> None:
    """Raise unless a run is the one that was never stopped."""
    run, whole = RunFolder.open(path), RunFolder.open(place() / like)
    expected = whole.load()
    found = run.load()
    assert found.state.step == STEPS
    for name, tensor in expected.model.items():
        assert torch.allclose(found.model[name], tensor, rtol=1e-6, atol=1e-7), name
    steps = [record["step"] for record in run.read_metrics()]
    assert steps == list(range(1, STEPS + 1)), steps
    for one, other in zip(run.read_metrics(), whole.read_metrics(), strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-5


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A new folder inside `place`, gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=place()))
    for name in ("corpus", "half", "tiny.json"):
        (folder / name).symlink_to(place() / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command line; a mistake is one line, and nothing hangs."""
    out, err = io.StringIO(), io.StringIO()

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"no answer in {MOST_SECONDS} s of computing")

    # Of this process, since the machine may be busy with others.
    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    said = err.getvalue()
    assert code in (0, 1, 2), code
    if code == 2:
        assert said.startswith("dilated: error: "), said
        assert said.count("\n") == 1, said
    return code, out.getvalue()


def child(work: Callable[[], object]) -> tuple[int, BinaryIO]:
    """A process that works; its number, and where it says what went wrong."""
    ours, theirs = os.pipe()
    number = os.fork()
    if not number:
        try:
            work()
        except BaseException:
            os.write(theirs, traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(theirs)
    return number, os.fdopen(ours, "rb")


def ended(number: int, said: BinaryIO) -> None:
    """Wait for a process; raise if anything but its end by a signal went wrong."""
    with said:
        text = said.read().decode()
    os.waitpid(number, 0)
    assert not text, text


class Killed:
    """`kill -9` at a random instant of a run, several times; then it goes on as if nothing was."""

    def draw(self, rng: random.Random) -> Case:
        delays = [round(rng.uniform(0.0, 0.25), 4) for _ in range(rng.randint(1, 4))]
        return {"delays": delays, "grown": rng.random() < 0.3}

    def check(self, case: Case) -> None:
        place()
        with scratch() as folder:
            path = folder / "run"
            for delay in case["delays"]:
                line = start(path, grown=case["grown"])
                number, said = child(partial(command, *line))
                time.sleep(delay)
                os.kill(number, signal.SIGKILL)
                ended(number, said)
                if (path / "config.json").exists() and RunFolder.open(path).checkpoints():
                    RunFolder.open(path).load()
            assert command(*start(path, grown=case["grown"]))[0] == 0
            is_whole(path, "grown" if case["grown"] else "whole")
            left = [p.name for p in path.iterdir() if p.name.endswith(".tmp")]
            assert not left, left


class Full:
    """A disk that is full at a random byte, stood for by a limit on the size of files."""

    def draw(self, rng: random.Random) -> Case:
        return {"limits": [rng.choice((0, 100, 1000, rng.randrange(12_000))) for _ in range(2)]}

    def check(self, case: Case) -> None:
        place()
        with scratch() as folder:
            path = folder / "run"
            for limit in case["limits"]:
                ended(*child(partial(self._limited, path, limit)))
            if path.exists() and not (path / "config.json").exists():
                left = [p.name for p in path.iterdir()]
                assert not left, left
            assert command(*start(path))[0] == 0
            is_whole(path)

    def _limited(self, path: Path, limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        command(*start(path))


class Damaged:
    """Bytes of a run folder changed: it is told in one line, or nothing is other than it was."""

    def draw(self, rng: random.Random) -> Case:
        return {
            "file": rng.randrange(2**16),
            "how": rng.choice(("flip", "flip", "flip", "cut", "insert", "empty", "remove", "swap")),
            "at": rng.random(),
            "bit": rng.randrange(8),
            "command": rng.choice(("train", "generate", "evaluate", "compare", "grow")),
        }

    def check(self, case: Case) -> None:
        with scratch() as folder:
            path = Path(shutil.copytree(place() / "half", folder / "run"))
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "lock")
            self._damage(files[case["file"] % len(files)], case)
            arguments = {
                "train": ["train", "--resume", "--out", str(path)],
                "generate": ["generate", str(path), "--max-bytes", "5"],
                "evaluate": [
                    *("evaluate", str(path), "--contexts", "8", "--max-bytes", "64", "--json"),
                ],
                "compare": ["compare", str(path), "--json"],
                "grow": grow(path, folder / "new"),
            }[case["command"]]
            code, said = command(*arguments)
            removed = case["how"] in ("remove", "empty", "cut")
            if code == 0 and case["command"] == "train" and not removed:
                is_whole(path)
            elif code == 0 and case["command"] == "generate":
                assert said == command("generate", str(place() / "half"), "--max-bytes", "5")[1]
            elif code == 0 and case["command"] == "grow":
                expected = RunFolder.open(place() / "heir").load().model
                for name, tensor in RunFolder.open(folder / "new").load().model.items():
                    assert torch.equal(tensor, expected[name]), name

    def _damage(self, file: Path, case: Case) -> None:
        content = bytearray(file.read_bytes())
        at = int(case["at"] * len(content))
        if case["how"] == "remove":
            file.unlink()
            return
        if case["how"] == "empty" or not content:
            content.clear()
        elif case["how"] == "flip":
            content[at] ^= 1 << case["bit"]
        elif case["how"] == "cut":
            del content[at:]
        elif case["how"] == "insert":
            content[at:at] = b"0"
        else:
            content.reverse()
        file.write_bytes(content)


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 10**30, 0.5, 1e308, "", "x", "nan", [], [1], [[]], {},
    {"kind": "x"},
)  # fmt: skip


class Configurations:
    """Configurations of all kinds with values and keys changed: read, or refused in one line."""

    def draw(self, rng: random.Random) -> Case:
        kinds = sorted(CONFIG_TYPES)
        edits = [
            [rng.randrange(2**16), rng.randrange(len(VALUES))] for _ in range(rng.randint(1, 3))
        ]
        return {
            "kind": rng.choice(kinds),
            "edits": edits,
            "text": rng.random(),
            "bit": rng.randrange(9),
        }

    def check(self, case: Case) -> None:
        schema = CONFIG_TYPES[case["kind"]].model_json_schema()
        values = {
            name: each.get("default", 1) for name, each in schema.get("properties", {}).items()
        }
        for place_, value in case["edits"]:
            names = [*values, "surplus"]
            values[names[place_ % len(names)]] = VALUES[value]
        content = bytearray(json.dumps(values).encode())
        if case["bit"] < 8 and content:
            content[int(case["text"] * len(content))] ^= 1 << case["bit"]
        with scratch() as folder:
            (folder / "any.json").write_bytes(content)
            command("config", "validate", str(folder / "any.json"))


WORDS = (
    "", "x", "0", "-1", "1", "7", "1,2", "8,64", "1,,2", "nan", "1e400", "/", ".", str(10**9),
    str(10**30), "half", "corpus", "slides/labels.csv",
)  # fmt: skip
# What an option may well be given, so that commands get further than their first complaint.
APT: dict[str, tuple[str, ...]] = {
    "paths": ("corpus", "rows.jsonl"), "run": ("half", "whole", "bases"), "out": ("new",),
    "runs": ("half", "whole", "bases"), "parent": ("half", "bases"), "resume": ("half",),
    "png": ("new.png",), "html": ("new.html",),
    "contexts": ("8", "4,16"), "segment_lengths": ("8,16", "4"), "dilation_rates": ("1,2", "2"),
    "length": ("64", "16,32"), "devices": ("2",), "files": ("slides/task.toml", "half/config.json"),
    "features": ("slides/features", "slides/features/3.pt"),
    "checkpoint": ("slides/encoder.pth", "theirs.pt", "bases"),
    "table": ("slides/labels.csv",), "embeddings": ("slides/embeddings.npz",),
    "label": ("mutated", "value"), "patient_column": ("patient",), "tile_size": ("256",),
    "task": ("slides/task.toml", "binary", "regression"), "prompt_file": ("corpus/1.txt",),
    "config": ("slides/shape.toml", "half/config.json", "bases/config.json"), "folds": ("3",),
    "tokenizer": ("tokenizer.json",), "text_field": ("text",), "validation": ("corpus/2.txt",),
    "fasta": ("genome.fa",), "bed": ("genome.bed",), "split": ("test", "valid"), "to": ("new",),
    "dictionary": ("dict.txt",), "vocab_size": ("64", "260"), "tasks": ("slides/task.toml",),
}  # fmt: skip


class Lines:
    """Command lines drawn from the options that the commands declare."""

    def draw(self, rng: random.Random) -> Case:
        name = rng.choice([name for name in COMMANDS if name not in ("demo", "doctor")])
        found = load_command(name)
        words = [name]
        if hasattr(found, "commands"):
            sub = rng.choice(sorted(found.commands))
            words.append(sub)
            found = found.commands[sub]
        for parameter in found.params:
            if parameter.name in ("help", "device"):
                continue
            likely = 0.95 if parameter.required else 0.2
            if parameter.param_type_name == "argument":
                words += [self._value(rng, parameter)] * rng.choice((1, 1, 2, int(likely < 0.5)))
            elif rng.random() < likely:
                words.append(rng.choice((*parameter.opts, *parameter.secondary_opts)))
                if not parameter.is_flag:
                    words.append(self._value(rng, parameter))
        return {"words": words}

    def _value(self, rng: random.Random, parameter: Any) -> str:
        # Where the choices are depends on typer's version.
        described = getattr(parameter, "type_descriptor", None)
        literals = get_args(described.annotation) if described else ()
        choices = [each for each in literals if isinstance(each, str)]
        choices = choices or list(getattr(getattr(parameter, "type", None), "choices", ()))
        choices += APT.get(parameter.name, ())
        if choices and rng.random() < 0.8:
            return str(rng.choice(choices))
        return rng.choice(WORDS)

    def check(self, case: Case) -> None:
        with scratch() as folder, contextlib.chdir(folder):
            (folder / "half").unlink()  # a link
            for name in ("half", "whole", "slides", "bases"):
                if (place() / name).exists():
                    shutil.copytree(place() / name, folder / name)
            for name in OTHERS:
                (folder / name).symlink_to(place() / name)
            words = list(case["words"])
            if "train" in words[:2] and words[0] != "slides":  # else ten minutes
                words += ["--steps", "1"]
            if words[0] == "bench":
                words += ["--rounds", "1", "--length", "64"]
            command(*words)
