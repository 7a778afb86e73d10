"""The claim of LongNet: at equal compute, a longer context in training gives a lower loss on code.

Real code only: sources of the standard library and of the packages that are installed here, each
file once, joined package by package in the order of paths; whole packages are held out, and held
out files of whose lines half are in training are left out. All candidates are our `LongNetLM`
trained by our trainer with one budget of operations (or of tokens); only attention and context
differ. Each is scored on the same held-out bytes: by context, by position in the window, and by
whether it completes a name that was defined so far back.

    python benchmarks/claim.py --json claim.json --png claim.png      # 30 minutes on an H200
    python benchmarks/claim.py --minutes 8 --workers 2 --rates 8e-3   # a part of it, on two of them
    python benchmarks/claim.py --only 'dilated 32768'                 # one number again
    python benchmarks/claim.py --device cpu --small --workers 2       # two cores, 10 minutes
    python benchmarks/claim.py --paths                                # what patterns reach

A row that is done is a file in the folder, and is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _machine import describe
from torch import Tensor, nn

from dilated_core import DilatedAttention, DilatedPattern
from dilated_factory import LongNetConfig, LongNetLM, TrainConfig, learn_tokenizer
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.corpora.tokens import Bytes, load_tokenizer
from dilated_factory.training.compiling import decide_compile
from dilated_factory.training.corpus import Corpus, corpus_of
from dilated_factory.training.loop import Trainer, initial_model
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.precision import autocast

SUFFIXES = (".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".js", ".ts")
LONGEST_FILE, LONGEST_LINE = 2**20, 1000  # past these it is data, or was written by a program
HELD_OUT = 0.06  # share of the bytes
NEAR_COPY = 0.5  # share of a held-out file's lines that are in training
SCORED = 1024  # bytes at the end of a window
CUE, ANSWER = 6, 8  # letters of a name
CURVES = ("by_context", "by_position", "recall")
GROWN = ", grown"  # of a candidate whose training begins with sequences of the shortest context
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Scale(NamedTuple):
    """How large everything is."""

    contexts: tuple[int, ...]
    num_layers: int
    embed_dim: int
    num_heads: int
    batch_tokens: int  # of a step; a longer context is one sequence
    tokens: float  # that a dense model of the shortest context trains on
    megabytes: float
    sections: int
    trials: int  # of each distance
    short_share: float = 0.75  # of the steps of those that grow
    rotary_base: float = 5e6
    names_share: float = 0.0  # of the training text: definitions of names, and their uses far on


LARGE = Scale((2048, 8192, 32768, 131072), 4, 512, 8, 65536, 1e8, 96, 64, 32)
SMALL = Scale((256, 1024, 4096), 2, 96, 4, 4096, 2e6, 8, 24, 16)


@dataclass(frozen=True)
class Row:
    """One training."""

    candidate: str
    context: int
    budget: str  # "flops" or "tokens"
    rate: float
    seed: int

    @property
    def kind(self) -> str:
        """What its seeds share."""
        return f"{self.candidate} {self.context} {self.budget}"

    def __str__(self) -> str:
        return f"{self.kind} rate {self.rate:g} seed {self.seed}"


Found = dict[str, Any]


def main() -> None:
    """Make the corpus, run what is missing, and tell what there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("claim"), help="folder of what is done")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model and short contexts")
    parser.add_argument("--minutes", type=within(0), help="begin no row that would end later")
    parser.add_argument("--only", default="", help="only rows whose name this pattern finds")
    parser.add_argument("--vocabulary", choices=("bytes", "bpe"), default="bytes")
    parser.add_argument("--vocabulary-size", type=int, default=4096, help="of bpe")
    parser.add_argument(
        "--rates", type=lambda text: [*map(within(0), text.split(","))],
        default="8e-3,4e-3,1.6e-2", help="learning rates, the likeliest first",
    )  # fmt: skip
    parser.add_argument("--seeds", type=within(0, kind=int), default=3)
    parser.add_argument("--tokens", type=within(0), help="of the dense model, shortest context")
    parser.add_argument(
        "--batch-tokens", type=within(0, kind=int), help="of a step, a sequence at least"
    )
    parser.add_argument("--short-share", type=within(0, 1), help="of the steps of those that grow")
    parser.add_argument("--rotary-base", type=within(0))
    parser.add_argument(
        "--names-share", type=float, help="of the training text, of names with far definitions"
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument(
        "--workers", type=within(0, kind=int), default=1, help="processes, one GPU each"
    )
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--paths", action="store_true", help="what patterns reach, and no training")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--png", type=Path, help="draw them to this file")
    given = parser.parse_args()
    scale = SMALL if given.small else LARGE
    changes = ("tokens", "batch_tokens", "short_share", "rotary_base", "names_share")
    scale = scale._replace(**{x: y for x in changes if (y := getattr(given, x)) is not None})
    if not 0 <= scale.names_share < 0.5:
        parser.error(f"--names-share must be in [0, 0.5). Got {scale.names_share:g}.")
    if given.paths:
        tell_paths(scale)
        return
    given.minutes = given.minutes or (9.0 if given.small else 30.0)
    if given.worker is not None:
        work(given, scale, given.worker)
        return
    started = time.time()
    machine = describe(given.device)
    print(json.dumps(machine), flush=True)
    make_corpus(given.out, scale)
    sow_names(given.out, scale)
    if given.vocabulary == "bpe" and not (given.out / "tokenizer.json").exists():
        learned = learn_tokenizer([given.out / "train"], given.vocabulary_size)
        (given.out / "tokenizer.json").write_text(learned.text, encoding="utf-8")
    for folder in ("rows", "claims", "runs"):
        if folder != "rows":
            shutil.rmtree(given.out / folder, ignore_errors=True)
        (given.out / folder).mkdir(exist_ok=True)
    processes = start_workers(given, started) if given.workers > 1 else []
    if not processes:
        work(given, scale, started, lambda: keep(given, scale, machine))
    while any(process.poll() is None for process in processes):
        time.sleep(2)
        keep(given, scale, machine)
    tell(keep(given, scale, machine))
    if given.png:
        draw(summary(done(given.out, scale)), machine, given.png)


