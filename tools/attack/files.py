"""Run folders killed and damaged, configurations mutated, command lines out of their own tables."""

from __future__ import annotations

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
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from dilated_factory import LongNetConfig, TrainConfig
from dilated_factory.cli import main
from dilated_factory.cli.app import COMMANDS, load_command
from dilated_factory.configs.kinds import CONFIG_TYPES
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
    train(root / "whole")
    half = trainer(root / "half")
    half.train(should_stop=lambda: half.step == STEPS // 2)
    return root


def trainer(path: Path) -> Trainer:
    """At step 0 in a new folder."""
    config = tiny(path.parent / "corpus")
    return Trainer.start(path, config, load_corpus(config.paths), checkpoint_every=2)


def train(path: Path) -> None:
    """To the end, from the newest checkpoint where there is one."""
    if (path / "config.json").exists():
        run = RunFolder.open(path)
        resumed = Trainer(run, load_corpus(run.config.paths), checkpoint_every=2)
        resumed.restore()
        resumed.train()
    else:
        trainer(path).train()


def is_whole(path: Path) -> None:
    """Raise unless a run is the one that was never stopped."""
    run, whole = RunFolder.open(path), RunFolder.open(place() / "whole")
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
    (folder / "corpus").symlink_to(place() / "corpus")
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


class Killed:
    """`kill -9` at a random instant of a run, several times; then it goes on as if nothing was."""

    def draw(self, rng: random.Random) -> Case:
        return {"delays": [round(rng.uniform(0.0, 0.25), 4) for _ in range(rng.randint(1, 4))]}

    def check(self, case: Case) -> None:
        place()
        with scratch() as folder:
            path = folder / "run"
            for delay in case["delays"]:
                child = os.fork()
                if not child:
                    with contextlib.suppress(BaseException):
                        train(path)
                    os._exit(0)
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                if (path / "config.json").exists() and RunFolder.open(path).checkpoints():
                    RunFolder.open(path).load()
            train(path)
            is_whole(path)
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
                child = os.fork()
                if not child:
                    with contextlib.suppress(BaseException):
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                        train(path)
                    os._exit(0)
                os.waitpid(child, 0)
            if path.exists() and not (path / "config.json").exists():
                left = [p.name for p in path.iterdir()]
                assert not left, left
            train(path)
            is_whole(path)


class Damaged:
    """Bytes of a run folder changed: it is told in one line, or nothing is other than it was."""

    def draw(self, rng: random.Random) -> Case:
        return {
            "file": rng.randrange(2**16),
            "how": rng.choice(("flip", "flip", "flip", "cut", "insert", "empty", "remove", "swap")),
            "at": rng.random(),
            "bit": rng.randrange(8),
            "command": rng.choice(("train", "generate", "evaluate")),
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
                    "evaluate",
                    str(path),
                    "--contexts",
                    "8",
                    "--max-bytes",
                    "64",
                    "--json",
                ],
            }[case["command"]]
            code, said = command(*arguments)
            removed = case["how"] in ("remove", "empty", "cut")
            if code == 0 and case["command"] == "train" and not removed:
                is_whole(path)
            elif code == 0 and case["command"] == "generate":
                assert said == command("generate", str(place() / "half"), "--max-bytes", "5")[1]

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
    "",
    "x",
    "0",
    "-1",
    "1",
    "7",
    "1,2",
    "8,64",
    "1,,2",
    "nan",
    "1e400",
    "/",
    ".",
    str(10**9),
    str(10**30),
)


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
            if parameter.param_type_name == "argument":
                words += [self._value(rng, parameter)] * rng.choice((0, 1, 1, 2))
            elif rng.random() < 0.3:
                words.append(parameter.opts[0])
                if not parameter.is_flag:
                    words.append(self._value(rng, parameter))
        return {"words": words}

    def _value(self, rng: random.Random, parameter: Any) -> str:
        # Where the choices are depends on typer's version.
        described = getattr(parameter, "type_descriptor", None)
        literals = get_args(described.annotation) if described else ()
        choices = [each for each in literals if isinstance(each, str)]
        choices = choices or list(getattr(getattr(parameter, "type", None), "choices", ()))
        if choices and rng.random() < 0.8:
            return str(rng.choice(choices))
        return rng.choice(("HALF", "CORPUS", "NEW", *WORDS))

    def check(self, case: Case) -> None:
        with scratch() as folder, contextlib.chdir(folder):
            shutil.copytree(place() / "half", folder / "half")
            known = {"HALF": "half", "CORPUS": "corpus", "NEW": "new"}
            words = [known.get(word, word) for word in case["words"]]
            if words[0] == "train":  # else ten minutes
                words += ["--steps", "1"]
            if words[0] == "bench":
                words += ["--rounds", "1", "--length", "64"]
            command(*words)
