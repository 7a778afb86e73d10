"""A corpus in many shards of JSON lines in zstd beside one text file of the same content.

Each is read and trained on in a process of its own, which gives the peak of memory; shards twice,
since the first reading makes the cache of tokens and the second finds it. Then one process trains
the same small model on both, in turns of a few steps, which gives the ratio of their speeds.

    python benchmarks/corpus.py                                # 200 MB in 300 shards
    python benchmarks/corpus.py --megabytes 2000 --steps 200   # what the README says
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from _machine import describe

TURN = 4  # steps on one corpus, before as many on the other


def peak_megabytes() -> float:
    """The most memory of this process so far."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024 / 1e6


def make(folder: Path, megabytes: float, shards: int) -> None:
    """Documents of one to thirty lines of words, in shards and in one text."""
    import zstandard

    generator = random.Random(0)
    words = [
        "".join(generator.choices("etaoinshrdlu", k=generator.randint(1, 9))) for _ in range(4096)
    ]
    lines = [" ".join(generator.choices(words, k=12)) + "\n" for _ in range(8192)]
    texts = ["".join(generator.choices(lines, k=generator.randint(1, 30))) for _ in range(8192)]
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    many = int(megabytes * 1e6 / shards / (sum(map(len, texts)) / len(texts))) + 1
    (folder / "shards").mkdir()
    compress = zstandard.ZstdCompressor().compress
    with (folder / "text").open("wb") as text:
        for shard in range(shards):
            drawn = generator.choices(range(len(texts)), k=many)
            text.writelines(texts[index].encode() for index in drawn)
            packed = compress(b"".join(rows[index] for index in drawn))
            (folder / "shards" / f"{shard:04}.jsonl.zst").write_bytes(packed)


def work(folder: Path, kinds: list[str], steps: int) -> dict[str, float]:
    """In a process of its own: read, and train on each kind, in turns of a few steps."""
    import torch

    from dilated_factory import LongNetConfig, TrainConfig, load_corpus
    from dilated_factory.training.loop import Trainer

    torch.set_num_threads(1)
    found = {"MB before": peak_megabytes()}
    model = LongNetConfig(embed_dim=32, num_heads=2, num_layers=1, context=4096)
    trainers: dict[str, Trainer] = {}
    for kind in kinds:
        started = time.perf_counter()
        path, field = folder / kind, "text" if kind == "shards" else None
        corpus = load_corpus([path], text_field=field, cache=folder / "cache")
        found[f"s to read {kind}"] = time.perf_counter() - started
        config = TrainConfig(
            model=model, paths=(str(path),), text_field=field, steps=steps, batch_size=4
        )
        out = folder / f"run-{uuid.uuid4().hex}"
        trainers[kind] = Trainer.start(out, config, corpus, checkpoint_every=10**9)
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for end in range(TURN, steps + 1, TURN):
        for kind, trainer in trainers.items():
            before = trainer.elapsed_seconds
            trainer.train(should_stop=lambda t=trainer, end=end: t.step >= end)
            speeds[kind].append(TURN * 4 * 4096 / (trainer.elapsed_seconds - before))
    for kind, each in speeds.items():
        found[f"tokens/s {kind}"] = statistics.median(each)
    if len(kinds) == 2:
        ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
        found["ratio"] = statistics.median(ratios)
    return found | {"MB peak": peak_megabytes()}


def run(folder: Path, kinds: list[str], steps: int) -> dict[str, float]:
    """`work` in a new process."""
    command = [sys.executable, __file__, "--work", str(folder), ",".join(kinds), str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    print(*kinds, *(f"{name} {value:,.2f}" for name, value in found.items()), sep="  ", flush=True)
    return found


def main() -> None:
    """Measure, and say whether memory and speed are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        folder, kinds, steps = options.work
        print(json.dumps(work(Path(folder), kinds.split(","), int(steps))))
        return
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.megabytes, options.shards)
        runs = [run(folder, ["shards"], options.steps) for _ in range(2)]
        run(folder, ["text"], options.steps)
        ratio = run(folder, ["text", "shards"], options.steps)["ratio"]
    peak = max(each["MB peak"] for each in runs)
    print(f"tokens/s of shards over text: {ratio:.3f} (median of turns; 0.9 is wanted)")
    print(f"most memory with shards: {peak:,.0f} MB (under 1500 is wanted)")
    sys.exit(0 if ratio >= 0.9 and peak < 1500 else 1)


if __name__ == "__main__":
    main()