def within(
    low: float, high: float = math.inf, kind: Callable[[str], float] = float
) -> Callable[[str], float]:
    """What an option's number is read by: finite, above `low` and below `high`."""

    def read(text: str) -> float:
        try:
            if low < (value := kind(text)) < high:
                return value
        except ValueError:
            pass
        what = "an int" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} in ({low:g}, {high:g}). Got {text}.")

    return read


def keep(given: argparse.Namespace, scale: Scale, machine: Found) -> list[Found]:
    """Write what is done so far; return its table."""
    rows = done(given.out, scale)
    table = summary(rows)
    if given.json:
        told = {"machine": machine, "scale": scale._asdict(), "table": table, "rows": rows}
        given.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return table


def start_workers(given: argparse.Namespace, started: float) -> list[subprocess.Popen[bytes]]:
    """Processes that take rows until there are none, each with a GPU of its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [*filter(None, visible)] or [str(i) for i in range(given.workers)]
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", str(started)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": names[i % len(names)]},
        )
        for i in range(given.workers)
    ]


# Corpus


def make_corpus(out: Path, scale: Scale) -> None:
    """A text for each package, in `train` or in `held out`; done once."""
    if (out / "corpus.json").exists():
        return
    packages = find_packages()
    order = sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest())
    sizes = {name: sum(map(len, packages[name])) for name in order}
    wanted = HELD_OUT * min(sum(sizes.values()), scale.megabytes * 1e6)
    held: list[str] = []
    for name in order:
        # Not of one package alone, and of none in whose length no context fits.
        if max(scale.contexts) // 2 < sizes[name] < wanted / 2 and wanted > sum(
            sizes[x] for x in held
        ):
            held.append(name)
    training, size = list[str](), 0.0
    most = scale.megabytes * 1e6
    for name in sorted(set(order) - set(held), key=order.index):
        if size < most:
            training.append(name)
            size += min(sizes[name], most / 3)  # so that it is not one package alone
    known = {line for name in training for file in packages[name] for line in lines_of(file)}
    lengths: Found = {"train": {}, "held out": {}}
    for side, names in (("train", training), ("held out", held)):
        shutil.rmtree(out / side, ignore_errors=True)
        (out / side).mkdir(parents=True)
        for name in names:
            files = packages[name]
            if side == "held out":
                files = [file for file in files if not is_near_copy(file, known)]
            text = b"\n".join(files)[: int(most / 3)]
            if text:
                (out / side / name).write_bytes(text)
                lengths[side][name] = len(text)
    total = {side: sum(found.values()) for side, found in lengths.items()}
    print(f"corpus: {total} bytes, held out {', '.join(lengths['held out'])}", flush=True)
    (out / "corpus.json").write_text(json.dumps(lengths, indent=1), encoding="utf-8")


def training_folder(scale: Scale) -> str:
    """The name of the folder of the training text."""
    return f"train, names {scale.names_share:g}" if scale.names_share else "train"


def sow_names(out: Path, scale: Scale) -> None:
    """Write the training text once more, with names of random letters, each defined and used once.

    A use stands from 256 to 0.9 of 32,768 bytes (the third context) behind its definition, at any
    distance as likely as at its double, and always between lines, the next ones. Definitions for
    whose use a text is too short have none.
    """
    folder = out / training_folder(scale)
    if not scale.names_share or folder.exists():
        return
    longest = 0.9 * scale.contexts[min(2, len(scale.contexts) - 1)]
    generator = random.Random(1)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in sorted((out / "train").iterdir()):
        lines = path.read_bytes().splitlines(keepends=True)
        due: list[tuple[int, bytes]] = []  # uses, and from which byte on
        text = bytearray()
        sown = 0
        for line in lines:
            text += line
            # The last line may have no end.
            while line.endswith((b"\n", b"\r")) and due and due[0][0] <= len(text):
                text += heappop(due)[1]
            if sown < scale.names_share * len(text):
                name = "".join(generator.choices(LETTERS, k=CUE + ANSWER)).encode()
                text += (definition := b"\n\n\ndef %s(value):\n    return value\n\n\n" % name)
                use = b"    found = %s(value)\n" % name
                distance = 256 * (longest / 256) ** generator.random()
                heappush(due, (len(text) + round(distance), use))
                sown += len(definition) + len(use)
        (part / path.name).write_bytes(text)
    part.rename(folder)


def find_packages() -> dict[str, list[bytes]]:
    """The files of each package in the order of their paths; no content twice."""
    seen: set[bytes] = set()
    standard = Path(sysconfig.get_path("stdlib"))
    roots = [standard, *(Path(sysconfig.get_path(x)) for x in ("purelib", "platlib"))]
    roots += [Path(x) for x in sys.path if x.endswith(("site-packages", "dist-packages"))]
    packages: dict[str, list[bytes]] = {}
    for root in dict.fromkeys(roots):
        for top in sorted(root.iterdir()) if root.is_dir() else ():
            passed = top.suffix == ".dist-info" or top.name in ("site-packages", "dist-packages")
            if passed or top.name.startswith((".", "__")):
                continue
            # Modules of one file are a package together.
            name = f"{'stdlib' if root == standard else 'site'}.{top.name}"
            name = name if top.is_dir() else f"{name.partition('.')[0]}.modules"
            paths = sorted(top.rglob("*")) if top.is_dir() else [top]
            packages.setdefault(name, []).extend(
                content for path in paths if (content := code_of(path, seen))
            )
    return {name: files for name, files in packages.items() if files}


def code_of(path: Path, seen: set[bytes]) -> bytes | None:
    """What a source file holds, if nothing before it held the same."""
    if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
        return None
    if not 64 <= path.stat().st_size <= LONGEST_FILE:
        return None
    try:
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return None
    digest = hashlib.sha256(content).digest()
    if digest in seen or b"\0" in content or max(map(len, content.splitlines())) > LONGEST_LINE:
        return None
    seen.add(digest)
    return content


def lines_of(file: bytes) -> Iterator[int]:
    """Hashes of the lines that say something."""
    return (hash(line) for x in file.splitlines() if len(line := x.strip()) >= 20)


def is_near_copy(file: bytes, known: set[int]) -> bool:
    """Whether half of what a file says is said in training."""
    lines = list(lines_of(file))
    return sum(line in known for line in lines) > NEAR_COPY * len(lines)


# Candidates


class Dense(nn.Module):
    """torch's fused attention, causal."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Query, key and value (B, N, H, D) to (B, N, H, D)."""
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


class Attention(NamedTuple):
    """What a candidate puts into each layer."""

    make: Callable[[], nn.Module]
    keys: float  # that a query sees, the mean over positions and heads


def dilated_pattern(context: int, heads: int) -> DilatedPattern:
    """The pattern under test: a branch for each head, the last one over the whole context.

    A branch of rate r shows a query only keys whose distance is a multiple of r, so what is to be
    copied exactly from any distance needs one that keeps every row. One head of it costs as much as
    all heads at the root of their number. Segments of the others are odd: their borders are apart.
    Past 32,768 positions the last two heads thin out together, and the work a position stays.
    """
    far = max(1, context // 32768)
    near = heads - (2 if far > 1 else 1)
    longest = min(2048, context // 2)
    ratio = (longest / 64) ** (1 / max(1, near - 1))
    lengths = [round(64 * ratio**i) | 1 for i in range(near)]
    lengths += [32768, context] if far > 1 else [context]
    return DilatedPattern(lengths, [1] * (heads - 1) + [far], head_groups="split")


def longnet_pattern(context: int) -> DilatedPattern:
    """The paper's: segments and rates double from a dense one, here of a sixteenth."""
    return DilatedPattern.longnet(context, segment_length=context // 16)


def attention_of(
    candidate: str, context: int, scale: Scale, length: int | None = None
) -> Attention:
    """The attention of a candidate at a context, in sequences of a length; of that by default."""
    heads = scale.num_heads
    candidate, length = candidate.removesuffix(GROWN), length or context
    patterns: dict[str, Callable[[], DilatedPattern]] = {
        "dilated": lambda: dilated_pattern(context, heads),
        "default": lambda: default_pattern(context),
        "longnet": lambda: longnet_pattern(context),
    }
    if candidate == "dense":
        return Attention(Dense, (length + 1) / 2)
    if candidate in patterns:
        pattern = patterns[candidate]()
        return Attention(lambda: DilatedAttention(pattern), keys_of(pattern, length, heads))
    from dilated_sparse import BlockSparseAttention, layouts

    # The others are given what the dilated pattern costs.
    keys = keys_of(dilated_pattern(context, heads), context, heads)
    if candidate == "window":
        width = min(context - 1, max(16, round(keys) - 1))
        layout = layouts.sliding_window(context, width, block_size=min(128, context // 4))
    elif candidate == "block sparse":
        block = 64 if context >= 2048 else 16
        many = max(1, round(2 * (keys / block - 3)))
        layout = layouts.bigbird(
            context, global_blocks=1, random_blocks=min(many, context // block), heads=heads,
            block_size=block,
        )  # fmt: skip
    else:
        raise ValueError(f"candidate must be one of {', '.join(CANDIDATES)}. Got {candidate!r}.")
    shown = layout if length == context else layout.at(length, length)
    pairs = shown.causal().visible_pairs() / shown.heads
    return Attention(lambda: BlockSparseAttention(layout), pairs / length)


CANDIDATES = (
    "dilated", "dense", "window", "block sparse", "longnet", "default", f"dilated{GROWN}",
    f"dense{GROWN}", f"longnet{GROWN}", f"window{GROWN}", f"block sparse{GROWN}",
)  # fmt: skip


def keys_of(pattern: DilatedPattern, context: int, heads: int) -> float:
    """Keys that a query sees, the mean over positions and heads."""
    return pattern.flops(context, heads, 1, is_causal=True) / (4 * context * heads)


def flops_of(candidate: str, context: int, scale: Scale, vocab_size: int) -> float:
    """Operations of forward and backward for a token: six a weight, and thrice the attention.

    The mean over a run, where sequences grow.
    """
    width, keys = scale.embed_dim, attention_of(candidate, context, scale).keys
    if candidate.endswith(GROWN):
        short = attention_of(candidate, context, scale, scale.contexts[0]).keys
        keys += scale.short_share * (short - keys)
    weights = scale.num_layers * 12 * width**2 + vocab_size * width
    return 6 * weights + 3 * scale.num_layers * 4 * width * keys


# Rows


def wanted(given: argparse.Namespace, scale: Scale, rows: Sequence[Found]) -> Iterator[Row]:
    """All rows, in the order of what they are worth: the claim, rates, seeds, all else."""
    short, *_ = contexts = list(scale.contexts)
    long = contexts[min(2, len(contexts) - 1)]
    claim = [(f"dilated{GROWN}", long), ("dense", short), ("dilated", short)]
    claim += [(f"dilated{GROWN}", c) for c in contexts if short < c < long] + [("window", short)]
    more = [(f"window{GROWN}", long), (f"dense{GROWN}", long), (f"block sparse{GROWN}", long)]
    more += [("dilated", long), ("window", long), ("block sparse", long)]
    more += [(f"longnet{GROWN}", long), ("dense", contexts[1])]
    more += [(f"dilated{GROWN}", c) for c in contexts if c > long]
    more += (
        [("default", long)]
        if dilated_pattern(long, scale.num_heads) != default_pattern(long)
        else []
    )
    # Dense attention past the second context costs several times what the rest of the model does.
    kinds = product(("dilated", "dense", "window", "block sparse"), contexts)
    rest = [(x, c) for x, c in kinds if (x != "dense" or c <= 4 * contexts[1])]
    rest = [x for x in rest if x not in claim + more]

    def best(kind: tuple[str, int], budget: str) -> float:
        name = f"{kind[0]} {kind[1]} {budget}"
        scored = [(r["bits"], r["rate"]) for r in rows if r["kind"] == name and r["seed"] == 0]
        return min(scored)[1] if scored else given.rates[0]

    first, others = given.rates[0], given.rates[1:]
    yield from (Row(*kind, "flops", first, 0) for kind in claim + more)
    yield from (Row(*kind, "flops", rate, 0) for kind in claim for rate in others)
    for group in (claim, more):
        for seed in range(1, given.seeds):
            yield from (Row(*kind, "flops", best(kind, "flops"), seed) for kind in group)
    yield from (Row(*kind, "tokens", first, 0) for kind in claim)
    yield from (Row(*kind, "flops", rate, 0) for kind in more for rate in others)
    yield from (Row(*kind, "flops", first, 0) for kind in rest)
    yield from (Row(*kind, "tokens", first, 0) for kind in more + rest)


def done(out: Path, scale: Scale) -> list[Found]:
    """The rows that there are at a scale."""
    rows = [json.loads(x.read_text()) for x in sorted((out / "rows").glob("*.json"))]
    return [row for row in rows if row["scale"] == json.loads(json.dumps(scale))]


def file_of(row: Row, given: argparse.Namespace, scale: Scale) -> str:
    """The name of a row's file."""
    of = hashlib.sha256(json.dumps(scale).encode()).hexdigest()[:8]
    return f"{row} {given.vocabulary} {of}.json".replace(" ", "-")


def work(
    given: argparse.Namespace,
    scale: Scale,
    started: float,
    on_row: Callable[[], object] = lambda: None,
) -> None:
    """Take rows that nobody has taken, until there are none or the time is over."""
    end = started + 60 * given.minutes
    parallel = Parallel(torch.device(given.device))
    tokenizer = load_tokenizer(
        str(given.out / "tokenizer.json") if given.vocabulary == "bpe" else None
    )
    corpus: Corpus | None = None
    longest = 0.0
    while True:
        rows = [x for x in done(given.out, scale) if x["vocabulary"] == given.vocabulary]
        row = next(
            (
                row
                for row in wanted(given, scale, rows)
                if re.search(given.only, str(row)) and take(given.out, file_of(row, given, scale))
            ),
            None,
        )
        if row is None or time.time() + longest > end:
            return
        begun = time.time()
        try:
            config = config_of(row, given, scale, tokenizer.vocab_size)
            corpus = corpus or corpus_of(config, tokenizer=tokenizer, cache=given.out / "cache")
            found = run(row, config, corpus, given, scale, parallel, end)
        except Exception:
            traceback.print_exc()
            continue
        if found is None:
            print(f"{row}: not in time", flush=True)
            return
        longest = max(longest, time.time() - begun)
        path = given.out / "rows" / file_of(row, given, scale)
        path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
        path.with_suffix(".part").rename(path)
        on_row()
        names = ", ".join(f"{d}: {x:.0%}" for d, x in found["recall"].items())
        print(
            f"{row}: {found['bits']:.4f} ± {found['error']:.4f} bits a byte, {found['steps']} "
            f"steps, {found['seconds']:.0f} + {found['scoring_seconds']:.0f} s; names {names}",
            flush=True,
        )


def take(out: Path, name: str) -> bool:
    """Whether a row was to be had."""
    if (out / "rows" / name).exists():
        return False
    try:
        (out / "claims" / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def config_of(row: Row, given: argparse.Namespace, scale: Scale, vocab_size: int) -> TrainConfig:
    """The configuration of a row, whose budget decides its steps."""
    vocab_size = -(-vocab_size // 64) * 64
    base = flops_of("dense", scale.contexts[0], scale, vocab_size)
    cost = (
        flops_of(row.candidate, row.context, scale, vocab_size) if row.budget == "flops" else base
    )
    batch = max(1, scale.batch_tokens // row.context)
    pattern: Found = {"segment_lengths": (row.context,), "dilation_rates": (1,)}
    model = LongNetConfig(
        embed_dim=scale.embed_dim, num_heads=scale.num_heads, num_layers=scale.num_layers,
        context=row.context, vocab_size=vocab_size, rotary_base=scale.rotary_base, **pattern,
    )  # fmt: skip
    grows: Found = {"short_context": scale.contexts[0], "short_share": scale.short_share}
    return TrainConfig(
        model=model,
        paths=(str(given.out / training_folder(scale)),),
        validation=(str(given.out / "held out"),),
        tokenizer=str(given.out / "tokenizer.json") if given.vocabulary == "bpe" else None,
        steps=max(1, round(scale.tokens * base / cost / (batch * row.context))),
        batch_size=batch,
        **(grows if row.candidate.endswith(GROWN) else {}),
        learning_rate=row.rate,
        dtype="float32" if given.device == "cpu" else "bfloat16",
        seed=row.seed,
    )


class RowTrainer(Trainer):
    """The trainer, of a model with a candidate's attention."""

    make_attention: Callable[[], nn.Module]

    def make_model(self) -> LongNetLM:
        """The weights are those of the seed, whatever the attention is."""
        return initial_model(self.run.config, type(self).make_attention)


def run(
    row: Row, config: TrainConfig, corpus: Corpus, given: argparse.Namespace, scale: Scale,
    parallel: Parallel, end: float,
) -> Found | None:  # fmt: skip
    """Train and score; None where the time was over before."""
    attention = attention_of(row.candidate, row.context, scale)
    kind = type("OfRow", (RowTrainer,), {"make_attention": staticmethod(attention.make)})
    folder = given.out / "runs" / file_of(row, given, scale)
    compiled = decide_compile(given.compile, parallel, print)
    torch._dynamo.reset()
    started = time.time()
    trainer = kind.start(
        folder, config, corpus, parallel=parallel, checkpoint_every=10**9, compiled=compiled
    )
    finished = trainer.train(should_stop=lambda: time.time() > end)
    shutil.rmtree(folder)
    if not finished:
        return None
    steps, seconds, started = trainer.step, time.time() - started, time.time()
    # As it is written: compiled, it would be compiled anew for each length.
    model = initial_model(config, attention.make).to(parallel.device).eval()
    model.load_state_dict(trainer.model.state_dict())
    del trainer
    with torch.no_grad(), autocast(parallel.device, config.dtype):
        found = score(model, corpus, row.context, scale, parallel.device)
        found["recall"] = recall(model, corpus, row.context, scale, parallel.device)
    return {
        **asdict(row), "kind": row.kind, "vocabulary": given.vocabulary, "scale": scale,
        "steps": steps,
        "tokens": steps * config.batch_size * row.context, "keys": attention.keys,
        "flops_per_token": flops_of(row.candidate, row.context, scale, config.model.vocab_size),
        "parameters": sum(x.numel() for x in model.parameters()),
        "seconds": seconds, "scoring_seconds": time.time() - started, "compiled": compiled, **found,
    }  # fmt: skip


# Scores


def places(corpus: Corpus, scale: Scale) -> list[int]:
    """Where scored sections end: evenly over the packages that have the longest context before."""
    size, longest = SCORED, max(scale.contexts[:3])
    ends = [x - len(corpus.train) for x in corpus.ends.tolist() if x > len(corpus.train)]
    fitting = [
        end
        for start, stop in zip([0, *ends], ends, strict=False)
        for end in range(start + longest, stop + 1, size)
    ] or list(range(longest + 1, len(corpus.validation) + 1, size))
    count = min(scale.sections, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def nats(model: LongNetLM, windows: Tensor, last: int, device: torch.device) -> Tensor:
    """Of the last tokens of each window (B, c + 1): float32 (B, last)."""
    found = []
    for part in windows.split(max(1, 65536 // windows.shape[1])):
        part = part.to(device, torch.int64)
        hidden = model.hidden_states(part[:, :-1])[:, -last:]
        for row, aim in zip(hidden, part[:, -last:], strict=True):
            logits = model.head(row).float()
            found.append(F.cross_entropy(logits, aim, reduction="none").cpu())
    return torch.stack(found)


def score(
    model: LongNetLM, corpus: Corpus, context: int, scale: Scale, device: torch.device
) -> Found:
    """Bits a byte at each context, with each section's; and by position in the own context."""
    data, ends = corpus.validation, places(corpus, scale)
    tail = SCORED if isinstance(corpus.tokenizer, Bytes) else SCORED // 4
    tail = min(tail, min(scale.contexts) // 2)
    curves: dict[str, list[float]] = {}
    found: Found = {}
    for length in scale.contexts:
        if length > 4 * context:
            continue
        windows = torch.stack([window_before(data, end, length + 1) for end in ends])
        whole = length == context
        losses = nats(model, windows, length if whole else tail, device)
        size = torch.tensor([corpus.bytes_in(x) for x in windows[:, -tail:]])
        each = losses[:, -tail:].double().sum(1) / math.log(2) / size
        curves[str(length)] = each.tolist()
        if whole:
            found |= {"bits": each.mean().item(), "error": standard_error(each.tolist())}
            edges = [0, *(2**k for k in range(6, 20) if 2**k < length), length]
            found["by_position"] = {
                str(b): (losses[:, a:b].mean() / math.log(2) * windows[:, 1:].numel()
                         / corpus.bytes_in(windows[:, 1:])).item()
                for a, b in pairwise(edges)
            }  # fmt: skip
    means = {length: statistics.fmean(each) for length, each in curves.items()}
    return {**found, "by_context": means, "sections": curves[str(context)]}


def window_before(data: Tensor, end: int, size: int) -> Tensor:
    """So many tokens before an end; the data from its begin where there are fewer."""
    start = max(0, min(end, len(data)) - size)
    return data[start : start + size]


def recall(
    model: LongNetLM, corpus: Corpus, context: int, scale: Scale, device: torch.device
) -> dict[str, float]:
    """The share of names that it completes, all letters right, by how far back their definition is.

    A name of random letters is defined once in held-out code. At the end of the window stand its
    first letters; the rest must follow, letter by letter the likeliest.
    """
    data, generator = corpus.validation, random.Random(0)
    encode = corpus.tokenizer.encode
    rates: dict[str, float] = {}
    distance = 256
    while distance <= context // 2:
        windows, answers = [], []
        for _ in range(scale.trials):
            letters = "".join(generator.choices(LETTERS, k=CUE + ANSWER)).encode()
            cue, answer = letters[:CUE], letters[CUE:]
            pieces = [b"\n\n\ndef ", cue, answer, b"(value):\n    return value\n\n\n"]
            definition = [encode([x])[0] for x in (*pieces, b"\n    found = ", cue)]
            before, name, rest, after, call, again = definition
            # Not always a multiple of a dilation rate.
            back = distance + generator.randrange(distance // 4)
            filler = back - len(rest) - len(after) - len(call) - len(again)
            head = context - len(before) - len(name) - back
            start = generator.randrange(len(data) - head - filler)
            code = data[start : start + head + filler].tolist()
            text = code[:head] + before + name + rest + after + code[head:] + call + again
            windows.append(torch.tensor(text + rest)[-(context + 1) :])
            answers.append(rest)
        rates[str(distance)] = exact(model, windows, answers, device)
        distance *= 2
    return rates


def exact(
    model: LongNetLM, windows: list[Tensor], answers: list[list[int]], device: torch.device
) -> float:
    """The share of windows whose last tokens, the answer, are each the likeliest."""
    right = 0
    step = max(1, 65536 // len(windows[0]))
    for i in range(0, len(windows), step):
        part = torch.stack(windows[i : i + step]).to(device)
        hidden = model.hidden_states(part[:, :-1])
        for row, tokens, answer in zip(hidden, part, answers[i : i + step], strict=True):
            guess = model.head(row[-len(answer) :]).argmax(-1)
            right += int((guess == tokens[-len(answer) :]).all())
    return right / len(windows)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


# Results


def summary(rows: Sequence[Found]) -> list[Found]:
    """A line for each kind of row: seeds at the rate that is best for seed 0, mean and errors."""
    table: list[Found] = []
    for kind in dict.fromkeys((r["kind"], r["vocabulary"]) for r in rows):
        alike = [r for r in rows if (r["kind"], r["vocabulary"]) == kind]
        first = [r for r in alike if r["seed"] == 0] or alike
        rate = min(first, key=lambda r: r["bits"])["rate"]
        seeds = [r for r in alike if r["rate"] == rate]
        one = seeds[0]
        keep = ("candidate", "context", "budget", "vocabulary", "rate", "tokens", "keys")
        table.append(
            {x: one[x] for x in (*keep, "flops_per_token", "steps")}
            | {
                "seeds": len(seeds),
                "bits": statistics.fmean(r["bits"] for r in seeds),
                "error_of_seeds": standard_error([r["bits"] for r in seeds]),
                "error_of_sections": one["error"],
                "rates_tried": sorted({r["rate"] for r in alike}),
                **{x: mean_of([r[x] for r in seeds]) for x in CURVES},
                "sections": [
                    statistics.fmean(x) for x in zip(*(r["sections"] for r in seeds), strict=True)
                ],
            }
        )  # fmt: skip
    return sorted(table, key=lambda t: (t["vocabulary"], t["budget"], t["candidate"], t["context"]))


def mean_of(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each value of tables alike."""
    return {key: statistics.fmean(table[key] for table in tables) for key in tables[0]}


def tell(table: Sequence[Found]) -> None:
    """Print the table, and each candidate's difference from dense at the shortest context."""
    print(
        "vocabulary budget candidate context rate tokens keys seeds bits ±seeds ±sections "
        "below-dense ±paired recall"
    )
    for line in table:
        group = [t for t in table if all(t[x] == line[x] for x in ("vocabulary", "budget"))]
        dense = [t for t in group if t["candidate"] == "dense"]
        gain = paired = math.nan
        if dense:
            base = min(dense, key=lambda t: t["context"])
            differences = [a - b for a, b in zip(base["sections"], line["sections"], strict=True)]
            gain, paired = statistics.fmean(differences), standard_error(differences)
        found = " ".join(f"{d}:{share:.2f}" for d, share in line["recall"].items())
        print(
            *(line["vocabulary"], line["budget"], line["candidate"].replace(" ", "-")),
            *(line["context"], f"{line['rate']:g}", f"{line['tokens']:.2e}", round(line["keys"])),
            *(line["seeds"], f"{line['bits']:.4f}", f"{line['error_of_seeds']:.4f}"),
            *(f"{line['error_of_sections']:.4f}", f"{gain:+.4f}", f"{paired:.4f}", found),
            sep="  ",
        )


def draw(table: Sequence[Found], machine: Found, path: Path) -> None:
    """Bits against the context in training; against that in evaluation; by position; recall.

    The last three of each candidate's best context.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = [t for t in table if t["budget"] == "flops"]
    if not table:
        print(f"no row of equal operations is done: {path} is not drawn")
        return
    figure, axes = pyplot.subplots(1, 4, figsize=(20, 4.5), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, candidate in enumerate(CANDIDATES):
        own = [t for t in table if t["candidate"] == candidate]
        # What grows to the shortest context is what begins there.
        lines = own + [
            t for t in table
            if own and GROWN in candidate and t["candidate"] == candidate.removesuffix(GROWN)
            and t["context"] < min(x["context"] for x in own)
        ]  # fmt: skip
        lines.sort(key=lambda t: t["context"])
        for vocabulary, style in (("bytes", "o-"), ("bpe", "s--")):
            some = [t for t in lines if t["vocabulary"] == vocabulary]
            if some:
                errors = [t["error_of_seeds"] if t["seeds"] > 1 else 0.0 for t in some]
                axes[0].errorbar(
                    [t["context"] for t in some], [t["bits"] for t in some], errors,
                    fmt=style, color=colors[index], capsize=3, label=f"{candidate}, {vocabulary}",
                )  # fmt: skip
        for line in sorted(own, key=lambda t: t["bits"])[:1]:
            name = f"{candidate} {line['context']}"
            for axis, key in zip(axes[1:], CURVES, strict=True):
                xs = [int(x) for x in line[key]]
                ys = list(line[key].values())
                axis.plot(xs, ys, "o-", markersize=3, color=colors[index], label=name)
    titles = {
        "context in training, at equal operations": "held-out bits a byte",
        "context in evaluation": "held-out bits a byte",
        "position in the context": "held-out bits a byte",
        "distance of the definition": "names completed",
    }
    for axis, (x, y) in zip(axes, titles.items(), strict=True):
        axis.set_xscale("log", base=2)
        axis.set(xlabel=x, ylabel=y)
        axis.legend(fontsize=7)
    # Dense attention that is given more than it was trained with would leave the others no room.
    bits = [y for t in table for x, y in t["by_context"].items() if int(x) <= t["context"]]
    axes[1].set_ylim(min(bits) - 0.02, max(bits) + 0.06)
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=130)


# What patterns reach


def tell_paths(scale: Scale) -> None:
    """For each pattern: how much of what is before a query it reaches, and on how many paths."""
    print("Of 16 queries in the last quarter of the context: the share of all earlier positions")
    print(
        "that is reached, how far back at the least, and the median number of paths to those that"
    )
    print("are farther back than half a context (the heads of a layer are ways of their own).")
    for context in scale.contexts:
        for name in ("dilated", "default", "longnet"):
            pattern = {
                "dilated": dilated_pattern(context, scale.num_heads),
                "default": default_pattern(context),
                "longnet": longnet_pattern(context),
            }[name]
            if name == "default" and pattern == dilated_pattern(context, scale.num_heads):
                continue
            keys = keys_of(pattern, context, scale.num_heads)
            print(f"{name} {context}: {pattern}, {keys:.0f} keys")
            generator = random.Random(0)
            queries = [generator.randrange(3 * context // 4, context) for _ in range(16)]
            for layers in sorted({1, 2, scale.num_layers}):
                counts = [
                    paths(pattern, query, layers, scale.num_heads)[: query + 1] for query in queries
                ]
                share = statistics.fmean((x > 0).double().mean().item() for x in counts)
                reach = min(len(x) - 1 - int((x > 0).nonzero()[0]) for x in counts)
                far = [x[: len(x) - context // 2] for x in counts]
                median = statistics.median(x.median().item() for x in far)
                print(f"  {layers} layers: {share:.1%}, back to {reach:,}, {median:.3g} paths")


def paths(pattern: DilatedPattern, query: int, layers: int, heads: int) -> Tensor:
    """How many ways lead from each position to a query through layers: float64 (query + 1,).

    A layer passes a state on by each head and branch that shows it, and as it is.
    """
    counts = torch.zeros(query + 1, dtype=torch.float64)
    counts[query] = 1
    for _ in range(layers):
        before = counts.clone()
        for branch, (length, rate) in enumerate(
            zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
        ):
            for head in heads_of(pattern, branch, heads):
                offset = offset_of(pattern, head, rate, heads)
                for start in range(0, query + 1, length):
                    part = counts[start + offset : min(start + length, query + 1) : rate]
                    ways = part.flip(0).cumsum(0).flip(0)
                    before[start + offset : min(start + length, query + 1) : rate] += ways
        counts = before
    return counts


def heads_of(pattern: DilatedPattern, branch: int, heads: int) -> Sequence[int]:
    """The heads that use a branch."""
    if pattern.head_groups == "shared":
        return range(heads)
    count = len(pattern.segment_lengths)
    sizes = [heads // count + (i < heads % count) for i in range(count)]
    start = sum(sizes[:branch])
    return range(start, start + sizes[branch])


def offset_of(pattern: DilatedPattern, head: int, rate: int, heads: int) -> int:
    """The rows that a head keeps."""
    return head % rate if pattern.head_offsets == "interleaved" else head // -(-heads // rate)


if __name__ == "__main__":
    main()
